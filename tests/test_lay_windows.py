"""Windows as the matmul kernels gather them: pixels in blocks, and weights in the same order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2t_fast import ops
from t2t_fast.kernels import launch
from t2t_fast.kernels.launch import num_ranges
from t2t_fast.kernels.lay_windows import Windows, blocks_launch, lay_windows, pack_weight, unpack_weight
from t2t_fast.kernels.windows import walkable
from t2t_fast.ops.soft_splits.arguments import Geometry

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

# Channels, geometry, and whether the pixels go into blocks.
CASES = {
    "first split": (3, Geometry((7, 7), (4, 4), (2, 2)), True),
    "gray": (1, Geometry((7, 7), (4, 4), (2, 2)), True),
    "no padding": (4, Geometry((6, 7), (4, 4), (0, 0)), True),
    "three blocks": (2, Geometry((7, 5), (3, 2), (1, 0)), True),
    "mixed strides": (3, Geometry((3, 4), (1, 3), (1, 2)), True),
    "larger steps": (3, Geometry((1, 1), (4, 4), (0, 0)), False),
    "no steps": (3, Geometry((3, 3), (1, 1), (1, 1)), False),
    "tokens": (20, Geometry((3, 3), (2, 2), (1, 1)), False),
}


def lay(case: str) -> tuple[Tensor, Geometry, Windows]:
    channels, geometry, _ = CASES[case]
    image = torch.randn(2, channels, 13, 18)
    if channels >= 16:
        image = image.contiguous(memory_format=torch.channels_last)
    windows = lay_windows(image, geometry)
    launched = blocks_launch(image, windows, geometry.padding)
    if launched is not None:
        launched.run(image.device)
    return image, geometry, windows


def gather(windows: Windows) -> Tensor:
    """The windows (B, L, features), by their strides alone."""
    window, view, image = windows.window, windows.view, windows.image
    padded = F.pad(image, (window.pad_w, window.pad_w + window.kernel_w, window.pad_h, window.pad_h + window.kernel_h))
    size = (len(image), view.grid_h, view.grid_w, window.kernel_h, window.kernel_w, window.channels)
    if windows.block is not None:  # a pixel is as wide as several blocks
        strides = (view.stride_image, view.stride_row, view.stride_col, view.stride_row, view.stride_col, 1)
        return image.as_strided(size, strides).flatten(3).flatten(1, 2)
    steps = padded.unfold(2, window.kernel_h, window.stride_h).unfold(3, window.kernel_w, window.stride_w)
    steps = steps[:, :, : view.grid_h, : view.grid_w]
    order = (0, 2, 3, 4, 5, 1) if window.channels_last else (0, 2, 3, 1, 4, 5)
    return steps.permute(order).flatten(3).flatten(1, 2)


@pytest.mark.parametrize("case", list(CASES))
def test_packed_weights_and_windows_are_in_one_order(case: str) -> None:
    image, geometry, windows = lay(case)
    kernel_size, stride, padding = geometry
    assert (windows.block is not None) == CASES[case][2]
    want = F.unfold(image, kernel_size, padding=padding, stride=stride).transpose(1, 2)
    weight = torch.randn(5, windows.num_values)
    packed, features = pack_weight(weight, windows, torch.float32), windows.window.num_features
    assert packed.shape[0] == 6
    assert packed.shape[1] % 64 == 0
    got = gather(windows)
    assert got.isfinite().all()  # no value of a block is left out
    torch.testing.assert_close(got @ packed[:5, :features].T, want @ weight.T)
    torch.testing.assert_close(got @ packed[5, :features], want.sum(2))  # the marks
    assert packed[:, features:].count_nonzero() == 0
    assert windows.marked == (packed[5].sum() != packed.shape[1])
    assert torch.equal(unpack_weight(packed[:5, :features], windows), weight)


def test_images_that_reach_too_far_are_copied() -> None:
    geometry = Geometry((3, 3), (2, 2), (1, 1))
    image = torch.randn(1, 3, 5, 5)
    assert walkable(image, geometry) is image
    far = torch.empty_strided((2, 3, 5, 5), (75, 25, 2**30, 1), device="meta")
    assert walkable(far, geometry).is_contiguous()
    apart = torch.empty_strided((2, 3, 5, 5), (2**40, 25, 5, 1), device="meta")  # images alone
    assert walkable(apart, geometry) is apart


@pytest.mark.parametrize(
    ("programs", "blocks", "places"), [(1, 49, 264), (128, 49, 396), (200, 49, 264), (9, 1568, 264)]
)
def test_no_other_number_of_ranges_ends_sooner(programs: int, blocks: int, places: int) -> None:
    def time(ranges: int) -> int:
        return -(-programs * ranges // places) * (-(-blocks // ranges) + 1)

    assert time(num_ranges(programs, blocks, places)) == min(map(time, range(1, blocks + 1)))


def test_ranges_of_no_work() -> None:
    assert launch.num_ranges(0, 10, 264) >= 1
    assert launch.num_ranges(5, 0, 264) == 1


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("norm", [False, True])
def test_only_the_pixels_of_a_window_count(kernel_size: int, norm: bool) -> None:
    """The blocks that a window covers hold more pixels than the window."""
    geometry = Geometry((kernel_size, kernel_size), (4, 4), (0, 0))
    assert lay_windows(torch.empty(1, 3, 19, 19), geometry).block == (4, 4)
    image, weight = 1e-3 * torch.randn(1, 3, 19, 19), torch.randn(5, 3 * kernel_size**2)
    image[:, :, 3] = 1000.0  # beyond the windows of 3 x 3, and at the edge of a block of those of 7 x 7
    image[:, :, :, 7] = torch.nan
    gamma = torch.ones(weight.shape[1]) if norm else None
    tensors = (image, weight, None, gamma, None)
    got = ops.soft_split_linear(*tensors, *geometry, eps=1e-12, backend="triton")
    want = ops.soft_split_linear(
        *(None if t is None else t.double() for t in tensors), *geometry, eps=1e-12, backend="reference"
    )
    assert want.isfinite().any()
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3, equal_nan=True)
