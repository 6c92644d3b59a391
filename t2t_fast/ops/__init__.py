"""The public ops, a folder for each family; no folder has the name of an op.

In a folder, ``op.py`` has the public functions: formula, shapes, checks, and the list of implementations. Those are in
``reference.py`` (the definition and its hand-written backward), ``aten.py`` (the library's faster operations), and
``triton.py`` or ``native.py`` (operators of our own). Arguments that travel together are in ``arguments.py``.

Every op takes ``backend=``: ``"auto"`` (no wish of this call's own; see :mod:`t2t_fast.dispatch`), ``"reference"``,
``"aten"``, ``"triton"`` or ``"native"``. Naming one that cannot run raises :class:`t2t_fast.BackendUnavailable`.
"""

from .block import add_layer_norm, layer_norm_linear, linear, mlp
from .performer import performer_attention, soft_split_performer, token_performer
from .se import se_gate, se_mlp
from .soft_splits import soft_split, soft_split_linear
from .softmax_attention import attention

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
