"""Parity with the original implementation: logits, tokens, gradients, parameter counts, state-dict names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import relative_error, seed_weights, seeded_images
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
SHAPES: dict[str, dict[str, list[int]]] = json.loads((GOLDEN / "state_dict_shapes.json").read_text())


@pytest.mark.parametrize("backend", ["reference", "aten", "auto"])
@pytest.mark.parametrize("case", CASES, ids=[case["model"] for case in CASES])
def test_values_and_gradients(case: dict[str, Any], backend: str) -> None:
    size = case["image_size"]
    model = timm.create_model(case["model"], img_size=size, backend=backend).eval()
    seed_weights(model, case["seed"])
    seen: list[Tensor] = []
    model.tokens_to_token.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.set_grad_enabled("loss" in case):
        logits = model(seeded_images(case["batch"], size, size, case["seed"]))
    (tokens,) = seen

    assert list(tokens.shape) == case["tokens_shape"]
    head = torch.stack([tokens[0, 0, :4], tokens[0, 97, :4], tokens[1, -1, :4]])
    assert relative_error(head, torch.tensor(case["tokens_head"])) < 2e-4
    assert tokens.double().norm().item() == pytest.approx(case["tokens_norm"], rel=2e-4)
    assert relative_error(logits[:, :16], torch.tensor(case["logits_head"])) < 2e-4
    assert logits.double().norm().item() == pytest.approx(case["logits_norm"], rel=2e-4)
    assert logits.argmax(dim=1).tolist() == case["logits_argmax"]

    if "loss" in case:
        logits.square().mean().backward()
        norms = {name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.grad is not None}
        assert norms.keys() == case["grad_norms"].keys()
        for name, norm in case["grad_norms"].items():
            assert norms[name] == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize("case", CASES, ids=[case["model"] for case in CASES])
def test_parameter_counts(case: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = timm.create_model(case["model"])
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == case["params"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == case["trainable_params"]


@pytest.mark.parametrize("name", SHAPES)
def test_names_shapes_and_order(name: str) -> None:
    with torch.device("meta"):
        state_dict = timm.create_model(name).state_dict()
    assert [(key, list(value.shape)) for key, value in state_dict.items()] == list(SHAPES[name].items())


def test_the_files_are_complete() -> None:
    assert len(SHAPES) == 14
    assert {case["model"] for case in CASES} <= SHAPES.keys()
    assert sum("loss" in case for case in CASES) >= 3
