"""Triton kernels and their launchers, one file per op or direction, installed as `t2t_fast.kernels`.

`launch`, `rows`, `windows` and `lay_windows` are what they share, `configs` their block sizes, `costs` what each has to
do at least. Nothing here is public: the ``triton`` modules of :mod:`t2t_fast.ops` make operators of the launchers.
"""
