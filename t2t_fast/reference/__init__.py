"""The definitions: each op as the paper and the original implementation write it, and its gradient by hand.

Every module holds ``forward`` (plain PyTorch, differentiable, the op's ``reference`` backend) and ``backward``
(the gradient written out, what a fused kernel's backward must compute). Slow on purpose, trusted by tests.
"""
