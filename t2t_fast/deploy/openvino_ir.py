"""OpenVINO's programs, the files .xml and .bin: made of an ONNX model, loaded, and quantised to int8 by NNCF.

None of this sends telemetry: OpenVINO's reader of ONNX does not, unlike its ``convert_model``, and NNCF runs in a
process of its own, where it is switched off.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORKER = Path(__file__).with_name("int8_worker.py")
_QUIET = {"CI": "true", "NNCF_CI": "1"}  # how openvino_telemetry and nncf are told to send nothing
_MAX_CALIBRATION = 300  # NNCF's own default


@dataclass(frozen=True, eq=False)
class Int8:
    """How to quantise a program to int8: on which images, and what is demanded of it.

    Half of the images, at most 300, calibrate the ranges of the activations. On the others the int8 program must
    choose the same class as the float32 model, or it is not written.

    Args:
        images: (N, in_chans, H, W), N at least 100, as the model takes them, of the kind that it will see.
        min_agreement: The accepted share of held-out images with the same top-1, from 0 to 1.

    Raises:
        TypeError: ``images`` is no floating-point tensor, or ``min_agreement`` no number.
        ValueError: ``images`` has another shape or too few images, or ``min_agreement`` is out of range.
    """

    images: Tensor
    min_agreement: float = 0.98

    LEAST = 100  # the default leaves room for one disagreement among the fifty held out

    def __post_init__(self) -> None:
        images = self.images
        if not (isinstance(images, Tensor) and images.is_floating_point()):
            raise TypeError(f"images must be a floating-point tensor (N, in_chans, H, W), got {_kind(images)}")
        if images.ndim != 4 or len(images) < self.LEAST:
            raise ValueError(
                f"images must have shape (N, in_chans, H, W) with at least {self.LEAST} images, half of them to "
                f"calibrate and half held out; got {tuple(images.shape)}"
            )
        if isinstance(self.min_agreement, bool) or not isinstance(self.min_agreement, (int, float)):
            raise TypeError(f"min_agreement must be a number from 0 to 1, got {self.min_agreement!r}")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"min_agreement must be from 0 to 1, got {self.min_agreement!r}")

    def split(self) -> tuple[Tensor, Tensor]:
        """Images to calibrate, and those held out, drawn at random with a fixed seed."""
        count = len(self.images)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
        first = min(_MAX_CALIBRATION, count // 2)
        images = self.images.detach().cpu().float()
        return images[order[:first]], images[order[first:]]


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


@functools.cache
def engine() -> Any:
    """OpenVINO's ``Core``, one for the whole process.

    Each ``Core`` that compiles installs a signal stack and, when it is deleted, frees it and installs the previous one.
    If that is of another that was deleted before, the next signal (as at the end of a child process) is fatal.
    """
    import openvino

    return openvino.Core()


def convert(onnx: Path) -> Path:
    """Write the ONNX model in ``onnx`` as OpenVINO's IR, with the dtypes that it has; the .xml beside it."""
    import openvino

    xml = onnx.with_suffix(".xml")
    openvino.serialize(engine().read_model(onnx), str(xml))
    return xml


def load(xml: Path, *, precision: str = "f32", threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """The program as a function from images to logits on the CPU, for one request at a time.

    Args:
        xml: The program, beside its .bin; or an ONNX file.
        precision: In which OpenVINO computes what is float32 in the program: ``"f32"`` or ``"bf16"``. Left to itself,
            it takes bfloat16 where the CPU has it.
        threads: None leaves the number to OpenVINO.
    """
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    request = engine().compile_model(xml, "CPU", settings).create_infer_request()
    # Inputs are read where they are. Outputs are copied: the next call writes over its own.
    return lambda images: torch.from_numpy(request.infer([images.cpu().numpy()], share_inputs=True)[0])


class QuantisationFailed(RuntimeError):
    """NNCF could not quantise the program; the message is NNCF's."""


def quantise(onnx: Path, images: Tensor) -> Path:
    """Write the int8 form of the ONNX model in ``onnx``, calibrated on ``images``; the .xml beside it.

    Raises:
        QuantisationFailed: NNCF failed.
    """
    data, xml = onnx.with_name("images.npy"), onnx.with_name("int8.xml")
    np.save(data, images.numpy())
    # -P: the folder of the worker must not hide other modules.
    command = [sys.executable, "-P", str(_WORKER), str(onnx), str(data), str(xml)]
    done = subprocess.run(command, env=os.environ | _QUIET, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise QuantisationFailed(lines[-1])
    return xml


def agreement(got: Tensor, want: Tensor) -> float:
    """The share of images with the same top-1; one whose logits are not finite agrees with nothing."""
    same = (got.argmax(1) == want.argmax(1)) & got.isfinite().all(1)
    return same.double().mean().item()
