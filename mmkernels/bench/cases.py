"""What is measured: the sizes of real training runs and real models, and what each costs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check.cases import OPS
from ..check.draw import Draw
from ..check.op import Call
from .attention_cases import ATTENTION, AttentionCase, attend

PASSES = ("fwd", "fwd_bwd")
DTYPES = (torch.float32, torch.bfloat16)  # measured unless others are asked for


@dataclass(frozen=True)
class LossCase:
    """A contrastive loss over N pairs of unit features of D numbers, at the scale CLIP's training ends with."""

    op: str
    pairs: int
    width: int
    devices: tuple[str, ...] = ("cpu", "cuda")  # measured there unless others are asked for
    compiled: tuple[str, ...] = ()  # devices where torch.compile of a peer is one too; each takes half a minute
    quick: bool = False
    passes: tuple[str, ...] = PASSES

    @property
    def name(self) -> str:
        return f"{self.pairs}x{self.width}"

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        features = [F.normalize(draw.normal(self.pairs, self.width).to(device).float()).to(dtype) for _ in range(2)]
        tensors = dict(zip(("image_features", "text_features"), features, strict=True))
        scale = {"clip_loss": 100.0, "siglip_loss": 10.0}[self.op]
        tensors["logit_scale"] = torch.tensor(scale, device=device)
        if self.op == "siglip_loss":
            tensors["logit_bias"] = torch.tensor(-10.0, device=device)
        return Call(tensors, {}, tuple(tensors))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        return torch.ones((), device=call.tensors["logit_scale"].device)

    def flops(self, direction: str) -> int:
        """The least: the logits once, and with gradients both features' products with them. Who cannot keep N x N
        logits between the sums and the gradients of CLIP computes them twice, at the cost of its own fraction."""
        products = 3 if direction == "fwd_bwd" else 1
        return 2 * products * self.pairs**2 * self.width

    def bytes(self, direction: str, call: Call) -> int:
        features = 2 * self.pairs * self.width * call.tensors["image_features"].element_size()
        return features * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        """About what eager PyTorch holds at its peak: matrices of N x N, two of logits and what autograd keeps."""
        matrices = 6 if direction == "fwd_bwd" else 4
        return matrices * self.pairs**2 * call.tensors["image_features"].element_size()


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


@dataclass(frozen=True)
class RotaryCase:
    """Queries and keys of a layer side by side in its fused projection, as (tokens, heads of both, numbers a head)."""

    name: str
    tokens: int
    heads: int
    dim: int
    op: str = "rotary_embed"
    interleaved: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: tuple[str, ...] = ()
    quick: bool = False
    passes: tuple[str, ...] = PASSES

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        projected = draw.normal(self.tokens, self.heads * 3 // 2, self.dim).to(device, dtype)
        angles = draw.normal(self.tokens, self.dim // 2).to(device)
        angles = angles.repeat_interleave(2, 1) if self.interleaved else angles.repeat(1, 2)
        tensors = {"x": projected[:, : self.heads], "cos": angles.cos().float(), "sin": angles.sin().float()}
        return Call(tensors, {"interleaved": self.interleaved}, ("x",))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        return draw.normal(self.tokens, self.heads, self.dim).to(call.tensors["x"])

    def flops(self, direction: str) -> int:
        return (6 if direction == "fwd_bwd" else 3) * self.tokens * self.heads * self.dim

    def bytes(self, direction: str, call: Call) -> int:
        tables = call.tensors["cos"].nbytes + call.tensors["sin"].nbytes
        once = 2 * self.tokens * self.heads * self.dim * call.tensors["x"].element_size() + tables
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        return 6 * self.bytes(direction, call)


Case = LossCase | PatchCase | AttentionCase | RotaryCase


def ours(case: Case) -> Callable[..., Tensor]:
    """What is measured as ours, on the arguments of the case's call."""
    return attend if isinstance(case, AttentionCase) else OPS[case.op].call


_CPU, _GPU, _ASKED = ("cpu",), ("cuda",), ()


def _losses(op: str) -> list[LossCase]:
    return [
        LossCase(op, 512, 256, _ASKED, quick=True),
        LossCase(op, 1024, 512),
        LossCase(op, 4096, 512, compiled=_CPU),
        LossCase(op, 4096, 768, _CPU),
        LossCase(op, 8192, 512),
        LossCase(op, 32768, 512, _GPU),  # on a CPU only by name: its eager peers need tens of gigabytes
        LossCase(op, 32768, 768, _GPU, compiled=_GPU),
    ]


_B16, _L14, _QWEN = (768, 3, 16, 16), (1024, 3, 14, 14), (1280, 3, 2, 14, 14)
_B16_BATCH, _L14_BATCH, _GPU_BATCH = (32, 3, 224, 224), (16, 3, 336, 336), (256, 3, 224, 224)

CASES: tuple[Case, ...] = (
    *_losses("clip_loss"),
    *_losses("siglip_loss"),
    PatchCase("2x224-p16", (2, 3, 224, 224), (192, 3, 16, 16), devices=_ASKED, quick=True),
    PatchCase("2x224-p16-uint8", (2, 3, 224, 224), (192, 3, 16, 16), uint8=True, devices=_ASKED, quick=True),
    PatchCase("32x224-p16", _B16_BATCH, _B16),
    PatchCase("32x224-p16-uint8", _B16_BATCH, _B16, uint8=True, compiled=_CPU),
    PatchCase("32x224-p16-channels_last", _B16_BATCH, _B16, channels_last=True),
    PatchCase("16x336-p14", _L14_BATCH, _L14),
    PatchCase("qwen2vl-rows-4096", (4096, 1176), _QWEN, bias=False),
    PatchCase("256x224-p16", _GPU_BATCH, _B16, devices=_GPU, compiled=_GPU),
    PatchCase("256x224-p16-uint8", _GPU_BATCH, _B16, uint8=True, devices=_GPU, compiled=_GPU),
    PatchCase("qwen2vl-rows-65536", (65536, 1176), _QWEN, bias=False, devices=_GPU),
    *ATTENTION,
    RotaryCase("300x4x64", 300, 4, 64, devices=_ASKED, quick=True),
    RotaryCase("qwen-vision-5476x32x80", 5476, 32, 80, compiled=_CPU + _GPU),
    RotaryCase("text-4096x40x128", 4096, 40, 128),
    RotaryCase("interleaved-4096x40x128", 4096, 40, 128, interleaved=True),
)
