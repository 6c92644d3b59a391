"""Soft split as one copy, and soft split, LayerNorm and Linear as one convolution: the long token never exists.

For a window u of n values, centred weights W_c = W diag(gamma) minus each row's mean absorb the LayerNorm's mean::

    Linear(LayerNorm(u)) = rstd(u) (W_c u) + (W beta + bias)

W_c u for all windows is a convolution of the image; only one variance per window is left, and that is separable.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import compute_dtype, ieee_float32, no_autocast, product_dtype
from ..common.autograd import (
    add_to,
    backward_by_hand,
    differentiable_backward,
    is_exporting,
    may_overwrite,
    wants_hand_written_backward,
)
from ..common.norm import Norm
from .arguments import Geometry, Pair, Split
from .reference import as_image, window_grid


def soft_split(x: Tensor, geometry: Geometry, grid: Pair | None) -> Tensor:
    """Tokens (B, L, C*kh*kw), contiguous.

    One copy through a strided view of the windows, where unfold needs a copy and a transpose.
    """
    kernel_size, stride, padding = geometry
    image = as_image(x, grid)
    if any(padding):
        image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]))
    rows = _windows_along(image, 2, kernel_size[0], stride[0])
    windows = _windows_along(rows, 3, kernel_size[1], stride[1])  # (B, C, h, w, kh, kw)
    return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _windows_along(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """``x.unfold(dim, size, step)``: the windows along ``dim``, their values in a new last dimension.

    Traced graphs get slices, and exported ones a copy: ONNX has no such view, and nothing can be told of its strides
    where sizes are open.
    """
    if torch.jit.is_tracing():
        span = (x.shape[dim] - size) // step * step + 1
        return torch.stack([x[(slice(None),) * dim + (slice(i, i + span, step),)] for i in range(size)], dim=-1)
    views = x.unfold(dim, size, step)
    return views.clone(memory_format=torch.contiguous_format) if is_exporting() else views


def soft_split_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: Split) -> Tensor:
    """(B, L, out); see :func:`t2t_fast.ops.soft_split_linear`."""
    image, geometry, norm = as_image(x, split.grid), split.geometry, split.norm
    if norm is None:
        return _to_tokens(_convolve(image, weight, bias, geometry))
    dtype = compute_dtype(x, weight)
    with no_autocast(x):
        centred, offset = centred_and_offset(weight, bias, norm, dtype)
    if product_dtype(x) in (torch.float16, torch.bfloat16):
        with no_autocast(x):
            mean, rstd, varied = window_statistics(image.to(dtype), geometry, norm.eps)
        y = _convolve(image, centred.to(weight.dtype), None, geometry)
        # Rows of a rounded W_c no longer sum to zero: take out what a window's mean leaves behind (flat windows).
        residue = centred.to(y.dtype).to(dtype).sum(dim=1)
        if may_overwrite(image, y, rstd, offset):
            scaled = y.to(dtype).addcmul_(mean, residue[:, None, None], value=-1).mul_(rstd * varied)
            return _to_tokens(scaled.add_(offset[:, None, None]).to(y.dtype))
        products = _zero_unless(varied, y - mean * residue[:, None, None], image.requires_grad)
        return _to_tokens((products * rstd + offset[:, None, None]).to(y.dtype))
    if wants_hand_written_backward(image, centred, offset) and not _convolves_in_tf32(image):
        return _to_tokens(_NormedConvolution.apply(image, centred, offset, geometry, norm.eps)[0])
    return _to_tokens(_normed_convolution(image, centred, offset, geometry, norm.eps)[0])


def centred_and_offset(weight: Tensor, bias: Tensor | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """:func:`fold_norm`, where W_c without gamma is centred, too."""
    centred, offset = fold_norm(weight, bias, norm, dtype)
    if norm.weight is None:  # folded weights were cast after centring, and their rows no longer sum to 0
        centred = centred.to(dtype)
        centred = centred - centred.mean(dim=1, keepdim=True)
    return centred, offset


def fold_norm(weight: Tensor, bias: Tensor | None, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W_c (out, n) and the constant W beta + bias (out,), in ``dtype``; without gamma ``weight`` as it is."""
    offset = weight.new_zeros(weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
    if norm.weight is None:
        return weight, offset
    weight = weight.to(dtype)
    scaled = weight * norm.weight.to(dtype)
    if norm.bias is not None:
        offset = offset + weight @ norm.bias.to(dtype)
    return scaled - scaled.mean(dim=1, keepdim=True), offset


def _normed_convolution(
    image: Tensor, centred: Tensor, offset: Tensor, geometry: Geometry, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``rstd (W_c u) + offset`` as an image (B, out, h, w), and :func:`window_statistics`."""
    mean, rstd, varied = window_statistics(image, geometry, eps)
    y = _convolve(image, centred, None, geometry)
    # In place where possible: these are the largest tensors of the model.
    y = y.mul_(rstd * varied) if may_overwrite(y, rstd) else _zero_unless(varied, y, image.requires_grad) * rstd
    return add_to(y, offset[:, None, None]), mean, rstd, varied


def _zero_unless(varied: Tensor, products: Tensor, keep_gradient: bool) -> Tensor:
    """W_c u, exactly 0 on constant windows, where it is pure rounding and rstd is largest.

    The weights' gradients are 0 there too, but not the image's: ``keep_gradient`` zeroes only the value and lets all
    gradients through.
    """
    keep_gradient = keep_gradient or torch.jit.is_tracing()  # with and without gradients the graph must be the same
    zero = products - products.detach() if keep_gradient else products.new_zeros(())
    return torch.where(varied, products, zero)


class _NormedConvolution(torch.autograd.Function):
    """:func:`_normed_convolution` with a backward by hand.

    Backward takes W_c u from the result and stores no window-sized tensor.

    With g the incoming gradient: ``dW_c`` and a first part of dx are the convolution's for ``g rstd``. The variance
    of a window gets ``dvar = -rstd²/2 Σ_out g (out - offset)``, and gives ``2/n dvar (x - mean)`` to each of its
    values; summed over the windows that cover a value this is x times one map minus another.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _normed_convolution(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the outputs that backward keeps
        ctx.mark_non_differentiable(*output[1:])
        image, centred, offset, ctx.geometry, ctx.eps = inputs
        ctx.save_for_backward(image, centred, offset, *output)

    @staticmethod
    @backward_by_hand
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, centred, offset, out, mean, rstd, varied = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (image, centred, offset, ctx.geometry, ctx.eps)
            return differentiable_backward(lambda *args: _normed_convolution(*args)[0], inputs, grad)
        needs_dx, needs_dw, needs_d_offset, *_ = ctx.needs_input_grad
        _, stride, padding = ctx.geometry
        dx: Any = None
        d_kernel: Any = None
        # Where only the weights want a gradient, in chunks: ``g rstd`` of a few images at a time is enough.
        size = grad.shape[0] if needs_dx or not grad.shape[0] else 4
        scale = rstd if needs_dx else rstd * varied
        for g, r, x in zip(grad.split(size), scale.split(size), image.split(size), strict=True):
            dx, part, _ = torch.ops.aten.convolution_backward(
                g * r, x, _kernel(centred, x, ctx.geometry), None, stride, padding,
                (1, 1), False, (0, 0), 1, (needs_dx, needs_dw, False),
            )  # fmt: skip
            d_kernel = part if d_kernel is None else d_kernel.add_(part)
        if needs_dx:
            d_var = (grad * (out - offset[:, None, None])).sum(dim=1, keepdim=True) * rstd.square() * -0.5
            share = d_var * (2 / centred.shape[1])
            maps = _cover(torch.cat((share, share * mean), dim=1), image, ctx.geometry)
            dx = dx.addcmul_(image, maps[:, :1]).sub_(maps[:, 1:])
        d_centred = None if d_kernel is None else d_kernel.flatten(1)
        d_offset = grad.sum(dim=(0, 2, 3)) if needs_d_offset else None
        return dx, d_centred, d_offset, None, None


def _cover(maps: Tensor, image: Tensor, geometry: Geometry) -> Tensor:
    """For each pixel of ``image`` the sum of ``maps`` (B, c, h, w) over the windows that cover it."""
    kernel_size, stride, padding = geometry
    area = kernel_size[0] * kernel_size[1]
    columns = maps.flatten(2).repeat_interleave(area, dim=1)
    return F.fold(columns, image.shape[2:], kernel_size, padding=padding, stride=stride)


def window_statistics(image: Tensor, geometry: Geometry, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 1/sqrt(variance + eps) of every window, and whether it varies at all, (B, 1, h, w) each.

    Zeros of the padding count. A window is constant if its values deviate by no more than the rounding of its mean.

    Over channels, then over window columns, then over window rows, by the law of total variance: the variance of a
    union of equal groups is the mean of their variances plus the variance of their means. No difference of large
    squares occurs, so constant and nearly constant windows keep their variance.
    """
    kernel_size, stride, padding = geometry
    mean = image.mean(dim=1, keepdim=True)
    deviation = image - mean
    var = (deviation.square_() if may_overwrite(deviation) else deviation.square()).mean(dim=1)
    mean = mean.squeeze(1)
    if any(padding):
        margins = (padding[1], padding[1], padding[0], padding[0])
        mean, var = F.pad(mean, margins), F.pad(var, margins)
    for dim, size, step in ((2, kernel_size[1], stride[1]), (1, kernel_size[0], stride[0])):
        means = _windows_along(mean, dim, size, step)
        mean = means.mean(dim=-1)
        var = _windows_along(var, dim, size, step).mean(dim=-1) + (means - mean.unsqueeze(-1)).square().mean(dim=-1)
    varied = var > (4 * torch.finfo(mean.dtype).eps * mean).square()
    return mean.unsqueeze(1), torch.rsqrt(var + eps).unsqueeze(1), varied.unsqueeze(1)


def _convolve(image: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if _convolves_in_tf32(image):
        return _multiply_windows(image, weight, bias, geometry)
    return F.conv2d(image, _kernel(weight, image, geometry), bias, geometry.stride, geometry.padding)


def _convolves_in_tf32(image: Tensor) -> bool:
    """Whether a convolution could be TF32 though float32 matmuls must not: cuDNN has a switch of its own."""
    return image.is_cuda and product_dtype(image) == torch.float32 and ieee_float32()


def _multiply_windows(image: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution as a matmul over the windows, (B, out, h, w) in channels-last order."""
    tokens = F.linear(soft_split(image, geometry, None), weight, bias)
    grid = window_grid(image.shape[2:], geometry)
    return tokens.transpose(1, 2).unflatten(2, grid)


def _kernel(weight: Tensor, image: Tensor, geometry: Geometry) -> Tensor:
    """Linear weights (out, C*kh*kw) as a convolution's.

    Channels-last, which makes the output channels-last: that is the token order (B, L, out) already.
    """
    return weight.unflatten(1, (image.shape[1], *geometry.kernel_size)).contiguous(memory_format=torch.channels_last)


def _to_tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)
