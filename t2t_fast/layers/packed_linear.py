"""A Linear for inference whose weights lie as the CPU's products like them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..aten.linear import multiply_packed, pack, why_not_packed
from ..numerics import product_dtype
from ..ops import layer_norm_linear, linear


class PackedLinear(nn.Module):
    """A Linear without gradients, with the exact GELU behind it if asked for.

    On x86 CPUs in float32 and bfloat16 the weights are rearranged once, for oneDNN; everywhere else, and under
    ``torch.compile``, it is :func:`t2t_fast.ops.linear`.

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
        self.register_buffer("weight", source.weight.detach().clone())
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())
        self._packed: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """(B, N, in_features) to (B, N, out_features), through ``norm`` first if it is given."""
        if why_not_packed(x, self.weight):
            tokens = x if x.dim() == 3 else x.unsqueeze(1)  # the head's (B, C)
            options: dict[str, Any] = {"gelu": self.gelu, "backend": self.backend}
            if norm is None:
                y = linear(tokens, self.weight, self.bias, **options)
            else:
                weights = (self.weight, self.bias, norm.weight, norm.bias)
                y = layer_norm_linear(tokens, *weights, eps=norm.eps, **options)
            return y if x.dim() == 3 else y.squeeze(1)
        if norm is not None:
            x = norm(x)
        dtype = product_dtype(x)  # autocast's, too
        # Weights may be moved, cast or loaded later.
        version = 0 if self.weight.is_inference() else self.weight._version
        state = (self.weight.data_ptr(), self.weight.dtype, version, dtype)
        if self._packed is None or self._packed[0] != state:
            self._packed = state, pack(self.weight.to(dtype))
        bias = None if self.bias is None else self.bias.to(dtype)
        return multiply_packed(x.to(dtype), self._packed[1], bias, self.gelu)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # copies and pickles rearrange anew

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, gelu={self.gelu}"
