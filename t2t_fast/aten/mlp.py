"""The MLP without a second hidden layer: where no gradient is wanted, GELU and the residual's sum work in place.

On a CPU a large tensor costs more to get from the system than to compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.common.autograd import may_overwrite
from ..ops.common.branch import add_branch
from . import linear


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    """(B, N, C) to (B, N, out)."""
    hidden = linear.forward(x, fc1_weight, fc1_bias, gelu=True)
    y = linear.forward(hidden, fc2_weight, fc2_bias)
    if residual is None or branch_scale is not None or not may_overwrite(y, residual):
        return add_branch(y, residual, branch_scale)
    return y.add_(residual) if torch.promote_types(y.dtype, residual.dtype) == y.dtype else residual + y
