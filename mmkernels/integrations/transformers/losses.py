"""CLIPModel, SiglipModel and Siglip2Model with return_loss=True, without the N x N logits that their outputs hold.

`logits_per_image` and `logits_per_text` are computed when someone reads them, in whatever way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers.models.clip import modeling_clip as clip
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2

from ... import backends
from ...ops.contrastive import clip_loss, siglip_loss


class _Pending:
    """Stands for a tensor that has not been asked for."""

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute = compute

    def __repr__(self) -> str:
        return "<computed when read>"


class _LazyLogits:
    """Mixed into a ModelOutput before its class."""

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if isinstance(value, _Pending):
            per_text = value.compute()
            self["logits_per_text"], self["logits_per_image"] = per_text, per_text.t()
            return super().__getattribute__(name)
        return value

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        if isinstance(key, int):
            return getattr(self, list(self.keys())[key])  # output[0] is the loss and computes no logits
        return self.to_tuple()[key]

    def items(self):
        return [(name, getattr(self, name)) for name in self.keys()]

    def values(self):
        return [getattr(self, name) for name in self.keys()]

    def to_tuple(self):
        return tuple(x.to_tuple() if hasattr(x, "to_tuple") else x for x in self.values())

    def get(self, key, default=None):
        return getattr(self, key) if key in self.keys() else default

    def __reduce__(self):  # as the plain class: what is pickled holds its logits
        return self.plain, tuple(getattr(self, field.name) for field in fields(self))


@dataclass(repr=False)
class LazyCLIPOutput(_LazyLogits, clip.CLIPOutput):
    plain = clip.CLIPOutput


@dataclass(repr=False)
class LazySiglipOutput(_LazyLogits, siglip.SiglipOutput):
    plain = siglip.SiglipOutput


@dataclass(repr=False)
class LazySiglip2Output(_LazyLogits, siglip2.Siglip2Output):
    plain = siglip2.Siglip2Output


def _is_fused(input_ids, pixel_values, return_loss, kwargs) -> bool:
    if not return_loss or kwargs.get("return_dict") is False or input_ids is None or pixel_values is None:
        return False
    return len(input_ids) == len(pixel_values)


def _output(model, lazy, loss, vision, text, image_embeds, text_embeds):
    image_embeds = image_embeds.to(text_embeds.device)
    scale, bias = (getattr(model, name, None) for name in ("logit_scale", "logit_bias"))
    scale = scale.to(text_embeds.device).exp()
    bias = () if bias is None else (bias.to(text_embeds.device),)

    def per_text() -> Tensor:
        return sum(bias, text_embeds @ image_embeds.t() * scale)

    embeds = {"text_embeds": text_embeds, "image_embeds": image_embeds}
    outputs = embeds | {"text_model_output": text, "vision_model_output": vision}
    loss = loss(image_embeds, text_embeds, scale, *bias, backend=backends.of_module(model))
    if torch.compiler.is_compiling():  # a graph returns tensors
        logits = per_text()
        return lazy.plain(loss=loss, logits_per_image=logits.t(), logits_per_text=logits, **outputs)
    pending = _Pending(per_text)
    return lazy(loss=loss, logits_per_image=pending, logits_per_text=pending, **outputs)


class CLIPModel(clip.CLIPModel):
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        return_loss=None,
        interpolate_pos_encoding=False,
        **kwargs,
    ):
        if not _is_fused(input_ids, pixel_values, return_loss, kwargs):
            return super().forward(
                input_ids,
                pixel_values,
                attention_mask,
                position_ids,
                return_loss,
                interpolate_pos_encoding,
                **kwargs,
            )
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        text = self.get_text_features(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        image_embeds, text_embeds = (x.pooler_output / clip._get_vector_norm(x.pooler_output) for x in (vision, text))
        return _output(self, LazyCLIPOutput, clip_loss, vision, text, image_embeds, text_embeds)


class _SiglipModel:
    """Mixed into SiglipModel and Siglip2Model, whose images come with arguments of their own."""

    _of_images = ("pixel_attention_mask", "spatial_shapes", "interpolate_pos_encoding")

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        *args,
        attention_mask=None,
        position_ids=None,
        return_loss=None,
        **kwargs,
    ):
        if args or not _is_fused(input_ids, pixel_values, return_loss, kwargs):
            kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, "return_loss": return_loss}
            given = {name: value for name, value in kwargs.items() if value is not None}
            return super().forward(input_ids, pixel_values, *args, **given)
        of_images = {name: kwargs.pop(name) for name in self._of_images if name in kwargs}
        vision = self.vision_model(pixel_values=pixel_values, **of_images, **kwargs)
        text = self.text_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        pooled = (x.pooler_output for x in (vision, text))
        image_embeds, text_embeds = (x / x.norm(p=2, dim=-1, keepdim=True) for x in pooled)
        return _output(self, self._lazy, siglip_loss, vision, text, image_embeds, text_embeds)


class SiglipModel(_SiglipModel, siglip.SiglipModel):
    _lazy = LazySiglipOutput


class Siglip2Model(_SiglipModel, siglip2.Siglip2Model):
    _lazy = LazySiglip2Output


SWAPS = {
    clip.CLIPModel: (CLIPModel, "loss"),
    siglip.SiglipModel: (SiglipModel, "loss"),
    siglip2.Siglip2Model: (Siglip2Model, "loss"),
}
