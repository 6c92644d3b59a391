"""benchmarks/throughput.py: the table, the result file, the gate on wrong logits, and the answers to bad arguments."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from t2t_fast.bench import measuring, models, rates, tables, throughput
from t2t_fast.bench.common import write_json
from t2t_fast.bench.images import load_images
from t2t_fast.bench.measuring import errors
from t2t_fast.bench.tables import quantile
from t2t_fast.bench.variants import OPENVINO, Row

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--img-size", "64", "--batch-size", "2", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rate is measured in test_script alone."""
    monkeypatch.setattr(rates, "operations_per_second", lambda dtype, device: 1e11)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_script(tmp_path: Path) -> None:
    """As a user runs it: table and legend on stdout, the whole measurement in a file named by the hardware, a plot."""
    command = [sys.executable, str(BENCHMARKS / "throughput.py"), *TINY, "--output", str(tmp_path), "--models"]
    command += ["t2t_vit_7", "resnet18"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("cpu-")
    assert f"_torch{torch.__version__.partition('+')[0]}_triton" in path.name
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".svg", ".png"}

    result = read(path)
    assert result["passed"] is result["complete"] is True
    assert result["device"] == "cpu"
    assert "china.jpg" in result["images"]
    assert result["environment"]["torch"] == str(torch.__version__)
    assert "git" in result["environment"]
    assert "--models t2t_vit_7 resnet18" in result["command"]
    rows = result["rows"]
    assert [(row["model"], row["variant"]) for row in rows] == [
        ("t2t_vit_7", "reference"),
        ("t2t_vit_7", "auto"),
        ("t2t_vit_7", "frozen"),
        ("resnet18", None),
    ]
    for row in rows:
        assert (row["mode"], row["precision"], row["batch_size"], row["img_size"]) == ("inference", "float32", 2, 64)
        assert row["status"] == "ok"
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] > 0
        assert row["speed"] > 0
        rate = result["operations_per_second"]["float32"]
        assert row["of_product"] == pytest.approx(2 * row["macs"] * row["images_per_second"] / rate)
        assert (row["error"] is None) == (row["variant"] is None)
        assert row["baseline"] == "t2t_vit_7 reference"
    assert rows[0]["speed"] == 1.0
    assert rows[0]["ops"]["soft_split_linear"] == ["reference"]
    assert rows[3]["params"] == 11689512

    lines = [line.split() for line in run.stdout.splitlines()]
    assert ["t2t_vit_7", "reference"] in [line[:2] for line in lines]
    assert ["resnet18", "-", "11.7"] in [line[:3] for line in lines]
    assert "1.00x" in run.stdout
    assert f"accepted up to {rows[0]['tolerance']:.0e}" in run.stdout
    assert str(path) in run.stdout


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_wrong_results_have_no_speed(
    value: float,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = measuring.build

    def build_wrong(row: Any, *args: Any) -> None:
        build(row, *args)
        if row.variant == "auto":
            with torch.no_grad():
                row.module.get_parameter("blocks.3.norm1.bias")[5] = value

    monkeypatch.setattr(measuring, "build", build_wrong)
    path = tmp_path / "wrong.json"
    arguments = ["--models", "t2t_vit_7", "--variants", "reference", "auto", "--mode", mode, "--synthetic"]
    assert throughput.main([*TINY, *arguments, "--output", str(path)]) == 1
    result = read(path)
    assert result["passed"] is False
    good, wrong = result["rows"]
    assert good["passed"] is True
    assert good["images_per_second"] > 0
    assert wrong["passed"] is False
    assert wrong["seconds"] == []
    assert wrong["images_per_second"] is wrong["speed"] is None
    output = capsys.readouterr().out
    assert "WRONG: t2t_vit_7 auto" in output
    row = next(line.split() for line in output.splitlines() if line.split()[:2] == ["t2t_vit_7", "auto"])
    assert row[4:7] == ["wrong", "-", "-"]


def test_every_parameter_counts() -> None:
    """The random weights let no parameter hide from the gate."""
    model = models.create("t2t_vit_7", 64)
    model.load_state_dict(models.random_weights("t2t_vit_7", 64, 0))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        for name, parameter in model.named_parameters():
            saved = parameter.clone()
            parameter.zero_()
            error = (model(images) - expected).norm() / expected.norm()
            assert error > 1e-3, name
            parameter.copy_(saved)


def make_row(**kwargs: Any) -> Any:
    given = {"model": "m", "variant": None, "mode": "inference", "precision": "float32", "params": 0, "macs": 0}
    return Row(**{**given, "batch_size": 1, "img_size": 1, "step": lambda images: images, **kwargs})


def seconds_of_zeros(measure: Any) -> Callable[[Any], float]:
    return lambda row: measure.time_step(row, torch.zeros(1))


def test_time_budget() -> None:
    seconds_of = seconds_of_zeros(measuring)
    for budget, rounds in ((1e-9, measuring.MIN_REPEATS), (60.0, measuring.MAX_REPEATS)):
        timed = [make_row() for _ in range(3)]
        reports: list[tuple[int, int]] = []
        kept: list[int] = []
        measuring.time_rows(
            timed,
            seconds_of,
            None,
            budget,
            lambda what, *report: reports.append(report),  # noqa: B023
            lambda: kept.append(len(timed[0].seconds)),  # noqa: B023
        )
        assert [len(row.seconds) for row in timed] == [rounds] * 3
        assert [row.status for row in timed] == ["ok"] * 3
        assert reports[-1] == (3 * rounds, 3 * rounds)
        assert kept == list(range(measuring.MIN_REPEATS, rounds + 1))


def test_out_of_memory_is_a_row_that_says_so() -> None:
    calls = 0

    def fail(images: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    good, bad = make_row(), make_row(step=fail)
    measuring.time_rows([good, bad], seconds_of_zeros(measuring), 6, 1.0, lambda *report: None)
    assert (good.status, len(good.seconds)) == ("ok", 6)
    assert (bad.status, len(bad.seconds)) == ("out of memory", 2)

    def broken(images: torch.Tensor) -> None:
        raise RuntimeError("something else")

    broken_row, good = make_row(step=broken), make_row()
    measuring.time_rows([broken_row, good], seconds_of_zeros(measuring), 1, 1.0, lambda *report: None)
    assert broken_row.status == "failed: RuntimeError: something else"
    assert good.status == "ok"
    assert [measuring.figures(row)["passed"] for row in (broken_row, good)] == [False, True]


def test_searches_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = measuring.Oracle(torch.zeros(2, 3, 4, 4), torch.device("cpu"), 0)
    seconds = {1: 1.0, 2: 1.2, 4: 1.5, 8: 4.0, 16: 9.0}

    def build(row: Any, *args: Any) -> None:
        def step(images: torch.Tensor) -> None:
            if len(images) > 27:
                raise torch.OutOfMemoryError

        row.step = step

    monkeypatch.setattr(measuring, "build", build)
    assert 26 <= measuring.largest_batch(make_row(), oracle) <= 27
    monkeypatch.setattr(measuring, "time_step", lambda row, images: seconds[len(images)])
    assert measuring.best_batch(make_row(), oracle, 1024) == 4


def test_interrupted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured is kept; the rest is measured later, with the arguments of the first run."""
    time_rows, path = measuring.time_rows, tmp_path / "run.json"

    def interrupt(rows: Any, *args: Any) -> None:
        if rows[0].img_size == 48:
            raise KeyboardInterrupt
        time_rows(rows, *args)

    monkeypatch.setattr(measuring, "time_rows", interrupt)
    arguments = ["--models", "t2t_vit_7", "--variants", "auto", "--img-size", "32", "48", "--batch-size", "2"]
    arguments += ["--synthetic", "--repeats", "2", "--device", "cpu", "--output", str(path)]
    assert throughput.main(arguments) == 130
    assert f"go on with --resume {path}" in capsys.readouterr().err
    first = read(path)
    assert [(row["img_size"], row["status"]) for row in first["rows"]] == [(32, "ok"), (48, "pending")]
    assert first["complete"] is False
    monkeypatch.setattr(measuring, "time_rows", time_rows)
    assert throughput.main(["--resume", str(path)]) == 0
    second = read(path)
    assert [row["img_size"] for row in second["rows"]] == [32, 48]
    assert second["rows"][0]["seconds"] == first["rows"][0]["seconds"]
    assert second["complete"] is True
    assert second["command"] == first["command"]
    path.write_text(json.dumps(second | {"hardware": "another"}))
    assert throughput.main(["--resume", str(path)]) == 2
    assert "--resume: the file's hardware is 'another', here it is" in capsys.readouterr().err


def test_variants_modes_and_precisions(tmp_path: Path) -> None:
    path = tmp_path / "many.json"
    arguments = ["--models", "t2t_vit_7", "--variants", *throughput.VARIANTS, "--mode", "inference", "training"]
    arguments += ["--img-size", "32", "--batch-size", "2", "--repeats", "1", "--precision", "autocast-bfloat16"]
    arguments = [a for a in arguments if not a.startswith("compiled")]  # minutes
    assert throughput.main([*arguments, "--device", "cpu", "--no-plot", "--output", str(path)]) == 0
    status = {(row["mode"], row["variant"]): row["status"] for row in read(path)["rows"]}
    assert status["inference", "auto"] == status["training", "auto"] == status["inference", "frozen"] == "ok"
    assert status["training", "frozen"] == "cannot run: frozen is for inference"
    assert "cannot run: soft_split_linear: backend='native'" in status["inference", "native"]
    assert "graphs are CUDA's" in status["inference", "cuda-graph"]
    assert "has the precision of its weights" in status["inference", "aoti"]
    assert list(tmp_path.iterdir()) == [path]


def test_exported_programs_pass_the_gate(tmp_path: Path) -> None:
    """Each in its own arithmetic, whatever the CPU would choose."""
    path = tmp_path / "exported.json"
    variants = ["frozen", "onnx", "openvino", "openvino-bf16"]
    arguments = ["--models", "t2t_vit_7", "--variants", *variants, "--synthetic", "--no-plot"]
    assert throughput.main([*TINY, *arguments, "--output", str(path)]) == 0
    rows = {row["variant"]: row for row in read(path)["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}
    for row in rows.values():
        assert 0 < row["error"] < row["tolerance"]
    tolerances = {name: row["tolerance"] for name, row in rows.items()}
    exact, rough = measuring.TOLERANCES[torch.float32], measuring.TOLERANCES[torch.bfloat16]
    assert tolerances == {"frozen": exact, "onnx": exact, "openvino": exact, "openvino-bf16": rough}
    assert rows["openvino-bf16"]["of_product"] is None  # the matmul's rate is that of float32
    assert rows["openvino"]["of_product"] > 0


@pytest.mark.slow
def test_openvino_in_16_and_8_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """int8 reports its agreement with float32; its logits are not judged."""
    path = tmp_path / "exported.json"
    arguments = ["--models", "t2t_vit_7", "--variants", *OPENVINO, "--precision", "bfloat16", "--no-plot"]
    assert throughput.main([*TINY, *arguments, "--output", str(path)]) == 0
    plain, half, int8 = read(path)["rows"]
    assert plain["status"] == "cannot run: openvino is measured on the CPU, in float32"
    assert (half["status"], half["tolerance"]) == ("ok", measuring.TOLERANCES[torch.bfloat16])
    assert half["of_product"] > 0
    assert int8["status"] == "ok"
    assert (int8["tolerance"], int8["top1"], int8["of_product"], int8["held_out"]) == (None, None, None, 50)
    assert 0 < int8["agreement"] <= 1
    assert int8["error"] < 1
    assert f"top-1 as in float32 for {int8['agreement']:.0%} of 50 images" in capsys.readouterr().out
    assert "50 images |" in tables.throughput(read(path))


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latency.json"
    arguments = ["--models", "t2t_vit_7", "--variants", "auto", "--img-size", "32", "--latency", "--no-plot"]
    assert throughput.main([*arguments, "--device", "cpu", "--synthetic", "--output", str(path)]) == 0
    (row,) = read(path)["rows"]
    assert (row["batch_size"], len(row["seconds"])) == (1, throughput.LATENCY_REPEATS)
    output = capsys.readouterr().out
    assert "p90, p99" in output
    ordered = sorted(row["seconds"])
    assert 1000 * quantile(row["seconds"], 90) == 1000 * ordered[89]
    assert f"{1000 * ordered[89]:.1f}, {1000 * ordered[98]:.1f}" in output


def test_a_stream_is_timed_with_its_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay ready before the clock started is not counted: fetching takes 2 s, a step 1 s."""
    now, ready = 0.0, 3
    monkeypatch.setattr(measuring, "_finished", lambda: now)

    def fetch(row: Any) -> torch.Tensor:
        nonlocal now, ready
        now, ready = now + (0 if ready > 0 else 2), ready - 1
        return torch.zeros(1)

    def step(images: torch.Tensor) -> None:
        nonlocal now
        now += 1

    assert measuring.time_stream(make_row(step=step), fetch, 3) == 3
    assert now == 3 + 3 * 3


@pytest.mark.parametrize("shards", [False, True], ids=["files", "shards"])
def test_with_the_loader(tmp_path: Path, shards: bool) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (50 + i, 60), "red").save(folder / f"{i}.jpg")
    if shards:
        (folder / "broken.jpg").write_bytes(b"not an image")
        with tarfile.open(tmp_path / "images" / "shard-0.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        shutil.rmtree(folder)
    path = tmp_path / "loader.json"
    arguments = ["--models", "t2t_vit_7", "--variants", "auto", "--no-plot", "--with-loader", "--images"]
    assert throughput.main([*TINY, *arguments, str(folder.parent), "--output", str(path)]) == 0
    assert read(path)["with_loader"] is True
    assert "3 images" in read(path)["images"]


def test_a_gradient_that_is_missing_is_noticed() -> None:
    """Each tensor's by itself, in whatever is large enough to matter."""
    want = [torch.ones(1000), torch.full((10,), 0.1), torch.full((10,), 1e-4)]
    assert errors(want, want) == (0.0, 0.0)
    whole, worst = errors([want[0], torch.zeros(10), want[2]], want)
    assert whole < 0.02
    assert worst == 1.0
    assert errors([*want[:2], torch.zeros(10)], want)[1] == 0.0
    for wrong in ([want[0], want[1]], [want[0], want[1][:5], want[2]], [want[0] * float("nan"), *want[1:]]):
        assert not errors(wrong, want)[0] <= 1.0


def test_others_models_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = measuring.build

    def build_wrong(row: Any, *args: Any) -> None:
        build(row, *args)
        with torch.no_grad():
            row.module.fc.bias[3] = float("nan")

    monkeypatch.setattr(measuring, "build", build_wrong)
    for mode in ("inference", "training"):
        path = tmp_path / f"{mode}.json"
        arguments = ["--models", "resnet18", "--mode", mode, "--synthetic", "--no-plot", "--output", str(path)]
        assert throughput.main([*TINY, *arguments]) == 1
        assert [row["status"] for row in read(path)["rows"]] == ["wrong"]


def test_the_largest_batches_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[str]] = []
    monkeypatch.setattr(measuring, "largest_batch", lambda row, oracle: 2)
    monkeypatch.setattr(measuring, "prepare", lambda rows, *args: groups.append([row.label for row in rows]) or [])
    monkeypatch.setattr(measuring, "select_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(measuring, "device_name", lambda *args: "a GPU")
    monkeypatch.setattr(rates, "operations_per_second", lambda *args: 1.0)
    options = throughput.parse_arguments(["--models", "t2t_vit_7", "--batch-size", "max", "--synthetic",
                                          "--precision", "bfloat16", "--img-size", "32"])  # fmt: skip
    throughput.measure(options, [], lambda *args: None)
    assert groups == [["t2t_vit_7 reference"], ["t2t_vit_7 auto"], ["t2t_vit_7 frozen"]]


def test_folder_of_images(tmp_path: Path) -> None:
    nested = tmp_path / "class"
    nested.mkdir()
    Image.new("RGB", (80, 50), "red").save(nested / "a.JPG", format="jpeg")
    Image.new("RGBA", (30, 90)).save(nested / "b.png")
    Image.new("L", (1, 1)).save(tmp_path / "c.png")
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("ignored")
    images, origin = load_images(tmp_path, False, 5, 32, seed=0)
    assert images.shape == (5, 3, 32, 32)
    assert images.isfinite().all()
    assert "3 images" in origin
    assert "1 unreadable" in origin
    assert torch.equal(images, load_images(tmp_path, False, 5, 32, seed=0)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "t2t_vit_77"], r"--models: 't2t_vit_77' is unknown; .*did you mean t2t_vit_7"),
        (["--batch-size", "0"], r"--batch-size: got '0'; accepted: a whole number of at least 1"),
        (["--time-budget", "nan"], r"--time-budget: got 'nan'; accepted: a number of seconds above 0"),
        (["--precision", "float8"], r"--precision/--dtype: invalid choice: 'float8' \(choose from .*bfloat16"),
        (["--variants", "cudnn"], r"--variants/--backends: invalid choice: 'cudnn' \(choose from .*reference"),
        (["--batch-size", "most"], r"--batch-size: got 'most'; accepted: a whole number of at least 1"),
        (["--batch-size", "max", "--device", "cpu"], r"--batch-size: max is for CUDA devices"),
        (["--precision", "tf32", "--device", "cpu"], r"--precision: tf32 is for CUDA devices, not for 'cpu'"),
        (["--latency", "--batch-size", "4"], r"--latency: measures batches of 1"),
        (["--grid", "--latency"], r"--grid: .* but --latency"),
        (["--with-loader"], r"--with-loader: needs --images FOLDER"),
        (["--resume", "file"], r"--resume: 'file' is no JSON"),
        (["--resume", "memory.json"], r"--resume: 'memory.json' is no file of throughput.py"),
        (["--resume", "old.json"], r"--resume: 'old.json' is of another version of throughput.py"),
        (["--resume", "old.json", "--models", "t2t_vit_7"], r"--resume: goes on with the arguments in the file"),
        (["--img-size", "100000"], r"--img-size: got 100000; accepted: up to 4096"),
        (["--resume", "nowhere"], r"--resume: 'nowhere' cannot be read"),
        (["--images", "no/such/folder"], r"--images: 'no/such/folder' is no folder"),
        (["--images", "empty"], r"--images: 'empty' holds none; accepted: \.jpg"),
        (["--img-size", "4"], r"--img-size: got 4, which t2t_vit_14 does not take: .*at least 16"),
        (["--output", "file/result.json"], r"--output: file cannot be written to"),
        pytest.param(
            ["--device", "cuda"],
            r"--device: 'cuda' cannot be used by this torch here; accepted: auto, cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line on stderr, exit status 2, and no file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "memory.json").write_text('{"benchmark": "memory", "rows": []}')
    old = dict.fromkeys(("command", "date", "total_seconds", "environment", "hardware"), "")
    (tmp_path / "old.json").write_text(json.dumps({**old, "benchmark": "throughput", "rows": [{}]}))
    output = [] if "--output" in arguments or "--resume" in arguments else ["--output", "empty"]
    try:
        status = throughput.main([*arguments, *output])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("throughput.py: error: ")
    assert re.search(message, line), line
    assert list((tmp_path / "empty").iterdir()) == []


def test_result_files_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
