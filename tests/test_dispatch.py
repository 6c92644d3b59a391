"""Who decides the backend, what explain says, and that explicit wishes are never ignored."""

from __future__ import annotations

import runpy
import subprocess
import sys
import threading

import pytest
import torch

import t2t_fast
from t2t_fast import BackendUnavailable, config, explain, ops, use_backend
from t2t_fast.dispatch import Implementation, Op, resolve_backend


def small_model(**kwargs: object) -> torch.nn.Module:
    return t2t_fast.create_model("t2t_vit_7", img_size=32, num_classes=3, depth=1, **kwargs).eval()


def test_the_call_wins_over_the_context_and_the_context_over_auto() -> None:
    assert resolve_backend() == "auto"
    with use_backend("reference"):
        assert resolve_backend() == "reference"
        assert resolve_backend("aten") == "aten"
        with use_backend("auto"):
            assert resolve_backend() == "auto"
        with use_backend("aten"):
            assert resolve_backend() == "aten"
        assert resolve_backend() == "reference"
    assert resolve_backend() == "auto"
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    assert resolve_backend() == "auto"


def test_contexts_do_not_leak_into_other_threads() -> None:
    seen: list[str] = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_environment_variable() -> None:
    code = "from t2t_fast.dispatch import resolve_backend, use_backend\nprint(resolve_backend())\n"
    code += "with use_backend('aten'): print(resolve_backend())\nwith use_backend('auto'): print(resolve_backend())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"T2T_FAST_BACKEND": "reference"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["reference", "aten", "auto"]


def test_an_empty_or_wrong_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As config.py reads it, once, when the package is imported."""
    for value in ("reference", ""):
        monkeypatch.setenv("T2T_FAST_BACKEND", value)
        assert runpy.run_path(config.__file__)["BACKEND"] == (value or "auto")
    monkeypatch.setenv("T2T_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"T2T_FAST_BACKEND='fast'.*accepted: auto, reference, aten, triton, native"):
        runpy.run_path(config.__file__)


def test_explain_names_every_op_and_every_reason() -> None:
    x = torch.randn(1, 3, 32, 32)
    told = explain(small_model(), x)
    stages, blocks = (
        {"soft_split_performer", "soft_split_linear"},
        {"linear", "attention", "add_layer_norm", "mlp"},
    )
    assert set(told.backends()) == stages | blocks
    assert sum(d.calls for d in told.decisions if d.op == "soft_split_performer") == 2
    with use_backend("reference"):
        told = explain(small_model(), x)
    assert all(d.backend == "reference" for d in told.decisions)
    assert "aten: 'reference' was requested" in str(told)
    assert explain(small_model(backend="aten"), x).backends()["attention"] == {"aten"}
    assert str(explain(torch.nn.Identity(), x)) == "no t2t_fast op was called"


def test_explain_leaves_random_state_and_mode_alone() -> None:
    model = small_model().train()
    state = torch.get_rng_state()
    explain(model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_backend_is_that_of_all_its_ops() -> None:
    model = small_model(backend="reference")
    x = torch.randn(1, 3, 32, 32)
    with use_backend("aten"):
        assert {b for ran in explain(model, x).backends().values() for b in ran} == {"reference"}
    model.set_backend("auto")
    with use_backend("aten"):
        assert {b for ran in explain(model, x).backends().values() for b in ran} == {"aten"}
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        model.set_backend("fast")
    with pytest.raises(BackendUnavailable, match=r"no 'triton' .*it has: aten"):
        small_model(backend="triton")(x)


def test_auto_takes_the_first_that_can_run_and_is_not_slower() -> None:
    op = Op(
        "example",
        (
            Implementation("triton", lambda x: "triton", why_not=lambda x: "x is on the CPU"),
            Implementation("native", lambda x: "native", why_not_auto=lambda x: "slower here" if x < 3 else None),
            Implementation("aten", lambda x: "aten"),
            Implementation("reference", lambda x: "reference"),
        ),
    )
    assert [op("auto", 1), op("auto", 3), op("native", 1)] == ["aten", "native", "native"]
    with pytest.raises(BackendUnavailable, match=r"example: backend='triton' .*: x is on the CPU"):
        op("triton", 1)
    (decision,) = explain(lambda x: op("auto", x), 1).decisions
    assert decision.reasons == {
        "triton": "x is on the CPU",
        "native": "slower here",
        "reference": "aten comes first",
    }


def test_compiled_calls_follow_the_context() -> None:
    function = torch.compile(lambda x: ops.soft_split(x, 3, 2, 1), fullgraph=True, backend="eager")
    x = torch.randn(1, 3, 8, 8)
    want = ops.soft_split(x, 3, 2, 1, backend="reference")
    assert torch.equal(function(x), want)
    with use_backend("reference"):
        assert torch.equal(function(x), want)
