"""The CUDA kernels of patch embedding in the emulator, against the reference in float64."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from emulator_build import CSRC
from torch import Tensor

from mmkernels.check.budget import Quantity
from mmkernels.check.cases import OPS
from mmkernels.check.draw import Draw
from mmkernels.check.op import Call, evaluate, evaluate_plain
from mmkernels.check.patch_embed import CASES, PatchCase
from mmkernels.ops.patch_embed.geometry import PatchGeometry, patch_geometry
from mmkernels.ops.patch_embed.pixels import Pixels, weight_view

KERNELS = [CSRC / "cuda" / "patch_embed" / name for name in ("forward.cu", "backward.cu")]
SOURCES = ["patch_embed.cpp", *map(str, KERNELS)]
FORWARD, WEIGHT_GRAD, IMAGES_GRAD = range(3)
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)  # PixelType
NAN = 0xFF  # each byte of what is not written
FIELDS = {"type": 1, "features": 3, "channels": 6, "image_type": 8, "batch": 9, "weight_stride": 25}  # of the header


@dataclass
class Drawn:
    """A case, its numbers, and what they should give."""

    name: str
    call: Call
    upstream: Tensor
    tf32: bool
    truth: dict[str, Tensor]
    plain: dict[str, Tensor]
    more: list[Drawn]  # that only tell how wrong plain PyTorch can be

    @classmethod
    def of(cls, case: PatchCase, dtype: torch.dtype, seed: int, tf32: bool = False) -> Drawn:
        op, draw = OPS["patch_embed"], Draw(seed, case.name)
        call = case.make(draw, dtype, "cpu")
        wide = call.in_dtype(torch.float64)
        result = op.call(**wide.tensors, **wide.options, backend="reference")
        upstream = case.upstream(draw, result).to(dtype)
        truth = evaluate(op.call, wide, op, upstream, backend="reference")
        rough, rough_upstream = call, upstream
        if tf32:
            tensors = {name: rounded_to_tf32(x) for name, x in call.tensors.items()}
            rough, rough_upstream = replace(call, tensors=tensors), rounded_to_tf32(upstream)
        plain = evaluate_plain(op, rough, rough_upstream)
        more = [cls.of(replace(case, plain_draws=0), dtype, seed + i, tf32) for i in range(1, case.plain_draws + 1)]
        return cls(f"{case.name}, {dtype}{', tf32' * tf32}", call, upstream, tf32, truth, plain, more)

    def geometry(self, images: Tensor) -> PatchGeometry:
        mean = self.call.tensors.get("mean")
        channels = None if mean is None else mean.numel()
        return patch_geometry(images, self.call.tensors["weight"], channels, self.call.options["layout"])


def rounded_to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).view(x.shape)


def extent_of(x: Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def bytes_of(x: Tensor) -> bytes:
    """From the first number of a tensor to its last, the gaps between them too."""
    return x.as_strided((extent_of(x),), (1,)).view(torch.uint8).numpy().tobytes()


def aligned_rows(x: Tensor) -> Tensor:
    """Rows filled up to a multiple of 8 numbers with zeros, and between them 8 of NaN."""
    width = -(-x.shape[-1] // 8) * 8
    padded = F.pad(x, (0, width - x.shape[-1]))
    return F.pad(padded, (0, 8), value=torch.nan)[..., :width]


class Job:
    """One call of one kernel, as patch_embed.cpp reads it, and how to read what it writes."""

    def __init__(self, op: int, drawn: Drawn):
        tensors = drawn.call.tensors
        weight = tensors["weight"]
        self.op, self.drawn, self.dtype = op, drawn, weight.dtype
        prefix, positions = tensors.get("prefix"), tensors.get("pos_embed")
        features, num_prefix = weight.shape[0], 0 if prefix is None else len(prefix)
        images = torch.full_like(tensors["images"], torch.nan) if op == IMAGES_GRAD else tensors["images"]
        geometry = drawn.geometry(images)
        pixels = Pixels.of(images, geometry)
        rows = aligned_rows(weight_view(weight, geometry, pixels.order).reshape(features, geometry.pixels))
        upstream = drawn.upstream.reshape(geometry.batch, -1, features)[:, num_prefix:]
        grad = aligned_rows(upstream)
        if op == FORWARD:
            self.out = weight.new_empty(geometry.result_shape(features, num_prefix))
        else:
            self.out = weight.new_empty_strided(weight.shape, weight.stride()) if op == WEIGHT_GRAD else images
        self.header = [op, TYPES.index(weight.dtype), drawn.tf32, features, num_prefix]
        self.header += [0 if positions is None else len(positions), geometry.patch[0], pixels.channel_inner]
        self.header += [TYPES.index(images.dtype), geometry.batch, *geometry.grid, geometry.batch_stride]
        self.header += [*geometry.grid_strides, *pixels.sizes, *pixels.strides, rows.stride(0), *grad.stride()[:2]]
        self.header += [geometry.weight_row_stride, *(geometry.patch[d] for d in pixels.order)]
        self.header += [geometry.weight_strides[d] for d in pixels.order]
        mean, std, bias = (tensors.get(name) for name in ("mean", "std", "bias"))
        forward, backward = op == FORWARD, op != FORWARD
        self.inputs = [
            images if op != IMAGES_GRAD else None, rows if op != WEIGHT_GRAD else None, mean, std,
            bias if forward else None, positions if forward else None, prefix if forward else None,
            grad if backward else None,
        ]  # fmt: skip
        self.touched = self._touched(geometry)

    def _touched(self, geometry: PatchGeometry) -> Tensor:
        """Which numbers of the output's memory are its own: not its gaps, nor pixels past the last whole patch."""
        touched = torch.zeros(extent_of(self.out), dtype=torch.bool)
        sizes, strides = self.out.shape, self.out.stride()
        if self.op == IMAGES_GRAD:
            sizes, strides = geometry.view_sizes, geometry.view_strides
        touched.as_strided(sizes, strides).fill_(True)
        return touched

    def packed(self) -> bytes:
        blobs = [(-1, 0) if x is None else (len(bytes_of(x)), x.data_ptr() % 16) for x in self.inputs]
        blobs.append((len(self.touched) * self.out.dtype.itemsize, self.out.data_ptr() % 16))
        header = self.header + [number for blob in blobs for number in blob]
        return struct.pack(f"{len(header)}q", *header) + b"".join(bytes_of(x) for x in self.inputs if x is not None)

    def complaint(self, written: bytes) -> str | None:
        name = ("tokens", "d_weight", "d_images")[self.op]
        storage = torch.frombuffer(bytearray(written), dtype=self.out.dtype)
        gaps = storage.view(torch.uint8).view(len(storage), -1)[~self.touched]
        if not (gaps == NAN).all():
            return f"{self.drawn.name}: {name} was written where it is not"
        storage[~self.touched] = 0
        ours = storage.as_strided(self.out.shape, self.out.stride())
        quantity = Quantity(f"{self.drawn.name}: {name}", ours.dtype, self.drawn.plain[name].dtype)
        quantity.add(ours, self.drawn.plain[name], self.drawn.truth[name])
        for each in self.drawn.more:
            quantity.add_plain(each.plain[name], each.truth[name])
        return quantity.failure()


def jobs_of(drawn: Drawn) -> list[Job]:
    """Forward and backward; of an image that is repeated, and of bytes, there is no gradient to write."""
    images = drawn.call.tensors["images"]
    ops = [FORWARD, WEIGHT_GRAD] + [IMAGES_GRAD] * (images.dtype != torch.uint8 and 0 not in images.stride())
    return [Job(op, drawn) for op in ops]


def run_jobs(run, build: str, folder: Path, jobs: list[Job]) -> list[bytes]:
    """The plain build compares three orders of threads; the others look at each access, and one is enough."""
    (folder / "cases").write_bytes(b"".join(job.packed() for job in jobs))
    ran = run(SOURCES, str(folder / "cases"), str(folder / "results"), "3" if build == "plain" else "1")
    names = ", ".join(f"{number}: {job.drawn.name}" for number, job in enumerate(jobs))
    assert ran.returncode == 0 and ran.stdout == "right\n", f"{ran.stdout}{ran.stderr}\n{names}"
    written, results = (folder / "results").read_bytes(), []
    for job in jobs:
        size = len(job.touched) * job.out.dtype.itemsize
        results.append(written[:size])
        written = written[size:]
    assert not written
    return results


def check(run, build: str, folder: Path, cases: list[Drawn]) -> None:
    jobs = [job for drawn in cases for job in jobs_of(drawn)]
    complaints = [job.complaint(x) for job, x in zip(jobs, run_jobs(run, build, folder, jobs), strict=True)]
    assert not any(complaints), "\n".join(filter(None, complaints))


NAMED = {case.name: case for case in CASES}


def named(*names: str) -> list[PatchCase]:
    return [NAMED[name] for name in names]


# Every way in which pixels are read, every layout, every addition.
BY_LINES = named("channels_last", "rows of a linear layer", "class token, positions for all")
BY_WORDS = named("P14, edge left over", "video", "four tokens, positions of patches")
BY_NUMBER = named("P1", "columns", "rows, strided", "crop", "rows, K 75", "rows in batches", "one image repeated")
CONVERTED = named("float32 images", "bfloat16 images", "float16 images")
BYTES = named("uint8, P7", "uint8, channels_last", "uint8, rows, tchw", "uint8, crop, one channel")
LARGE = PatchCase("several tiles", (2, 3, 64, 84), (152, 3, 7, 7), positions=108, prefix=2)
DEEP = named("rows, chw, Conv3d")
ODD_RUNS = PatchCase("odd runs, even strides", (2, 3, 14, 8), (19, 3, 7, 7))


def test_bfloat16_is_within_the_budget(run, build, seed, tmp_path):
    cases = [*BY_LINES, *BY_WORDS, *BY_NUMBER, ODD_RUNS, *CONVERTED, *BYTES[:3]]
    check(run, build, tmp_path, [Drawn.of(case, torch.bfloat16, seed) for case in cases])


def test_float16_is_within_the_budget(run, build, seed, tmp_path):
    cases = [LARGE, *BY_LINES[:1], *BY_WORDS[1:2], *CONVERTED[:1], *BYTES[2:]]
    check(run, build, tmp_path, [Drawn.of(case, torch.float16, seed) for case in cases])


def test_float32_is_within_the_budget(run, build, seed, tmp_path):
    cases = [LARGE, *DEEP, *BY_LINES[1:], *BY_WORDS[:2], *BY_NUMBER[:2], *CONVERTED[1:], *BYTES]
    check(run, build, tmp_path, [Drawn.of(case, torch.float32, seed) for case in cases])


def test_tf32_is_as_wrong_as_rounding_to_it(run, build, seed, tmp_path):
    cases = [replace(LARGE, images=(1, 3, 64, 84)), *BY_NUMBER[1:2]]
    check(run, build, tmp_path, [Drawn.of(case, torch.float32, seed, tf32=True) for case in cases])


def test_calls_that_the_kernels_cannot_serve_are_refused(run, seed, tmp_path):
    def refused(message: str, **changes: int) -> None:
        job = Job(FORWARD, Drawn.of(NAMED["P1"], torch.bfloat16, seed))
        for field, value in changes.items():
            job.header[FIELDS[field]] = value
        (tmp_path / "cases").write_bytes(job.packed())
        ran = run(SOURCES, str(tmp_path / "cases"), str(tmp_path / "results"), "1")
        assert f"FAILED case 0: patch_embed: {message}" in ran.stdout, ran.stdout + ran.stderr

    refused("the weight has to be of a floating type", type=TYPES.index(torch.uint8))
    refused("negative or too many features", features=-1)
    refused("more patches or pixels than 32 bits number", batch=2**31 - 1)
    refused("negative sizes", batch=-1)
    refused("the rows of weight have to be aligned", weight_stride=12)
    refused("uint8 images need mean and std", image_type=TYPES.index(torch.uint8), channels=0)
