"""What the backbone's blocks compute besides attention: Linears with what stands around them, and residual sums."""

from .op import add_layer_norm, layer_norm_linear, linear, mlp

__all__ = ["add_layer_norm", "layer_norm_linear", "linear", "mlp"]
