"""The contrastive losses: what open_clip computes, the truth by chunks, and the sizes of training runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check.contrastive import OPS as LOSSES
from ..check.contrastive_truth import contrastive_truth
from ..check.draw import Draw
from ..check.op import Call, Op
from ..ops.contrastive.pairing import Pairing
from .op import PASSES, Function, Measured, Peer, Series, Truth, Values


def _peers(op: Op, call: Call) -> list[Peer]:
    losses = None if _is_paired_otherwise(call) else open_clip_losses()
    if losses is None:
        return [Peer("open_clip's arithmetic", op.plain)]
    loss = {"clip_loss": losses.ClipLoss, "siglip_loss": losses.SigLipLoss}[op.name]
    triton_peer = siglip_kernel(op.name, call.tensors["image_features"].device.type)
    others = [] if triton_peer is None else [Peer("siglip-kernel", as_function(triton_peer()))]
    return [Peer("open_clip", as_function(loss())), *others]


def _is_paired_otherwise(call: Call) -> bool:
    """Than row i with row i, which is all that open_clip knows."""
    return "image_ids" in call.tensors or len(call.tensors["image_features"]) != len(call.tensors["text_features"])


@functools.cache
def open_clip_losses() -> ModuleType | None:
    """open_clip's own losses where it is installed.

    Its file is loaded by itself: the package imports torchvision for its transforms, which fails beside a torch built
    for the CPU only, and the losses need none of it.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        return None
    spec = importlib.util.spec_from_file_location(
        "mmkernels_bench_open_clip_loss", Path(package.submodule_search_locations[0]) / "loss.py"
    )
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # torch.compile looks its globals up there
        spec.loader.exec_module(module)
    except (ImportError, OSError):
        return None
    return module


def siglip_kernel(op: str, device: str) -> type | None:
    """siglip-kernel's loss, a module of Triton kernels, where it and a GPU are. (memeff's CLIP has a fixed temperature
    and no gradient of it: it computes something else.)"""
    if op != "siglip_loss" or device != "cuda" or importlib.util.find_spec("siglip_kernel") is None:
        return None
    return importlib.import_module("siglip_kernel").DistributedSigLIPLoss


def as_function(loss: Callable[..., Tensor]) -> Function:
    """One of open_clip's losses, by the names of our arguments."""
    return lambda image_features, text_features, logit_scale, logit_bias=None: loss(
        image_features, text_features, logit_scale, logit_bias
    )


def _truth(op: Op, call: Call, upstream: Tensor) -> Truth:
    exact, response = _by_chunks(op, call, torch.float64)
    return Truth(exact, {name: x.max().item() for name, x in response.items()})


def _plain(op: Op, call: Call) -> Values:
    return _by_chunks(op, call, torch.float32)[0]


def _by_chunks(op: Op, call: Call, dtype: torch.dtype) -> tuple[Values, Values]:
    """A loss and its gradients, and how far each responds to a rounded logit."""
    tensors = call.tensors
    scalars = [tensors[name].item() for name in ("logit_scale", "logit_bias") if name in tensors]
    image, text = tensors["image_features"], tensors["text_features"]
    ids = (tensors.get(name) for name in ("image_ids", "text_ids"))
    pairing = Pairing.of(len(image), len(text), *ids, "positives")
    found = contrastive_truth(op.name, image, text, *scalars, dtype=dtype, pairing=pairing)
    value, response = (
        {op.result: x.loss} | {f"d_{name}": x.gradients()[name] for name in call.differentiable} for x in found
    )
    return value, response


OPS = tuple(
    Measured(
        op,
        partial(_peers, op),
        truth_by_chunks=partial(_truth, op),
        plain_by_chunks=partial(_plain, op),
    )
    for op in LOSSES
)


@dataclass(frozen=True)
class LossCase:
    """A contrastive loss over N pairs of unit features of D numbers, at the scale CLIP's training ends with; of M > N
    texts, the last of which are hard negatives; or of captions by their ids, three images and three texts each."""

    op: str
    pairs: int
    width: int
    texts: int = 0  # 0: as many as pairs
    captions: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")  # measured there unless others are asked for
    compiled: tuple[str, ...] = ()  # devices where torch.compile of a peer is one too; each takes half a minute
    quick: bool = False
    across_ranks: bool = False  # measured there unless others are asked for
    passes: tuple[str, ...] = PASSES

    @property
    def name(self) -> str:
        size = f"{self.pairs}x{self.texts}x{self.width}" if self.texts else f"{self.pairs}x{self.width}"
        return size + ", captions" * self.captions

    @property
    def logits(self) -> int:
        return self.pairs * (self.texts or self.pairs)

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        counts = self.pairs, self.texts or self.pairs
        features = [F.normalize(draw.normal(n, self.width).to(device).float()).to(dtype) for n in counts]
        tensors = dict(zip(("image_features", "text_features"), features, strict=True))
        scale = {"clip_loss": 100.0, "siglip_loss": 10.0}[self.op]
        tensors["logit_scale"] = torch.tensor(scale, device=device)
        if self.op == "siglip_loss":
            tensors["logit_bias"] = torch.tensor(-10.0, device=device)
        differentiable = tuple(tensors)
        if self.captions:
            ids = [torch.arange(n, device=device) // 3 * 2 for n in counts]
            tensors |= dict(zip(("image_ids", "text_ids"), ids, strict=True))
        return Call(tensors, {}, differentiable)

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        return torch.ones((), device=call.tensors["logit_scale"].device)

    def flops(self, direction: str) -> int:
        """The least: the logits once, and with gradients both features' products with them. Who cannot keep N x N
        logits between the sums and the gradients of CLIP computes them twice, at the cost of its own fraction."""
        products = 3 if direction == "fwd_bwd" else 1
        return 2 * products * self.logits * self.width

    def bytes(self, direction: str, call: Call) -> int:
        features = (
            (self.pairs + (self.texts or self.pairs)) * self.width * call.tensors["image_features"].element_size()
        )
        return features * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        """About what eager PyTorch holds at its peak: matrices of N x N, two of logits and what autograd keeps."""
        matrices = 6 if direction == "fwd_bwd" else 4
        return matrices * self.logits * call.tensors["image_features"].element_size()


def _losses(op: str) -> list[LossCase]:
    return [
        LossCase(op, 512, 256, devices=(), quick=True),
        LossCase(op, 1024, 512),
        LossCase(op, 2048, 512, texts=6144),
        LossCase(op, 4096, 512, captions=True),
        LossCase(op, 4096, 512, compiled=("cpu",), across_ranks=True),
        LossCase(op, 4096, 768, devices=("cpu",)),
        LossCase(op, 8192, 512),
        LossCase(op, 16384, 512, devices=(), across_ranks=True),
        LossCase(op, 32768, 512, devices=("cuda",)),  # on a CPU only by name: its eager peers need tens of gigabytes
        LossCase(op, 32768, 768, devices=("cuda",), compiled=("cuda",)),
    ]


CASES = (*_losses("clip_loss"), *_losses("siglip_loss"))

_PAIRS = (1024, 2048, 4096, 8192, 16384, 32768)
GROWTH = tuple(
    Series(op.name, "pairs", "pairs of a batch, D = 256", {n: LossCase(op.name, n, 256) for n in _PAIRS})
    for op in LOSSES
)
