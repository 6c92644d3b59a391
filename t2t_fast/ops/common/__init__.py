"""What the families of ops share: autograd helpers, residual branches, a LayerNorm's arguments, derivatives, and
what can run where.

:mod:`~t2t_fast.ops.common.triton` says when the kernels can run. :mod:`~t2t_fast.ops.common.extension` loads the
C++/CUDA extension, or keeps the reason why not.
"""
