"""When an op may run in place of a module: a plain one, whose weights are plain tensors, neither hooked nor patched.

Every other module is called: adapters, quantised and parametrised layers, hooked or patched modules, and every module
while one of torch's global hooks is registered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook

from ..checks import FLOAT_DTYPES

# torch's own tensors, and what compilers and exporters put in their place. Other subclasses have arithmetic of their
# own: quantised, distributed or sparse weights.
_PLAIN_TENSORS = frozenset((nn.Parameter, Tensor, FakeTensor, FunctionalTensor))
_DTYPES = frozenset(FLOAT_DTYPES)


def are_plain(*modules: Any) -> bool:
    """Whether an op may run in place of these modules.

    Plain modules are torch's own Linear, LayerNorm over the channels and exact GELU, with plain weights and no hooks.
    """
    if _has_any_global_hook():
        return False
    for module in modules:
        kind = type(module)
        if kind is nn.Linear or kind is nn.LayerNorm:
            # Missing where parametrisations or pruning compute it; hidden where it was set past torch.
            parameters = module._parameters
            if "weight" in module.__dict__ or "bias" in module.__dict__:
                return False
            weight, bias = parameters.get("weight", module), parameters.get("bias", module)
            if not (weight is None or is_plain_weight(weight)) or not (bias is None or is_plain_weight(bias)):
                return False
            if kind is nn.LayerNorm and len(module.normalized_shape) != 1:
                return False
        elif kind is not nn.GELU or module.approximate != "none":
            return False
    return not _are_hooked(modules)


def is_plain_weight(weight: Any) -> bool:
    """Whether this is a strided floating-point tensor of no subclass with arithmetic of its own."""
    return type(weight) in _PLAIN_TENSORS and weight.dtype in _DTYPES and weight.layout is torch.strided


def has_no_weights(norm: Any) -> bool:
    """Whether it is a LayerNorm without affine weights.

    The soft splits' ops read a missing weight as "no LayerNorm", so pass ``folded=True`` or call the modules.
    """
    return isinstance(norm, nn.LayerNorm) and norm._parameters.get("weight", norm) is None


def dropout_rate(module: Any) -> float | None:
    """The rate of a Dropout, 0 in evaluation and for an Identity; None if ``module`` must be called."""
    if type(module) not in (nn.Dropout, nn.Identity) or is_watched(module):
        return None
    return module.p if type(module) is nn.Dropout and module.training else 0.0


def class_of(module: Any) -> type[Any]:
    """The class of ``module``. As ``torch.export`` traces, each module poses as one of a subclass."""
    kind = type(module)
    return type(module.get_base()) if torch.compiler.is_exporting() and hasattr(kind, "get_base") else kind


def is_watched(*modules: Any) -> bool:
    """Whether a hook, of a module's own or of all, sees what goes into one of them or what comes out, in any direction.

    So does a ``forward`` of the module's own, in place of its class's, and one that ``module.compile()`` has made.
    """
    return _has_any_global_hook() or _are_hooked(modules)


def is_patched(module: nn.Module) -> bool:
    """Whether somebody has set another ``forward`` on the module itself."""
    return "forward" in module.__dict__


def _are_hooked(modules: tuple[Any, ...]) -> bool:
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
            or module._compiled_call_impl is not None
        ):
            return True
    return False
