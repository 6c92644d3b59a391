"""Rows of a comparison: a model in a variant (backend, frozen, compiled, ...), and the step to time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import t2t_fast
from t2t_fast.bench import models
from t2t_fast.config import BACKENDS
from t2t_fast.deploy.export import load

INT8 = "openvino-int8"
OPENVINO = ("openvino", "openvino-bf16", INT8)
EXPORTED = ("onnx", *OPENVINO, "aoti")
FROZEN = ("frozen", "compiled-frozen", "cuda-graph")
PRECISIONS = {
    "float32": (torch.float32, None),
    "tf32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast-bfloat16": (torch.float32, torch.bfloat16),
    "autocast-float16": (torch.float32, torch.float16),
}


def product_dtype(precision: str) -> torch.dtype:
    """The dtype in which matmuls run."""
    dtype, autocast = PRECISIONS[precision]
    return autocast or dtype


def arithmetic(variant: str | None, precision: str) -> str | None:
    """The precision whose matmuls a row's own are like; None for int8."""
    if variant == INT8:
        return None
    return "bfloat16" if variant == "openvino-bf16" else precision


class CannotRun(Exception):
    """A row cannot be measured here; the message says why."""


@dataclass
class Row:
    """A model in a variant, which is None for a timm model run as it is; with its conditions and results.

    ``agreement`` is int8's: the share of ``held_out`` images with the same top-1 as in float32.
    """

    model: str
    variant: str | None
    mode: str
    precision: str
    batch_size: int
    img_size: int
    params: int
    macs: int
    status: str = "pending"
    error: float | None = None
    tolerance: float | None = None
    top1: float | None = None
    agreement: float | None = None
    held_out: int | None = None
    ops: dict[str, list[str]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    module: nn.Module | None = None
    step: Callable[[Tensor], Any] | None = None
    images: Tensor | None = None

    @property
    def label(self) -> str:
        return f"{self.model} {self.variant}" if self.variant else self.model

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies the row."""
        return self.model, self.variant, self.mode, self.precision, self.batch_size, self.img_size

    @property
    def weight_dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def product_dtype(self) -> torch.dtype:
        return product_dtype(arithmetic(self.variant, self.precision) or self.precision)

    def drop(self) -> None:
        """Free the model and its images."""
        self.module = self.step = self.images = None


class Programs:
    """A folder of exported programs, one for all batch sizes and threads; int8 ones with what was found about them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._found: dict[Path, dict[str, Any]] = {}

    def write(
        self, row: Row, make: Callable[[], nn.Module], format: str, int8: t2t_fast.Int8 | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """The row's model as ``format``, exported from ``make()`` unless it is there, and what ``export`` returned."""
        suffix = {"onnx": "onnx", "openvino": "xml"}.get(format, "pt2")
        dtype = str(row.weight_dtype).removeprefix("torch.") + ("-int8" if int8 else "")
        path = Path(self._folder.name, f"{row.model}-{row.img_size}-{dtype}-{format}.{suffix}")
        if path not in self._found:
            try:
                self._found[path] = t2t_fast.export(make(), path, format, int8=int8)
            except t2t_fast.ExportError as error:
                raise CannotRun(str(error)) from error
        return path, self._found[path]


def build(
    row: Row,
    weights: dict[str, Tensor] | None,
    device: torch.device,
    seed: int,
    images: Tensor | None = None,
    programs: Programs | None = None,
) -> None:
    """Make the row's module and its step, a function of a batch of images.

    ``images`` calibrate int8; ``programs`` keeps what is exported, for rows that need the same.

    Raises:
        CannotRun: The variant does not support this mode or this machine.
    """
    variant = row.variant or "auto"
    if row.mode == "training" and variant in (*FROZEN, *EXPORTED):
        raise CannotRun(f"{variant} is for inference")
    if row.mode == "training" and row.precision == "float16":
        raise CannotRun("weights in float16 do not train: take autocast-float16")
    torch.manual_seed(seed)
    if models.is_ours(row.model):
        backend = "reference" if variant == "compiled-reference" else variant if variant in BACKENDS else "auto"
        model = models.create(row.model, row.img_size, backend=backend)
        if weights is not None:
            model.load_state_dict(weights)
    else:
        model = models.create(row.model, row.img_size)
    model = model.to(device, row.weight_dtype)
    module: Any = model
    if variant in EXPORTED:
        module = _export(row, model, device, images, programs or Programs())
    if variant in FROZEN:
        module = t2t_fast.freeze(model)
    if variant.startswith("compiled"):
        # Time the graph that was checked, for this batch size, and never fall back to the eager model.
        torch._dynamo.config.recompile_limit = 1000  # per code object, which all models share
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        module = torch.compile(module, dynamic=False)
    if variant == "cuda-graph":
        with precision_of(row, device):
            module = t2t_fast.GraphRunner(module, [row.batch_size])
        if "nothing to capture" in module.notes[-1]:
            raise CannotRun(module.notes[-1])
    row.module = module
    row.step = _training_step(row, module, device) if row.mode == "training" else _forward(row, module, device)


def _export(
    row: Row, model: nn.Module, device: torch.device, images: Tensor | None, programs: Programs
) -> Callable[[Tensor], Tensor]:
    """The model exported to another runtime, checked and loaded, with as many threads as torch has."""
    variant, threads = str(row.variant), torch.get_num_threads()
    if PRECISIONS[row.precision][1]:
        raise CannotRun("an exported program has the precision of its weights, not autocast's")
    if variant == "onnx" and (device.type != "cpu" or row.precision == "bfloat16"):
        raise CannotRun("onnxruntime is measured on the CPU, in float32 and float16")
    if variant not in OPENVINO:
        path, _ = programs.write(row, lambda: model, variant)
        return load(path, variant, threads=threads)
    accepted = ("float32",) if variant == "openvino" else ("float32", "bfloat16")
    if device.type != "cpu" or row.precision not in accepted:
        raise CannotRun(f"{variant} is measured on the CPU, in {' and '.join(accepted)}")
    int8 = None
    if variant == INT8:
        assert images is not None
        int8 = t2t_fast.Int8(images, min_agreement=0)  # reported, not demanded: random weights leave near-ties
    # The program is in float32 and runs in bfloat16 as the row asks for it; in int8, what is left of float. OpenVINO
    # reads ONNX itself, so that one export serves both runtimes.
    path, found = programs.write(row, model.float, "openvino" if int8 else "onnx", int8)
    row.agreement, row.held_out = found.get("agreement"), found.get("held_out")
    in_bfloat16 = variant == "openvino-bf16" or row.precision == "bfloat16"
    run = load(path, "openvino", precision="bf16" if in_bfloat16 else "f32", threads=threads)
    return lambda images: run(images.float())


def precision_of(row: Row, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context with the row's autocast."""
    autocast = PRECISIONS[row.precision][1]
    return torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()


def _forward(row: Row, model: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def step(images: Tensor) -> Tensor:
        with precision_of(row, device):
            return model(images)

    return step


def _training_step(row: Row, model: nn.Module, device: torch.device) -> Callable[[Tensor], None]:
    """Forward, backward and AdamW's update, for random labels, with the model's default dropout."""
    labels = torch.randint(1000, (row.batch_size,), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=row.precision == "autocast-float16" and device.type == "cuda")

    def step(images: Tensor) -> None:
        if not model.training:
            model.train()
        optimizer.zero_grad(set_to_none=True)
        with precision_of(row, device):
            loss = F.cross_entropy(model(images).float(), labels[: len(images)])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step
