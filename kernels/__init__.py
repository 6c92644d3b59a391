"""Triton kernels and their launchers, one file per op, installed as `t2t_fast.kernels`.

`launch` and `windows` are what they share, `configs` their block sizes, `costs` what each has to do at least. Nothing
here is public: :mod:`t2t_fast.triton` makes operators of the launchers.
"""
