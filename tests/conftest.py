"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported: workers that share the cores (pytest -n) have a thread each, and so have their processes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports the kernels: without a GPU they run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20210128)


@pytest.fixture
def on_device() -> Iterator[None]:
    """Make tensors on the GPU where there is one: the tests of the ops run there as they are."""
    torch.set_default_device("cuda" if torch.cuda.is_available() else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written to holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
