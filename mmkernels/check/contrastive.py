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
from ..ops.contrastive.pairing import Pairing
from .contrastive_truth import contrastive_truth
from .draw import DTYPES, Draw
from .op import Call, Op
from .poison import guarded


def plain_clip_loss(
    image_features,
    text_features,
    logit_scale,
    logit_bias=None,
    *,
    label_smoothing=0.0,
    normalize=False,
    image_ids=None,
    text_ids=None,
    same="positives",
    direction="both",
    rounding=None,
):
    """Both matrices of logits spelled out and a cross-entropy over each, as open_clip trains on one device, and NegCLIP
    and UniCL: over the rows that have a positive, towards all of these."""
    image, text, scale, bias = _prepare(image_features, text_features, logit_scale, logit_bias, normalize, rounding)
    logits_per_image = _logits(scale, image, text, rounding)
    logits_per_text = _logits(scale, text, image, rounding)
    if bias is not None:
        logits_per_image, logits_per_text = logits_per_image + bias, logits_per_text + bias
    paired = min(len(image), len(text))
    if image_ids is None or same == "ignored":
        targets = [torch.arange(paired, device=image.device)] * 2
        if image_ids is not None:
            ignored = (image_ids[:, None] == text_ids).fill_diagonal_(False)
            logits_per_image = logits_per_image.masked_fill(ignored, -torch.inf)
            logits_per_text = logits_per_text.masked_fill(ignored.T, -torch.inf)
        rows = logits_per_image[:paired], logits_per_text[:paired]
    else:
        rows, targets = [], []
        for logits, equal in ((logits_per_image, image_ids[:, None] == text_ids), (logits_per_text, None)):
            equal = text_ids[:, None] == image_ids if equal is None else equal
            counted = equal.any(1)
            rows.append(logits[counted])
            targets.append(equal[counted].to(logits.dtype) / equal[counted].sum(1, keepdim=True))
    losses = [F.cross_entropy(*x, label_smoothing=label_smoothing) for x in zip(rows, targets, strict=True)]
    return {"both": sum(losses) / 2, "image_to_text": losses[0], "text_to_image": losses[1]}[direction]


def plain_siglip_loss(
    image_features,
    text_features,
    logit_scale,
    logit_bias,
    *,
    normalize=False,
    image_ids=None,
    text_ids=None,
    same="positives",
    rounding=None,
):
    image, text, scale, bias = _prepare(image_features, text_features, logit_scale, logit_bias, normalize, rounding)
    logits = _logits(scale, image, text, rounding) + bias
    own = torch.zeros_like(logits).fill_diagonal_(1)[: len(text)]
    own = F.pad(own, (0, 0, 0, len(image) - len(own)))
    equal = own if image_ids is None else (image_ids[:, None] == text_ids).to(logits.dtype)
    positives = equal if same == "positives" else own
    losses = -F.logsigmoid((2 * positives - 1) * logits)
    return (losses if same == "positives" else losses * (1 - equal + own * equal)).sum() / len(image)


def _prepare(image, text, scale, bias, normalize: bool, rounding: torch.dtype | None):
    """rounding: unit features, and so their gradients, have the dtype of those given."""
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        if rounding is not None:
            image, text = (x.to(rounding).to(x.dtype) for x in (image, text))
    return image, text, *(x.reshape(()) if isinstance(x, Tensor) else x for x in (scale, bias))


def _logits(scale, rows: Tensor, columns: Tensor, rounding: torch.dtype | None) -> Tensor:
    """rounding: as kernels hold the gradient of the logits to multiply the features with it."""
    if rounding is None:
        return scale * rows @ columns.T
    return scale * _WithRoundedGradient.apply(rows @ columns.T, rounding)


class _WithRoundedGradient(torch.autograd.Function):
    """A tensor whose gradient keeps as many digits as `dtype` has, at any size: kernels scale it into its range."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        fractions, exponents = torch.frexp(grad)
        return torch.ldexp(fractions.to(ctx.dtype).to(grad.dtype), exponents), None


def _response(op: str, call: Call) -> dict[str, float]:
    image, text = call.tensors["image_features"].double(), call.tensors["text_features"].double()
    normalize = call.options.get("normalize")
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    scale, bias = (call.tensors[name].item() if name in call.tensors else 0.0 for name in ("logit_scale", "logit_bias"))
    options = {name: value for name, value in call.options.items() if name in ("label_smoothing", "direction")}
    ids = (call.tensors.get(name) for name in ("image_ids", "text_ids"))
    pairing = Pairing.of(len(image), len(text), *ids, call.options.get("same", "positives"))
    _, moved = contrastive_truth(op, image, text, scale, bias, pairing=pairing, **options)
    values = {"loss": moved.loss} | {f"d_{name}": value for name, value in moved.gradients().items()}
    if normalize:  # those of the unit features, not of the features given: the plain error has to do
        del values["d_image_features"], values["d_text_features"]
    return {name: value.max().item() for name, value in values.items()}


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
        exact=("loss", "d_image_features", "d_text_features", "d_logit_scale", "d_logit_bias"),
        rounds=True,
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
    texts: int = 0  # 0: as many as pairs
    ids: str = ""  # "captions": some of them several times; "classes": few, and one that no text has
    same: str = "positives"
    direction: str = "both"
    plain_draws: int = 6  # draws that measure plain PyTorch only: of scalars it takes some
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        texts = self.texts or self.pairs
        image, text = draw.normal(self.pairs, self.width), draw.normal(texts, self.width)
        if self.features == "aligned":
            paired = min(self.pairs, texts)
            text[:paired] = image[:paired] + 0.2 * text[:paired]
        if self.features in ("unit", "aligned"):
            image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        tensors = {
            "image_features": guarded(image.to(device, dtype), self.image_memory),
            "text_features": guarded(text.to(device, dtype), self.text_memory),
            "logit_scale": self._scalar(self.scale, dtype, device),
        }
        if self.bias is not None:
            tensors["logit_bias"] = self._scalar(self.bias, dtype, device)
        differentiable = tuple(tensors)
        options: dict[str, object] = {"normalize": self.normalize}
        if self.op == "clip_loss":
            options |= {"label_smoothing": self.label_smoothing, "direction": self.direction}
        if self.ids:
            options["same"] = self.same
            tensors |= {name: ids.to(device) for name, ids in self._draw_ids(draw, texts).items()}
        return Call(tensors, options, differentiable)

    def _draw_ids(self, draw: Draw, texts: int) -> dict[str, Tensor]:
        if self.ids == "classes":
            image, text = draw.integers(-1, 3, self.pairs), draw.integers(0, 4, texts)
        else:
            captions = draw.integers(0, 3 * max(self.pairs, texts), max(self.pairs, texts))
            image, text = captions[: self.pairs], captions[:texts]
        return {"image_ids": image, "text_ids": text}

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
        replace(base, name="normalize", pairs=41, width=36, features="raw", normalize=True, quick=False),
    ]


def _pairings(op: str, bias: float | None) -> list[LossCase]:
    """What else may belong together than row i and row i."""
    base = LossCase(op, "", 39, 45, bias=bias)
    return [
        replace(base, name="hard negatives", texts=87, quick=True),
        replace(base, name="fewer texts", pairs=150, texts=33),
        replace(base, name="one image", pairs=1, texts=57, features="aligned"),
        replace(base, name="one text", pairs=57, texts=1),
        replace(base, name="wide", pairs=100, texts=430, width=70, scale=100.0),
        replace(base, name="tall", pairs=450, texts=60, width=70, scale=100.0),
        replace(base, name="captions", texts=60, ids="captions", quick=True),
        replace(base, name="captions, aligned", ids="captions", features="aligned", scale=100.0),
        replace(base, name="classes", pairs=70, texts=51, ids="classes"),
        replace(base, name="classes, wide", pairs=150, texts=333, ids="classes", scale=100.0),
        replace(base, name="duplicates ignored", texts=60, ids="captions", same="ignored", quick=True),
        replace(base, name="classes ignored", pairs=210, texts=190, ids="classes", same="ignored", scale=50.0),
    ]


CASES = (
    *_losses("clip_loss", None),
    *_pairings("clip_loss", None),
    LossCase("clip_loss", "image to text", 41, 30, direction="image_to_text"),
    LossCase("clip_loss", "text to image, fewer texts", 41, 30, texts=17, direction="text_to_image"),
    LossCase("clip_loss", "image to text, classes", 63, 30, texts=80, ids="classes", direction="image_to_text"),
    LossCase("clip_loss", "label smoothing, hard negatives", 25, 30, texts=60, label_smoothing=0.1),
    LossCase("clip_loss", "label smoothing, captions", 45, 30, texts=60, ids="captions", label_smoothing=0.1),
    LossCase("clip_loss", "label smoothing, one way", 60, 30, texts=41, direction="image_to_text", label_smoothing=0.3),
    LossCase("clip_loss", "label smoothing", 21, 34, label_smoothing=0.1, quick=True),
    LossCase("clip_loss", "label smoothing 1", 30, 20, label_smoothing=1.0),
    LossCase("clip_loss", "bias", 33, 20, bias=-3.0),
    *_losses("siglip_loss", -10.0),
    *_pairings("siglip_loss", -10.0),
    LossCase("siglip_loss", "bias 5", 33, 20, bias=5.0),
)
