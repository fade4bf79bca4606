"""Patch embedding: the convolution that models run, the linear layer it is, and the first layers of vision models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check.draw import Draw
from ..check.op import Call
from ..check.patch_embed import PATCH_EMBED, cut, normalized, plain_patch_embed
from .op import PASSES, Measured, Peer, Series


def _peers(call: Call) -> list[Peer]:
    images, weight = call.tensors["images"], call.tensors["weight"]
    convolution = "conv3d" if weight.dim() == 5 else "conv2d"
    if images.dim() == 2:
        return [Peer(convolution, _convolve_rows), Peer("linear", _linear)]
    if images.dtype == torch.uint8:
        return [
            Peer(f"normalise + {convolution}", plain_patch_embed),
            Peer("normalise + cut + linear", _cut_and_linear),
        ]
    return [Peer(convolution, plain_patch_embed), Peer("cut + linear", _cut_and_linear)]


def _convolve_rows(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As Qwen2-VL's vision tower does it: every row becomes a video of one patch."""
    patches = images.reshape(-1, *weight.shape[1:])
    return F.conv3d(patches, weight, bias, stride=weight.shape[2:]).view(len(images), -1)


def _linear(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(images, weight.flatten(1), bias)


def _cut_and_linear(images, weight, bias=None, mean=None, std=None) -> Tensor:
    if mean is not None:
        images = normalized(images, mean, std, weight).to(weight.dtype)
    return F.linear(cut(images, (1, *weight.shape[2:])), weight.flatten(1), bias)


OPS = (Measured(PATCH_EMBED, _peers, several_peers=True, eager="the convolution, as models run it"),)


@dataclass(frozen=True)
class PatchCase:
    """A batch through the first layer of a vision transformer; gradients of weight and bias, as training wants them."""

    name: str
    images: tuple[int, ...]
    weight: tuple[int, ...]
    op: str = "patch_embed"
    uint8: bool = False
    channels_last: bool = False
    bias: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: tuple[str, ...] = ()
    quick: bool = False
    passes: tuple[str, ...] = PASSES

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        images = draw.bytes(*self.images) if self.uint8 else draw.normal(*self.images).to(dtype)
        images = images.to(device)
        if self.channels_last:
            images = images.to(memory_format=torch.channels_last)
        tensors = {"images": images, "weight": (0.02 * draw.normal(*self.weight)).to(device, dtype)}
        if self.bias:
            tensors["bias"] = draw.normal(self.weight[0]).to(device, dtype)
        differentiable = tuple(tensors)[1:]
        if self.uint8:
            tensors["mean"] = torch.tensor([0.481, 0.458, 0.408], device=device)
            tensors["std"] = torch.tensor([0.269, 0.261, 0.276], device=device)
        return Call(tensors, {}, differentiable)

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        batch = self.images[:1] if len(self.images) > 2 else ()
        tokens = self._patches // (batch[0] if batch else 1)
        return draw.normal(*batch, tokens, self.weight[0]).to(call.tensors["weight"])

    def flops(self, direction: str) -> int:
        products = 2 if direction == "fwd_bwd" else 1
        return 2 * products * self._patches * self.weight[0] * self._pixels

    def bytes(self, direction: str, call: Call) -> int:
        images, weight = call.tensors["images"], call.tensors["weight"]
        once = images.nbytes + weight.nbytes + self._patches * self.weight[0] * weight.element_size()
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        return 4 * self.bytes(direction, call)

    @property
    def _pixels(self) -> int:
        return torch.Size(self.weight[1:]).numel()

    @property
    def _patches(self) -> int:
        if len(self.images) == 2:
            return self.images[0]
        batch, _, height, width = self.images
        return batch * (height // self.weight[-2]) * (width // self.weight[-1])


_B16, _L14, _QWEN = (768, 3, 16, 16), (1024, 3, 14, 14), (1280, 3, 2, 14, 14)
_B16_BATCH, _L14_BATCH, _GPU_BATCH = (32, 3, 224, 224), (16, 3, 336, 336), (256, 3, 224, 224)
_GPU = ("cuda",)

CASES = (
    PatchCase("2x224-p16", (2, 3, 224, 224), (192, 3, 16, 16), devices=(), quick=True),
    PatchCase("2x224-p16-uint8", (2, 3, 224, 224), (192, 3, 16, 16), uint8=True, devices=(), quick=True),
    PatchCase("32x224-p16", _B16_BATCH, _B16),
    PatchCase("32x224-p16-uint8", _B16_BATCH, _B16, uint8=True, compiled=("cpu",)),
    PatchCase("32x224-p16-channels_last", _B16_BATCH, _B16, channels_last=True),
    PatchCase("16x336-p14", _L14_BATCH, _L14),
    PatchCase("qwen2vl-rows-4096", (4096, 1176), _QWEN, bias=False),
    PatchCase("256x224-p16", _GPU_BATCH, _B16, devices=_GPU, compiled=_GPU),
    PatchCase("256x224-p16-uint8", _GPU_BATCH, _B16, uint8=True, devices=_GPU, compiled=_GPU),
    PatchCase("qwen2vl-rows-65536", (65536, 1176), _QWEN, bias=False, devices=_GPU),
)

_PICTURES = {n: PatchCase(f"{n}x224-p16", (n, 3, 224, 224), _B16) for n in (1, 2, 4, 8, 16, 32, 64)}
GROWTH = (Series("patch_embed", "pictures", "pictures of 224 x 224, patches of 16, 768 features", _PICTURES),)
