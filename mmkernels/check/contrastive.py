"""The contrastive losses: what eager PyTorch writes, how far a rounded logit moves them, and their cases."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.contrastive import clip_loss, siglip_loss
from .contrastive_truth import contrastive_truth
from .draw import DTYPES, Draw
from .op import Call, Op
from .poison import guarded


def plain_clip_loss(
    image_features, text_features, logit_scale, logit_bias=None, *, label_smoothing=0.0, normalize=False
):
    """Both matrices of logits spelled out and a cross-entropy over each, as open_clip trains on one device."""
    image, text, scale, bias = _prepare(image_features, text_features, logit_scale, logit_bias, normalize)
    logits_per_image = scale * image @ text.T
    logits_per_text = scale * text @ image.T
    if bias is not None:
        logits_per_image, logits_per_text = logits_per_image + bias, logits_per_text + bias
    labels = torch.arange(len(image), device=image.device)
    losses = [F.cross_entropy(x, labels, label_smoothing=label_smoothing) for x in (logits_per_image, logits_per_text)]
    return sum(losses) / 2


def plain_siglip_loss(image_features, text_features, logit_scale, logit_bias, *, normalize=False):
    image, text, scale, bias = _prepare(image_features, text_features, logit_scale, logit_bias, normalize)
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def _prepare(image, text, scale, bias, normalize: bool):
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return image, text, *(x.reshape(()) if isinstance(x, Tensor) else x for x in (scale, bias))


def _response(op: str, call: Call) -> dict[str, float]:
    image, text = call.tensors["image_features"].double(), call.tensors["text_features"].double()
    normalize = _normalizes(call)
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    scale, bias = (call.tensors[name].item() if name in call.tensors else 0.0 for name in ("logit_scale", "logit_bias"))
    _, moved = contrastive_truth(op, image, text, scale, bias, call.options.get("label_smoothing", 0.0))
    values = {"loss": moved.loss} | {f"d_{name}": value for name, value in moved.gradients().items()}
    if normalize:  # those of the unit features, not of the features given: the plain error has to do
        del values["d_image_features"], values["d_text_features"]
    return {name: value.max().item() for name, value in values.items()}


def _normalizes(call: Call) -> bool:
    """Unit features are rounded to the features' dtype, whoever makes them."""
    return bool(call.options.get("normalize"))


def _hides_nan(call: Call, run: Callable[..., Tensor]) -> list[str]:
    """A NaN in one feature must reach the loss."""
    tensors = {name: x.clone() for name, x in call.tensors.items()}
    row = len(tensors["text_features"]) // 2
    tensors["text_features"][row, -1] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Triton's interpreter remarks on the NaN
        loss = run(**tensors, **call.options)
    return [] if loss.isnan().all() else [f"a NaN in row {row} of text_features gives a loss of {loss.item()}"]


def _op(call: Callable[..., Tensor], plain: Callable[..., Tensor], seconds: tuple[float, float]) -> Op:
    name = call.__name__
    return Op(
        name,
        ("loss",),
        call,
        plain,
        typed_by="image_features",
        seconds=seconds,
        response=partial(_response, name),
        wide=("loss",),
        rounds_between=_normalizes,
        probe=_hides_nan,
    )


OPS = (
    _op(clip_loss, plain_clip_loss, (0.15, 1.5)),
    _op(siglip_loss, plain_siglip_loss, (0.1, 0.6)),
)


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


CASES = (
    *_losses("clip_loss", None),
    LossCase("clip_loss", "label smoothing", 21, 34, label_smoothing=0.1, quick=True),
    LossCase("clip_loss", "label smoothing 1", 30, 20, label_smoothing=1.0),
    LossCase("clip_loss", "bias", 33, 20, bias=-3.0),
    *_losses("siglip_loss", -10.0),
    LossCase("siglip_loss", "bias 5", 33, 20, bias=5.0),
)
