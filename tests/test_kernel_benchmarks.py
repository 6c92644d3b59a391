"""benchmarks/kernels.py and the pytest-benchmark suite: cases, the gate, the result file, the collection."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from t2t_fast import ops
from t2t_fast.bench import kernels, rates, tables
from t2t_fast.bench.cases import CASES, exact_step, runners, sample_of, step, worst_error
from t2t_fast.ops.block import op as block
from t2t_fast.ops.se import op as se

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timing is one call, and the machine's rates are made up."""
    monkeypatch.setattr(kernels, "median_seconds", lambda function, device: function() is None or 1e-3)
    monkeypatch.setattr(kernels, "bytes_per_second", lambda device: 1e10)
    monkeypatch.setattr(kernels, "operations_per_second", lambda dtype, device: 1e11)


def test_rates_of_this_machine() -> None:
    """A copy of memory and a matmul, in bytes and operations per second: within what CPUs have."""
    device = torch.device("cpu")
    assert 1e8 < rates.bytes_per_second(device) < 1e13
    assert 1e8 < rates.operations_per_second(torch.float32, device) < 1e15


def test_every_op_has_a_case() -> None:
    # token_performer is the second half of soft_split_performer, soft_split a copy.
    assert {case.op for case in CASES} - {"tokens_to_token"} == set(ops.__all__) - {"token_performer", "soft_split"}


def test_table_and_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.json"
    arguments = ["--ops", "se_gate", "add_layer_norm", "--batch-size", "1", "--no-compile", "--device", "cpu"]
    assert kernels.main([*arguments, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    assert list(result["work"]) == ["add_layer_norm, 384", "se_gate, 384"]
    work = result["work"]["se_gate, 384"]["forward"]
    assert work["bytes"] == 2 * 197 * 384 * 4
    assert work["floor_s"] == work["bytes"] / 1e10  # no matmuls: the bytes decide
    timed = {(row["op"], row["variant"]) for row in result["rows"] if "forward_s" in row and "training_s" in row}
    assert {("se_gate", "reference"), ("se_gate", "aten"), ("add_layer_norm", "aten")} <= timed
    assert all(row["passed"] and row.get("error", 0) < 1e-5 for row in result["rows"])
    assert "over floor" in capsys.readouterr().out


def test_the_tokens_to_token_module(tmp_path: Path) -> None:
    """Of both models: auto beside the definition, forward and in a training step."""
    path = tmp_path / "kernels.json"
    arguments = ["--ops", "tokens_to_token", "--batch-size", "1", "--no-compile", "--device", "cpu"]
    assert kernels.main([*arguments, "--output", str(path)]) == 0
    result = json.loads(path.read_text())
    timed = [(row["use"], row["variant"]) for row in result["rows"] if {"forward_s", "training_s"} <= row.keys()]
    models = ("t2t_vit_14", "t2t_vit_t_14")
    assert timed == [(model, variant) for model in models for variant in ("reference", "auto")]
    assert all(row["error"] < 1e-4 for row in result["rows"])
    # The image and 196 tokens of 384 channels, and in training the image again and the gradient of the tokens.
    work = result["work"]["tokens_to_token, t2t_vit_14"]
    assert work["forward"]["bytes"] == 4 * (3 * 224**2 + 196 * 384) == work["training"]["bytes"] / 2
    assert "| tokens_to_token, t2t_vit_t_14 | training |" in tables.kernels(result)


@pytest.mark.parametrize("value", [float("nan"), 2.0])
def test_a_wrong_result_is_not_timed(value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = tuple(
        dataclasses.replace(i, run=lambda *args, run=i.run: run(*args) * value) if i.backend == "aten" else i
        for i in se._SE_GATE.implementations
    )
    monkeypatch.setattr(se, "_SE_GATE", dataclasses.replace(se._SE_GATE, implementations=implementations))
    path = tmp_path / "kernels.json"
    arguments = ["--ops", "se_gate", "--batch-size", "1", "--no-compile", "--device", "cpu"]
    assert kernels.main([*arguments, "--output", str(path)]) == 1
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["aten"]["passed"] is False
    assert rows["aten"]["status"].startswith("wrong: ")
    assert "forward_s" not in rows["aten"]
    assert rows["reference"]["passed"] is True


def test_all_wrong_by_a_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The literal form does not loosen its own gate."""
    monkeypatch.setattr(kernels, "step", lambda function, sample: [1000 * t for t in step(function, sample)])
    path = tmp_path / "kernels.json"
    arguments = ["--ops", "se_gate", "--batch-size", "1", "--no-compile", "--device", "cpu"]
    assert kernels.main([*arguments, "--output", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"].partition(":")[0] for row in rows} <= {"wrong", "cannot run"}  # native may not be built
    assert rows[0]["status"].startswith("wrong")


def test_a_row_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("out of resources:\nshared memory")

    op = block._ADD_LAYER_NORM
    failing = tuple(dataclasses.replace(i, run=fail) if i.backend == "aten" else i for i in op.implementations)
    monkeypatch.setattr(block, "_ADD_LAYER_NORM", dataclasses.replace(op, implementations=failing))
    path = tmp_path / "kernels.json"
    arguments = ["--ops", "add_layer_norm", "se_gate", "--batch-size", "1", "--no-compile", "--device", "cpu"]
    assert kernels.main([*arguments, "--output", str(path)]) == 1
    rows = {(row["op"], row["variant"]): row for row in json.loads(path.read_text())["rows"]}
    assert rows["add_layer_norm", "aten"]["status"] == "failed: RuntimeError: out of resources: shared memory"
    assert rows["add_layer_norm", "reference"]["passed"] and rows["se_gate", "aten"]["passed"]


def test_tensors_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those of the batch to be timed end the other ops."""

    def limited(case: Any, batch: int, *args: Any) -> Any:
        if case.op == "add_layer_norm" and batch > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return sample_of(case, batch, *args)

    monkeypatch.setattr(kernels, "sample_of", limited)
    path = tmp_path / "kernels.json"
    arguments = ["--ops", "add_layer_norm", "se_gate", "--batch-size", "5", "--no-compile", "--device", "cpu"]
    assert kernels.main([*arguments, "--output", str(path)]) == 0
    rows = {(row["op"], row["variant"]): row for row in json.loads(path.read_text())["rows"]}
    assert rows["add_layer_norm", "reference"]["status"] == rows["add_layer_norm", "aten"]["status"] == "out of memory"
    assert "training_s" in rows["se_gate", "aten"]


def test_a_reference_that_fails_blames_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if case.op == "se_gate")
    calls = list[int]()

    def failing_once(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("once")
        return exact_step(*args)

    monkeypatch.setattr(kernels, "exact_step", failing_once)
    rows = {row["variant"]: row for row in kernels.measure(case, 1, torch.float32, torch.device("cpu"), False)}
    assert rows["reference"]["status"] == "failed: RuntimeError: once"
    assert rows["aten"]["status"] == "ok"


def test_exchanged_gradients_are_wrong() -> None:
    """Of an op with two results of one shape."""
    (case,) = (case for case in CASES if case.op == "add_layer_norm")
    sample = sample_of(case, 1, torch.float32, torch.device("cpu"))

    class Exchanged(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
            return a.clone(), b.clone()

        @staticmethod
        def backward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> Any:
            return b, a

    want = exact_step(case, sample)
    assert worst_error(step(lambda t: case.call("aten", t), sample), want) < 1e-5
    assert worst_error(step(lambda t: Exchanged.apply(*case.call("aten", t)), sample), want) > 0.1


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_suite_times_nothing_wrong(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("test_ops", BENCHMARKS / "test_ops.py")
    test_ops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test_ops)
    monkeypatch.setattr(test_ops, "rates", lambda: (1e9, 1e9))
    (case,) = (case for case in CASES if case.op == "se_gate")

    def call(backend: str, sample: Any) -> torch.Tensor:
        return case.call(backend, sample) * (factor if backend == "aten" else 1.0)

    class Benchmark:
        timed, stats, extra_info = False, None, dict[str, Any]()

        def __call__(self, function: Any) -> None:
            self.timed = True

    benchmark, changed = Benchmark(), dataclasses.replace(case, call=call)
    with contextlib.nullcontext() if factor == 1 else pytest.raises(AssertionError):
        test_ops.test_op(benchmark, changed, "aten", "forward")
    assert benchmark.timed == (factor == 1)


def test_every_case_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All share one line of code, and Dynamo's limit of programs for it."""
    compile, counters = torch.compile, list[CompileCounter]()

    def counting(function: object, **options: object) -> object:
        counters.append(CompileCounter())
        return compile(function, backend=counters[-1], **options)

    monkeypatch.setattr(torch, "compile", counting)
    small = [case for case in CASES if "3136" not in case.use and case.op != "tokens_to_token"]
    assert len(small) > 8
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, whatever ran before
        for case in small:
            sample = sample_of(case, 1, torch.float32, torch.device("cpu"))
            run = runners(case)["reference, compiled"]
            run(sample)
            with torch.no_grad():
                run(sample)
            assert counters[-1].frame_count == 2, case.name


def test_gradients_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who times a step must not time the drawing of random numbers."""
    (case,) = (case for case in CASES if case.op == "add_layer_norm")
    sample = sample_of(case, 1, torch.float32, torch.device("cpu"))
    first = step(runners(case)["aten"], sample)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: pytest.fail("drawn again"))
    second = step(runners(case)["aten"], sample)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_work_is_the_matmuls() -> None:
    """The flops of every case equal those that torch counts for its reference."""
    for case in CASES:
        sample = sample_of(case, 1, torch.float32, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            case.call("reference", sample)
        counted, claimed = counter.get_total_flops(), case.work(1, 4)["forward"].flops
        assert abs(counted - claimed) <= 0.02 * counted + 2e5, case.name  # the gates' and denominators' are left out


def test_the_suite_runs_when_asked_for() -> None:
    one = ["benchmarks", "-k", "se_gate and forward and aten", "--benchmark-only", "--benchmark-min-rounds=2"]
    command = [sys.executable, "-m", "pytest", "-v", *one, "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # whose workers time nothing
    ran = subprocess.run(command, cwd=BENCHMARKS.parent, env=alone, capture_output=True, text=True)
    assert "benchmarks/test_ops.py::test_op[" in ran.stdout, ran.stdout + ran.stderr
    assert "1 passed" in ran.stdout
