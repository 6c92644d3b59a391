"""Public functions with wrong arguments: every failure is a TypeError, ValueError or BackendUnavailable in words."""

from __future__ import annotations

import collections
import inspect
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import t2t_fast
from t2t_fast import ops
from t2t_fast.bench.samples import SAMPLES, make

DOCUMENTED = (TypeError, ValueError, t2t_fast.BackendUnavailable)


ODD: list[Callable[[Any], Any]] = [
    lambda value: None,
    lambda value: "text",
    lambda value: 3,
    lambda value: -1,
    lambda value: 0,
    lambda value: float("nan"),
    lambda value: 10**30,
    lambda value: [1, 2, 3],
    lambda value: (2, -2),
    lambda value: {},
    lambda value: torch.randn(3),
    lambda value: torch.randn(0, 3, 9, 9),
    lambda value: torch.tensor(1.0),
    lambda value: value.unsqueeze(0) if isinstance(value, Tensor) else value,
    lambda value: value[..., :-1] if isinstance(value, Tensor) else value,
    lambda value: value.double() if isinstance(value, Tensor) else value,
    lambda value: value.half() if isinstance(value, Tensor) else value,
    lambda value: value.to(torch.int64) if isinstance(value, Tensor) else value,
    lambda value: value.to(torch.complex64) if isinstance(value, Tensor) else value,
    lambda value: value.bool() if isinstance(value, Tensor) else value,
    lambda value: value.to_sparse() if isinstance(value, Tensor) else value,
    lambda value: value.to("meta") if isinstance(value, Tensor) else value,
]


def test_the_samples_cover_every_public_op() -> None:
    assert sorted(SAMPLES) == sorted(ops.__all__)
    for name in SAMPLES:
        assert torch.isfinite(getattr(ops, name)(**make(name))[0]).all(), name


@pytest.mark.parametrize("name", ops.__all__)
def test_ops(name: str) -> None:
    """One or two arguments are replaced; the call works, or fails with a documented error that says why."""
    draw, outcomes = random.Random(name), collections.Counter[str]()
    function = getattr(ops, name)
    known = set(inspect.signature(function).parameters) - {"backend"}
    for _ in range(250):
        arguments = make(name)
        for key in draw.sample(sorted(known), draw.choice((1, 1, 2))):
            arguments[key] = draw.choice(ODD)(arguments.get(key, 0.1))
        backend = draw.choice(("auto", "auto", "aten", "reference", "native"))
        try:
            function(**arguments, backend=backend)
            outcomes["worked"] += 1
        except DOCUMENTED as error:
            assert len(str(error)) > 20, (arguments, error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50


CREATE: dict[str, Any] = {
    "name": "t2t_vit_7",
    "img_size": 32,
    "in_chans": 3,
    "num_classes": 5,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "qk_scale": None,
    "qkv_bias": False,
    "token_dim": 64,
    "tokens_type": "performer",
    "block_type": "standard",
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "token_drop_rate": 0.1,
    "global_pool": "token",
    "dynamic_img_size": False,
    "backend": "auto",
}
VALUES: list[Any] = [
    None,
    "text",
    "",
    3,
    -1,
    0,
    2.5,
    float("nan"),
    float("inf"),
    True,
    [],
    (32, 48),
    (1, 2, 3),
    {},
    b"x",
]


def test_create_model() -> None:
    draw, outcomes = random.Random(0), collections.Counter[str]()
    for _ in range(300):
        arguments = dict(CREATE)
        for key in draw.sample(sorted(CREATE), draw.choice((1, 1, 2))):
            arguments[key] = draw.choice(VALUES)
        try:
            model = t2t_fast.create_model(arguments.pop("name"), **arguments)
        except DOCUMENTED as error:
            assert len(str(error)) > 20, (arguments, error)
            outcomes["refused"] += 1
            continue
        outcomes["worked"] += 1
        images = torch.randn(1, model.tokens_to_token.in_chans, *model.img_size)
        assert torch.isfinite(model.eval()(images)).all(), arguments
    assert min(outcomes.values()) > 30


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, b"x", torch.zeros(2)])
def test_functions_of_a_model(tmp_path: Any, value: Any) -> None:
    """What is no model is refused by every function that takes one."""
    functions: list[Callable[[], Any]] = [
        lambda: t2t_fast.freeze(value),
        lambda: t2t_fast.optimize(value),
        lambda: t2t_fast.export(value, tmp_path / "m.pt2"),
        lambda: t2t_fast.GraphRunner(value),
        lambda: t2t_fast.explain(value),
        lambda: t2t_fast.save_checkpoint(value, tmp_path / "m.pth"),
        lambda: t2t_fast.use_backend(value).__enter__(),
    ]
    for function in functions:
        if isinstance(value, dict) and function is functions[5]:
            continue  # no weights at all are weights
        with pytest.raises(DOCUMENTED, match=r"\w+ \w+"):
            function()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, 3, "text", torch.zeros(2), torch.zeros(1, 3, 32, 32, dtype=torch.int64)])
def test_images_and_tokens_that_are_none(value: Any) -> None:
    model = t2t_fast.create_model("t2t_vit_7", img_size=32, depth=1).eval()
    frozen = t2t_fast.freeze(model)
    for function in (model, model.forward_features, model.forward_intermediates, frozen):
        with pytest.raises(DOCUMENTED, match="images"):
            function(value)


def test_limits_that_follow_from_several_arguments() -> None:
    for arguments, named in (
        ({"mlp_ratio": 1e30}, "mlp_ratio"),
        ({"img_size": 2**31 - 1}, "img_size"),
        ({"img_size": b"ab"}, "img_size"),
        ({"global_pool": ["token"]}, "global_pool"),
    ):
        with pytest.raises(DOCUMENTED, match=named):
            t2t_fast.create_model("t2t_vit_7", **arguments)
    with pytest.raises(TypeError, match="batch_sizes"):
        t2t_fast.GraphRunner(torch.nn.Identity(), batch_sizes=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="y has dtype float64, norm_weight float32"):
        x = torch.zeros(1, 2, 4)
        ops.add_layer_norm(x, x.double(), torch.ones(4), torch.zeros(4))
    model = t2t_fast.create_model("t2t_vit_7", img_size=np.int32(32), depth=1)
    assert model.img_size == (32, 32)
    model.register_buffer("mean", torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match="mean holds NaN or infinity"):
        t2t_fast.freeze(model)
