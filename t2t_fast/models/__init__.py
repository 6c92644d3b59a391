"""T2T-ViT and the paper's comparison designs; importing this registers them with timm."""

from .registry import create_model, list_models
from .t2t_vit import T2TViT
from .t2t_vit_dense import T2TViTDense

__all__ = ["T2TViT", "T2TViTDense", "create_model", "list_models"]
