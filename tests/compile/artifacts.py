"""Compile the Triton kernels for a GPU that is not there, and report on what came out.

    python tests/compile/artifacts.py sm90        # JSON: call -> kernel -> report

The backend's own launchers run on meta tensors, with their launch replaced by Triton's `warmup`: what is compiled is
what a GPU of that family would be sent, tile for tile and argument for argument, and cannot drift from it. Neither a
GPU nor a driver is needed, only the compiler and the disassembler that come with the triton wheel.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from events import Events
from loops import Way, ways_of
from sass import Kernel, kernels_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mmkernels.ops import _triton
from mmkernels.ops.contrastive import triton as contrastive
from mmkernels.ops.contrastive.pairing import Pairing, Shares
from mmkernels.ops.patch_embed import triton as patch_embed
from mmkernels.ops.patch_embed.geometry import patch_geometry
from mmkernels.ops.patch_embed.patches import Additions, Gradients, Patches
from mmkernels.ops.rotary_embed import triton as rotary_embed
from mmkernels.ops.similarity import triton as similarity
from mmkernels.ops.span_attention import triton as span_attention
from mmkernels.ops.span_attention.params import Params
from mmkernels.spans import RowSpans

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "cdna": GPUTarget("hip", "gfx942", 64),
}
# KiB a block may use. The sm80 row of the tables also serves sm_86, sm_89 and sm_120, which have 99, not 163.
SHARED = {"sm80": 99, "sm90": 227, "sm100": 227, "cdna": 64}
REGISTERS = 65536


class Device:
    """Stands for the driver of a machine with one GPU."""

    def __init__(self, family: str):
        self.target = TARGETS[family]
        self.index = list(TARGETS).index(family)  # Triton keeps what it compiled by the index of the device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Features:
    """A contrastive loss of features, of no size that a power of two divides."""

    loss: str
    dtype: str
    width: int
    same: str | None = None
    label_smoothing: float = 0.1

    def run(self) -> None:
        x = torch.empty(1003, self.width, dtype=getattr(torch, self.dtype), device="meta")
        scale, ids = torch.empty((), device="meta"), torch.empty(1003, dtype=torch.int32, device="meta")
        pairing = Pairing(0, 0, 1003, self.same, *([] if self.same is None else [ids] * 4))
        if self.loss.startswith("siglip"):
            return getattr(contrastive, self.loss)(x, x, scale, scale, pairing, 1003)
        getattr(contrastive, self.loss)(x, x, scale, pairing, Shares.of(pairing, "both"), self.label_smoothing)

    @property
    def launched(self) -> set[str]:
        if self.loss.startswith("siglip"):
            return {"siglip"}
        return {"clip_stats", "fold_stats", "fold_stats again", "clip_weights", "clip_grad"}  # rows, then columns


@dataclass(frozen=True)
class Embedding:
    """patch_embed forward and backward, with everything that can be added."""

    images: tuple[int, ...]
    image_dtype: str
    weight: tuple[int, ...]
    dtype: str = "bfloat16"
    channels_last: bool = False
    gathered: bool = True  # the runs of pixels are long enough for asynchronous copies, 4 bytes at least

    def run(self) -> None:
        images = torch.empty(self.images, dtype=getattr(torch, self.image_dtype), device="meta")
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        weight = torch.empty(self.weight, dtype=getattr(torch, self.dtype), device="meta")
        mean = torch.empty(3, device="meta") if self.image_dtype == "uint8" else None
        geometry = patch_geometry(images, weight, None if mean is None else 3, "chw")
        patches = Patches(images, weight, mean, mean, geometry)
        bias, positions = weight.new_empty(len(weight)), weight.new_empty(geometry.patches, len(weight))
        tokens = patch_embed.patch_embed(patches, Additions(bias, positions, None))
        grad = tokens.view(geometry.batch, geometry.patches, len(weight))
        d_images, d_weight = None if mean is not None else torch.empty_like(images), torch.empty_like(weight)
        patch_embed.patch_embed_backward(grad, patches, Gradients(d_images, d_weight, None, geometry))

    @property
    def launched(self) -> set[str]:
        return {"embed", "weight_grad"} | (set() if self.image_dtype == "uint8" else {"images_grad"})


@dataclass(frozen=True)
class Attention:
    """span_attention forward and backward, of no size that a power of two divides."""

    head: int
    dtype: str = "bfloat16"
    queries: int = 1003
    keys: int = 1501
    batch: int = 40
    lse_gradient: bool = False
    values: int | None = None  # numbers of a head of them, if not as many

    def run(self) -> None:
        heads, key_heads = 6, 2

        def tensor(tokens: int, heads: int, numbers: int) -> torch.Tensor:
            return torch.empty(self.batch, tokens, heads, numbers, dtype=getattr(torch, self.dtype), device="meta")

        q, k = tensor(self.queries, heads, self.head), tensor(self.keys, key_heads, self.head)
        v = tensor(self.keys, key_heads, self.values or self.head)
        lo = torch.empty(1, 1, self.queries, dtype=torch.int32, device="meta")
        params = Params(lo, lo, RowSpans(lo, lo, self.keys).hulls(), None, self.head**-0.5, 0.0)
        out, lse = span_attention.span_attention(q, k, v, params)
        if self.queries > 1:
            d_lse = lse if self.lse_gradient else None
            span_attention.span_attention_backward(out, q, k, v, out, lse, d_lse, params)

    @property
    def row(self) -> int:
        """Numbers of a key and its value."""
        return self.head + (self.values or self.head)

    @property
    def resized(self) -> Attention:
        """The same model with another batch."""
        return replace(self, queries=self.queries * 2 if self.queries > 1 else 1, keys=self.keys + 35, batch=48)

    @property
    def launched(self) -> set[str]:
        if self.queries == 1:
            return {"forward", "merge"}  # few programs: the keys are split
        passes = {"key_grads", "key_grads again"} if self.head > 128 else {"key_grads"}
        return {"forward", "query_grad", "key_table"} | passes


@dataclass(frozen=True)
class Rotation:
    """rotary_embed of queries and keys that lie in a fused projection."""

    head: int
    dtype: str = "bfloat16"
    tokens: int = 1003
    interleaved: bool = False

    def run(self) -> None:
        x = torch.empty(2, self.tokens, 6, self.head, dtype=getattr(torch, self.dtype), device="meta")[:, :, :4]
        table = torch.empty(1, self.tokens, self.head, device="meta")
        rotary_embed.rotary_embed(x, table, table, self.interleaved, False)

    @property
    def resized(self) -> Rotation:
        return replace(self, tokens=self.tokens * 2)

    @property
    def launched(self) -> set[str]:
        return {"rotate"}


@dataclass(frozen=True)
class Maxima:
    """nearest_code of a codebook, or where there are segments, max_similarity of images of 32 tokens."""

    width: int
    dtype: str = "bfloat16"
    segments: int = 1
    rows: int = 4096

    def run(self) -> None:
        kind = getattr(torch, self.dtype)
        rows, columns = (torch.empty(n, self.width, dtype=kind, device="meta") for n in (self.rows, 16384))
        bias = torch.empty(16384, device="meta") if self.segments == 1 else None
        starts = torch.empty(self.segments + 1, dtype=torch.int32, device="meta")
        similarity.row_maxima(rows, columns, bias, starts)
        weights = torch.empty(self.rows, self.segments, device="meta")
        indices = torch.empty(self.rows, self.segments, dtype=torch.int32, device="meta")
        similarity.gather(weights, columns, indices)
        similarity.scatter(weights, rows, indices, len(columns))

    @property
    def resized(self) -> Maxima:
        return replace(self, rows=self.rows * 2)

    @property
    def launched(self) -> set[str]:
        return {"find_maxima", "gather_columns", "scatter_rows"}


PICTURES = (3, 3, 224, 224)
CALLS = {
    "clip-bfloat16": Features("clip_loss_with_grads", "bfloat16", 768),
    "clip-bfloat16-unsmoothed": Features("clip_loss_with_grads", "bfloat16", 768, label_smoothing=0.0),
    "clip-bfloat16-positives": Features("clip_loss_with_grads", "bfloat16", 768, "positives"),
    "clip-bfloat16-ignored": Features("clip_loss_with_grads", "bfloat16", 768, "ignored", 0.0),
    "siglip-bfloat16-positives": Features("siglip_loss_with_grads", "bfloat16", 768, "positives"),
    "siglip-bfloat16-ignored": Features("siglip_loss_with_grads", "bfloat16", 768, "ignored"),
    "clip-bfloat16-tail": Features("clip_loss_with_grads", "bfloat16", 75),
    "clip-float32": Features("clip_loss_with_grads", "float32", 768),
    "siglip-bfloat16": Features("siglip_loss_with_grads", "bfloat16", 768),
    "embed-P16": Embedding(PICTURES, "bfloat16", (768, 3, 16, 16)),
    "embed-P14": Embedding(PICTURES, "bfloat16", (1152, 3, 14, 14)),
    "embed-uint8-P16": Embedding(PICTURES, "uint8", (768, 3, 16, 16)),
    "embed-uint8-P14": Embedding(PICTURES, "uint8", (1152, 3, 14, 14), gathered=False),
    "embed-uint8-channels_last": Embedding(PICTURES, "uint8", (768, 3, 16, 16), channels_last=True),
    "embed-float32": Embedding(PICTURES, "float32", (768, 3, 16, 16), dtype="float32"),
    "attention-72": Attention(72),
    "attention-128": Attention(128),
    "attention-256": Attention(256),
    "attention-512": Attention(512),
    "attention-576-512": Attention(576, values=512),
    "attention-128-decode": Attention(128, queries=1),
    "attention-576-512-decode": Attention(576, queries=1, values=512),
    "attention-64-float32": Attention(64, dtype="float32"),
    "attention-64-lse": Attention(64, lse_gradient=True),
    "codes-8": Maxima(8),
    "codes-256": Maxima(256),
    "similarity-256": Maxima(256, segments=512),
    "similarity-128-float32": Maxima(128, "float32", segments=512),
    "rotary-80": Rotation(80),
    "rotary-128-float32": Rotation(128, dtype="float32"),
    "rotary-128-interleaved": Rotation(128, interleaved=True),
}


def compile_call(family: str, name: str) -> dict[str, tuple[object, dict[str, object]]]:
    """The kernels that a call launches on a GPU of this family, compiled, with the options of the launch."""
    kernels = {}

    def warm_up(kernel, programs: int, *args, **meta) -> None:
        name = kernel.__name__
        while name in kernels:
            name += " again"
        kernels[name] = kernel.warmup(*args, grid=(programs,), **meta), meta

    driver.set_active(Device(family))
    torch.version.hip = "7.0" if family == "cdna" else None
    _triton.family = lambda device: family
    for module in (contrastive, patch_embed, rotary_embed, similarity, span_attention):
        module.launch = warm_up
    CALLS[name].run()
    if hasattr(CALLS[name], "resized"):
        first = kernels.copy()
        kernels.clear()
        CALLS[name].resized.run()
        changed = [key for key, (kernel, _) in kernels.items() if kernel is not first[key][0]]
        if changed:
            raise RuntimeError(f"{name}: other lengths compiled {', '.join(changed)} again")
    return kernels


def report(kernel, meta: dict[str, object], family: str) -> dict[str, object]:
    """What a test asserts about a kernel: counts of instructions, resources, and the options it was launched with."""
    found = amd_report(kernel) if family == "cdna" else nvidia_report(kernel)
    return found | {name: value for name, value in meta.items() if isinstance(value, int)}


def amd_report(kernel) -> dict[str, int]:
    text = kernel.asm["amdgcn"]
    field = {name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1)) for name in ("vgpr_count", "vgpr_spill_count")}
    return dict(
        shared=kernel.metadata.shared,
        registers=field["vgpr_count"],
        spills=field["vgpr_spill_count"],
        mfma=len(re.findall(r"v_mfma", text)),
        atomics=len(re.findall(r"_atomic_", text)),
    )


def nvidia_report(kernel) -> dict[str, object]:
    ptx, machine_code = kernel.asm["ptx"], disassembled(kernel.asm["cubin"])
    warps = int(re.search(r"\.reqntid (\d+)", ptx).group(1)) // 32
    return dict(
        shared=kernel.metadata.shared,
        registers=machine_code.registers,
        blocks=REGISTERS // (-(-machine_code.registers // 8) * 8 * 32 * warps),
        spills=machine_code.count("LDL|STL") + machine_code.stack,
        hmma=machine_code.count("HMMA"),
        hgmma=machine_code.count("HGMMA"),
        utcmma=machine_code.count(r"UTC\w*MMA"),
        asynchronous=machine_code.count("LDGSTS|UTMALDG"),
        atomics=len(re.findall(r"(?m)^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", ptx)),
        ways=[asdict(way) for way in ways_of(machine_code)],  # but for those of sm100's own instructions
    )


def ways_in(report: dict) -> list[Way]:
    """As they were before they became JSON."""
    return [Way(**way | {"events": Events(**way["events"])}) for way in report["ways"]]


def disassembled(cubin: bytes) -> Kernel:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return kernels_of(file)[0]


if __name__ == "__main__":
    family = sys.argv[1]
    reports = {
        name: {kernel: report(*compiled, family) for kernel, compiled in compile_call(family, name).items()}
        for name in sys.argv[2:] or CALLS
    }
    print(json.dumps(reports))
