"""A Linear for inference whose weight is stored in oneDNN's packed layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import Decision, is_explaining, resolve_backend, tell
from ..numerics import product_dtype
from ..ops import layer_norm_linear, linear
from ..ops.block.aten import layer_norm, multiply_packed, pack, why_not_packed
from .plain import is_plain_weight


class PackedLinear(nn.Module):
    """A Linear without gradients, with the exact GELU behind it if asked for.

    On x86 CPUs in float32 and bfloat16 the weights are rearranged once, for oneDNN; everywhere else, under
    ``torch.compile``, and where another backend than ``aten`` is asked for, it is :func:`t2t_fast.ops.linear`.

    Args:
        source: The Linear whose weights are copied.
        gelu: Apply GELU to the result.
        backend: Passed to the op.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Linear, gelu: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.gelu, self.backend = gelu, backend
        with torch.inference_mode(False):  # tensors made in that mode do not tell when they are written to
            self.register_buffer("weight", source.weight.detach().clone())
            self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())
        self._packed: dict[torch.dtype, tuple[Any, Tensor]] = {}

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """(B, N, in_features) to (B, N, out_features), through ``norm`` first if it is given."""
        if not is_plain_weight(self.weight):  # quantised since
            y = F.linear(x if norm is None else norm(x), self.weight, self.bias)
            return F.gelu(y) if self.gelu else y
        if resolve_backend(self.backend) not in ("auto", "aten") or why_not_packed(x, self.weight):
            tokens = x if x.dim() == 3 else x.unsqueeze(1)  # the head's (B, C)
            options: dict[str, Any] = {"gelu": self.gelu, "backend": self.backend}
            if norm is None:
                y = linear(tokens, self.weight, self.bias, **options)
            else:
                weights = (self.weight, self.bias, norm.weight, norm.bias)
                y = layer_norm_linear(tokens, *weights, eps=norm.eps, **options)
            return y if x.dim() == 3 else y.squeeze(1)
        if is_explaining():
            op = "linear" if norm is None else "layer_norm_linear"
            tell(Decision(op, "aten", {}, detail="oneDNN, weights laid out"))
        if norm is not None:
            x = layer_norm(x, norm.weight, norm.bias, norm.eps)
        dtype = product_dtype(x)  # autocast's, too
        bias = None if self.bias is None else self.bias.to(dtype)
        return multiply_packed(x.to(dtype), self._weight_for(dtype), bias, self.gelu)

    def _weight_for(self, dtype: torch.dtype) -> Tensor:
        """The weight as it is now, for it may be moved, cast or loaded at any time, rearranged for ``dtype``."""
        if self.weight.is_inference():
            return pack(self.weight.to(dtype))
        state = (self.weight.data_ptr(), self.weight.dtype, self.weight._version)
        known, packed = self._packed.get(dtype, (None, None))
        if known != state or packed is None:  # another thread may do the same: both are right
            packed = pack(self.weight.to(dtype))
            self._packed[dtype] = state, packed
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # copies and pickles rearrange anew

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, gelu={self.gelu}"
