"""Softmax attention. The folder's name is not ``attention``: in :mod:`t2t_fast.ops` that name is the function."""

from .op import attention

__all__ = ["attention"]
