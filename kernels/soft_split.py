"""Soft split: overlapping windows gathered from an image or token grid straight into tokens, and back.

Forward writes each token once; the image of a token grid and the transposed unfold of the literal form are never
written. Backward is a gather as well: every pixel sums, in a fixed order, the windows that cover it, so no atomics and
no zero-filled buffer are needed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, Launch
from .windows import GROW_WITH_THE_BATCH, View, Window, load_patches, locate_windows

# Copies: one configuration does for every chip and dtype.
_FORWARD = Config({"BLOCK_TOKENS": 32, "BLOCK_FEATURES": 64}, num_warps=4, num_stages=1)
_BACKWARD = Config({"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 16}, num_warps=8, num_stages=1)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_forward_kernel(
    image_ptr,
    tokens_ptr,
    num_tokens,
    view,
    WINDOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
):
    offs_token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    offs_feature = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    num_features = WINDOW.channels * WINDOW.kernel_h * WINDOW.kernel_w
    window_ptrs, top, left = locate_windows(image_ptr, offs_token, num_tokens, view, WINDOW)
    patches = load_patches(window_ptrs, top, left, offs_feature, view, WINDOW, True)
    ptrs = tokens_ptr + offs_token.to(tl.int64)[:, None] * num_features + offs_feature[None, :]
    mask = (offs_token < num_tokens)[:, None] & (offs_feature < num_features)[None, :]
    tl.store(ptrs, patches.to(tokens_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=GROW_WITH_THE_BATCH)
def _soft_split_backward_kernel(
    grad_ptr,
    d_image_ptr,
    num_pixels,
    stride_grad_image,
    stride_grad_token,
    stride_grad_feature,
    view,
    WINDOW: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    offs_pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    image = (offs_pixel // (view.height * view.width)).to(tl.int64)
    row = offs_pixel % (view.height * view.width) // view.width
    col = offs_pixel % view.width
    mask = (offs_pixel < num_pixels)[:, None] & (channel < WINDOW.channels)[None, :]
    accumulator: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), accumulator)
    for a in tl.static_range((WINDOW.kernel_h + WINDOW.stride_h - 1) // WINDOW.stride_h):
        for b in tl.static_range((WINDOW.kernel_w + WINDOW.stride_w - 1) // WINDOW.stride_w):
            grid_row = (row + WINDOW.pad_h) // WINDOW.stride_h - a
            grid_col = (col + WINDOW.pad_w) // WINDOW.stride_w - b
            i = row + WINDOW.pad_h - grid_row * WINDOW.stride_h
            j = col + WINDOW.pad_w - grid_col * WINDOW.stride_w
            covers = (grid_row >= 0) & (grid_row < view.grid_h) & (i < WINDOW.kernel_h)
            covers &= (grid_col >= 0) & (grid_col < view.grid_w) & (j < WINDOW.kernel_w)
            token_ptrs = (
                grad_ptr
                + image * stride_grad_image
                + (grid_row * view.grid_w + grid_col).to(tl.int64) * stride_grad_token
                + (i * WINDOW.kernel_w + j).to(tl.int64) * stride_grad_feature
            )
            offs_channel = (channel * (WINDOW.kernel_h * WINDOW.kernel_w)).to(tl.int64) * stride_grad_feature
            grad = tl.load(token_ptrs[:, None] + offs_channel[None, :], mask=mask & covers[:, None], other=0.0)
            total += grad.to(accumulator)
    offs_position = image * view.stride_image + row.to(tl.int64) * view.stride_row + col.to(tl.int64) * view.stride_col
    ptrs = d_image_ptr + offs_position[:, None] + (channel.to(tl.int64) * view.stride_channel)[None, :]
    tl.store(ptrs, total.to(d_image_ptr.dtype.element_ty), mask=mask)


def forward_launch(image: Tensor, tokens: Tensor, view: View, window: Window) -> Launch:
    """Fill ``tokens`` (B, L, C*kh*kw), contiguous, from ``image`` (B, C, H, W) of any strides."""
    num_tokens = image.shape[0] * view.grid_h * view.grid_w
    blocks = _FORWARD.blocks
    grid = (
        triton.cdiv(num_tokens, blocks["BLOCK_TOKENS"]),
        triton.cdiv(window.num_features, blocks["BLOCK_FEATURES"]),
    )
    return Launch(_soft_split_forward_kernel, grid, (image, tokens, num_tokens, view), {"WINDOW": window}, _FORWARD)


def backward_launch(grad: Tensor, d_image: Tensor, view: View, window: Window) -> Launch:
    """Fill ``d_image`` (B, C, H, W), whose strides ``view`` holds, from ``grad`` (B, L, C*kh*kw) of any strides."""
    num_pixels = d_image.shape[0] * view.height * view.width
    blocks = _BACKWARD.blocks
    grid = (
        triton.cdiv(num_pixels, blocks["BLOCK_PIXELS"]),
        triton.cdiv(window.channels, blocks["BLOCK_CHANNELS"]),
    )
    args = (grad, d_image, num_pixels, *grad.stride(), view)
    return Launch(_soft_split_backward_kernel, grid, args, {"WINDOW": window}, _BACKWARD)
