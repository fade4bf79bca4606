"""Inputs for any model, from the signature of its forward and its configuration.

What a signature leaves open (are images (B, C, H, W) or one more to a row? is audio a wave or a spectrogram?) is tried:
`candidates` yields ways to call the model, the richest first, and whoever asks takes the first that the model runs on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import input_shapes as shapes
from .sizes import Sizes

Inputs = dict[str, Any]
TEXT_FROM, TEXT_TO = 3, 50  # tokens with no meaning of their own
LONGEST = 600  # placeholders in a row
PADDED = 4  # by how much the last row is shorter


@dataclass
class Candidate:
    """One way to call a model: inputs for a side of padding, and what they hold."""

    holds: str
    make: Callable[[str], Inputs]
    padded: bool


def candidates(model: nn.Module, family: str, seed: int = 0) -> Iterator[Candidate]:
    """Ways to call it, the richest first."""
    ask = _Ask(model, family)
    for media in shapes.media(ask.sizes, ask.names, family):

        def make(side: str, media: shapes.Media = media) -> Inputs:
            torch.manual_seed(seed)  # both sides of padding, both dtypes and both ways of a model see the same numbers
            return ask.inputs(side, media)

        yield Candidate(media.holds or "text", make, ask.takes_padding(media))


class _Ask:
    """What a model wants to be given."""

    def __init__(self, model: nn.Module, family: str):
        self.model, self.family = model, family
        self.sizes, self.cls = Sizes(model, family), type(model).__name__
        parameters = inspect.signature(model.forward).parameters.values()
        self.names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        self.required = {p.name for p in parameters if p.default is p.empty and p.name in self.names}
        self.contrastive = "return_loss" in self.names
        self.rows = 3 if self.contrastive else 2

    def takes_padding(self, media: shapes.Media) -> bool:
        return "attention_mask" in self.names and ("input_ids" in self.names or "attention_mask" in media.values)

    def inputs(self, side: str, media: shapes.Media) -> Inputs:
        values = {name: x() if callable(x) else x for name, x in media.values.items()}
        given: Inputs = dict(values)
        if "input_ids" in self.names and media.text:
            given |= self._text(side, values, media)
        elif "inputs_embeds" in self.required:
            given["inputs_embeds"] = torch.randn(self.rows, 9, self.sizes.width)
            given["attention_mask"] = mask_of(side, self.rows, 9)
        for name in sorted(self.names - given.keys()):  # in one order: they are drawn
            maker = shapes.OTHERS.get(name)
            if maker is not None and (name in self.required or shapes.wants(self.model, name, media)):
                made = maker(self.sizes, given)
                if made is not None:
                    given[name] = made
        if self.contrastive:
            given["return_loss"] = True
        if "attention_mask" in given and "attention_mask" not in self.names:
            del given["attention_mask"]
        return {name: x for name, x in given.items() if name in self.names}

    def _text(self, side: str, values: Inputs, media: shapes.Media) -> Inputs:
        pieces = [self._placeholders(kind, values, media) for kind in media.kinds]
        start = [token for piece in pieces for token in piece]
        if len(start) > LONGEST:
            raise ValueError(f"{len(start)} placeholders a row")
        length = max(13, len(start) + 11)
        if self.sizes.text_length is not None and not start:
            length = min(length, self.sizes.text_length)
        ids = torch.randint(TEXT_FROM, min(TEXT_TO, self.sizes.vocabulary), (self.rows, length))
        mask = mask_of(side, self.rows, length)
        for row in range(self.rows):
            begin = PADDED if side == "left" and row == self.rows - 1 else 0
            ids[row, begin : begin + len(start)] = torch.tensor(start, dtype=torch.long)
        ids = ids.masked_fill(mask == 0, self.sizes.pad)
        if self.contrastive or "SequenceClassification" in self.cls:  # which pool where the text ends
            ids[torch.arange(self.rows), mask.cumsum(-1).argmax(-1)] = self.sizes.end
        if "MultipleChoice" in self.cls:
            ids, mask = (x[:, None].expand(-1, 2, -1).contiguous() for x in (ids, mask))
        if "codebooks" in self.sizes.given:
            ids = ids[..., None].repeat(1, 1, self.sizes.given["codebooks"])
        given = {"input_ids": ids, "attention_mask": mask}
        return given | self._token_kinds(ids, media)

    def _placeholders(self, kind: str, values: Inputs, media: shapes.Media) -> list[int]:
        """The tokens that stand for a picture in a row, as many as the model makes features of it."""
        token = self.sizes.token(kind)
        if token is None:
            return []
        count = media.counts.get(kind)
        if count is None:
            count = features(self.model, kind, values, self.names)
        if not count and kind == "image":  # features by a Q-Former, and no function that makes them alone
            count = self.rows * self.sizes.number("num_query_tokens", default=0)
        if not count:
            return []
        before, after = self.sizes.around(kind)
        return [TEXT_FROM, *before, *(token,) * (count // self.rows), *after]

    def _token_kinds(self, ids: Tensor, media: shapes.Media) -> Inputs:
        """1 for tokens of images, 2 for those of videos, 3 for those of audio: what the processors hand over too."""
        kinds = torch.zeros_like(ids)
        for number, kind in enumerate(("image", "video", "audio"), start=1):
            token = self.sizes.token(kind)
            if token is not None and kind in media.kinds:
                kinds[ids == token] = number
        found = {}
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
            if name in self.names:
                found[name] = kinds.int()
        if "token_type_ids" in self.names and media.kinds and self.sizes.config.model_type in shapes.PREFIX_BY_TYPE:
            found["token_type_ids"] = (kinds > 0).long()
        return found


def mask_of(side: str, rows: int, length: int) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    if side == "left":
        mask[-1, :PADDED] = 0
    elif side == "right":
        mask[-1, -PADDED:] = 0
    return mask


def features(model: nn.Module, kind: str, values: Inputs, names: set[str]) -> int:
    """How many rows of features the model makes of all images (or videos, or audio) of a batch."""
    owners = (model, getattr(model, "model", None), getattr(model, "base_model", None))
    method = next((m for x in owners if (m := getattr(x, f"get_{kind}_features", None)) is not None), None)
    if method is None:
        return 0
    accepted = inspect.signature(method).parameters
    given = {name: x for name, x in values.items() if name in accepted}
    for name in accepted:  # their own names for what forward calls otherwise
        if name not in given and name in shapes.SAME_THING and shapes.SAME_THING[name] in values:
            given[name] = values[shapes.SAME_THING[name]]
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in given and name in shapes.OTHERS:
            given[name] = shapes.OTHERS[name](Sizes(model), given)
    with torch.no_grad():
        out = method(**given)
    made = (getattr(out, name, None) for name in ("pooler_output", "last_hidden_state"))
    return _rows(next((x for x in made if x is not None), out))


def _rows(x: Any) -> int:
    if isinstance(x, Tensor):
        return x.numel() // x.shape[-1]
    return sum(_rows(part) for part in x) if isinstance(x, (list, tuple)) else 0
