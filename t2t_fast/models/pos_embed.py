"""The fixed sinusoid position table and its interpolation to other grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.types import Device

from ..numerics import compute_dtype

# (built grid, grid, device, dtype) to (source table, its version, resized table)
TableCache = dict[tuple[object, ...], tuple[Tensor, int, Tensor]]


def sinusoid_table(num_positions: int, dim: int, device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The table of "Attention is all you need" §3.5, (1, num_positions, dim): sine at even, cosine at odd.

    Computed on the CPU in float64, which some devices lack. ``device=None`` means torch's default device.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return torch.empty(1, num_positions, dim, device=device, dtype=dtype)
    position = torch.arange(num_positions, dtype=torch.float64, device="cpu").unsqueeze(1)
    exponent = 2 * torch.arange(dim, dtype=torch.float64, device="cpu").div(2, rounding_mode="floor") / dim
    angle = position / 10000**exponent
    table = torch.where(torch.arange(dim, device="cpu") % 2 == 0, angle.sin(), angle.cos())
    return table.unsqueeze(0).to(device, dtype)


def resize_table(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A (1, 1 + h*w, dim) table, cls row first, interpolated bicubically from ``old_grid`` to ``new_grid``.

    Without antialiasing, as in the original. In a graph with open sizes the table is always interpolated: bicubic
    interpolation to the same grid changes nothing.
    """
    sizes = zip(old_grid, new_grid, strict=True)
    if not torch.jit.is_tracing() and all(statically_known_true(old == new) for old, new in sizes):
        return table
    dtype = compute_dtype(table)  # some devices lack interpolation in 16 bits
    rows = table[:, 1:].to(dtype).unflatten(1, old_grid).permute(0, 3, 1, 2)
    rows = F.interpolate(rows, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], rows.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def table_for_grid(
    table: Tensor,
    built_grid: tuple[int, int],
    grid: tuple[int, int],
    dynamic: bool,
    cache: TableCache | None = None,
) -> Tensor:
    """The position table for images of ``grid``, resized from ``built_grid`` where they differ.

    Args:
        table: The model's position table.
        built_grid: Height and width of the model's grid, in tokens.
        grid: Those of the image.
        dynamic: Accept other grids.
        cache: Keeps resized tables for later calls.

    Raises:
        ValueError: The grids differ, and ``dynamic`` is off.
    """
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if dynamic and in_graph:  # its sizes may be open: one formula for all
        return resize_table(table, built_grid, grid)
    if tuple(grid) == tuple(built_grid):
        return table
    if not dynamic:
        raise ValueError(
            f"the image makes a token grid of {tuple(grid)}, the model was built for {tuple(built_grid)}; pass "
            "img_size=(H, W) when creating the model, or dynamic_img_size=True for images of varying size"
        )
    if cache is None or table.requires_grad or table.is_inference():
        return resize_table(table, built_grid, grid)
    # Keep the source table alive: equal data_ptr means same storage, equal _version means unmodified.
    key = (tuple(built_grid), tuple(grid), table.device, table.dtype)
    source, version, resized = cache.get(key, (None, 0, None))
    if source is None or resized is None or (source.data_ptr(), version) != (table.data_ptr(), table._version):
        if source is not None or len(cache) >= 16:
            cache.clear()
        resized = resize_table(table.detach(), built_grid, grid)
        cache[key] = (table.detach(), table._version, resized)
    return resized
