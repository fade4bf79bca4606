"""Where documents begin in the rows of the model that runs now, as its caller said: cu_seq_lens_q.

transformers hands that to attention, and to no function that makes a mask: these guess documents from positions that
begin anew, and only where no attention_mask came. In an accelerated model each module that makes masks tells them what
it was told, for as long as its forward runs (masks.py asks). A module inside it that was told nothing, such as a vision
tower, tells them nothing: documents are those of the text's tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from ..._warnings import warn
from .._tracing import is_traced
from ..swap import subclass

_told: ContextVar[Tensor | None] = ContextVar("documents", default=None)
_traced: Tensor | None = None  # the same for what torch.compile traces, which follows globals and no context


def tells_documents(plain: type) -> type:
    """A subclass whose forward, called as before, tells masks of its documents."""
    inner = plain.forward

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        before, offsets = told(), kwargs.get("cu_seq_lens_q")
        if offsets is None:
            _warn_of_guesses(args, kwargs)
        _tell(offsets)
        try:
            return inner(self, *args, **kwargs)
        finally:
            _tell(before)

    return subclass(plain, None, {"forward": forward})


def told() -> Tensor | None:
    """(documents + 1,), over the tokens of all rows laid one after the other."""
    return _traced if torch.compiler.is_compiling() else _told.get()


def _tell(offsets: Tensor | None) -> None:
    global _traced
    _traced = offsets  # of eager code too, which may call what is compiled
    if not torch.compiler.is_compiling():
        _told.set(offsets)


def apart(function: Callable, *args, **kwargs) -> object:
    """function(*args, **kwargs) as eager code runs it. torch.compile breaks its graph for it: which runs of keys a mask
    has is a matter of its values, and a graph would hold the mask itself, tokens by tokens."""
    return _apart(told(), function, args, kwargs)


@torch.compiler.disable
def _apart(offsets: Tensor | None, function: Callable, args: tuple, kwargs: dict) -> object:
    token = _told.set(offsets)
    try:
        return function(*args, **kwargs)
    finally:
        _told.reset(token)


def begin_anew(positions: object) -> bool:
    """Whether positions of tokens, (B, L), or (3 or 4, B, L) of Qwen2-VL and its kin, fall inside a row, as where
    another document begins; False of others, and where nobody can look, as under torch.compile."""
    if not isinstance(positions, Tensor) or torch.compiler.is_compiling() or is_traced():
        return False
    if positions.dim() == 3 and len(positions) in (3, 4):
        positions = positions[0]  # the text's own, or the time, which never falls inside a document
    if positions.dim() != 2 or positions.is_meta:
        return False
    return bool((positions[:, 1:] < positions[:, :-1]).any())


def _warn_of_guesses(args: tuple, kwargs: dict) -> None:
    """Where nobody can guess the documents that positions tell of: a mask of ones came, which processors hand out and
    transformers takes for the truth, or positions along three axes, which it does not look at. Only where they are the
    positions of the tokens: those of a picture's patches, (B, patches, 2), tell of no documents."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    tokens = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
    length = next((x.shape[1] for x in tokens if isinstance(x, Tensor) and x.dim() > 1), None)
    if not isinstance(positions, Tensor) or positions.shape[-1:] != (length,) or not begin_anew(positions):
        return
    along_three = positions.dim() == 3 and len(positions) == 3
    of_ones = isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())
    if of_ones or (along_three and mask is None):
        warn_unsaid("an attention_mask of ones" if of_ones else "position_ids of three axes alone")


def warn_unsaid(what: str) -> None:
    warn(
        f"mmkernels: positions begin anew inside a row, with {what} and without cu_seq_lens_q: documents may "
        "see each other. Hand cu_seq_lens_q and cu_seq_lens_k to the model, as mmkernels.packing.Collator does"
    )


def bounds(offsets: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Of each token, (batch, length): where its document begins and ends in its row; twice the same past the last."""
    token = torch.arange(batch * length, device=offsets.device, dtype=offsets.dtype).view(batch, length)
    document = torch.searchsorted(offsets[1:], token, right=True)
    ends = torch.cat([offsets, offsets[-1:]])
    start, end = (ends[document + side] - token[:, :1] for side in (0, 1))
    return start, end
