"""A Linear for inference whose weight is stored in oneDNN's packed layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import Decision, is_explaining, resolve_backend, tell
from ..numerics import product_dtype
from ..ops import linear
from ..ops.block.aten import multiply_packed, pack, why_not_packed
from .plain import is_plain_weight

_NEVER: Any = (None, 0, 0, None)


class PackedLinear(nn.Module):
    """A Linear without gradients, with the exact GELU behind it if asked for.

    On x86 CPUs in float32 and bfloat16 the weights are packed once, for oneDNN; everywhere else, under
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
        # By dtype and rows: the weight, its state then, and its packed form.
        self._packed: dict[tuple[torch.dtype, tuple[int, int] | None], tuple[Any, int, int, Any]] = {}

    def forward(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """(B, N, in_features) or (B, in_features) to the same with out_features, or those from ``rows[0]`` to ``[1]``.

        ``rows`` are for plain weights.
        """
        weight, bias = self.weight, self.bias
        if not is_plain_weight(weight):  # quantised since
            y = F.linear(x, weight, bias)
            return F.gelu(y) if self.gelu else y
        if rows is not None:
            weight, bias = weight[slice(*rows)], None if bias is None else bias[slice(*rows)]
        if resolve_backend(self.backend) not in ("auto", "aten") or why_not_packed(x, weight):
            if x.dim() == 3:
                return linear(x, weight, bias, gelu=self.gelu, backend=self.backend)
            return linear(x.unsqueeze(1), weight, bias, gelu=self.gelu, backend=self.backend).squeeze(1)
        if is_explaining():
            tell(Decision("linear", "aten", {}, detail="oneDNN, packed weights"))
        dtype = product_dtype(x)  # autocast's, too
        bias = None if bias is None else bias.to(dtype)
        return multiply_packed(x.to(dtype), self.packed(dtype, rows), bias, self.gelu)

    def packed(self, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
        """The weight as it is now, for it may be moved, cast or loaded at any time, packed for ``dtype``.

        Of all outputs, or of those from ``rows[0]`` to ``rows[1]``.
        """
        weight: Any = self._buffers.get("weight")
        if weight is None:  # a Parameter since
            weight = self.weight
        source, version, address, packed = self._packed.get((dtype, rows), _NEVER)
        if source is not weight or version != weight._version or address != weight.data_ptr():
            part = weight if rows is None else weight[slice(*rows)]
            packed = pack(part.to(dtype))  # another thread may do the same: both are right
            if not weight.is_inference():  # which does not tell when it is written to
                self._packed[dtype, rows] = weight, weight._version, weight.data_ptr(), packed
        return packed

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        self._packed.clear()  # which would keep the weights where they were
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}  # copies and pickles pack anew

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, gelu={self.gelu}"
