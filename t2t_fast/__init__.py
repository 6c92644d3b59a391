"""T2T-ViT as a drop-in library: same checkpoints, same logits, faster. See README.md."""

from __future__ import annotations

import os as _os

__version__ = "0.1.0"

# In a checkout that is not installed, kernels/ is beside the package, not inside.
_sibling = _os.path.join(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))), "kernels")
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")) and _os.path.isdir(_sibling):
    __path__.append(_os.path.dirname(_sibling))

from .startup import importing as _importing

with _importing():
    from . import ops
    from .deploy.export import ExportError, export
    from .deploy.freeze import FrozenT2TViT, freeze
    from .deploy.graph_runner import GraphRunner
    from .deploy.openvino_ir import Int8
    from .dispatch import BackendUnavailable, explain, use_backend
    from .models import T2TViT, T2TViTDense, create_model, list_models
    from .models.adopt import optimize
    from .models.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "ExportError",
    "FrozenT2TViT",
    "GraphRunner",
    "Int8",
    "T2TViT",
    "T2TViTDense",
    "create_model",
    "explain",
    "export",
    "freeze",
    "list_models",
    "load_checkpoint",
    "ops",
    "optimize",
    "save_checkpoint",
    "use_backend",
]
