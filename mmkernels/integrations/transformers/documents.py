"""Where documents begin in the rows of the model that runs now, as its caller said: cu_seq_lens_q.

transformers hands that to attention, and to no function that makes a mask: these guess documents from positions that
begin anew, and only where no attention_mask came. In an accelerated model each module that makes masks tells them what
it was told, for as long as its forward runs (masks.py asks). A module inside it that was told nothing, such as a vision
tower, tells them nothing: documents are those of the text's tokens.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar

import torch
from torch import Tensor

from ..swap import subclass

_told: ContextVar[Tensor | None] = ContextVar("documents", default=None)
_traced: Tensor | None = None  # the same for what torch.compile traces, which follows globals and no context


def tells_documents(plain: type) -> type:
    """A subclass whose forward, called as before, tells masks of its documents."""
    inner = plain.forward

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        before = told()
        _tell(kwargs.get("cu_seq_lens_q"))
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


def bounds(offsets: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Of each token, (batch, length): where its document begins and ends in its row; twice the same past the last."""
    token = torch.arange(batch * length, device=offsets.device, dtype=offsets.dtype).view(batch, length)
    document = torch.searchsorted(offsets[1:], token, right=True)
    ends = torch.cat([offsets, offsets[-1:]])
    start, end = (ends[document + side] - token[:, :1] for side in (0, 1))
    return start, end
