"""Test and measure everything on a GPU in one call: the most important first, within a time limit.

    python benchmarks/gpu_report.py --out report --minutes 9
    python benchmarks/gpu_report.py --out report --stages tests kernels         # some of it
    python benchmarks/gpu_report.py --out report --dry-run                      # on a CPU: every stage, tiny

Stages: the environment; the build of the extension for this GPU; `pytest -m gpu` and the ops' tests; the kernel table;
throughput and training beside other models, latency, compiled models; tuning; memory; other batch sizes;
compute-sanitizer over small shapes; the kernel table with the compiled reference. Each stage is a process with a share
of the remaining time, and writes its results as it goes; a failure or an interruption loses none of them, and the other
stages go on. summary.txt has less than 100 lines and is also printed. No network is needed, only Python with torch,
triton, timm and pytest.

To publish the results, copy the files in DIR/results (every complete result, under its final name) to
benchmarks/results, then run benchmarks/report.py.

exit status: 0, 1 if a stage failed or ran out of time, 2 if an argument is impossible, 130 if interrupted
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from t2t_fast.bench.common import (
    checkout,
    positive_seconds,
    result_path,
    write_json,
    write_text,
)
from t2t_fast.env import collect_env
from t2t_fast.usage import OneLineParser, UsageError

LINES = 95  # of the summary
TOLD = 6  # failures and skips of one stage in the summary
_OPS = """soft_split soft_split_linear performer_attention token_performer soft_split_performer
add_layer_norm block triton se_gate se_mlp"""
OPS_TESTS = tuple(f"tests/test_{name}.py" for name in _OPS.split())
GPU_TESTS = tuple(f"tests/test_{name}.py" for name in ("gpu", "graph_runner", "optimize", "se_native", "triton"))
PEERS = ("t2t_vit_14", "t2t_vit_t_14", "deit_small_patch16_224", "resnet50")
COMPARED = ("t2t_vit_7", "t2t_vit_14", "t2t_vit_24", *PEERS[1:])  # top-1 is published of three T2T-ViTs and more


@dataclass(frozen=True)
class Stage:
    """A process of the report.

    Attributes:
        name: The name for ``--stages``.
        share: The stage's share of the remaining time, relative to the shares of later stages.
        command: The command, run in the root of the project; ``{out}`` is the folder, ``{seconds}`` the stage's time.
        dry: A tiny version of the command, for a machine without a GPU.
        environment: Environment variables to set.
    """

    name: str
    share: float
    command: tuple[str, ...]
    dry: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def benchmark(script: str, *arguments: str) -> tuple[str, ...]:
    return python(f"benchmarks/{script}.py", *arguments)


def measured(
    name: str, models: Sequence[str], variants: str, *options: str, mode: str = "inference", seconds: int = 15
) -> tuple[str, ...]:
    """throughput.py on the GPU, in bfloat16; training under autocast."""
    precision = "autocast-bfloat16" if mode == "training" else "bfloat16"
    common = ("--mode", mode, "--precision", precision, "--synthetic", "--no-plot", "--time-budget", str(seconds))
    return benchmark(
        "throughput", "--models", *models, "--variants", *variants.split(), *common, *options, *output(name)
    )


def output(name: str) -> tuple[str, str]:
    """The argument for the stage's result file, which the summary reads."""
    return "--output", f"{{out}}/{name}.json"


def stages(workers: int, arch: str) -> list[Stage]:
    """All stages, the most important first; ``arch`` is the GPU's compute capability, such as "9.0"."""
    parallel = ("-n", str(workers)) if workers > 1 else ()
    pytest = python("-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "--no-header", "--tb=short",
                    "--continue-on-collection-errors")  # fmt: skip
    t2t = benchmark("throughput", "--models", "t2t_vit_7", "--repeats", "1", "--variants", "reference", "auto",
                    "--img-size", "32", "--device", "cpu", "--no-plot", "--synthetic")  # fmt: skip
    tiny = ("--batch-size", "2")
    one_op = benchmark("kernels", "--ops", "add_layer_norm", "--batch-size", "1", "--device", "cpu")
    kernels = benchmark("kernels", "--time-budget", "{seconds}")
    backends = "reference auto frozen"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    sanitized = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", "sanitizer and cuda", "-x"
    )
    environment = python("-c", "from t2t_fast.env import *; print(format_env(collect_env()))")
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # each tensor has its own block, so that overruns are found
    # Shares are seconds of nine minutes.
    return [
        Stage("environment", 10, environment, environment),
        Stage("build", 52, python("setup.py", "build_ext", "--inplace"), python("setup.py", "--version"),
              (("TORCH_CUDA_ARCH_LIST", arch),)),
        Stage("tests", 75, (*pytest, *parallel, "-m", "gpu", *GPU_TESTS),
              (*pytest, "-m", "not slow", "tests/test_gpu.py")),
        Stage("ops", 60, (*pytest, *parallel, "-m", "not slow", *OPS_TESTS),
              (*pytest, "tests/test_linear.py", "-k", "named")),
        # Without the compiled reference, which takes minutes: that is the last stage.
        Stage("kernels", 50, (*kernels, "--no-compile", *output("kernels")),
              (*one_op, "--no-compile", *output("kernels"))),
        Stage("throughput", 60, measured("throughput", COMPARED, f"{backends} cuda-graph"),
              (*t2t, *tiny, *output("throughput"))),
        Stage("training", 40, measured("training", PEERS, "reference auto", mode="training"),
              (*t2t, *tiny, "--mode", "training", *output("training"))),
        Stage("latency", 25, measured("latency", PEERS[:1], f"{backends} cuda-graph", "--latency", seconds=10),
              (*t2t, "--latency", *output("latency"))),
        Stage("compiled", 45, measured("compiled", (PEERS[0], PEERS[2]),
                                       "reference auto compiled-reference compiled compiled-frozen"),
              (*t2t, *tiny, *output("compiled"))),
        Stage("tuning", 40, benchmark("tune", "--time-budget", "{seconds}", *output("tuning")),
              benchmark("tune", "--tiny", *output("tuning"))),
        Stage("memory", 12, benchmark("memory", "--batch-size", "128", "--precision", "autocast-bfloat16",
                                      *output("memory")),
              benchmark("memory", "--models", "t2t_vit_7", "--variants", "auto", "--img-size", "32", "--batch-size",
                        "1", "--device", "cpu", *output("memory"))),
        Stage("batches", 25, measured("batches", PEERS[:1], backends, "--batch-size", "1", "8", "32", "128", "512"),
              (*t2t, "--batch-size", "1", "2", *output("batches"))),
        Stage("memcheck", 10, (sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *sanitized),
              python("-c", "print('compute-sanitizer needs a GPU')"), uncached),
        Stage("racecheck", 10, (sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *sanitized),
              python("-c", "print('compute-sanitizer needs a GPU')")),
        Stage("kernels-compiled", 20, (*kernels, *output("kernels-compiled")),
              (*one_op, *output("kernels-compiled"))),
    ]  # fmt: skip


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """A context in which SIGINT and SIGTERM are only recorded, in the list that it gives."""
    seen: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda number, frame: seen.append(number)) for kind in kinds}
    try:
        yield seen
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def run(stage: Stage, root: Path, dry: bool, out: Path, seconds: float, seen: Sequence[int] = ()) -> dict[str, Any]:
    """Run a stage in ``root`` and append its output to log.txt. After its time it is interrupted, then killed.

    A signal in ``seen`` kills it at once.
    """
    fill = {"{out}": str(out), "{seconds}": str(max(1, int(0.8 * seconds)))}
    command = list(stage.dry if dry else stage.command)
    for name, value in fill.items():
        command = [part.replace(name, value) for part in command]
    result: dict[str, Any] = {"stage": stage.name, "status": "", "seconds": 0.0, "output": []}
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"\n===== {stage.name}: {' '.join(command)}\n")
        log.flush()
        offset = log.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=root,
                env={**os.environ, **dict(stage.environment), "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n")
            is_missing = isinstance(error, FileNotFoundError)
            status = f"skipped: {command[0]} is not installed" if is_missing else f"cannot start: {error}"
            return result | {"status": status}
        status = _wait(process, seconds, seen)
    took = round(time.monotonic() - started, 1)
    with (out / "log.txt").open(errors="replace") as log:
        log.seek(offset)
        lines = log.read().splitlines()
    return result | {"status": status, "seconds": took, "output": lines}


def _wait(process: subprocess.Popen[bytes], seconds: float, seen: Sequence[int]) -> str:
    """Wait for the process, or end it; the status."""
    if _ended(process, seconds, seen):
        return "ok" if process.returncode == 0 else f"exit status {process.returncode}"
    if not seen:
        _send(process, signal.SIGINT)
        _ended(process, 8, seen)
    _send(process, signal.SIGKILL)  # also workers that outlive it
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    return "interrupted" if seen else f"cut after {seconds:.0f} s"


def _ended(process: subprocess.Popen[bytes], seconds: float, seen: Sequence[int]) -> bool:
    """Whether the process ends within ``seconds`` and before a signal."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if seen or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def summarise(results: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """The summary, less than 100 lines: status of each stage, failures, figures, and how to publish the files."""
    lines = [f"{r['stage']:<16} {r['status']:<18} {r['seconds']:>6.1f} s  {_last(r)}".rstrip() for r in results]
    for result in results:
        told = [line for line in result["output"] if line.startswith(("FAILED ", "ERROR ", "SKIPPED "))]
        told.sort(key=lambda line: line.startswith("SKIPPED"))
        lines += [f"  {line[:150]}" for line in told[:TOLD]]
        lines += [f"  ... and {len(told) - TOLD} more in log.txt"] * (len(told) > TOLD)
    for result in results:
        content = _content(out / f"{result['stage']}.json")
        figures = FIGURES.get(content.get("benchmark", ""))
        lines += [f"{result['stage']} {line}"[:250] for line in figures(content)] if figures else []
    if len(lines) > LINES - 1:
        lines = [*lines[: LINES - 2], f"... and {len(lines) - LINES + 2} more lines in the files"]
    return [*lines, f"copy {out / 'results'}/*.json to benchmarks/results, then run python benchmarks/report.py"]


def _last(result: dict[str, Any]) -> str:
    spoken = [line.strip() for line in result["output"] if line.strip()]
    return spoken[-1][:100] if spoken else ""


def _kernels(content: dict[str, Any]) -> Iterator[str]:
    """A line per use: time, and ratio to the floor, of every variant but the eager reference."""

    def figures(row: dict[str, Any], parts: dict[str, Any]) -> str:
        if "forward_s" not in row:
            return str(row["status"])[:40]
        named = [("", "forward"), (", training ", "training")]
        return "".join(
            f"{name}{row[f'{part}_s'] * 1e6:.0f} µs {row[f'{part}_s'] / parts[part]['floor_s']:.2f}x floor"
            for name, part in named
            if f"{part}_s" in row
        )

    for use, parts in content["work"].items():
        rows = [r for r in content["rows"] if f"{r['op']}, {r['use']}" == use and r["variant"] != "reference"]
        yield f"{use}: " + "; ".join(f"{r['variant']} {figures(r, parts)}" for r in rows)


def _throughput(content: dict[str, Any]) -> Iterator[str]:
    """A line per model and batch size, with all variants: images per second, or milliseconds for batches of 1."""

    def figures(row: dict[str, Any]) -> str:
        if not row["seconds"]:
            return str(row["status"])[:40]
        alone = row["batch_size"] == 1
        speed = f" {row['speed']:.2f}x" if row["speed"] else ""
        return (f"{row['ms_per_batch']:.2f} ms" if alone else f"{row['images_per_second']:.0f}/s") + speed

    groups: dict[tuple[str, int], list[str]] = {}
    for row in content["rows"]:
        cell = f"{row['variant']} {figures(row)}" if row["variant"] else figures(row)
        groups.setdefault((row["model"], row["batch_size"]), []).append(cell)
    for (model, batch), cells in groups.items():
        yield f"{model}, {batch}: {'; '.join(cells)}"


def _tuning(content: dict[str, Any]) -> Iterator[str]:
    for row in content["rows"]:
        best = row["status"][:80] if row["best"] is None else f"best {row['best']:.3f}"
        yield f"{row['table']} {row['kind']}: {best}, {len(row['failed'])} of {row['tried']} failed"


def _memory(content: dict[str, Any]) -> Iterator[str]:
    for row in content["rows"]:
        peak = f"{row['backward'] / 1e6:.0f} MB in training" if "backward" in row else row["status"]
        yield f"{row['model']} {row['variant']}: {peak}"


FIGURES = {"kernels": _kernels, "throughput": _throughput, "tuning": _tuning, "memory": _memory}


def _content(path: Path) -> dict[str, Any]:
    """The content of a benchmark's result file; empty without a complete one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    needed = {"benchmark", "hardware", "date", "environment", "rows"}
    return content if isinstance(content, dict) and needed <= content.keys() else {}


def _published(out: Path, content: dict[str, Any]) -> Path:
    """The path in ``out``/results, with the name that the benchmark gives a result by default."""
    kind, hardware = content["benchmark"], content["hardware"]
    device = hardware if kind == "throughput" else f"{kind} {hardware}"
    return result_path(out / "results", device, content["environment"], datetime.fromisoformat(content["date"]))


def _forget(stage: str, out: Path) -> None:
    """Remove the stage's results of an earlier report."""
    path = out / f"{stage}.json"
    if content := _content(path):
        _published(out, content).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _write(results: Sequence[dict[str, Any]], environment: dict[str, Any], out: Path) -> None:
    for result in results:
        path = out / f"{result['stage']}.json"
        content = _content(path)
        if content and content.get("complete", result["status"] == "ok"):
            shutil.copyfile(path, _published(out, content))
    kept = [{name: r[name] for name in ("stage", "status", "seconds")} for r in results]
    write_json(out / "report.json", {"stages": kept, "environment": environment})
    write_text(out / "summary.txt", "\n".join(summarise(results, out)) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and return the exit status."""
    parser = OneLineParser(prog="gpu_report.py", description=__doc__)
    names = [stage.name for stage in stages(1, "")]
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for all results; made if missing")
    add("--minutes", type=positive_seconds, default=9.0, help="for everything together; default: 9")
    add("--stages", nargs="+", default=names, choices=names, metavar="NAME", help=f"default: {' '.join(names)}")
    add("--dry-run", action="store_true", help="run tiny versions of all stages on the CPU")
    options = parser.parse_args(argv)
    try:
        with held_signals() as seen:
            return _report(options, seen)
    except UsageError as error:
        parser.error(str(error))


def _report(options: argparse.Namespace, seen: Sequence[int]) -> int:
    started = time.monotonic()
    root, out = checkout(), _folder(options.out)
    workers, arch = _machine(options.dry_run)
    results: list[dict[str, Any]] = []
    todo = [stage for stage in stages(workers, arch) if stage.name in options.stages]
    for stage in todo:
        _forget(stage.name, out)
    environment = collect_env()
    for index, stage in enumerate(todo):
        if seen:
            break
        left = 60 * options.minutes - (time.monotonic() - started) - 5  # for the summary
        seconds = left * stage.share / sum(later.share for later in todo[index:])
        if seconds < 2:
            results.append({"stage": stage.name, "status": "no time left", "seconds": 0.0, "output": []})
        else:
            print(f"[{time.monotonic() - started:5.0f} s] {stage.name}: at most {seconds:.0f} s", flush=True)
            results.append(run(stage, root, options.dry_run, out, seconds, seen))
        environment = environment if seen else collect_env()  # clocks and power under load
        _write(results, environment, out)
    _write(results, environment, out)
    print((out / "summary.txt").read_text(), end="")
    if seen:
        return 130
    return 0 if all(r["status"] == "ok" or r["status"].startswith("skipped: ") for r in results) else 1


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")
        for name in ("report.json", "summary.txt"):  # of an earlier report
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written to ({error.strerror}); pass another folder") from error
    return out.resolve()


def _machine(dry: bool) -> tuple[int, str]:
    """The number of parallel test processes, and the GPU's compute capability.

    Raises:
        UsageError: There is no GPU.
    """
    if dry:
        return 1, ""
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device; --dry-run walks through all stages on the CPU")
    major, minor = torch.cuda.get_device_capability()
    has_xdist = importlib.util.find_spec("xdist") is not None
    return min(8, os.cpu_count() or 1) if has_xdist else 1, f"{major}.{minor}"


if __name__ == "__main__":
    sys.exit(main())
