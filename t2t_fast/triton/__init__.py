"""The `triton` backend: the kernels of :mod:`t2t_fast.kernels` as operators of ``torch.library``.

Each module registers one op's schema, shapes, gradients and FLOPs, and says when it can run. Triton and the kernels
are imported at the first call, not with the package.
"""
