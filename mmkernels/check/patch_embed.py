"""Patch embedding: what eager PyTorch writes, and the cases."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.patch_embed import patch_embed
from .draw import DTYPES, Draw
from .op import Call, Op
from .poison import guarded


def plain_patch_embed(
    images, weight, bias=None, *, pos_embed=None, prefix=None, mean=None, std=None, layout="chw", rounding=None
):  # fmt: skip
    """The strided convolution of a vision model, or the linear layer where the patches come as rows.

    rounding: pixels are converted to the dtype of the weight.
    """
    if images.dtype == torch.uint8:
        images = normalized(images, mean, std, weight, layout)
    images = images.to(rounding or weight.dtype).to(weight.dtype)
    if images.dim() >= 4 and weight.dim() >= 4:
        tokens = _convolution(images, weight, bias)
    elif images.dim() >= 4:
        side = math.isqrt(weight.shape[1] // images.shape[1])
        tokens = F.linear(cut(images, (1, side, side), layout), weight, bias)
    else:
        tokens = F.linear(images, _rows(weight, layout), bias)
    num_prefix = 0 if prefix is None else len(prefix)
    if pos_embed is not None and len(pos_embed) == tokens.shape[-2]:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], 1)
    if pos_embed is not None and num_prefix and len(pos_embed) == tokens.shape[-2]:
        tokens = tokens + pos_embed
    return tokens


def _convolution(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, [T,] H, W) -> (B, N, E) by the convolution the checkpoint's weight belongs to."""
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    return convolve(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def cut(images: Tensor, patch: tuple[int, int, int], layout: str = "chw") -> Tensor:
    """(B, C, [T,] H, W) -> (B, N, K): one row a patch, its pixels in the order that `layout` names."""
    if images.dim() == 4:
        images = images.unsqueeze(2)
    batch, channels, *sizes = images.shape
    grid = [size // step for size, step in zip(sizes, patch, strict=True)]
    (t, y, x), (gt, gy, gx) = patch, grid
    images = images[:, :, : gt * t, : gy * y, : gx * x].reshape(batch, channels, gt, t, gy, y, gx, x)
    inner = {"chw": (1, 3, 5, 7), "hwc": (3, 5, 7, 1), "tchw": (3, 1, 5, 7)}[layout]
    return images.permute(0, 2, 4, 6, *inner).reshape(batch, gt * gy * gx, -1)


def _rows(weight: Tensor, layout: str = "chw") -> Tensor:
    """The weight as (E, K), its columns in the order that `layout` names; an (E, K) weight is in it already."""
    if weight.dim() == 2:
        return weight
    if weight.dim() == 4:
        weight = weight.unsqueeze(2)
    order = {"chw": (0, 1, 2, 3, 4), "hwc": (0, 2, 3, 4, 1), "tchw": (0, 2, 1, 3, 4)}[layout]
    return weight.permute(order).flatten(1)


def normalized(images: Tensor, mean: Tensor, std: Tensor, weight: Tensor, layout: str = "chw") -> Tensor:
    """uint8 -> (images / 255 - mean) / std in float32 (float64 for a float64 weight), before it is rounded."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if images.dim() >= 4:
        shape = (-1, *[1] * (images.dim() - 2))
        return (images.to(wide) / 255 - mean.view(shape)) / std.view(shape)
    channel = _channel_of_column(len(mean), images.shape[-1], weight, layout)
    return (images.to(wide) / 255 - mean[channel]) / std[channel]


def _channel_of_column(channels: int, columns: int, weight: Tensor, layout: str) -> Tensor:
    """Which channel each column of rows already cut belongs to."""
    if layout == "hwc":
        return torch.arange(columns, device=weight.device) % channels
    frames = weight.shape[2] if layout == "tchw" and weight.dim() == 5 else 1
    pixels = columns // (channels * frames)
    return torch.arange(columns, device=weight.device) // pixels % channels


PATCH_EMBED = Op(
    "patch_embed",
    ("tokens",),
    patch_embed,
    plain_patch_embed,
    typed_by="weight",
    seconds=(0.06, 2.5),
    exact=("tokens", "d_images", "d_weight", "d_bias", "d_pos_embed", "d_prefix"),
    rounds=True,
    plain_reference=True,
)
OPS = (PATCH_EMBED,)


@dataclass(frozen=True)
class PatchCase:
    name: str
    images: tuple[int, ...]
    weight: tuple[int, ...]
    op: str = "patch_embed"
    image_dtype: torch.dtype | None = None  # None: the weight's
    memory: str = "plain"
    weight_memory: str = "plain"
    bias: bool = True
    positions: int = 0  # rows of pos_embed
    prefix: int = 0
    layout: str = "chw"
    channels: int = 3  # of mean and std
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    plain_draws: int = 0

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        features, fan_in = self.weight[0], torch.Size(self.weight[1:]).numel()
        tensors = {"images": self._images(draw, dtype, device)}
        tensors["weight"] = guarded((draw.normal(*self.weight) * fan_in**-0.5).to(device, dtype), self.weight_memory)
        additions = {"bias": (features,) if self.bias else None}
        additions["pos_embed"] = (self.positions, features) if self.positions else None
        additions["prefix"] = (self.prefix, features) if self.prefix else None
        for name, shape in additions.items():
            if shape:
                tensors[name] = guarded(draw.normal(*shape).to(device, dtype))
        differentiable = tuple(tensors)
        if self.image_dtype == torch.uint8:
            differentiable = differentiable[1:]
            tensors["mean"] = guarded((0.45 + 0.03 * draw.normal(self.channels)).float().to(device))
            tensors["std"] = guarded((0.25 + 0.01 * draw.normal(self.channels)).float().to(device))
        return Call(tensors, {"layout": self.layout}, differentiable)

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        return draw.normal(*result.shape)

    def _images(self, draw: Draw, dtype: torch.dtype, device: str) -> Tensor:
        if self.image_dtype == torch.uint8:
            return guarded(draw.bytes(*self.images).to(device), self.memory)
        return guarded(draw.normal(*self.images).to(device, self.image_dtype or dtype), self.memory)


_UINT8 = {"image_dtype": torch.uint8}
CASES = (
    PatchCase("P16", (2, 3, 32, 48), (40, 3, 16, 16)),
    PatchCase("P14, edge left over", (2, 3, 33, 45), (37, 3, 14, 14), positions=6),
    PatchCase("P8, one channel, no bias", (3, 1, 27, 16), (19, 1, 8, 8), bias=False, quick=True),
    PatchCase("P16, four channels", (1, 4, 32, 48), (24, 4, 16, 16)),
    PatchCase("one patch", (1, 3, 14, 14), (33, 3, 14, 14)),
    PatchCase("one feature", (2, 3, 28, 42), (1, 3, 14, 14)),
    PatchCase("P1", (2, 3, 5, 7), (9, 3, 1, 1), plain_draws=28),
    PatchCase("patches 8 x 14", (2, 3, 24, 43), (35, 3, 8, 14)),
    PatchCase("E 130, 300 patches", (3, 3, 70, 70), (130, 3, 7, 7), positions=100),
    PatchCase("E 272, K 768", (2, 3, 112, 96), (272, 3, 16, 16), positions=42),
    PatchCase("class token, positions for all", (2, 3, 10, 17), (36, 3, 5, 5), prefix=1, positions=7, quick=True),
    PatchCase("four tokens, positions of patches", (2, 3, 28, 42), (36, 3, 14, 14), prefix=4, positions=6),
    PatchCase("tokens only", (2, 3, 28, 28), (36, 3, 14, 14), prefix=2, bias=False),
    PatchCase("channels_last", (2, 3, 32, 50), (40, 3, 16, 16), memory="channels_last", weight_memory="channels_last"),
    PatchCase("crop", (2, 3, 17, 26), (21, 3, 8, 8), memory="crop", quick=True),
    PatchCase("columns", (2, 3, 24, 40), (21, 3, 8, 8), memory="columns", weight_memory="columns"),
    PatchCase("strided", (2, 3, 24, 40), (21, 3, 8, 8), memory="strided", weight_memory="odd"),
    PatchCase("one image repeated", (3, 3, 16, 24), (21, 3, 8, 8), memory="expanded"),
    PatchCase("beyond 2^31", (3, 3, 16, 24), (21, 3, 8, 8), memory="far", dtypes=(torch.bfloat16,)),
    PatchCase("video", (2, 3, 4, 12, 13), (21, 3, 2, 6, 6), quick=True),
    PatchCase("video, frame left over", (1, 3, 5, 16, 24), (18, 3, 2, 8, 8), positions=12, memory="channels_last"),
    PatchCase("rows of a linear layer", (17, 588), (40, 588)),
    PatchCase("rows, K 75", (70, 75), (22, 75), quick=True),
    PatchCase("rows, hwc, Conv2d", (17, 192), (30, 3, 8, 8), layout="hwc", quick=True),
    PatchCase("rows, chw, Conv3d", (19, 1176), (72, 3, 2, 14, 14), bias=False),
    PatchCase("rows, tchw, Conv3d", (19, 384), (20, 3, 2, 8, 8), layout="tchw"),
    PatchCase("rows, hwc, Conv3d", (19, 384), (20, 3, 2, 8, 8), layout="hwc"),
    PatchCase("rows in batches", (2, 9, 192), (30, 192), prefix=1, positions=10),
    PatchCase("rows, columns in memory", (33, 75), (22, 3, 5, 5), memory="columns"),
    PatchCase("rows, strided", (33, 75), (22, 3, 5, 5), memory="strided", weight_memory="strided"),
    PatchCase("images to a linear layer", (2, 3, 28, 42), (25, 588)),
    PatchCase("images to a linear layer, hwc", (2, 3, 16, 24), (25, 192), layout="hwc"),
    PatchCase("float32 images", (2, 3, 28, 30), (37, 3, 14, 14), image_dtype=torch.float32),
    PatchCase("bfloat16 images", (2, 3, 28, 30), (37, 3, 14, 14), image_dtype=torch.bfloat16),
    PatchCase("float16 images", (2, 3, 28, 30), (37, 3, 14, 14), image_dtype=torch.float16),
    PatchCase("uint8, P14", (2, 3, 30, 44), (37, 3, 14, 14), positions=6, **_UINT8),
    PatchCase("uint8, P7", (2, 3, 16, 22), (37, 3, 7, 7), positions=6, quick=True, **_UINT8),
    PatchCase("uint8, channels_last", (2, 3, 32, 48), (40, 3, 16, 16), memory="channels_last", **_UINT8),
    PatchCase("uint8, crop, one channel", (2, 1, 21, 30), (26, 1, 8, 8), channels=1, memory="crop", **_UINT8),
    PatchCase("uint8, rows, hwc", (17, 192), (30, 3, 8, 8), layout="hwc", **_UINT8),
    PatchCase("uint8, rows of a linear layer", (17, 192), (30, 192), **_UINT8),
    PatchCase("uint8, rows of a linear layer, hwc", (17, 192), (30, 192), layout="hwc", **_UINT8),
    PatchCase("uint8, rows, tchw", (17, 384), (30, 3, 2, 8, 8), layout="tchw", **_UINT8),
    PatchCase("uint8, video", (1, 3, 4, 16, 24), (21, 3, 2, 8, 8), prefix=1, **_UINT8),
    PatchCase("uint8, beyond 2^31", (3, 3, 16, 24), (21, 3, 8, 8), memory="far", dtypes=(torch.float32,), **_UINT8),
)
