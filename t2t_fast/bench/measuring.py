"""Check rows against the reference in float64, and time them in rounds."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import t2t_fast
from t2t_fast.bench import models
from t2t_fast.bench.variants import EXPORTED, INT8, CannotRun, Programs, Row, arithmetic, build, precision_of
from t2t_fast.usage import UsageError

# Accepted relative norm of the error of the logits and, in training, of all gradients together, by the dtype of the
# matmuls: three to five times the error of rounding alone, in any T2T-ViT.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
GRADIENT_TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-1, torch.float16: 2e-2}
# Of a single gradient: in 16 bits small ones are mostly rounding, and a missing one has an error of 1.
WORST_TENSOR = {torch.float32: 1e-3, torch.bfloat16: 0.75, torch.float16: 0.5}
TF32_TOLERANCES = {"inference": 4e-3, "training": 2e-2}  # as many digits as float16
MIN_REPEATS, MAX_REPEATS = 5, 100
REST = 0.2  # seconds in which a runtime's threads stop waiting busily for more work
SETTLED = 0.05  # warm: two consecutive runs differ by less
Report = Callable[[str, int, int], None]


def select_device(name: str) -> torch.device:
    """The device for ``--device``.

    Raises:
        UsageError: This torch cannot use it here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    if name == "auto":
        return torch.device(present[-1])
    if name not in present:
        raise UsageError(f"--device: {name!r} cannot be used by this torch here; accepted: auto, {', '.join(present)}")
    return torch.device(name)


def select_precision(name: str, device: torch.device) -> str:
    """The precision for ``--precision``; ``auto`` is 16 bits on CUDA and float32 elsewhere.

    Raises:
        UsageError: The device lacks this precision.
    """
    if name == "auto":
        if device.type != "cuda":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if name == "tf32" and device.type != "cuda":
        raise UsageError(f"--precision: tf32 is for CUDA devices, not for {device.type!r}; take float32")
    return name


def device_name(device: torch.device, env: dict[str, Any]) -> str:
    """The name of the hardware, if it is known."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name())
    return f"{device.type} {env['cpu']['model'] or 'unknown'}"


class Oracle:
    """Weights of our models, and the exact results: the reference's logits or gradients in float64, cached."""

    def __init__(self, images: Tensor, device: torch.device, seed: int, programs: Programs | None = None) -> None:
        self.images, self.device, self.seed = images, device, seed
        self.programs = programs or Programs()
        self._weights: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._answers: dict[tuple[Any, ...], list[Tensor]] = {}

    def count(self, row: Row) -> int:
        """How many images are compared, a divisor of the batch size; few, as float64 is slow on a CPU."""
        most = min(8 if self.device.type == "cpu" else 32, 4 if row.mode == "training" else 32)
        most = max(1, min(most, most * 224**2 // row.img_size**2))
        return max(size for size in range(1, most + 1) if row.batch_size % size == 0)

    def weights(self, row: Row) -> dict[str, Tensor] | None:
        if not models.is_ours(row.model):
            return None
        key = (row.model, row.img_size)
        if key not in self._weights:
            self._weights[key] = models.random_weights(*key, self.seed)
        return self._weights[key]

    def answer(self, row: Row) -> list[Tensor]:
        """The exact result for the first images, with weights and images rounded to the row's dtype."""
        count = self.count(row)
        key = (row.model, row.img_size, row.mode, row.weight_dtype, count)
        if key not in self._answers:
            device = self.device.type if self.device.type == "cuda" else "cpu"  # others may lack float64
            model = models.create(row.model, row.img_size, backend="reference")
            model.load_state_dict(self.weights(row) or {})
            model = model.to(row.weight_dtype).to(device, torch.float64)
            images = self.images[:count].to(row.weight_dtype).to(device, torch.float64)
            self._answers[key] = gradients(model, images) if row.mode == "training" else _logits(model, images)
        return self._answers[key]


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [model(images).cpu().double()]


def gradients(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Gradients of all parameters for a fixed loss, without dropout."""
    model.eval()
    model.zero_grad(set_to_none=True)
    logits = model(images)
    logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean().backward()
    found = [p.grad.cpu().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, float]:
    """Relative norms of the difference: of all tensors together, and of the worst; NaN if one is not finite.

    Tensors with less than 1e-3 of the whole norm are mostly rounding in 16 bits; they count in the first norm only.
    """
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.nan, math.nan
    differences = torch.stack([(g - w).norm() for g, w in zip(got, want, strict=True)])
    norms = torch.stack([w.norm() for w in want])
    matter = norms >= 1e-3 * norms.norm()
    return (differences.norm() / norms.norm()).item(), (differences / norms)[matter].max().item()


def prepare(rows: Sequence[Row], oracle: Oracle, report: Report, keep: Callable[[], None] = lambda: None) -> list[Row]:
    """Build, check and warm up each row, and return those that can be timed. The status of the others says why not.

    ``keep`` is called after each row.
    """
    ready = []
    for done, row in enumerate(rows):
        report(f"preparing {row.label}", done, len(rows))
        with guarded(row):
            build(row, oracle.weights(row), oracle.device, oracle.seed, oracle.images, oracle.programs)
            images = batch_for(row, oracle)
            check(row, oracle, images)
            if row.status == "pending":
                settle(row, images)
                ready.append(row)
        if row.status != "pending":
            row.drop()
        keep()
    return [row for row in ready if row.status == "pending"]


@contextlib.contextmanager
def guarded(row: Row) -> Iterator[None]:
    """A context that turns an error of one row into its status, so that the others go on."""
    try:
        yield
    except UsageError:
        raise
    except (CannotRun, t2t_fast.BackendUnavailable) as error:
        row.status = f"cannot run: {' '.join(str(error).split())}"
    except Exception as error:  # compilers, drivers and foreign models raise anything
        row.status = failure(error)
    if row.status == "out of memory":
        row.drop()
        give_back()


def give_back() -> None:
    """Free the memory that CUDA's allocator caches."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):  # after some errors the device is lost
            torch.cuda.empty_cache()


def failure(error: Exception) -> str:
    """The status, in one line, of a row that raised ``error``."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return "out of memory"
    return f"failed: {type(error).__name__}: {text[:200]}"


def batch_for(row: Row, oracle: Oracle) -> Tensor:
    """The row's batch on the device; images repeat if there are too few."""
    images = oracle.images
    if len(images) < row.batch_size:
        images = images.repeat(math.ceil(row.batch_size / len(images)), 1, 1, 1)
    return images[: row.batch_size].to(oracle.device, row.weight_dtype)


def check(row: Row, oracle: Oracle, images: Tensor) -> None:
    """Compare the row's logits, or its gradients, with the exact ones, on batches of the size that will be timed.

    Results of models that are not ours must be finite and, compiled, agree with the eager model. A row whose error
    exceeds the tolerance, or is NaN, gets the status "wrong"; logits of int8 must be finite.
    """
    assert row.module is not None and row.step is not None
    if oracle.weights(row) is None:
        _check_foreign(row, oracle, images)
        return
    with precision_of(row, oracle.device):
        explained = t2t_fast.explain(_explicable(row.module), images[:2]).backends()
    row.ops = {op: sorted(ran) for op, ran in explained.items()}
    exact, count = oracle.answer(row), oracle.count(row)
    if row.mode == "training":
        repeated = images[:count].repeat(row.batch_size // count, 1, 1, 1)  # with the same mean gradients
        with precision_of(row, oracle.device):
            got = gradients(row.module, repeated)
        row.tolerance = GRADIENT_TOLERANCES[row.product_dtype]
    else:
        logits = row.step(images)
        got = [logits[:count].cpu().double()]
        row.tolerance = TOLERANCES[row.product_dtype]
    if row.precision == "tf32":
        row.tolerance = TF32_TOLERANCES[row.mode]
    row.error, worst = errors(got, exact)
    if row.variant == INT8:  # its top-1 was compared when it was made; no tolerance holds for its logits
        row.tolerance = None
        row.status = row.status if math.isfinite(row.error) else "wrong"
        return
    limit = WORST_TENSOR[torch.float16 if row.precision == "tf32" else row.product_dtype]
    if not (row.error <= row.tolerance and worst <= max(row.tolerance, limit)):  # a NaN does not pass
        row.status = "wrong"
    elif row.mode == "inference":
        row.top1 = (got[0].argmax(1) == exact[0].argmax(1)).double().mean().item()


def _check_foreign(row: Row, oracle: Oracle, images: Tensor) -> None:
    assert row.module is not None and row.step is not None
    result = row.step(images)
    if result is None:  # training
        finite = all(bool(p.isfinite().all()) for p in row.module.parameters())
        row.status = row.status if finite else "wrong"
        return
    row.status = row.status if bool(result.isfinite().all()) else "wrong"
    plain = getattr(row.module, "_orig_mod", None)
    if plain is not None:
        with torch.no_grad(), precision_of(row, oracle.device):
            want = plain(images)
        row.tolerance = 2 * (TF32_TOLERANCES["inference"] if row.precision == "tf32" else TOLERANCES[row.product_dtype])
        row.error, _ = errors([result.cpu().double()], [want.cpu().double()])
        if not row.error <= row.tolerance:
            row.status = "wrong"


def _explicable(module: nn.Module) -> nn.Module:
    """The eager module inside a compiled one or a GraphRunner."""
    module = getattr(module, "_orig_mod", module)
    return module.model if isinstance(module, t2t_fast.GraphRunner) else module


def settle(row: Row, images: Tensor, most: int = 20) -> None:
    """Warm up: run until two consecutive runs take about the same time."""
    previous = math.inf
    for _ in range(most):
        seconds = time_step(row, images)
        if abs(seconds - previous) <= SETTLED * seconds:
            return
        previous = seconds


def time_rows(
    rows: Sequence[Row],
    seconds_of: Callable[[Row], float],
    repeats: int | None,
    budget: float,
    report: Report,
    keep: Callable[[], None] = lambda: None,
) -> None:
    """Time the rows in rounds, each row once per round, so that drift of the machine affects all alike.

    Args:
        rows: Prepared rows.
        seconds_of: Runs a row and returns the seconds of one step.
        repeats: Number of rounds; None means as many as ``budget`` allows, from MIN_REPEATS to MAX_REPEATS.
        budget: Seconds for all rounds together.
        report: Called with the current activity, the batches done and the batches planned.
        keep: Called after every round from MIN_REPEATS on.
    """
    planned = repeats or MIN_REPEATS
    started = time.perf_counter()
    done = 0
    rows = list(rows)
    while done < planned and rows:
        first = done % len(rows)  # rotate, so that no row always follows the same one
        for i, row in enumerate([*rows[first:], *rows[:first]]):
            with guarded(row):
                row.seconds.append(seconds_of(row))
            report("timing", done * len(rows) + i + 1, planned * len(rows))
        rows = [row for row in rows if row.status == "pending"]
        done += 1
        if done >= MIN_REPEATS:
            keep()
        if repeats is None:
            affordable = int(budget * done / (time.perf_counter() - started))
            planned = min(max(affordable, MIN_REPEATS), MAX_REPEATS)
    for row in rows:
        row.status = "ok"


def time_after_rest(row: Row, images: Tensor) -> float:
    """Seconds of one step after a rest, as another runtime's threads may wait busily, and REST seconds of steps."""
    assert row.step is not None
    time.sleep(REST)
    warm = time.perf_counter() + REST
    while time.perf_counter() < warm:
        row.step(images)
    return time_step(row, images)


def shares_processor(rows: Sequence[Row]) -> bool:
    """Whether some of these rows run in another runtime, with threads of its own, and others do not."""
    return len({row.variant if row.variant in EXPORTED else None for row in rows}) > 1


def time_step(row: Row, images: Tensor) -> float:
    """Seconds of one step, by the device's own clock on CUDA."""
    assert row.step is not None
    if images.is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        row.step(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    row.step(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def time_stream(row: Row, fetch: Callable[[Row], Tensor], ahead: int) -> float:
    """Seconds per step in a run of steps, each with the next batch, including its fetching.

    Up to ``ahead`` batches may be ready beforehand, so the clock starts after as many steps.
    """
    assert row.step is not None
    started = 0.0
    for step in range(2 * ahead):
        if step == ahead:
            started = _finished()
        row.step(fetch(row))
    return (_finished() - started) / ahead


def _finished() -> float:
    """The time after the device has finished."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def largest_batch(row: Row, oracle: Oracle, limit: int = 1 << 16) -> int:
    """The largest batch that fits: doubled until memory runs out, then bisected to about 6%; 0 if none fits."""

    def fits(size: int) -> bool:
        trial = Row(**{**row.__dict__, "batch_size": size, "status": "pending", "seconds": []})
        with guarded(trial):
            build(trial, oracle.weights(trial), oracle.device, oracle.seed, oracle.images, oracle.programs)
            time_step(trial, batch_for(trial, oracle))
        trial.drop()
        if trial.status not in ("pending", "out of memory"):
            row.status = trial.status
        return trial.status == "pending"

    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def best_batch(row: Row, oracle: Oracle, limit: int) -> int:
    """The power of two up to ``limit`` with most images per second; two batches without a gain end the search."""
    best, best_rate, falls, size = 1, 0.0, 0, 1
    while size <= limit and falls < 2:
        trial = Row(**{**row.__dict__, "batch_size": size, "status": "pending", "seconds": []})
        with guarded(trial):
            build(trial, oracle.weights(trial), oracle.device, oracle.seed, oracle.images, oracle.programs)
            images = batch_for(trial, oracle)
            settle(trial, images, 5)
            rate = size / statistics.median(time_step(trial, images) for _ in range(3))
            best, best_rate, falls = (size, rate, 0) if rate > best_rate else (best, best_rate, falls + 1)
        trial.drop()
        if trial.status != "pending":
            row.status = trial.status if size == 1 else "pending"
            break
        size *= 2
    return best


def figures(row: Row) -> dict[str, Any]:
    """A row of the result file; ``speed`` and ``of_product`` come from :func:`relate`."""
    rates = [row.batch_size / seconds for seconds in row.seconds]
    quartiles = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else None
    content = {
        name: getattr(row, name)
        for name in ("model", "variant", "mode", "precision", "batch_size", "img_size", "params", "macs", "ops")
    }
    return content | {
        "error": row.error if row.error is not None and math.isfinite(row.error) else None,
        "tolerance": row.tolerance,
        "top1": row.top1,
        "agreement": row.agreement,
        "held_out": row.held_out,
        "status": row.status,
        "passed": row.status != "wrong" and not row.status.startswith("failed"),
        "images_per_second": statistics.median(rates) if rates else None,
        "spread": (quartiles[2] - quartiles[0]) / 2 if quartiles else None,
        "ms_per_batch": 1000 * statistics.median(row.seconds) if rates else None,
        "speed": None,
        "of_product": None,
        "seconds": row.seconds,
    }


def relate(rows: Sequence[dict[str, Any]], operations_per_second: Mapping[str, float]) -> None:
    """Fill in ``speed`` and ``of_product``, which need more than a row's own times.

    ``speed`` is the row's images per second over those of a baseline with the same mode, precision, batch and image
    size: the model's reference, else the first reference, else the first row. If both ran in the same rounds, it is the
    median of the rounds' ratios. ``of_product`` is the row's arithmetic per second (two operations for each
    multiply-accumulate, three times as many in training) over that of a large matmul in its precision, if that was
    measured.
    """
    for row in rows:
        product = operations_per_second.get(arithmetic(row["variant"], row["precision"]) or "")
        if row["seconds"] and product is not None:
            operations = 2 * row["macs"] * (3 if row["mode"] == "training" else 1) * row["images_per_second"]
            row["of_product"] = operations / product
        kind = [r for r in rows if r["seconds"] and all(r[k] == row[k] for k in ("mode", "precision", "img_size"))]
        same = [r for r in kind if r["batch_size"] == row["batch_size"]] or kind
        references = [r for r in same if r["variant"] == "reference"]
        baseline = next((r for r in references if r["model"] == row["model"]), next(iter(references + same), None))
        if baseline is None or not row["seconds"]:
            continue
        row["baseline"] = f"{baseline['model']} {baseline['variant'] or ''}".strip()
        ours, theirs = row["seconds"], baseline["seconds"]
        if len(ours) == len(theirs) and row["batch_size"] == baseline["batch_size"]:
            row["speed"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        else:
            row["speed"] = row["images_per_second"] / baseline["images_per_second"]
