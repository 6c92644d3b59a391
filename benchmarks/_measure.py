"""Build the models to compare, check them against the definition in float64, and time them in turn."""

from __future__ import annotations

import difflib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from _common import UsageError
from torch import Tensor, nn

import t2t_fast
from t2t_fast.macs import count_macs

# Accepted relative norm of the error of the logits: three to five times what rounding alone leaves, in any T2T-ViT.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
MIN_REPEATS, MAX_REPEATS = 5, 100


@dataclass
class Row:
    """One model with one backend; ``weights`` are those that all rows of a T2T-ViT were given."""

    model: str
    backend: str | None
    module: nn.Module
    params: int
    macs: int
    weights: dict[str, Tensor] | None = None
    ops: dict[str, list[str]] = field(default_factory=dict)
    error: float | None = None
    top1: float | None = None
    passed: bool = True
    times: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.model} {self.backend}" if self.backend else self.model


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


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for ``--dtype``; ``auto`` is 16 bits on CUDA and float32 elsewhere."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return next(dtype for dtype in TOLERANCES if str(dtype) == f"torch.{name}")


def device_name(device: torch.device, env: dict[str, Any]) -> str:
    """The hardware's own name where it is known."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name())
    return f"{device.type} {env['cpu']['model'] or 'unknown'}"


def check_names(models: Sequence[str]) -> None:
    """Raise UsageError unless every name is one that timm or this package can create."""
    for name in models:
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)  # ours are registered there
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            ours = ", ".join(t2t_fast.list_models())
            raise UsageError(f"--models: {name!r} is unknown; accepted: {ours} and timm's names{hint}")


def build_rows(name: str, backends: Sequence[str], img_size: int, seed: int) -> list[Row]:
    """The rows of one model, with random weights: one per backend if it is a T2T-ViT, otherwise one.

    Raises:
        UsageError: The model does not take images of that size.
    """
    torch.manual_seed(seed)
    try:
        model = _create(name, img_size)
        cost = count_macs(model, img_size)
    except (AssertionError, ValueError) as error:  # how timm and this package refuse a size
        raise UsageError(f"--img-size: got {img_size}, which {name} does not take: {error}") from error
    if not isinstance(model, t2t_fast.T2TViT):
        return [Row(name, None, model, cost.params, cost.macs)]
    _spread(model)
    weights = model.state_dict()
    return [Row(name, b, _t2t(name, img_size, b, weights), cost.params, cost.macs, weights) for b in backends]


def _create(name: str, img_size: int) -> nn.Module:
    try:
        return timm.create_model(name, img_size=img_size).eval()
    except TypeError:  # most convolutional networks take any size, and no such argument
        return timm.create_model(name).eval()


def _t2t(name: str, img_size: int, backend: str, weights: dict[str, Tensor]) -> nn.Module:
    model = timm.create_model(name, img_size=img_size, backend=backend).eval()
    model.load_state_dict(weights)
    return model


def _spread(model: nn.Module) -> None:
    """Random values in every bias and norm, and weights that keep the variance; shorter keys and queries.

    As initialised, the logits hardly depend on the image and not at all on the biases; and where keys and queries are
    long, the Performer's features all but vanish. Errors would hide.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            gain = 0.5 if name.endswith("kqv") else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


@torch.inference_mode()
def check(rows: Sequence[Row], images: Tensor) -> int:
    """Run every row once, and compare the T2T-ViTs' logits with the reference backend in float64.

    The weights and images are the same, after rounding to the dtype of ``images``: what remains is the arithmetic.

    Returns:
        The number of images compared.

    Raises:
        UsageError: A row cannot run.
    """
    count = min(len(images), 8 if images.device.type == "cpu" else 32)  # float64 takes its time on a CPU
    sample = torch.linspace(0, len(images) - 1, count).long()
    exact: dict[str, Tensor] = {}
    for row in rows:
        logits = _first_run(row, images)[sample.to(images.device)].cpu().double()
        if row.backend is None or row.weights is None:
            continue
        row.ops = {op: sorted(ran) for op, ran in t2t_fast.explain(row.module, images).backends().items()}
        if row.model not in exact:
            exact[row.model] = _exact_logits(row, row.weights, images[sample.to(images.device)])
        expected = exact[row.model]
        row.error = ((logits - expected).norm() / expected.norm()).item()
        row.top1 = (logits.argmax(1) == expected.argmax(1)).double().mean().item()
        row.passed = row.error <= TOLERANCES[images.dtype]  # a NaN does not pass
    return count


def _first_run(row: Row, images: Tensor) -> Tensor:
    try:
        return row.module(images)
    except t2t_fast.BackendUnavailable as error:
        raise UsageError(f"--backends: {row.label}: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--batch-size: {len(images)} images do not fit into memory with {row.label}") from error


def _exact_logits(row: Row, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    device = images.device.type if images.device.type == "cuda" else "cpu"  # others may lack float64
    model = _t2t(row.model, images.shape[-1], "reference", weights)
    return model.to(images.dtype).to(device, torch.float64)(images.to(device, torch.float64)).cpu()


@torch.inference_mode()
def time_rows(
    rows: Sequence[Row], images: Tensor, repeats: int | None, budget: float, report: Callable[[int, int], None]
) -> None:
    """Time the rows in rounds, one batch of each per round, so that drift of the machine hits all alike.

    Args:
        rows: Warm already from :func:`check`; a GPU gets a few more rounds to raise its clocks.
        images: The batch.
        repeats: Number of rounds; None leaves it to ``budget``, within MIN_REPEATS and MAX_REPEATS.
        budget: Seconds that the rounds may take together.
        report: Called with the batches done and the batches planned.
    """
    for _ in range(0 if images.device.type == "cpu" else 5):
        for row in rows:
            time_forward(row.module, images)
    planned = repeats or MIN_REPEATS
    started = time.perf_counter()
    done = 0
    while done < planned and rows:
        first = done % len(rows)  # another neighbour each round: none always runs after the same one
        for i, row in enumerate([*rows[first:], *rows[:first]]):
            row.times.append(time_forward(row.module, images))
            report(done * len(rows) + i + 1, planned * len(rows))
        done += 1
        if repeats is None:
            affordable = int(budget * done / (time.perf_counter() - started))
            planned = min(max(affordable, MIN_REPEATS), MAX_REPEATS)


def time_forward(module: nn.Module, images: Tensor) -> float:
    """Seconds of one forward pass, by the device's own clock on CUDA."""
    if images.is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        module(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    module(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def summarise(rows: Sequence[Row], batch_size: int) -> tuple[str | None, list[dict[str, Any]]]:
    """The label of the row that speeds are relative to, and the figures of every row, ready for JSON.

    That row is the first with the backend ``reference``, or the first at all; None if it was not timed.
    """
    baseline = next((row for row in rows if row.backend == "reference"), rows[0])
    return baseline.label if baseline.times else None, [_figures(row, baseline, batch_size) for row in rows]


def _figures(row: Row, baseline: Row, batch_size: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "model": row.model,
        "backend": row.backend,
        "params": row.params,
        "macs": row.macs,
        "ops": row.ops,
        "error": row.error if row.error is not None and math.isfinite(row.error) else None,
        "top1": row.top1,
        "passed": row.passed,
        "images_per_second": None,
        "spread": None,
        "ms_per_batch": None,
        "speed": None,
        "seconds": row.times,
    }
    if row.times:
        rates = [batch_size / seconds for seconds in row.times]
        figures["images_per_second"] = statistics.median(rates)
        if len(rates) > 1:
            quartiles = statistics.quantiles(rates, n=4, method="inclusive")
            figures["spread"] = (quartiles[2] - quartiles[0]) / 2
        figures["ms_per_batch"] = 1000 * statistics.median(row.times)
        if baseline.times:
            ratios = [theirs / ours for theirs, ours in zip(baseline.times, row.times, strict=True)]
            figures["speed"] = statistics.median(ratios)
    return figures
