"""The minimal work of each kernel: floating-point operations, and bytes, each read or written once."""

from __future__ import annotations

from dataclasses import dataclass

from .windows import View, Window


@dataclass(frozen=True)
class Cost:
    """Work that no implementation can avoid."""

    flops: int
    bytes: int

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Seconds for the bytes or for the operations, whichever takes longer, at these rates."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def soft_split_linear(batch: int, window: Window, view: View, out: int, itemsize: int, norm: bool) -> dict[str, Cost]:
    """Costs by name: forward in inference and in training, and the two halves of backward.

    Args:
        batch: Images.
        window: Kernel size, stride, padding and channels.
        view: Sizes of the image and of the grid of windows.
        out: Width of the resulting tokens.
        itemsize: Bytes per value of image, weight and tokens; sums and statistics have 4.
        norm: Whether there is a LayerNorm.
    """
    num_tokens = batch * view.grid_h * view.grid_w
    image = batch * window.channels * view.height * view.width * itemsize
    tokens, weight = num_tokens * out * itemsize, window.num_features * out * itemsize
    statistics = 2 * 4 * num_tokens if norm else 0
    flops = 2 * num_tokens * window.num_features * out
    return {
        "forward": Cost(flops, image + weight + tokens),
        "forward, training": Cost(flops, image + weight + tokens + statistics),
        "backward weight": Cost(flops, image + tokens + statistics + 4 * window.num_features * out),
        "backward input": Cost(flops, 2 * image + weight + (2 if norm else 1) * tokens + statistics),
    }


def soft_split_performer(
    batch: int, window: Window, view: View, dim: int, features: int, hidden: int, itemsize: int
) -> dict[str, Cost]:
    """Costs of a whole stage by name: forward, and backward without and with the image's gradient.

    Args:
        batch: Images.
        window: Kernel size, stride, padding and channels.
        view: Sizes of the image and of the grid of windows.
        dim: Width E of the resulting tokens.
        features: Number m of random features.
        hidden: Width of the MLP's hidden layer.
        itemsize: Bytes per value of image, weights and tokens.
    """
    num_tokens = batch * view.grid_h * view.grid_w
    image = batch * window.channels * view.height * view.width * itemsize
    tokens = num_tokens * dim * itemsize
    weights = (3 * window.num_features + dim + 2 * hidden) * dim * itemsize
    split = 2 * num_tokens * window.num_features * 3 * dim
    layer = 2 * num_tokens * dim * (4 * features + dim + 2 * hidden)
    return {
        "forward": Cost(split + layer, image + weights + tokens),
        "backward": Cost(split + 2 * layer, image + 2 * weights + tokens),
        "backward with input": Cost(2 * split + 2 * layer, 2 * image + 2 * weights + tokens),
    }
