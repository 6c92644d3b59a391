"""Squeeze-and-excitation: after the attention projection (official placement) or on the MLP's output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..checks import factory_options
from ..ops import se_gate, se_mlp
from ..ops.common.branch import Branch, add_branch
from .plain import are_plain, dropout_rate, is_watched

torch.fx.wrap("se_gate")
torch.fx.wrap("se_mlp")

_PARTS = [nn.Linear, nn.ReLU, nn.Linear, nn.Sigmoid]  # of the gate


class SELayer(nn.Module):
    """Scales the channels of (B, N, C) tokens by a gate of their mean (paper §3.3).

    Args:
        dim: Channels C.
        reduction: C over the width of the bottleneck.
        backend: Passed to the op.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.

    Raises:
        ValueError: ``dim`` is below ``reduction``.
    """

    fc: Any  # a Sequential, whose entries a type checker knows only as Module

    def __init__(
        self,
        dim: int,
        reduction: int = 16,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < reduction:
            raise ValueError(f"a squeeze-and-excitation gate needs a width of at least {reduction}, got {dim}")
        options = factory_options(device, dtype)
        self.backend = backend
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // reduction, bias=False, **options),
            nn.ReLU(),
            nn.Linear(dim // reduction, dim, bias=False, **options),
            nn.Sigmoid(),
        )

    @property
    def is_plain(self) -> bool:
        """Whether the gate's parts are as they were made, and not hooked."""
        parts = list(self.fc._modules.values())
        if type(self.fc) is not nn.Sequential or [type(part) for part in parts] != _PARTS:
            return False
        reduce, relu, expand, sigmoid = parts
        without_bias = reduce.bias is None and expand.bias is None
        return without_bias and are_plain(reduce, expand) and not is_watched(self.fc, relu, sigmoid)

    def forward(self, x: Tensor, residual: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, C); ``residual`` and ``branch_scale`` as for :func:`t2t_fast.ops.se_gate`."""
        if not self.is_plain:
            return add_branch(x * self.fc(x.mean(dim=1)).unsqueeze(1), Branch(residual, branch_scale))
        reduce, expand = self.fc[0].weight, self.fc[2].weight
        return se_gate(x, reduce, expand, residual=residual, branch_scale=branch_scale, backend=self.backend)


class SEMlp(nn.Module):
    """An MLP whose output passes a squeeze-and-excitation gate.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels in between.
        drop: Dropout after each matmul.
        reduction: ``dim`` over the width of the gate's bottleneck.
        backend: Passed to the ops.
        device: Where the parameters are made.
        dtype: Their floating-point type; None for torch's default.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        reduction: int = 16,
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = factory_options(device, dtype)
        self.backend = backend
        self.fc1 = nn.Linear(dim, hidden_dim, **options)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **options)
        self.drop = nn.Dropout(drop)
        self.se_layer = SELayer(dim, reduction, backend, **options)

    @property
    def adds_residual(self) -> bool:
        """Whether the gate's pass can add the residual; see ``run_branch``."""
        return type(self) is SEMlp and type(self.se_layer) is SELayer and not is_watched(self.se_layer)

    def forward(self, x: Tensor, residual: Tensor | None = None, branch_scale: Tensor | None = None) -> Tensor:
        """(B, N, C) to (B, N, C); where the module ``adds_residual``, the others are as for the op."""
        plain_gate = self.adds_residual and self.se_layer.is_plain
        if not (plain_gate and dropout_rate(self.drop) == 0 and are_plain(self.fc1, self.act, self.fc2)):
            y = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
            return self.se_layer(y) if residual is None else self.se_layer(y, residual, branch_scale)
        fc1, fc2, gate = self.fc1, self.fc2, self.se_layer.fc
        return se_mlp(
            x,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            gate[0].weight,
            gate[2].weight,
            residual=residual,
            branch_scale=branch_scale,
            backend=self.backend,
        )
