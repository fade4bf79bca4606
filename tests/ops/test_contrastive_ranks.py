"""The contrastive losses across the ranks of a group, over gloo: against one process in float64, against open_clip's
own ranks, under DDP and torch.compile; and what each rank is told when an exchange fails."""

import copy
import itertools
import os
import random
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from draws import SEED
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

import mmkernels.nn
from mmkernels import BackendUnavailable, DistributedError, accelerate, clip_loss, siglip_loss
from mmkernels.check.contrastive import plain_clip_loss, plain_siglip_loss
from mmkernels.ops._comm import Comm
from mmkernels.ops.contrastive import distributed

SCALE, BIAS = 9.0, -2.0


# ---- one process, in float64


class Whole:
    """Features of all ranks, which of them belong together, and the loss and gradients of one process."""

    def __init__(self, rng: random.Random, ranks: int) -> None:
        self.loss = rng.choice(["clip_loss", "siglip_loss"])
        self.same = rng.choice([None, "positives", "ignored"])
        even = rng.random() < 0.3
        sizes = [(rng.randint(1, 9), rng.randint(1, 12)) for _ in range(ranks)]
        self.sizes = [(7, 7)] * ranks if even else sizes
        if self.same == "ignored":  # every image has a text, as plain code wants it
            self.sizes = [(min(n, m), m) for n, m in self.sizes]
        self.options = {} if self.loss == "siglip_loss" else {"direction": rng.choice(distributed.DIRECTIONS)}
        if self.loss == "clip_loss" and self.same != "ignored":
            self.options["label_smoothing"] = rng.choice([0.0, 0.1])
        self.image, self.text = (F.normalize(torch.randn(sum(x), 8).double()) for x in zip(*self.sizes, strict=True))
        self.ids = [torch.randint(0, 8, (len(x),)) for x in (self.image, self.text)]
        self.ids[1][0] = self.ids[0][0]  # something belongs together

    def truth(self) -> list[torch.Tensor]:
        """Loss, gradients of image, text and scale, and of the bias that SigLIP has."""
        leaves = [self.image, self.text, torch.tensor(SCALE).double(), torch.tensor(BIAS).double()]
        leaves = [x.clone().requires_grad_() for x in leaves[: 4 if self.loss == "siglip_loss" else 3]]
        image, text, *scalars = leaves
        order, pairs = self.own_texts_first()
        ids = self.ids if self.same == "positives" else pairs
        if self.same == "ignored":
            text, ids = text[order], (self.ids[0], self.ids[1][order])
        options = self.options | dict(image_ids=ids[0], text_ids=ids[1], same=self.same or "positives")
        plain = plain_siglip_loss if self.loss == "siglip_loss" else plain_clip_loss
        loss = plain(image, text, *scalars, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def own_texts_first(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All texts, the images' own first; and ids by which image and own text are equal, and nothing else."""
        images, texts = torch.full((len(self.image),), -1), torch.full((len(self.text),), -2)
        first_image = first_text = number = 0
        for n, m in self.sizes:
            own = torch.arange(min(n, m)) + number
            images[first_image : first_image + len(own)] = texts[first_text : first_text + len(own)] = own
            first_image, first_text, number = first_image + n, first_text + m, number + len(own)
        owned = (texts >= 0).nonzero()[:, 0]
        return torch.cat([owned, (texts < 0).nonzero()[:, 0]]), [images, texts]

    def of_rank(self, rank: int) -> tuple[slice, slice]:
        starts = [sum(x[:rank]) for x in zip(*self.sizes, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes[rank], strict=True))

    def found(self, rank: int, dtype: torch.dtype, device: str, **call) -> list[torch.Tensor]:
        rows, columns = self.of_rank(rank)
        leaves = [self.image[rows], self.text[columns], torch.tensor(SCALE), torch.tensor(BIAS)]
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(device, dtype if x.dim() else wide).requires_grad_() for x in leaves]
        leaves = leaves[: 4 if self.loss == "siglip_loss" else 3]
        if self.same:
            call |= dict(image_ids=self.ids[0][rows].to(device), text_ids=self.ids[1][columns].to(device))
            call["same"] = self.same
        call |= self.options
        loss = (siglip_loss if self.loss == "siglip_loss" else clip_loss)(*leaves, **call)
        with torch.no_grad():
            alone = (siglip_loss if self.loss == "siglip_loss" else clip_loss)(*leaves, **call)
        torch.testing.assert_close(alone, loss.detach())
        return [x.cpu() for x in (loss.detach(), *torch.autograd.grad(loss, leaves))]


def check_against_one_process(rank: int, ranks: int, seed: int, device: str = "cpu") -> None:
    rng = random.Random(seed)  # the same on every rank, as torch's
    torch.manual_seed(seed)
    groups = [dist.group.WORLD, mesh := init_device_mesh(device, (ranks,), mesh_dim_names=("dp",)), (mesh, "dp")]
    kinds = [(torch.float32, None)] if device == "cuda" else [(torch.float64, "reference"), (torch.float32, "cpu")]
    for case in range(60):
        whole, reduce = Whole(rng, ranks), rng.choice(distributed.REDUCES)
        dtype, backend = rng.choice(kinds)
        distributed.GATHERED_BYTES = rng.choice([2**30, 700, 100])  # one piece, several, one of each text
        asked = device == "cpu" or len(set(whole.sizes)) == 1  # a GPU's ranks are taken to be even
        sizes = rng.choice([None if asked else "exchange", "exchange", whole.sizes])
        call = dict(group=groups[case % 3], reduce=reduce, sizes=sizes, backend=backend)
        truth, rows = whole.truth(), whole.of_rank(rank)
        factor = ranks if reduce == "mean" else 1
        expected = [truth[0], *(factor * x[r] for x, r in zip(truth[1:3], rows, strict=True)), *truth[3:]]
        for name, value, exact in zip(
            ("loss", "image", "text", "scale", "bias"), whole.found(rank, dtype, device, **call), expected, strict=False
        ):
            error = (value - exact).abs().max().item()
            limit = 1e-11 if dtype == torch.float64 else 2e-5
            assert error <= limit * max(1.0, exact.abs().max().item()), (case, name, error, vars(whole), call)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_are_one_process(tmp_path, ranks):
    """Even and uneven ranks, more texts than images, ids, directions, smoothing, in pieces: drawn from the seed."""
    on_ranks(ranks, tmp_path, check_against_one_process, SEED)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_are_one_process_over_nccl_on_gpus(tmp_path, ranks):
    """NCCL refuses two ranks on one device: a group of one is all that a single GPU can show."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    on_ranks(ranks, tmp_path, check_against_one_process, SEED, "cuda", library="nccl", seconds=300)


def check_reduce_scatter(rank: int, ranks: int, seed: int) -> None:
    """How GPUs' gradients return, over gloo."""
    torch.manual_seed(seed)
    comm, sizes = Comm("clip_loss", dist.group.WORLD), [3] * ranks
    parts = torch.randn(ranks, 3 * ranks, 2).double()  # of all ranks
    ways = (comm.start_sum_of_rows, comm._start_reduce_scatter)
    for found in (way(parts[rank], sizes, "gradients")() for way in ways):
        torch.testing.assert_close(found, parts.sum(0)[3 * rank : 3 * rank + 3])


def test_gradients_return_by_reduce_scatter_too(tmp_path):
    on_ranks(3, tmp_path, check_reduce_scatter, SEED)


# ---- open_clip's modules, on the same ranks

CLIP_MODES = [dict(local_loss=a, gather_with_grad=b) for a, b in itertools.product([False, True], repeat=2)]
SIGLIP_MODES = [dict(dist_impl=name) for name in ("bidir", "shift", "reduce", "gather")]


def check_open_clip(rank: int, ranks: int, seed: int) -> None:
    import open_clip.loss

    torch.manual_seed(seed)
    features = [F.normalize(torch.randn(ranks * 5, 8).double(), dim=1) for _ in range(2)]
    features = [x[5 * rank : 5 * rank + 5] for x in features]
    for name, mode in [*(("ClipLoss", x) for x in CLIP_MODES), *(("SigLipLoss", x) for x in SIGLIP_MODES)]:
        found = []
        for module in (open_clip.loss, mmkernels.nn, None):  # None: open_clip's, accelerated
            leaves = [x.clone().requires_grad_() for x in (*features, torch.tensor(SCALE), torch.tensor(BIAS))]
            leaves = leaves[: 4 if name == "SigLipLoss" else 3]
            leaves[2:] = [x.detach().double().requires_grad_() for x in leaves[2:]]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss = getattr(module or open_clip.loss, name)(rank=rank, world_size=ranks, **mode)
            if module is None:
                accelerate(loss, verbose=False)
            if module is mmkernels.nn:
                wrong = mode == dict(local_loss=True, gather_with_grad=False)
                assert [str(x.message) for x in said if "does not train" in str(x.message)][1:] == []
                assert any("does not train on the gradient" in str(x.message) for x in said) == wrong
            value = loss(*leaves)
            *gradients, last = torch.autograd.grad(value, leaves)
            scalars = [*gradients[2:], last]
            for x in scalars:  # open_clip's are of the rank's own value: DDP averages them
                dist.all_reduce(x.div_(ranks))
            found.append([value.detach(), *gradients[:2], *scalars])
        for theirs, *ours in zip(*found, strict=True):
            assert all((x - theirs).abs().max() <= 1e-12 for x in ours), (name, mode)


@pytest.mark.parametrize("ranks", [2, 3])
def test_modules_are_open_clips_in_every_mode(tmp_path, ranks):
    on_ranks(ranks, tmp_path, check_open_clip, SEED)


def check_bfloat16(rank: int, ranks: int, seed: int) -> None:
    """Rounded once, at the end; open_clip's own are rounded with every logit and on their way."""
    import open_clip.loss

    torch.manual_seed(seed)
    whole = [F.normalize(torch.randn(48 * ranks, 64), dim=1).bfloat16() for _ in range(2)]
    part = slice(48 * rank, 48 * rank + 48)
    for name, plain, mode in (
        ("ClipLoss", plain_clip_loss, CLIP_MODES[3]),
        *(("SigLipLoss", plain_siglip_loss, mode) for mode in SIGLIP_MODES),
    ):
        scalars = [torch.tensor(SCALE), torch.tensor(BIAS)][: 2 if name == "SigLipLoss" else 1]
        exact = [x.double().requires_grad_() for x in whole]
        truth = torch.autograd.grad(plain(*exact, *(x.double() for x in scalars)), exact)
        errors = []
        for module in (mmkernels.nn, open_clip.loss):
            leaves = [x[part].clone().requires_grad_() for x in whole]
            loss = getattr(module, name)(rank=rank, world_size=ranks, **mode)(*leaves, *scalars)
            found = torch.autograd.grad(loss, leaves)
            errors.append([(x / ranks - y[part]).norm() / y[part].norm() for x, y in zip(found, truth, strict=True)])
        for ours, theirs in zip(*errors, strict=True):
            assert ours < 0.8 * theirs and ours < 2**-8, (name, mode, errors)


def test_bfloat16_is_closer_to_the_truth_than_open_clips(tmp_path):
    on_ranks(2, tmp_path, check_bfloat16, SEED)


def check_ddp_and_compile(rank: int, ranks: int, seed: int) -> None:
    """A training step of two towers, DDP around them, the loss compiled whole: weights as of one process."""
    torch.manual_seed(seed)
    towers = torch.nn.ModuleList([torch.nn.Linear(6, 8), torch.nn.Linear(5, 8)]).double()
    towers.scale = torch.nn.Parameter(torch.tensor(2.0).double())
    plain, (images, texts) = copy.deepcopy(towers), (torch.randn(4 * ranks, width).double() for width in (6, 5))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = towers

        def forward(self, image, text):
            features = [F.normalize(t(x), dim=1) for t, x in zip(self.towers, (image, text), strict=True)]
            return *features, self.towers.scale.exp()

    def loss_of(*features):
        return clip_loss(*features, group=dist.group.WORLD, backend="reference")

    model = torch.nn.parallel.DistributedDataParallel(Model())
    step = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    part = slice(4 * rank, 4 * rank + 4)
    step(*model(images[part], texts[part])).backward()
    features = [F.normalize(t(x), dim=1) for t, x in zip(plain, (images, texts), strict=True)]
    plain_clip_loss(*features, plain.scale.exp()).backward()
    for ours, truth in zip(towers.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)


def test_under_ddp_and_compiled(tmp_path):
    on_ranks(2, tmp_path, check_ddp_and_compile, SEED)


# ---- failures


def features_of(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(F.normalize(torch.randn(rows, 8)) for _ in range(2))


def check_a_wrong_argument(rank: int, ranks: int) -> None:
    image, text = features_of()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"text_features \(4, 7\); features of both must have") as caught:
        clip_loss(image, text[:, :7] if rank == 1 else text, 10.0, group=dist.group.WORLD)
    assert ("clip_loss: rank 1 raised ValueError: clip_loss: image_features" in str(caught.value)) == (rank == 0)
    assert time.monotonic() - began < 20  # not the timeout
    for options, label in (({"label_smoothing": 0.1 * rank}, "label_smoothing"), ({"reduce": "sum"}, "reduce")):
        if rank == 0 and label == "reduce":
            options = {}
        with pytest.raises(ValueError, match=f"clip_loss: {label} differs between the ranks"):
            clip_loss(image, text, 10.0, group=dist.group.WORLD, **options)
    with pytest.raises(ValueError, match="whether gradients are wanted differs between the ranks"):
        clip_loss(image.requires_grad_(rank == 0), text, 10.0, group=dist.group.WORLD)
    with pytest.raises(ValueError if rank else BackendUnavailable, match="backend 'cuda' cannot serve this call"):
        clip_loss(image, text, 10.0, group=dist.group.WORLD, backend=None if rank else "cuda")
    local = mmkernels.nn.ClipLoss(local_loss=True, rank=rank, world_size=ranks)
    with pytest.raises(ValueError, match="ClipLoss: the number of pairs differs between the ranks"):
        local(image[: 4 - rank], text[: 4 - rank], 10.0)
    with pytest.raises(ValueError, match=r"sizes is \[4\]; it must hold a positive number"):
        clip_loss(image, text, 10.0, group=dist.group.WORLD, sizes=[4])


def test_a_wrong_argument_of_one_rank_is_an_error_on_all(tmp_path):
    on_ranks(2, tmp_path, check_a_wrong_argument)


def check_a_missing_rank(rank: int, ranks: int, how: str) -> None:
    image, text = features_of()
    clip_loss(image, text, 10.0, group=dist.group.WORLD)  # connected
    began = time.monotonic()
    if rank == ranks - 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return time.sleep(25)  # never calls
    with pytest.raises(DistributedError) as caught:
        clip_loss(image, text, 10.0, group=dist.group.WORLD)
    said, seconds = str(caught.value), time.monotonic() - began
    assert f"comparing the arguments of ranks {[x for x in range(ranks) if x != rank]} failed on rank {rank}" in said
    assert f"No answer from rank {ranks - 1}" in said or "No answer from rank" in said, said
    assert seconds < 20
    Path(os.environ["MMKERNELS_SAID"], str(rank)).write_text(said)


@pytest.mark.parametrize("how", ["killed", "elsewhere"])
def test_a_rank_that_died_or_never_calls(tmp_path, monkeypatch, how):
    """Of three, the others raise after the group's timeout of 4 seconds and 5 of roll call, at the latest."""
    monkeypatch.setenv("MMKERNELS_SAID", str(tmp_path))
    if how == "killed":
        with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
            on_ranks(3, tmp_path, check_a_missing_rank, how, seconds=4)
    else:
        on_ranks(3, tmp_path, check_a_missing_rank, how, seconds=4)
        assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}
