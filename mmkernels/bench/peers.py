"""What a user would run instead, at its best. A peer takes the arguments of the op it stands for.

The first peer of a case is what models do today ("eager"); its error is also what the error budget is made of.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check.cases import OPS
from ..check.op import Call
from ..check.patch_embed import cut, normalized
from .attention_cases import AttentionCase
from .attention_peers import flex_peer, sdpa_peers, varlen_peers
from .cases import PASSES, Case

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    name: str
    function: Function
    compiled: bool = False
    passes: tuple[str, ...] = PASSES


def peers(case: Case, call: Call) -> list[Peer]:
    """The peers of a case on these arguments, eager first."""
    if isinstance(case, AttentionCase):
        return _attention_peers(case, call)
    if case.op == "rotary_embed":
        found = [Peer("transformers' arithmetic", OPS[case.op].plain)]
    else:
        found = _loss_peers(case.op) if case.op != "patch_embed" else _patch_peers(call)
    if next(iter(call.tensors.values())).device.type in case.compiled:
        best = found[-1]
        found.append(Peer(f"compiled {best.name}", torch.compile(best.function, dynamic=False), compiled=True))
    return found


def _attention_peers(case: AttentionCase, call: Call) -> list[Peer]:
    found = [Peer(name, function) for name, function in (sdpa_peers(call) | varlen_peers(call)).items()]
    device = call.tensors["q"].device.type
    if device in case.compiled:
        passes = ("fwd",) if device == "cpu" else PASSES  # on a CPU FlexAttention has no backward
        found.append(Peer("compiled FlexAttention", flex_peer(), compiled=True, passes=passes))
    return found


def _loss_peers(op: str) -> list[Peer]:
    published = _open_clip(op)
    if published is not None:
        return [Peer("open_clip", published)]
    return [Peer("open_clip's arithmetic", OPS[op].plain)]


@functools.cache
def _open_clip(op: str) -> Function | None:
    """open_clip's own loss where it is installed.

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
    loss = {"clip_loss": module.ClipLoss, "siglip_loss": module.SigLipLoss}[op]()
    return lambda image_features, text_features, logit_scale, logit_bias=None: loss(
        image_features, text_features, logit_scale, logit_bias
    )


def _patch_peers(call: Call) -> list[Peer]:
    images, weight = call.tensors["images"], call.tensors["weight"]
    convolution = "conv3d" if weight.dim() == 5 else "conv2d"
    if images.dim() == 2:
        return [Peer(convolution, _convolve_rows), Peer("linear", _linear)]
    if images.dtype == torch.uint8:
        return [
            Peer(f"normalise + {convolution}", OPS["patch_embed"].plain),
            Peer("normalise + cut + linear", _cut_and_linear),
        ]
    return [Peer(convolution, OPS["patch_embed"].plain), Peer("cut + linear", _cut_and_linear)]


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
