"""The CUDA kernels of the contrastive losses in the emulator, against the losses in float64."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulator_build import CSRC
from torch import Tensor

from mmkernels.check.budget import Quantity
from mmkernels.check.cases import OPS
from mmkernels.check.contrastive_truth import contrastive_truth
from mmkernels.check.suite import SMALL_PLAIN_DRAWS
from mmkernels.ops.contrastive.pairing import Pairing, Shares
from mmkernels.ops.contrastive.smoothing import FeatureSums

ROOM = CSRC / "cuda" / "contrastive"
COMMON = ROOM / "passes.cu"
KERNELS = {"sm_80": ROOM / "tiles_sm80.cu", "sm_90a": ROOM / "tiles_sm90.cu"}
SOURCES = ["contrastive.cpp", str(COMMON), *map(str, KERNELS.values())]
DS_SCALE = 2**15
TILE = 128


@dataclass
class Case:
    op: str
    images: int
    width: int
    texts: int = -1  # as many as images
    own: tuple[int, int, int] = (0, 0, -1)  # offset, first and last of the own pairs; -1: to the last
    ids: str = ""  # "captions": some of them several times; "classes": few, and one that no text has
    same: str = "positives"
    direction: str = "both"
    scale: float = 14.3
    bias: float = -10.0  # SigLIP's
    label_smoothing: float = 0.0
    aligned: bool = False  # pairs nearly equal, as after training
    chunk: int = 0  # rows of dS at a time; 0: all
    workspace: int = 0  # bytes, of the forward pass; 0: as many as it asks for
    ds_gap: int = 8  # numbers beyond a row of dS
    gaps: tuple[int, int] = (0, 0)  # between rows of image and text
    offsets: tuple[int, int] = (0, 0)  # numbers from an aligned address
    with_gradients: bool = True
    dtype: torch.dtype = torch.bfloat16
    image: Tensor = None
    text: Tensor = None
    image_ids: Tensor | None = None
    text_ids: Tensor | None = None

    @property
    def name(self) -> str:
        ids = f", {self.ids} are {self.same}" if self.ids else ""
        return f"{self.op}, {self.images} x {self.num_texts} x {self.width}, scale {self.scale:g}{ids}"

    @property
    def num_texts(self) -> int:
        return self.images if self.texts < 0 else self.texts

    @property
    def pairing(self) -> Pairing:
        offset, first, last = self.own
        last = min(self.images, self.num_texts - offset) if last < 0 else last
        pairing = Pairing.of(self.images, self.num_texts, self.image_ids, self.text_ids, self.same)
        return replace(pairing, offset=offset, first=first, last=last)

    @property
    def shares(self) -> Shares:
        return Shares.of(self.pairing, self.direction)

    @property
    def count(self) -> float:
        return self.images if self.op == "siglip_loss" else float(self.shares.count)

    @property
    def ds_stride(self) -> int:
        return -(-self.num_texts // 8) * 8 + self.ds_gap

    def draw(self) -> Case:
        image, text = (torch.randn(count, self.width) for count in (self.images, self.num_texts))
        text = image + 0.2 * text if self.aligned else text
        image, text = (F.normalize(x, dim=1).to(self.dtype) for x in (image, text))
        image_ids, text_ids = self._draw_ids() if self.ids else (None, None)
        return replace(self, image=image, text=text, image_ids=image_ids, text_ids=text_ids)

    def _draw_ids(self) -> tuple[Tensor, Tensor]:
        if self.ids == "classes":
            return torch.randint(-1, 3, (self.images,)), torch.randint(0, 4, (self.num_texts,))
        most = max(self.images, self.num_texts)
        captions = torch.randint(0, 3 * most, (most,))
        return captions[: self.images], captions[: self.num_texts]


@dataclass
class Result:
    loss: Tensor
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}


def plain_result(case: Case) -> Result:
    """Eager PyTorch and autograd in float32, as exact as the results are promised. Beside ids, its own pairs are the
    first ones, to which texts are turned."""
    turn = case.own[0] if case.ids else 0
    names = ["image_features", "text_features", "logit_scale", *(["logit_bias"] if case.op == "siglip_loss" else [])]
    values = [case.image, case.text.roll(-turn, 0), torch.tensor(case.scale), torch.tensor(case.bias)]
    inputs = {name: value.float().clone().requires_grad_() for name, value in zip(names, values, strict=False)}
    options = {"rounding": case.dtype}
    if case.ids:
        options |= {"image_ids": case.image_ids, "text_ids": case.text_ids.roll(-turn, 0), "same": case.same}
    elif case.own != (0, 0, -1):  # as plain code has it, by ids
        offset, first, last = case.own
        ids = torch.full((case.images,), -1)
        ids[first:last] = torch.arange(first, last) + offset
        options |= {"image_ids": ids, "text_ids": torch.arange(case.num_texts)}
    if case.op == "clip_loss":
        options |= {"label_smoothing": case.label_smoothing, "direction": case.direction}
    loss = OPS[case.op].plain(**inputs, **options)
    loss.backward()
    gradients = {name: x.grad for name, x in inputs.items()}
    gradients["text_features"] = gradients["text_features"].roll(turn, 0)
    return Result(loss.detach(), **gradients)


# ---- what contrastive.cpp reads and writes


def packed_case(case: Case) -> bytes:
    """Gaps between rows hold NaN."""
    places, bodies = [], []
    for x, gap, offset in zip((case.image, case.text), case.gaps, case.offsets, strict=True):
        stride = case.width + gap
        extent = (len(x) - 1) * stride + case.width if len(x) else 0
        numbers = torch.full((max(extent, 0),), torch.nan, dtype=case.dtype)
        numbers.as_strided(x.shape, (stride, 1)).copy_(x)
        places += [numbers.numel(), offset, stride]
        bodies.append(numbers.view(torch.int16).numpy().tobytes())
    flags = [case.op == "siglip_loss", case.with_gradients, case.dtype == torch.bfloat16]
    sizes = [case.ds_stride, case.chunk or max(case.images, 1), case.workspace]
    pairing, shares = case.pairing, case.shares
    ids = [x for x in (pairing.image_ids, pairing.text_ids, pairing.image_counts, pairing.text_counts) if x is not None]
    bodies += [x.numpy().tobytes() for x in ids]
    pairs = pairing.offset, pairing.first, pairing.last, (None, "positives", "ignored").index(pairing.same)
    header = [*flags, case.images, case.num_texts, case.width, *pairs, *places, *sizes]
    products = (x.item() for x in FeatureSums.of(case.image, case.text, pairing).products())
    numbers = case.scale, case.bias, case.label_smoothing, shares.row, shares.column, case.count, *products
    return struct.pack(f"{len(header)}q8d", *header, *numbers) + b"".join(bodies)


@pytest.fixture(params=KERNELS)
def kernel(request) -> str:
    return request.param


def readable_by_tma(case: Case) -> Case:
    """Rows at multiples of 16 bytes."""
    gaps = tuple(gap + -(case.width + gap) % 8 for gap in case.gaps)
    return replace(case, gaps=gaps, offsets=tuple(offset // 8 * 8 for offset in case.offsets))


def run_passes(run, kernel: str, folder: Path, cases: list[Case]) -> str:
    """What it prints; the results are in the folder."""
    (folder / "cases").write_bytes(b"".join(map(packed_case, cases)))
    ran = run(SOURCES, kernel, str(folder / "cases"), str(folder / "results"))
    return ran.stdout + ran.stderr


def run_cases(run, kernel: str, folder: Path, cases: list[Case]) -> list[Result]:
    if kernel == "sm_90a":
        cases = [readable_by_tma(case) for case in cases]
    printed = run_passes(run, kernel, folder, cases)
    names = "\n".join(f"{number}: {case.name}" for number, case in enumerate(cases))
    assert printed == "right\n", f"{printed}\n{names}"
    data, results = bytearray((folder / "results").read_bytes()), []
    for case in cases:
        means = torch.frombuffer(data, dtype=torch.float32, count=4)
        size = case.images * case.ds_stride if case.with_gradients else 0
        ds = torch.frombuffer(data, dtype=case.dtype, count=size, offset=16) if size else torch.empty(0)
        data = data[16 + 2 * size :]
        results.append(result_of(case, means, ds.view(-1, case.ds_stride)))
    assert not data
    return results


def result_of(case: Case, means: Tensor, ds: Tensor) -> Result:
    """As the backend makes it of what the kernels left, with its products."""
    loss, d_scale, d_bias = means[0], means[1], means[2]
    untouched = means[1:] if not case.with_gradients else means[3 if case.op == "siglip_loss" else 2 :]
    assert (untouched == -1).all(), f"{case.name}: wrote beyond its results"
    if not case.with_gradients:
        return Result(loss)
    edge = -(-case.num_texts // 8) * 8
    assert (ds[:, case.num_texts : edge] == 0).all() and (ds[:, edge:].view(torch.int16) == -1).all(), case.name
    ds = ds[:, : case.num_texts].float() * (case.scale / (case.count * DS_SCALE))
    d_image, d_text = ds @ case.text.float(), ds.T @ case.image.float()
    if case.label_smoothing:
        sums, scale = FeatureSums.of(case.image, case.text, case.pairing), torch.tensor(case.scale)
        sizes = case.images, case.num_texts
        less = sums.take_off(scale, case.shares, case.label_smoothing, sizes, case.pairing.counted, d_image, d_text)
        d_scale = (d_scale - less).float()
    bias = {"logit_bias": d_bias} if case.op == "siglip_loss" else {}
    return Result(loss, d_image.to(case.dtype), d_text.to(case.dtype), d_scale, **bias)


# ---- tests


def all_cases(rng: random.Random) -> list[Case]:
    some = rng.randint(2, TILE)
    return [
        Case("clip_loss", 1, 1),
        Case("clip_loss", 1, 80, scale=100.0),
        Case("clip_loss", 37, 65, label_smoothing=0.1),  # no aligned rows
        Case("clip_loss", some, rng.randint(1, 99), chunk=rng.randint(1, some)),
        Case("clip_loss", 130, 96, scale=100.0, gaps=(8, 0), offsets=(0, 8)),
        Case("clip_loss", 30, 20, label_smoothing=1.0),
        Case("clip_loss", TILE, 168),
        Case("clip_loss", 257, 16, scale=150.0, chunk=129, workspace=row_of_tiles(257)),
        Case("clip_loss", 140, 72, scale=100.0, aligned=True, gaps=(3, 0), offsets=(0, 1)),
        Case("clip_loss", 300, 8, with_gradients=False, workspace=2 * row_of_tiles(300) + 4),
        Case("clip_loss", 5, 0),
        Case("clip_loss", 150, 24, scale=0.0),
        Case("clip_loss", 135, 40, scale=-20.0, aligned=True),
        Case("clip_loss", 38, 40, scale=-5.0, label_smoothing=0.2),
        Case("clip_loss", 40, 24, texts=rng.randint(41, 80), label_smoothing=0.1),
        Case("clip_loss", 60, 16, texts=rng.randint(1, 50), chunk=40, label_smoothing=0.2),
        Case("clip_loss", 290, 16, texts=rng.randint(1, 200), chunk=140, workspace=2**15),
        Case("clip_loss", 150, 32, texts=280, own=(130, 3, 149), scale=50.0),
        Case("clip_loss", 140, 32, texts=30, own=(-101, 101, 131), direction="text_to_image", chunk=100),
        Case("clip_loss", 30, 40, texts=rng.randint(129, 150), direction="image_to_text", label_smoothing=0.3),
        Case("clip_loss", 140, 40, texts=190, ids="captions", scale=50.0, label_smoothing=0.1, chunk=100),
        Case("clip_loss", some, 24, texts=rng.randint(8, 99), ids="classes", direction="text_to_image", gaps=(1, 0)),
        Case("clip_loss", 290, 16, texts=rng.randint(130, 200), ids="classes", chunk=140, workspace=2**13),
        Case("clip_loss", 135, 40, ids="captions", scale=-100.0, aligned=True, workspace=2**13),
        Case("clip_loss", 40, 72, ids="captions", scale=400.0, aligned=True),
        Case("clip_loss", 150, 24, texts=rng.randint(8, 50), ids="classes", same="ignored", chunk=90),
        Case("clip_loss", 140, 16, texts=300, own=(131, 0, 140), ids="captions", same="ignored", scale=40.0),
        Case("siglip_loss", 1, 1),
        Case("siglip_loss", 37, 165, bias=5.0, gaps=(3, 0)),
        Case("siglip_loss", 131, 64, scale=100.0, chunk=100, gaps=(0, 16)),
        Case("siglip_loss", some, 24, aligned=True, scale=100.0, bias=-90.0, gaps=(1, 0)),
        Case("siglip_loss", 260, 16, with_gradients=False, chunk=130),
        Case("siglip_loss", 150, 24, texts=290, own=(131, 2, 150)),
        Case("siglip_loss", 270, 40, texts=rng.randint(1, 140)),
        Case("siglip_loss", 140, 24, texts=rng.randint(129, 160), ids="captions", chunk=100),
        Case("siglip_loss", 150, 16, texts=290, own=(131, 0, 150), ids="classes", same="ignored"),
        Case("siglip_loss", 40, 16, texts=150, ids="classes", with_gradients=False),
        Case("siglip_loss", 140, 16, ids="captions", same="ignored", with_gradients=False),
    ]


def cases_for_hopper(rng: random.Random) -> list[Case]:
    """A block has several tiles, of which some need no masks, and its warpgroups take turns in tiles of more than four
    steps; a chunk may end within a tile that nothing else cuts."""
    return [
        *(case for case in all_cases(rng) if case.width > 0),
        Case("clip_loss", 300, 330, scale=100.0),
        Case("clip_loss", 260, 330, texts=530, ids="captions", scale=50.0),
        Case("siglip_loss", 520, 20, chunk=200),
        Case("siglip_loss", 140, 20, texts=560, scale=100.0, bias=5.0),
    ]


def row_of_tiles(count: int) -> int:
    """Bytes of the parts of one row of tiles."""
    return 8 * (-(-count // TILE) * min(TILE, count) + count)


def complaints(case: Case, ours: Result) -> list[str]:
    """Of few numbers, one draw of plain PyTorch would be luck."""
    quantities = {
        name: Quantity(f"{case.name}, {case.dtype}: {name}", value.dtype, torch.float32)
        for name, value in ours.named().items()
    }
    for number, each in enumerate([case, *(case.draw() for _ in range(SMALL_PLAIN_DRAWS))]):
        bias = each.bias if each.op == "siglip_loss" else 0.0
        options = dict(pairing=each.pairing, direction=each.direction)
        truth, response = contrastive_truth(
            each.op, each.image, each.text, each.scale, bias, each.label_smoothing, **options
        )
        rough = plain_result(each).named()
        for name, quantity in quantities.items():
            moved = getattr(response, name).abs().max().item() if each.width else 0.0
            quantity.add_plain(rough[name], getattr(truth, name), moved)
            if number == 0:
                quantity.add_ours(ours.named()[name], getattr(truth, name))
    return [failure for quantity in quantities.values() if (failure := quantity.failure())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_within_the_budget(build, run, kernel, seed, tmp_path, dtype):
    if build != "plain" and dtype == torch.float16:
        pytest.skip("the same templates, and the instrumented builds are slow")
    cases = {"sm_80": all_cases, "sm_90a": cases_for_hopper}[kernel](random.Random(seed))
    cases = [replace(case, dtype=dtype).draw() for case in cases]
    results = run_cases(run, kernel, tmp_path, cases)
    failures = [failure for case, result in zip(cases, results, strict=True) for failure in complaints(case, result)]
    assert not failures, "\n".join(failures)


def exact_products(scale: float, label_smoothing: float) -> Case:
    """Products of 1, and 2^-13 more within a group of twenty, and 2^-9 more of a pair: all are exact."""
    count = TILE + 12
    own, group, one = torch.eye(count), torch.eye(7)[torch.arange(count) % 7], torch.ones(count, 1)
    image = torch.cat([one, own * 2**-4, group * 2**-6], 1).bfloat16()
    text = torch.cat([one, own * 2**-5, group * 2**-7], 1).bfloat16().copysign(torch.tensor(scale))
    case = Case("clip_loss", count, image.shape[1], scale=scale, label_smoothing=label_smoothing)
    return replace(case, image=image, text=text)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def test_losses_near_zero_keep_their_digits(run, kernel, tmp_path):
    """Of pairs told apart, and of texts that belong to no image, to a few roundings of the products. Where these are
    exact, so are their differences, though the logits are some 10^4, and what SigLIP's bias leaves of 10^3; what is
    left of the column of ones is rounding in any case."""
    apart = [Case("clip_loss", 140, 72, scale=scale, aligned=True).draw() for scale in (30.0, 60.0)]
    apart += [Case("siglip_loss", 140, 72, texts=560, own=(0, 0, 0), scale=30.0, bias=-30.0).draw()]
    exact = [exact_products(scale, smoothing) for scale in (9999.7, -9999.7) for smoothing in (0.0, 0.1)]
    many = exact_products(1000.0, 0.0)
    many = replace(many, texts=4 * len(many.text), text=many.text.repeat(4, 1))  # whole tiles of Hopper's, too
    exact += [replace(many, op="siglip_loss", own=(0, 0, 0), bias=-1010.0)]
    for case, ours in zip(apart + exact, run_cases(run, kernel, tmp_path, apart + exact), strict=True):
        numbers = case.scale, case.bias, case.label_smoothing
        truth, _ = contrastive_truth(case.op, case.image, case.text, *numbers, pairing=case.pairing)
        first = 1 if case.width > case.images else 0
        limit = 2e-6 if first else 8 * torch.finfo(torch.float32).eps * case.scale
        assert relative_error(ours.loss, truth.loss) < limit, f"{case.name}: loss"
        for name in ("image_features", "text_features"):
            value, expected = getattr(ours, name)[:, first:], getattr(truth, name)[:, first:]
            assert relative_error(value, expected) < 2 * torch.finfo(case.dtype).eps, f"{case.name}: {name}"


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_a_feature_that_is_not_a_number_shows(run, kernel, tmp_path, op):
    """As in plain PyTorch: it spoils the loss, and the gradients of all that depends on it."""
    clean = Case(op, 150, 40).draw()
    cases = []
    for name, row in (("image", 3), ("text", 149)):
        dirty = replace(clean, **{name: getattr(clean, name).clone()})
        getattr(dirty, name)[row, 7] = torch.nan
        cases.append(dirty)
    for case, ours in zip(cases, run_cases(run, kernel, tmp_path, cases), strict=True):
        expected = plain_result(case).named()
        for name, value in ours.named().items():
            assert torch.equal(value.isnan(), expected[name].isnan()), f"{case.name}: {name}"


@pytest.mark.parametrize(
    "case, why",
    [
        (Case("clip_loss", 0, 16), "no pairs have no mean"),
        (Case("siglip_loss", 0, 16), "no pairs have no mean"),
        (Case("clip_loss", 9, 16, ds_gap=4), "rows of ds have to begin at multiples of 16 bytes"),
        (Case("siglip_loss", 20, 16, ds_gap=-8), "and to hold a row of S"),
        (Case("clip_loss", 300, 16, workspace=64), "smaller than clip_statistics_workspace() says"),
    ],
)
def test_what_cannot_be_right_is_refused(run, kernel, tmp_path, case, why):
    assert why in run_passes(run, kernel, tmp_path, [case.draw()])


@pytest.mark.parametrize(
    "case",
    [
        Case("clip_loss", 5, 12),
        Case("siglip_loss", 5, 16, gaps=(0, 4)),
        Case("clip_loss", 5, 16, offsets=(4, 0)),
        Case("siglip_loss", 5, 0),
        Case("clip_loss", 5, 16, gaps=(0, -8)),
    ],
)
def test_what_tma_cannot_read_is_not_served(run, tmp_path, case):
    assert "is not served" in run_passes(run, "sm_90a", tmp_path, [case.draw()])
