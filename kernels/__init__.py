"""Triton kernels and their launchers, one file per op, installed as `t2t_fast.kernels`.

None ship in this version.
"""
