"""The public ops. Each module holds one: checks, the list of implementations, and the docstring with the formula.

Every op takes ``backend=``: ``"auto"`` (no wish of this call's own; see :mod:`t2t_fast.dispatch`), ``"reference"``,
``"aten"``, ``"triton"`` or ``"native"``. Naming one that cannot run raises :class:`t2t_fast.BackendUnavailable`.
"""

from .add_layer_norm import add_layer_norm
from .attention import attention
from .layer_norm_linear import layer_norm_linear
from .linear import linear
from .mlp import mlp
from .performer import performer_attention, soft_split_performer, token_performer
from .se_gate import se_gate
from .se_mlp import se_mlp
from .soft_split import soft_split, soft_split_linear

__all__ = [
    "add_layer_norm",
    "attention",
    "layer_norm_linear",
    "linear",
    "mlp",
    "performer_attention",
    "se_gate",
    "se_mlp",
    "soft_split",
    "soft_split_linear",
    "soft_split_performer",
    "token_performer",
]
