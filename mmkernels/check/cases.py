"""What is checked: sizes that are multiples of nothing, every form an argument may take, every layout in memory.

A case makes fresh calls from a seed; `quick` ones are small enough for Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_cases import ATTENTION, AttentionCase
from .draw import DTYPES, Draw
from .ops import Call
from .poison import guarded


@dataclass(frozen=True)
class LossCase:
    op: str
    name: str
    pairs: int
    width: int
    scale: float = 14.3  # CLIP's initial 1 / 0.07
    bias: float | None = None
    features: str = "unit"  # "raw": not normalised; "aligned": pairs nearly equal, as after training
    image_memory: str = "plain"
    text_memory: str = "plain"
    scale_in_dtype: bool = False  # as a model cast as a whole holds it, with an axis of one element
    label_smoothing: float = 0.0
    normalize: bool = False
    plain_draws: int = 0  # draws that measure plain PyTorch only
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        image, text = draw.normal(self.pairs, self.width), draw.normal(self.pairs, self.width)
        if self.features == "aligned":
            text = image + 0.2 * text
        if self.features in ("unit", "aligned"):
            image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        tensors = {
            "image_features": guarded(image.to(device, dtype), self.image_memory),
            "text_features": guarded(text.to(device, dtype), self.text_memory),
            "logit_scale": self._scalar(self.scale, dtype, device),
        }
        if self.bias is not None:
            tensors["logit_bias"] = self._scalar(self.bias, dtype, device)
        options: dict[str, object] = {"normalize": self.normalize}
        if self.op == "clip_loss":
            options["label_smoothing"] = self.label_smoothing
        return Call(tensors, options, tuple(tensors))

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        return draw.factor()

    def _scalar(self, value: float, dtype: torch.dtype, device: str) -> Tensor:
        shape, dtype = ((1,), dtype) if self.scale_in_dtype else ((), torch.float32)
        return torch.full(shape, value, dtype=dtype, device=device)


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


@dataclass(frozen=True)
class RotaryCase:
    name: str
    shape: tuple[int, ...]  # (T, H, D) or (B, T, H, D)
    op: str = "rotary_embed"
    memory: str = "plain"
    tables: str = "shared"  # by the batch; or "own": each row of it has its own
    table_dtype: torch.dtype = torch.float32
    interleaved: bool = False
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    plain_draws: int = 0

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        *batch, tokens, _, dim = self.shape
        angles = 3 * draw.normal(*(batch if self.tables == "own" else []), tokens, dim)  # halves that differ, too
        tables = (guarded(table.to(device, self.table_dtype)) for table in (angles.cos(), angles.sin()))
        x = guarded(draw.normal(*self.shape).to(device, dtype), self.memory)
        options = {"interleaved": True} if self.interleaved else {}
        return Call(dict(zip(("x", "cos", "sin"), (x, *tables), strict=True)), options, ("x", "cos", "sin"))

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        return draw.normal(*result.shape)


def _losses(op: str, bias: float | None) -> list[LossCase]:
    """The cases of one loss; `bias` is what this loss is given where a case says nothing of it."""
    base = LossCase(op, "37x65", 37, 65, bias=bias, quick=True)
    return [
        base,
        replace(base, name="1x1", pairs=1, width=1),
        replace(base, name="1x80, scale 100", pairs=1, width=80, scale=100.0),
        replace(base, name="3x7, scale 1", pairs=3, width=7, scale=1.0),
        replace(base, name="130x96, scale 100", pairs=130, width=96, scale=100.0, quick=False),
        replace(base, name="64x64", pairs=64, width=64, quick=False),
        replace(base, name="257x40, scale 150", pairs=257, width=40, scale=150.0, quick=False),
        replace(base, name="300x512, scale 100", pairs=300, width=512, scale=100.0, quick=False),
        replace(base, name="515x129", pairs=515, width=129, quick=False),
        replace(base, name="raw features", pairs=46, width=48, scale=5.0, features="raw"),
        replace(base, name="aligned, scale 100", pairs=66, width=33, scale=100.0, features="aligned", quick=False),
        replace(base, name="columns", pairs=45, width=50, image_memory="columns", text_memory="columns"),
        replace(base, name="strided", pairs=45, width=50, image_memory="strided", text_memory="plain", quick=False),
        replace(base, name="odd address", pairs=67, width=31, image_memory="odd", text_memory="crop", quick=False),
        replace(base, name="one row repeated", pairs=20, width=40, image_memory="expanded", quick=False),
        replace(base, name="beyond 2^31", pairs=5, width=24, image_memory="far", dtypes=(torch.bfloat16,), quick=False),
        replace(base, name="scale in dtype", pairs=50, width=40, scale=16.0, scale_in_dtype=True, quick=False),
        replace(
            base, name="normalize", pairs=41, width=36, features="raw", normalize=True, plain_draws=60, quick=False
        ),
    ]


CLIP = [
    *_losses("clip_loss", None),
    LossCase("clip_loss", "label smoothing", 21, 34, label_smoothing=0.1, quick=True),
    LossCase("clip_loss", "label smoothing 1", 30, 20, label_smoothing=1.0),
    LossCase("clip_loss", "bias", 33, 20, bias=-3.0),
]

SIGLIP = [
    *_losses("siglip_loss", -10.0),
    LossCase("siglip_loss", "bias 5", 33, 20, bias=5.0),
]

_UINT8 = {"image_dtype": torch.uint8}
PATCH = [
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
]

ROTARY = [
    RotaryCase("T 37, H 3, D 80", (37, 3, 80), quick=True),
    RotaryCase("D 2", (5, 1, 2), quick=True, plain_draws=40),
    RotaryCase("D 6, a batch", (3, 7, 2, 6), quick=True),
    RotaryCase("D 72, two halves of 36", (70, 2, 72), memory="odd"),
    RotaryCase("D 256, a batch of its own tables", (2, 33, 2, 256), tables="own", quick=True),
    RotaryCase("one third of a fused projection", (50, 4, 64), memory="fused", quick=True),
    RotaryCase("heads first", (2, 50, 4, 64), memory="heads_first", tables="own"),
    RotaryCase("heads of something wider", (40, 5, 34), memory="crop"),
    RotaryCase("one row repeated", (20, 3, 32), memory="expanded"),
    RotaryCase("half tables", (45, 3, 96), table_dtype=torch.bfloat16),
    RotaryCase("beyond 2^31", (3, 2, 32), memory="far", dtypes=(torch.bfloat16,)),
    RotaryCase("T 1100, several threads", (1100, 4, 80)),
    RotaryCase("interleaved, T 37, H 3, D 80", (37, 3, 80), interleaved=True, quick=True),
    RotaryCase("interleaved, D 2", (5, 1, 2), interleaved=True, quick=True, plain_draws=40),
    RotaryCase("interleaved, D 70", (40, 5, 70), memory="odd", interleaved=True),
    RotaryCase(
        "interleaved, a batch of its own tables", (2, 33, 4, 64), "rotary_embed", "fused", "own", interleaved=True
    ),
]

Case = LossCase | PatchCase | AttentionCase | RotaryCase
CASES: tuple[Case, ...] = (*CLIP, *SIGLIP, *PATCH, *ATTENTION, *ROTARY)
