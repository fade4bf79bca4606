"""Span attention: what a layer of a multimodal model attends over, forward and in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..check.draw import Draw
from ..check.op import Call, evaluate
from ..check.span_attention import SPAN_ATTENTION
from ..ops.span_attention import span_attention
from ..spans import RowSpans
from .op import PASSES, Measured, Series, Truth
from .span_attention_layouts import Layout, MakeLayout, blocks, documents, full, media
from .span_attention_peers import compile_flex, peers

ROWS = 256  # queries whose truth is worked out at a time


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str | None = None) -> Tensor:
    """Ours, from what a model has."""
    return span_attention(q, k, v, layout.spans(), backend=backend)


def _truth_by_blocks(call: Call, upstream: Tensor) -> Truth:
    """A block of queries at a time, with the keys from the first to the last that one of them sees."""
    op, wide = SPAN_ATTENTION, call.in_dtype(torch.float64)
    spans = call.options["layout"].spans()
    truth = {"out": torch.zeros_like(wide.tensors["q"])}
    truth |= {f"d_{name}": torch.zeros_like(x) for name, x in wide.tensors.items()}
    for start in range(0, spans.num_queries, ROWS):
        rows = slice(start, start + ROWS)
        lo, hi = spans.lo[rows], spans.hi[rows]
        keys = slice(int(lo.min()), int(hi.max()))
        part = {"spans": RowSpans(lo - keys.start, hi - keys.start, keys.stop - keys.start)}
        places = {"q": rows, "k": keys, "v": keys}
        tensors = {name: x[..., places[name], :, :] for name, x in wide.tensors.items()}
        block = Call(tensors, part, call.differentiable)
        values = evaluate(op.call, block, op, upstream[..., rows, :, :], backend="reference")
        for name, value in values.items():
            truth[name][..., places.get(name.removeprefix("d_"), rows), :, :] += value
    return Truth(truth, {})


OPS = (
    Measured(
        replace(SPAN_ATTENTION, call=attend),
        peers,
        several_peers=True,
        compile=compile_flex,
        eager="SDPA, with a dense mask where one is needed",
        truth_by_chunks=_truth_by_blocks,
    ),
)


@dataclass(frozen=True)
class AttentionCase:
    name: str
    layout: MakeLayout
    heads: tuple[int, int] = (16, 16)  # of queries, of keys
    dim: int = 64
    op: str = "span_attention"
    batch: int | None = None
    passes: tuple[str, ...] = PASSES
    devices: tuple[str, ...] = ("cpu", "cuda")  # measured there unless others are asked for
    compiled: tuple[str, ...] = ()  # devices where FlexAttention is a peer; each pass takes half a minute
    quick: bool = False

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        layout = self.layout(device)
        spans = layout.spans()
        sizes = [(spans.num_queries, self.heads[0]), (spans.num_keys, self.heads[1]), (spans.num_keys, self.heads[1])]
        batch = [self.batch] if self.batch else []
        tensors = {
            name: draw.normal(*batch, *size, self.dim).to(device, dtype)
            for name, size in zip("qkv", sizes, strict=True)
        }
        return Call(tensors, {"layout": layout}, tuple(tensors))

    def upstream(self, draw: Draw, call: Call) -> Tensor:
        q = call.tensors["q"]
        return draw.normal(*q.shape).to(q)

    @cached_property
    def _pairs(self) -> int:
        return self.layout("cpu").pairs * (self.batch or 1) * self.heads[0]

    def flops(self, direction: str) -> int:
        """Of the pairs that see each other. Forward: the products with keys and values. Backward the scores once more,
        those with the values' gradients, and one for each of the three gradients."""
        products = 7 if direction == "fwd_bwd" else 2
        return 2 * products * self._pairs * self.dim

    def bytes(self, direction: str, call: Call) -> int:
        """Queries, keys, values and the result once; the same again for their gradients."""
        once = call.tensors["q"].nbytes + sum(x.nbytes for x in call.tensors.values())
        return once * (2 if direction == "fwd_bwd" else 1)

    def eager_bytes(self, direction: str, call: Call) -> int:
        """About what SDPA with a mask holds: the mask as numbers, the keys repeated for their groups, a result each."""
        q, k = call.tensors["q"], call.tensors["k"]
        repeated = 2 * k.nbytes * (self.heads[0] // self.heads[1] - 1)
        mask = q.shape[-3] * k.shape[-3] * k.element_size()
        return mask + repeated + 2 * self.bytes(direction, call)


_LENGTHS = (64, 1024, 300, 77, 577, 128, 900, 32)
_LONG = (512, 2048, 1024, 3072, 256, 4096, 1800, 900, 2676)  # 16384 tokens
_CPU, _GPU, _ASKED, _BOTH = ("cpu",), ("cuda",), (), ("cpu", "cuda")
_TILES = ((0, 512, 513), (2 * 1601, 1601, 1601))  # one picture of two tiles, then two of one tile side by side
_SMALL = {"devices": _ASKED, "quick": True}
_LLAMA = {"heads": (32, 8), "dim": 128}
_TRAINED = {"heads": (16, 16), "dim": 128, "devices": _GPU, "compiled": _GPU}

CASES = (
    AttentionCase("packed-small", documents((64, 30, 77)), (4, 2), **_SMALL),
    AttentionCase("cross-small", media(64, (0, 40), (50, 77), "immediate"), (4, 4), 80, **_SMALL),
    AttentionCase("packed", documents(_LENGTHS), compiled=_CPU),
    AttentionCase("packed-gqa", documents(_LENGTHS), (8, 2), 128),
    AttentionCase("packed-images", documents(_LENGTHS, images=True), compiled=_CPU),
    AttentionCase("equal-lengths", documents((512,) * 8), (8, 8)),
    AttentionCase("sliding-window", documents((4096,), window=512), (4, 1), 256, compiled=_BOTH),
    AttentionCase("full-2048", full(2048, 2048)),
    AttentionCase("full-2048-d128", full(2048, 2048), (8, 8), 128),
    AttentionCase("clip-texts", documents((77,) * 64), (8, 8)),
    AttentionCase("vision-windows", blocks((64,) * 64, (64,) * 64), (8, 8), 80),
    AttentionCase("cross-immediate", media(1024, range(0, 1024, 256), (1601,) * 4, "immediate")),
    AttentionCase("cross-previous", media(1024, range(0, 1024, 256), (1601,) * 4, "previous"), (8, 8)),
    AttentionCase("cross-tiles", media(1024, *_TILES, "group"), (8, 8)),
    AttentionCase("decode-8", full(1, 4096), **_LLAMA, batch=8, passes=("fwd",)),
    AttentionCase("decode-1", full(1, 4096), **_LLAMA, batch=1, passes=("fwd",)),
    AttentionCase("packed-16k", documents(_LONG), **_TRAINED),
    AttentionCase("packed-16k-images", documents(_LONG, images=True), **_TRAINED),
    AttentionCase("full-8192", full(8192, 8192), **_TRAINED),
    AttentionCase("cross-8k", media(8192, range(0, 8192, 512), (1601,) * 16, "immediate"), **_TRAINED),
)


def _series(name: str, axis: str, sizes: Iterable[int], layout: Callable[[int], MakeLayout], **options) -> Series:
    cases = {n: AttentionCase(f"{name}-{n}", layout(n), **options) for n in sizes}
    return Series("span_attention", name, axis, cases)


def _keys(batch: int) -> Series:
    axis = f"keys that a decoded token sees, batch of {batch}, 32 heads of 128, 8 of keys"
    sizes, options = (1024, 2048, 4096, 8192, 16384, 32768), _LLAMA | {"batch": batch, "passes": ("fwd",)}
    return _series(f"keys-of-{batch}", axis, sizes, lambda n: full(1, n), **options)


def _tokens() -> Series:
    axis, sizes = "tokens of one causal document, 2 heads of 64", (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    return _series("tokens", axis, sizes, lambda n: documents((n,)), heads=(2, 2))


def _lengths() -> Series:
    """Around what ends a tile, a block or a kernel, and between."""
    small = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 33, 48, 64, 65, 77, 96, 128, 129, 160, 192, 193, 256)
    axis, total = "tokens a causal document, 4096 in all, 8 heads of 64", 4096
    layout = lambda n: documents((n,) * (total // n))  # noqa: E731
    return _series("lengths", axis, (*small, 384, 512, 1024, 2048, total), layout, heads=(8, 8))


def _documents() -> Series:
    axis = "causal documents of 512 tokens, 8 heads of 64"
    return _series("documents", axis, _DOUBLED, lambda n: documents((512,) * n), heads=(8, 8))


def _images() -> Series:
    axis, text = "images of 577 tokens; each of 1024 queries sees the last one, 8 heads of 64", 1024
    layout = lambda n: media(text, range(0, text, text // n), (577,) * n, "immediate")  # noqa: E731
    return _series("images", axis, _DOUBLED, layout, heads=(8, 8))


def _heads() -> Series:
    cases = {n: AttentionCase(f"heads-{n}", documents(_LENGTHS), (n, n)) for n in _DOUBLED}
    return Series("span_attention", "heads", "heads of 64, eight causal documents of 32 to 1024 tokens", cases)


_DOUBLED = (1, 2, 4, 8, 16, 32, 64)
GROWTH = (_tokens(), _lengths(), _documents(), _images(), _heads(), _keys(1), _keys(8))
