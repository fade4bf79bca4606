"""What the check needs to know of an op: how to call it, what plain PyTorch writes instead, and what is special."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ops.contrastive import clip_loss, siglip_loss
from ..ops.patch_embed import patch_embed
from ..ops.rotary_embed import rotary_embed
from ..ops.span_attention import span_attention
from ..spans import RowSpans
from . import plain
from .contrastive_truth import contrastive_truth


@dataclass(frozen=True)
class Call:
    """The arguments of one call, which of them get a gradient, and what outputs beside the result are fed with."""

    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)
    differentiable: tuple[str, ...] = ()
    fed: dict[str, Tensor] = field(default_factory=dict)

    def in_dtype(self, dtype: torch.dtype) -> Call:
        """The same numbers in another dtype; what is not differentiable (uint8 images, mean, std) stays as it is."""
        moved = {name: x.to(dtype) if name in self.differentiable else x for name, x in self.tensors.items()}
        return replace(self, tensors=moved)

    def inputs(self) -> dict[str, Tensor]:
        """Every tensor of the call by name, those of its row spans too."""
        spans = self.options.get("spans")
        return self.tensors | ({"lo": spans.lo, "hi": spans.hi} if isinstance(spans, RowSpans) else {})


@dataclass(frozen=True)
class Op:
    name: str
    outputs: tuple[str, ...]  # what it returns; the first is its result
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    plain: Callable[..., Tensor | tuple[Tensor, ...]]
    # See mmkernels.check.budget; the largest of each quantity's elements.
    response: Callable[[Call], dict[str, float]] = lambda call: {}
    wide: tuple[str, ...] = ()  # outputs exact to float32, even of half inputs: their budget is plain float32 code's
    # Arguments and outputs whose last axes may be put in another order, those of a group in the same one.
    orders: tuple[tuple[str, ...], ...] = ()

    @property
    def result(self) -> str:
        return self.outputs[0]

    def named(self, returned: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What a call returned by name: all outputs, or the first where it was not asked for more."""
        return dict(zip(self.outputs, returned if isinstance(returned, tuple) else (returned,), strict=False))


def _logits_response(op: str) -> Callable[[Call], dict[str, float]]:
    def response(call: Call) -> dict[str, float]:
        image, text = call.tensors["image_features"].double(), call.tensors["text_features"].double()
        normalize = bool(call.options.get("normalize"))
        if normalize:
            image, text = torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)
        scale, bias = (
            call.tensors[name].item() if name in call.tensors else 0.0 for name in ("logit_scale", "logit_bias")
        )
        _, moved = contrastive_truth(op, image, text, scale, bias, call.options.get("label_smoothing", 0.0))
        values = {"loss": moved.loss} | {f"d_{name}": value for name, value in moved.gradients().items()}
        if normalize:  # those of the unit features, not of the features given: the plain error has to do
            del values["d_image_features"], values["d_text_features"]
        return {name: value.max().item() for name, value in values.items()}

    return response


OPS = {
    op.name: op
    for op in (
        Op("clip_loss", ("loss",), clip_loss, plain.clip_loss, _logits_response("clip_loss"), wide=("loss",)),
        Op("siglip_loss", ("loss",), siglip_loss, plain.siglip_loss, _logits_response("siglip_loss"), wide=("loss",)),
        Op("patch_embed", ("tokens",), patch_embed, plain.patch_embed),
        Op(
            "span_attention",
            ("out", "lse"),
            span_attention,
            plain.span_attention,
            wide=("lse",),
            orders=(("q", "k"), ("v", "out")),
        ),
        Op("rotary_embed", ("out",), rotary_embed, plain.rotary_embed),
    )
}
