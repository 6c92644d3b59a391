"""A pytest plugin for the process that runs timm's own test files: its tests build this package's models.

Loaded by test_timm_suite.py, never by the suite itself.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import timm

import t2t_fast

# Words of timm's test files, and what stands in their place; {name} is the first of the names under test.
SUBSTITUTIONS = {
    # their plain ViT
    "vit_tiny_patch16_224": "{name}",
    "patch_embed.img_size": "img_size",
    # the patch size of a T2T-ViT is that of its three soft splits
    "patch_size=8": "patch_size=16",
    # frozen parameters (pos_embed, the random features w) have no gradient
    "assert x.grad is not None, f'No gradient for {n}'": "assert x.grad is not None or not x.requires_grad, n",
    "num_params = sum([x.numel() for x in model.parameters()])": (
        "num_params = sum([x.numel() for x in model.parameters() if x.requires_grad])"
    ),
    "pruned.named_parameters() if p.grad is None]": "pruned.named_parameters() if p.requires_grad and p.grad is None]",
    # models of fixed image size, in tests with images of another
    "if model_name.startswith('coat') else": "if model_name.startswith(('coat', 't2t')) else",
    # a first convolution: only the convolutional tokens have one
    "'patch_embed.proj'": "()",
    "restored.pretrained_cfg['first_conv'] == first_conv": "tuple(restored.pretrained_cfg['first_conv']) == first_conv",
    # so the weights for another number of channels are those of the first Linear, repeated
    "adapted.patch_embed.proj.weight,": "adapted.tokens_to_token.attention1.kqv.weight,",
    "source.patch_embed.proj.weight.repeat(1, 2, 1, 1) / 2,": (
        "source.tokens_to_token.attention1.kqv.weight.unflatten(1, (4, 49)).repeat(1, 2, 1).flatten(1) / 2,"
    ),
}
# timm's tests whose decorators list models of timm: the parameters besides the name, for ours.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_model_init_weights_after_to_empty": {"kwargs": {"img_size": 64, "embed_dim": 32, "num_heads": 2}},
    "test_prune_intermediate_layers_params_used": {},
    "test_forward_after_prune_intermediate_layers": {},
}

# Patterns of test ids, and why those tests are left out.
LEFT_OUT = {
    "*test_model_inference*": "needs files of timm's own models",
    "*test_model_load_pretrained*": "downloads weights",
    "*test_model_features_pretrained*": "downloads weights",
    "*torchscript*": "torch.jit.script is not supported; see docs/deploy.md",
    "*preprocessing_separate[True]": "NaFlex is another form of timm's own ViT",
    "*reset_classifier_structure*-True]": "NaFlex is another form of timm's own ViT",
    "*inherit_training_regularization*": "the token layers' dropout is 0.1 by default, as in the original",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--t2t-names", default="t2t_vit_7", help="models to test, separated by commas")


def _names(config: pytest.Config) -> list[str]:
    return config.getoption("--t2t-names").split(",")


def pytest_configure(config: pytest.Config) -> None:
    """``timm.list_models``, which timm's decorators call, lists ours; filters take ``t2t_vit_*`` for ``vit_*``."""
    names = _names(config)
    assert set(names) <= set(t2t_fast.list_models())

    def list_models(
        filter: str | Sequence[str] = "", *, exclude_filters: str | Sequence[str] = "", **_: Any
    ) -> list[str]:
        return [n for n in names if _matches(n, filter or "*") and not _matches(n, exclude_filters)]

    timm.list_models = list_models
    timm.list_pretrained = lambda *args, **kwargs: []


def _matches(name: str, filters: str | Sequence[str]) -> bool:
    patterns = [filters] if isinstance(filters, str) else filters
    return any(fnmatch.fnmatch(name.removeprefix("t2t_"), pattern) for pattern in patterns)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    extra = ARGUMENTS.get(metafunc.function.__name__)
    if extra is None:
        return
    definition = metafunc.definition
    definition.own_markers[:] = [mark for mark in definition.own_markers if mark.name != "parametrize"]
    values = [(name, *extra.values()) for name in _names(metafunc.config)]
    metafunc.parametrize(("model_name", *extra), values, ids=_names(metafunc.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that build one of the models under test."""
    items[:] = [item for item in items if _is_ours(item, _names(config))]


def _is_ours(item: Any, names: Sequence[str]) -> bool:
    if any(fnmatch.fnmatch(item.nodeid, pattern.replace("[", "[[]")) for pattern in LEFT_OUT):
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if "model_name" in params or "name" in params:
        return params.get("model_name", params.get("name")) in names
    source = inspect.getsource(item.function)
    return "_vit(" in source or any(name in source for name in names)
