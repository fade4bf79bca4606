"""A mask that is held as row spans: what a model hands from the function that makes its masks to its attention layers.

To the model it is the mask that its own attention would be given: (B, 1, Q, K), bool with True where a query sees a
key, or, for eager attention, 0 and the least number of a floating dtype. Whatever operation asks for its values makes
it that, so code that works on its mask before it attends gets what it would have got; attention that knows better reads
the spans. Tracing sees a wrapper around a small tensor, so this holds under torch.compile as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...spans import RowSpans

aten = torch.ops.aten


class SpanMask(Tensor):
    """Which keys each query sees: those of `code` that are in `seen`; one of them may be None, which says all.

    code: int64 (B, runs, Q), each element lo << 32 | hi: runs that are disjoint and ascending.
    seen: bool (B, K), the keys that any query sees: no padding.
    refusal: if not None, no operation makes the mask dense: it raises, with this reason.
    of_documents: what makes the mask anew for documents that begin at given offsets, where it was made without them.
    """

    of_documents: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def __new__(
        cls,
        code: Tensor | None,
        seen: Tensor | None,
        queries: int,
        keys: int,
        dtype: torch.dtype = torch.bool,
        refusal: str | None = None,
    ):
        held = seen if code is None else code
        shape = (held.shape[0], 1, queries, keys)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=held.device)

    def __init__(self, code, seen, queries, keys, dtype=torch.bool, refusal=None):
        self.code, self.seen, self.refusal = code, seen, refusal
        self.made = {}  # of it, once

    def __tensor_flatten__(self):
        names = [name for name in ("code", "seen") if getattr(self, name) is not None]
        return names, (self.dtype, self.refusal)

    @staticmethod
    def __tensor_unflatten__(inner, context, outer_size, outer_stride):
        return SpanMask(inner.get("code"), inner.get("seen"), outer_size[2], outer_size[3], *context)

    def __repr__(self, *, tensor_contents=None):
        return f"SpanMask(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol):
        return SpanMask, (self.code, self.seen, *self.shape[2:], self.dtype, self.refusal)

    def __deepcopy__(self, memo):
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kept = _KEEPS.get(function)
        if kept is not None:
            mask = kept(*args, **(kwargs or {}))
            if mask is not None:
                return mask
        args, kwargs = tree_map(lambda x: x._for(function) if isinstance(x, SpanMask) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    def _for(self, function: torch._ops.OpOverload) -> Tensor:
        """What an operation is given in its place."""
        if self.refusal is not None:
            raise ValueError(f"{self.refusal} ({function} of its mask)")
        if not _aliases(function):
            return self.dense()
        if torch.compiler.is_compiling():
            if function._schema.is_mutable:
                raise ValueError(f"SpanMask: {function} writes to a mask, which a compiled function cannot follow")
            return self.dense()
        # The result is written to, or may be through a view: from here on the dense mask is the mask.
        if not is_dense(self):
            self.made = {"dense": self.dense().contiguous(), "is dense": True}
        return self.made["dense"]

    def dense(self) -> Tensor:
        """The mask that it stands for."""
        return self.once("dense", self._dense)

    def tolist(self) -> list:
        return self.dense().tolist()

    def numpy(self, *, force: bool = False):
        return self.dense().numpy(force=force)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() gives, for as long as there is this mask, which does not change."""
        if torch.compiler.is_compiling():
            return make()
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _dense(self) -> Tensor:
        seen = torch.ones((), dtype=torch.bool, device=self.device)
        if self.code is not None:
            seen = _decode(self.code, self.shape[3]).to_dense()[:, None]
        if self.seen is not None:
            seen = seen & self.seen[:, None, None]
        seen = seen.expand(self.shape)
        if self.dtype == torch.bool:
            return seen
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(seen, zero, torch.finfo(self.dtype).min)


# Functions, not methods: torch.compile traces into these.


def spans_of(mask: SpanMask, queries: int) -> RowSpans:
    """Of its code, for the first `queries` of its rows, with a batch axis."""
    if torch.compiler.is_compiling():
        return _decode(mask.code[:, :, :queries], mask.shape[3])
    return mask.once(f"spans of {queries}", lambda: _decode(mask.code[:, :, :queries], mask.shape[3]))


def _decode(code: Tensor, keys: int) -> RowSpans:
    return RowSpans((code >> 32).int(), (code & 0xFFFFFFFF).int(), keys)


def is_dense(mask: SpanMask) -> bool:
    """Whether it may have been written to, so that what it holds says something else than its dense mask."""
    return not torch.compiler.is_compiling() and "is dense" in mask.made


@cache
def _aliases(function: torch._ops.OpOverload) -> bool:
    """Whether it writes to an argument, or returns a view of one."""
    return any(argument.alias_info is not None for argument in function._schema.arguments)


def encode(lo: Tensor, hi: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """lo, hi: (runs, B or 1, Q or 1) of any values. -> the code of a mask."""
    lo, hi = lo.clamp(0, keys), hi.clamp(0, keys)
    return ((lo << 32) | torch.maximum(lo, hi)).expand(-1, batch, queries).transpose(0, 1)


# ---- what leaves it a mask of spans; None: this call does not


def _same(mask: SpanMask, *args, **kwargs) -> SpanMask | None:
    if is_dense(mask):
        return None
    same = SpanMask(mask.code, mask.seen, *mask.shape[2:], mask.dtype, mask.refusal)
    same.of_documents = mask.of_documents
    return same


def _moved(mask: SpanMask, *, dtype=None, layout=None, device=None, non_blocking=False, **kwargs) -> SpanMask | None:
    if is_dense(mask) or dtype not in (None, mask.dtype) or layout not in (None, torch.strided):
        return None
    code, seen = (x if x is None else x.to(device=device, non_blocking=non_blocking) for x in (mask.code, mask.seen))
    moved, anew = SpanMask(code, seen, *mask.shape[2:], mask.dtype, mask.refusal), mask.of_documents
    there = moved.device
    moved.of_documents = anew and (lambda offsets: anew(offsets).to(there))
    return moved


def _sliced(mask: SpanMask, dim: int = 0, start=None, end=None, step: int = 1) -> SpanMask | None:
    """Some of the queries, as of models that need the last ones only."""
    if is_dense(mask) or dim not in (2, -2) or step != 1:
        return None
    queries = mask.shape[2]
    first, last, _ = slice(start, end).indices(queries)
    last = max(first, last)
    code = None if mask.code is None else mask.code[:, :, first:last]
    return SpanMask(code, mask.seen, last - first, mask.shape[3], mask.dtype, mask.refusal)


_KEEPS = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _moved,
    aten.slice.Tensor: _sliced,
}
