"""The MLP of the backbone's blocks and of the token transformer."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.types import Device

from ..checks import check_alike, factory_options
from ..ops import linear, mlp
from ..ops.block.aten import layer_norm
from .plain import are_plain, dropout_rate, is_watched

torch.fx.wrap("linear")
torch.fx.wrap("mlp")


class Mlp(timm.layers.Mlp):
    """timm's MLP, ``fc2(gelu(fc1(x)))``, through :func:`t2t_fast.ops.mlp` wherever its parts are as they were made.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels in between.
        drop: Dropout after each matmul.
        backend: Passed to the op.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden_dim, drop=drop, **factory_options(device, dtype))
        self.backend = backend

    @property
    def adds_residual(self) -> bool:
        """Whether :func:`t2t_fast.ops.mlp` runs, which can add the residual; see ``run_branch``."""
        if type(self) is not Mlp or not are_plain(self.fc1, self.act, self.fc2):
            return False
        dropouts = (self.drop1, self.drop2)
        return (
            all(dropout_rate(drop) == 0 for drop in dropouts)
            and type(self.norm) is nn.Identity
            and not is_watched(self.norm)
        )

    def forward(self, x: Tensor, residual: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, C); where the module ``adds_residual``, the others are as for the op."""
        if residual is None and not self.adds_residual:
            return super().forward(x)
        fc1, fc2 = self.fc1, self.fc2
        branch = {"residual": residual, "branch_scale": branch_scale}
        return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, **branch, backend=self.backend)


def apply_linear(x: Tensor, module: Any, backend: str) -> Tensor:
    """``module(x)``, through :func:`t2t_fast.ops.linear` if that is the same."""
    return linear(x, module.weight, module.bias, backend=backend) if are_plain(module) else module(x)


def apply_norm(x: Tensor, norm: Any) -> Tensor:
    """``norm(x)``, through :func:`t2t_fast.ops.block.aten.layer_norm` if that is the same."""
    if isinstance(x, Tensor) and are_plain(norm):  # a tracer's proxy is no Tensor
        check_alike("x", x, ("the LayerNorm's weight", norm.weight))
        return layer_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x)
