"""Everything a GPU can tell, in order of worth, in one call that ends in time and loses nothing if it is cut.

    python benchmarks/gpu_report.py --out report --minutes 9
    python benchmarks/gpu_report.py --out report --stages tests kernels         # some of it
    python benchmarks/gpu_report.py --out report --dry-run                      # on a CPU: every stage, tiny

Stages: the environment; the extension built for this GPU; `pytest -m gpu` and the ops' tests; the kernel table;
throughput and training beside other models, then compiled; tuning; memory; compute-sanitizer over small shapes. Each is
a process with a share of the time that is left, and writes into the folder as it goes; one that fails or runs out of
time does not stop the others. summary.txt, printed at the end too, has less than 100 lines. Nothing is fetched from the
network: any Python with torch, triton, timm, pytest and rich will do.

exit status: 0, 1 if a stage failed or ran out of time, 2 if an argument is impossible
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import OneLineParser, UsageError, positive_seconds, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
LINES = 95  # of the summary
_OPS = """soft_split soft_split_linear performer_attention token_performer soft_split_performer layer_norm_linear
add_layer_norm mlp linear block triton se_gate se_mlp"""
OPS_TESTS = tuple(f"tests/test_{name}.py" for name in _OPS.split())
PEERS = ("t2t_vit_14", "t2t_vit_t_14", "deit_small_patch16_224", "resnet50")


@dataclass(frozen=True)
class Stage:
    """A process of the report.

    Attributes:
        name: As for ``--stages``.
        share: Of the time that is left when it begins, relative to the later stages' shares.
        command: What runs, from the root of the project; ``{out}`` is the folder, ``{seconds}`` the stage's time.
        dry: The same, tiny, for a machine without a GPU.
        environment: Variables to set.
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


def measured(name: str, *models: str, variants: str, mode: str = "inference") -> tuple[str, ...]:
    """throughput.py on the GPU; training in autocast, as it is done."""
    precision = "autocast-bfloat16" if mode == "training" else "bfloat16"
    options = ("--mode", mode, "--precision", precision, "--synthetic", "--no-plot", "--time-budget", "15")
    return benchmark(
        "throughput", "--models", *models, "--variants", *variants.split(), *options, "--output", f"{{out}}/{name}.json"
    )


def stages(workers: int, arch: str) -> list[Stage]:
    """In order of worth; ``arch`` is the GPU's compute capability as nvcc wants it."""
    parallel = ("-n", str(workers)) if workers > 1 else ()
    pytest = python("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--no-header", "--tb=short")
    tiny = ("--img-size", "32", "--batch-size", "2", "--device", "cpu", "--no-plot")
    t2t = ("--models", "t2t_vit_7", "--repeats", "1", "--variants", "reference", "auto")
    sanitizer = shutil.which("compute-sanitizer") or "compute-sanitizer"
    sanitized = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", "sanitizer and cuda", "-x"
    )
    return [
        Stage("environment", 6, python("-m", "t2t_fast", "env"), python("-m", "t2t_fast", "env")),
        Stage("build", 8, python("setup.py", "build_ext", "--inplace"), python("setup.py", "--version"),
              (("TORCH_CUDA_ARCH_LIST", arch),)),
        Stage("tests", 28, (*pytest, *parallel, "-m", "gpu", "tests"),
              (*pytest, "-m", "not slow", "tests/test_gpu.py")),
        Stage("ops", 28, (*pytest, *parallel, "-m", "not slow", *OPS_TESTS),
              (*pytest, "tests/test_linear.py", "-k", "named")),
        Stage("kernels", 24, benchmark("kernels", "--output", "{out}/kernels.json", "--time-budget", "{seconds}"),
              benchmark("kernels", "--ops", "add_layer_norm", "--batch-size", "1", "--device", "cpu", "--no-compile",
                        "--output", "{out}/kernels.json")),
        Stage("throughput", 14, measured("throughput", *PEERS, variants="reference auto frozen cuda-graph"),
              benchmark("throughput", *t2t, *tiny, "--output", "{out}/throughput.json")),
        Stage("training", 14, measured("training", *PEERS, variants="reference auto", mode="training"),
              benchmark("throughput", *t2t, *tiny, "--mode", "training", "--output", "{out}/training.json")),
        Stage("compiled", 24, measured("compiled", *PEERS[:1], *PEERS[2:3],
                                       variants="reference auto compiled-reference compiled compiled-frozen"),
              benchmark("throughput", *t2t, *tiny, "--output", "{out}/compiled.json")),
        Stage("tuning", 24, benchmark("tune", "--output", "{out}/tuning.json", "--time-budget", "{seconds}"),
              benchmark("tune", "--tiny", "--output", "{out}/tuning.json")),
        Stage("memory", 6, benchmark("memory", "--batch-size", "128", "--precision", "autocast-bfloat16", "--output",
                                     "{out}/memory.json"),
              benchmark("memory", "--models", "t2t_vit_7", "--variants", "auto", "--img-size", "32", "--batch-size",
                        "1", "--device", "cpu", "--output", "{out}/memory.json")),
        Stage("memcheck", 8, (sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *sanitized),
              python("-c", "print('compute-sanitizer needs a GPU')")),
        Stage("racecheck", 8, (sanitizer, "--tool", "racecheck", "--error-exitcode", "9", *sanitized),
              python("-c", "print('compute-sanitizer needs a GPU')")),
    ]  # fmt: skip


def run(stage: Stage, dry: bool, out: Path, seconds: float) -> dict[str, Any]:
    """Run a stage, its output appended to log.txt; at the end of its time it is interrupted, then killed."""
    fill = {"out": str(out), "seconds": str(max(1, int(0.8 * seconds)))}
    command = [part.format(**fill) if "{" in part else part for part in (stage.dry if dry else stage.command)]
    started = time.monotonic()
    with (out / "log.txt").open("a") as log:
        log.write(f"\n===== {stage.name}: {' '.join(command)}\n")
        log.flush()
        offset = log.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **dict(stage.environment), "PYTHONUNBUFFERED": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n")
            return {"stage": stage.name, "status": f"cannot start: {error}", "seconds": 0.0, "output": []}
        status = _wait(process, seconds)
    took = round(time.monotonic() - started, 1)
    with (out / "log.txt").open(errors="replace") as log:
        log.seek(offset)
        output = log.read().splitlines()
    return {"stage": stage.name, "status": status, "seconds": took, "output": output}


def _wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """How the process ended."""
    try:
        code = process.wait(seconds)
        return "ok" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        for sign, grace in ((signal.SIGINT, 8), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it
        return f"cut after {seconds:.0f} s"


def summarise(results: Sequence[dict[str, Any]], out: Path) -> list[str]:
    """Less than 100 lines: how each stage ended, what failed, and the figures."""
    lines = [f"{r['stage']:<12} {r['status']:<18} {r['seconds']:>6.1f} s  {_last(r)}" for r in results]
    for result in results:
        failed = [line for line in result["output"] if line.startswith(("FAILED", "ERROR"))]
        lines += [f"  {line[:150]}" for line in failed[:12]]
        lines += [f"  ... and {len(failed) - 12} more in log.txt"] * (len(failed) > 12)
    kernels = _rows(out / "kernels.json")
    lines += [f"kernel {r['op']}, {r['use']}, {r['variant']}: {_kernel(r)}" for r in kernels if r["variant"] != "aten"]
    for name in ("throughput", "training", "compiled"):
        for r in _rows(out / f"{name}.json"):
            speed = f"{r['images_per_second']:.0f} images/s, {r['speed'] or 0:.2f}x" if r["seconds"] else r["status"]
            lines.append(f"{name} {r['model']} {r['variant'] or '-'}: {speed[:90]}")
    for r in _rows(out / "tuning.json"):
        tried = f"{len(r['failed'])} of {r['tried']} failed"
        lines.append(f"tuning {r['table']} {r['kind']}: best {r['best']:.3f}, {tried}")
    for r in _rows(out / "memory.json"):
        peak = f"{r['backward'] / 1e6:.0f} MB in training" if "backward" in r else r["status"]
        lines.append(f"memory {r['model']} {r['variant']}: {peak}")
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} more lines in the files"]
    return lines


def _last(result: dict[str, Any]) -> str:
    spoken = [line.strip() for line in result["output"] if line.strip()]
    return spoken[-1][:100] if spoken else ""


def _kernel(row: dict[str, Any]) -> str:
    if "forward_s" not in row:
        return str(row["status"])[:90]
    training = f", training {row['training_s'] * 1e6:.0f} µs" if "training_s" in row else ""
    return f"forward {row['forward_s'] * 1e6:.0f} µs{training}"


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text())["rows"])
    except (OSError, ValueError, KeyError):
        return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and return the exit status."""
    parser = OneLineParser(
        prog="gpu_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in stages(1, "")]
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for all results; made if missing")
    add("--minutes", type=positive_seconds, default=9.0, help="for everything together; default: 9")
    add("--stages", nargs="+", default=names, choices=names, metavar="NAME", help=f"default: {' '.join(names)}")
    add("--dry-run", action="store_true", help="walk through all stages on the CPU, tiny")
    options = parser.parse_args(argv)
    started = time.monotonic()
    try:
        out = _folder(options.out)
        workers, arch = _machine(options.dry_run)
        results = []
        todo = [stage for stage in stages(workers, arch) if stage.name in options.stages]
        for index, stage in enumerate(todo):
            left = 60 * options.minutes - (time.monotonic() - started) - 5  # for the summary
            seconds = left * stage.share / sum(later.share for later in todo[index:])
            if seconds < 2:
                results.append({"stage": stage.name, "status": "no time left", "seconds": 0.0, "output": []})
            else:
                print(f"[{time.monotonic() - started:5.0f} s] {stage.name}: at most {seconds:.0f} s", flush=True)
                results.append(run(stage, options.dry_run, out, seconds))
            kept = [{name: r[name] for name in ("stage", "status", "seconds")} for r in results]
            write_json(out / "report.json", {"stages": kept, "environment": _environment()})
            write_text(out / "summary.txt", "\n".join(summarise(results, out)) + "\n")
    except UsageError as error:
        parser.error(" ".join(str(error).split()))
    print((out / "summary.txt").read_text(), end="")
    return 0 if all(result["status"] == "ok" for result in results) else 1


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "log.txt").write_text("")
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written to ({error.strerror}); pass another folder") from error
    return out.resolve()


def _machine(dry: bool) -> tuple[int, str]:
    """Test processes to run at a time, and the GPU's compute capability.

    Raises:
        UsageError: A GPU is wanted, and there is none.
    """
    import torch

    if dry:
        return 1, ""
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device; --dry-run walks through all stages on the CPU")
    major, minor = torch.cuda.get_device_capability()
    has_xdist = importlib.util.find_spec("xdist") is not None
    return min(8, os.cpu_count() or 1) if has_xdist else 1, f"{major}.{minor}"


def _environment() -> dict[str, Any]:
    """Of this package, and what the driver says of clocks, power and memory."""
    sys.path.append(str(ROOT))
    from t2t_fast.env import collect_env

    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,memory.total,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        told = [str(error)]
    return collect_env() | {"nvidia_smi": told}


if __name__ == "__main__":
    sys.exit(main())
