"""The `native` backend: the C++/CUDA extension of ``csrc/`` as operators of ``torch.library``.

:mod:`~t2t_fast.native.library` loads it, or keeps the reason why not. Every other module registers one op's shapes and
gradients, and says when it can run.
"""
