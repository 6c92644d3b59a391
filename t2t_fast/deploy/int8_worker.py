"""Quantise an ONNX model to OpenVINO's int8, as a script: ``int8_worker.py MODEL.onnx IMAGES.npy OUT.xml``.

A process of its own, which imports neither torch for itself nor this package: NNCF reports to its makers unless
environment variables forbid it before it is imported, and it writes to standard output.
"""

from __future__ import annotations

import sys
from typing import Any

import nncf
import numpy as np
import openvino


def quantise(onnx: str, images: str, xml: str) -> None:
    """Write ``xml`` and its .bin: post-training quantisation, calibrated on ``images`` (N, C, H, W).

    The tokens-to-token module stays in float32: an error in the exponent of the Performer's phi is multiplied.
    """
    program, samples = openvino.Core().read_model(onnx), np.load(images, mmap_mode="r")
    quantised = nncf.quantize(
        program,
        nncf.Dataset([sample[None] for sample in samples]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
        ignored_scope=nncf.IgnoredScope(names=tokens_to_token(program), validate=False),
    )
    openvino.serialize(quantised, xml)


def tokens_to_token(program: Any) -> list[str]:
    """The names of all that computes the tokens: what comes before they are joined with the class token.

    Raises:
        ValueError: They are joined nowhere.
    """
    nodes = _joined(program)
    before: dict[str, None] = {}
    while nodes:
        node = nodes.pop()
        if node.get_friendly_name() not in before:
            before[node.get_friendly_name()] = None
            nodes += _sources(node)
    return list(before)


def _joined(program: Any) -> list[Any]:
    """The class token and the tokens of the tokens-to-token module, as nodes."""
    for node in program.get_ordered_ops():
        if node.get_type_name() == "Concat" and node.get_output_element_type(0).is_real():
            sources = _sources(node)
            if any(source.get_type_name() == "Broadcast" for source in sources):
                return sources
    raise ValueError("no class token is joined with the others")


def _sources(node: Any) -> list[Any]:
    return [value.get_node() for value in node.input_values()]


if __name__ == "__main__":
    quantise(*sys.argv[1:])
