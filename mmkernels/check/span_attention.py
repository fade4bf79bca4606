"""Span attention: what eager PyTorch writes, and the cases: every layout, every head size, every place in memory.

Keys that no query sees, queries that see no key, and the gradients of these queries' results hold NaN in every case:
padding reaches nothing. Where a case differentiates the log-sum-exp, the gradient of a sum of both is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.span_attention import span_attention
from .budget import ulp
from .draw import DTYPES, Draw
from .op import Call, Op
from .poison import guarded
from .span_attention_layouts import Layout, beyond, blocks, causal, filled, full, last_rows, scattered


def plain_span_attention(q, k, v, spans, *, scale=None, softcap=None, sinks=None, return_lse=False, rounding=None):
    """SDPA with a dense mask, or with a softcap the eager code that Gemma 2 is left with, and with sinks gpt-oss.

    A row without keys sees all of them and is zeroed afterwards, as idefics does; what no query sees is zeroed before,
    since a masked NaN is a NaN. rounding: weights have the dtype of the values that they are multiplied with.
    """
    mask = spans.to_dense()
    mask = mask if mask.dim() == 2 else mask[:, None]  # over the heads
    idle, unseen = ~mask.any(-1, keepdim=True), ~mask.any(-2)[..., None]
    groups = q.shape[-2] // k.shape[-2]
    queries = q.transpose(-3, -2).masked_fill(idle, 0.0)
    keys, values = (x.transpose(-3, -2).repeat_interleave(groups, -3).masked_fill(unseen, 0.0) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def scores(visible: Tensor) -> Tensor:
        products = queries @ keys.mT * scale
        capped = products if softcap is None else softcap * (products / softcap).tanh()
        capped = capped.masked_fill(~visible, -torch.inf)
        if sinks is None:
            return capped
        return torch.cat([capped, sinks.to(q.dtype)[:, None, None].expand(*capped.shape[:-1], 1)], -1)

    if softcap is None and sinks is None and rounding is None:
        out = _sdpa(queries, keys, values, mask | idle, scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = scores(mask | idle).softmax(-1, dtype=wide).to(rounding or q.dtype).to(q.dtype)
        out = weights[..., : mask.shape[-1]] @ values
    out = out.masked_fill(idle, 0.0).transpose(-3, -2)
    if not return_lse:
        return out
    if sinks is not None:
        return out, scores(mask).logsumexp(-1)
    return out, scores(mask | idle).logsumexp(-1).masked_fill(idle[..., 0], -torch.inf)


def _sdpa(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """([B,] H, T, D), D and Dv brought to one length by zeros, as DeepSeek's models do: the fused kernels want that."""
    width = max(queries.shape[-1], values.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) for x in (queries, keys, values))
    batched = (x if x.dim() == 4 else x[None] for x in padded)
    out = F.scaled_dot_product_attention(*batched, attn_mask=mask, scale=scale)
    return out.view(*queries.shape[:-1], width)[..., : values.shape[-1]]


def response_of_lse(softcap: float | None, dtype: torch.dtype) -> float:
    """How far the log-sum-exp moves when every score moves by 2 ulp of the cap. Kernels for half types make tanh of an
    exponential, which near zero is a difference from 1, and off by ulps of that."""
    return 2 * ulp(torch.float32, softcap) if softcap and dtype != torch.float32 else 0.0


def _response(call: Call) -> dict[str, float]:
    return {"lse": response_of_lse(call.options["softcap"], call.tensors["q"].dtype)}


SPAN_ATTENTION = Op(
    "span_attention",
    ("out", "lse"),
    span_attention,
    plain_span_attention,
    typed_by="q",
    seconds=(0.4, 3.0),
    response=_response,
    wide=("lse",),
    exact=("out", "lse", "d_v"),
    rounds=True,
    orders=(("q", "k"), ("v", "out")),
)
OPS = (SPAN_ATTENTION,)


@dataclass(frozen=True)
class AttentionCase:
    name: str
    layout: Layout
    heads: tuple[int, int] = (2, 2)  # of queries, of keys
    dims: tuple[int, int] = (64, 64)  # of queries and keys, of values
    op: str = "span_attention"
    batch: int | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    lse_gradient: bool = False
    memory: str = "plain"
    kv_memory: str | None = None  # None: as the queries'
    growing: bool = False  # later keys have larger scores, so that a running maximum moves all the time
    clinging: bool = False  # a key almost in every query's own direction, beside whose weight the others are small
    sunken: bool = False  # every score is about -200: of a key that is none, which scores zero, the weight would be all
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES
    plain_draws: int = 0

    def make(self, draw: Draw, dtype: torch.dtype, device: str) -> Call:
        spans = self.layout()
        visible = spans.to_dense()
        idle, unseen = ~visible.any(-1), ~visible.any(-2)
        (q_heads, kv_heads), (dim, v_dim) = self.heads, self.dims

        def normal(*shape: int) -> Tensor:
            return draw.normal(*([self.batch] if self.batch else []), *shape)

        def padded(x: Tensor, padding: Tensor, memory: str) -> Tensor:
            return guarded(x.masked_fill(padding[..., None, None], torch.nan).to(device, dtype), memory)

        q, k = normal(spans.num_queries, q_heads, dim), normal(spans.num_keys, kv_heads, dim)
        if self.growing:
            q, k = q.abs(), k.abs() * torch.linspace(0.1, 3, len(k)).view(-1, 1, 1)
        if self.clinging:
            k = q + 0.1 * k
        if self.sunken:
            depth = (200 * dim**0.5) ** 0.5
            q[..., 0], k[..., 0] = depth, -depth
        kv_memory = self.kv_memory or self.memory
        v = normal(spans.num_keys, kv_heads, v_dim)
        tensors = {"q": padded(q, idle, self.memory), "k": padded(k, unseen, kv_memory)}
        tensors["v"] = padded(v, unseen, kv_memory)
        spans = spans.held_by(*(guarded(x.to(device), "odd") for x in (spans.lo, spans.hi)))
        if self.sinks:
            tensors["sinks"] = guarded(draw.normal(q_heads).to(device, dtype))
        options = {"spans": spans, "return_lse": True}
        options |= {"scale": self.scale, "softcap": self.softcap}
        fed = {}
        if self.lse_gradient:
            d_lse = normal(q_heads, spans.num_queries)
            if not self.sinks:  # with them, the lse of a query that sees nothing is its sink's, and that has a gradient
                d_lse = d_lse.masked_fill(idle[..., None, :], torch.nan)
            fed["lse"] = d_lse.to(device, dtype)
        return Call(tensors, options, tuple(tensors), fed)

    def upstream(self, draw: Draw, result: Tensor) -> Tensor:
        idle = (result == 0).all(-1).all(-1).cpu()
        return draw.normal(*result.shape).masked_fill(idle[..., None, None], torch.nan)


_LENGTHS = (1, 5, 33, 64, 7, 130)
_PACKED = AttentionCase("packed causal", causal(_LENGTHS))
_SMALL = AttentionCase("small causal", causal((5, 17, 1, 9)), dims=(32, 32), quick=True)
_IMAGES = (range(6, 31), range(40, 57), range(57, 80), range(110, 175))

_ODD = (13, 7, 19, 29)  # no multiples of any kernel's tile

_OF_LSE = [  # cases that differentiate the log-sum-exp: with and without sinks
    replace(_SMALL, name="small, lse", layout=causal((13, 6), padding=7), heads=(4, 2), dims=(16, 16)),
    replace(_SMALL, name="small, lse, two runs, softcap", layout=scattered(20, 50, runs=2), softcap=2.0, dims=(40, 16)),
    AttentionCase("lse, windows of a batch", causal((70, 41), window=17, padding=4), batch=2, memory="fused"),
    AttentionCase("lse, chunks of keys", full(70, 2100), heads=(1, 1), dims=(40, 40)),
    AttentionCase("lse, few queries", last_rows(3, 400), heads=(4, 1), dims=(72, 72)),
]
_OF_LSE = [replace(case, plain_draws=20) for case in _OF_LSE]

HEAD_DIMS = (16, 24, 32, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192, 256, 320, 512)

CASES = (
    _SMALL,
    _PACKED,
    replace(_PACKED, name="padding after the last document", layout=causal(_LENGTHS, padding=29)),
    replace(_SMALL, name="small, padding", layout=causal((5, 17, 0, 9), padding=7)),
    replace(_PACKED, name="images in text", layout=causal(_LENGTHS, images=_IMAGES)),
    replace(_SMALL, name="small images in text", layout=causal((20, 17), images=(range(3, 12), range(20, 29)))),
    replace(_PACKED, name="window 17", layout=causal((200, 3, 90), window=17)),
    replace(_SMALL, name="small window", layout=causal((30, 9), window=6)),
    replace(_PACKED, name="window 40, images", layout=causal(_LENGTHS, window=40, images=_IMAGES)),
    AttentionCase("full 49x301", full(49, 301)),
    AttentionCase("full 333x97", full(333, 97), dims=(128, 128)),
    AttentionCase("causal, 1100 keys", last_rows(140, 1100), heads=(1, 1)),
    AttentionCase("full 70x2100", full(70, 2100), heads=(1, 1), dims=(40, 40)),
    AttentionCase("windows", blocks([64] * 3 + [49, 64, 16], [64] * 3 + [49, 64, 16]), dims=(80, 80)),
    AttentionCase("small windows", blocks([16] * 3, [16] * 3), dims=(80, 80), quick=True),
    AttentionCase(
        "documents of 1 to 9", causal((1, 8, 2, 9, 7, 1, 3, 4, 8, 5, 6, 2), padding=3), heads=(2, 2), dims=(40, 24)
    ),
    AttentionCase("documents of 1 to 4, heads 2/1", causal((1, 4, 2, 3) * 6), heads=(2, 1), memory="fused"),
    AttentionCase("documents of 1 to 8, softcap", causal((1, 8, 2, 5)), softcap=5.0, scale=1.0, plain_draws=20),
    AttentionCase("small, two runs of few keys", scattered(3, 8, runs=2), dims=(16, 16), quick=True, plain_draws=20),
    AttentionCase("last image", blocks([20, 0, 61, 33], [77, 30, 0, 130], padding=5), heads=(4, 4)),
    AttentionCase("more sequences than queries", blocks([1, 0, 0, 1, 0, 0, 0, 1], [40, 3, 0, 70, 9, 0, 1, 12])),
    AttentionCase("scattered", scattered(131, 333), heads=(4, 2), dims=(72, 72), plain_draws=20),
    AttentionCase("small scattered", scattered(40, 50), heads=(2, 1), dims=(16, 16), quick=True),
    AttentionCase("two runs", scattered(100, 210, runs=2), heads=(3, 1)),
    AttentionCase("small runs", scattered(20, 70, runs=2), dims=(32, 32), quick=True),
    AttentionCase("five runs", scattered(60, 400, runs=5), dims=(96, 96)),
    AttentionCase("spans beyond the keys", beyond(50, 90)),
    AttentionCase("small, beyond the keys", beyond(9, 11), dims=(16, 16), quick=True, plain_draws=20),
    *(replace(_PACKED, name=f"D {dim}", layout=causal((37, 5)), dims=(dim, dim), heads=(2, 1)) for dim in HEAD_DIMS),
    *(
        replace(_SMALL, name=f"small, D {dim}", layout=causal((13, 4)), heads=(1, 1), dims=(dim, dim))
        for dim in (72, 88, 128)
    ),
    *(AttentionCase(f"D {dim}", blocks([19, 6], [30, 41]), dims=(dim, dim), plain_draws=20) for dim in (1, 5)),
    *(AttentionCase(f"D {dim}", blocks([19, 6], [30, 41]), dims=(dim, dim)) for dim in (20, 77)),
    AttentionCase("no queries", full(0, 20)),
    replace(_SMALL, name="small, no keys", layout=full(7, 0)),
    AttentionCase("no spans", scattered(40, 30, empty=1.0), heads=(4, 2)),
    AttentionCase("D 64, values of 40", causal((50, 21)), dims=(64, 40)),
    AttentionCase("D 72, values of 128", causal((50, 21)), dims=(72, 128)),
    AttentionCase("small, D 40, values of 16", causal((9, 5)), dims=(40, 16), quick=True),
    AttentionCase("small, D 320, values of 300", causal((9, 5)), dims=(320, 300), quick=True),
    AttentionCase("D 192, values of 128", causal((50, 21)), dims=(192, 128)),
    AttentionCase("D 576, values of 512", causal((50, 21)), dims=(576, 512)),
    AttentionCase("heads 6/2", causal((5, 90, 33)), heads=(6, 2)),
    AttentionCase("heads 5/1", causal((50, 33)), heads=(5, 1), dims=(80, 80)),
    AttentionCase("small, heads 4/2", causal((13, 6)), heads=(4, 2), dims=(16, 16), quick=True),
    AttentionCase("scale 1", causal((90, 41)), scale=1.0),
    AttentionCase("scale -0.2", causal((60, 41)), scale=-0.2),
    AttentionCase("growing scores", full(40, 700), growing=True),
    replace(_SMALL, name="small, growing scores", layout=full(9, 70), growing=True),
    AttentionCase("clinging queries", full(150, 150), scale=0.3, clinging=True, plain_draws=20),
    AttentionCase("clinging queries, windows", blocks([61, 90], [61, 90]), scale=0.3, clinging=True, plain_draws=20),
    AttentionCase("clinging queries, D 512", full(70, 70), heads=(1, 1), dims=(512, 512), scale=0.1, clinging=True),
    AttentionCase("scores far below zero", full(70, 301), sunken=True, plain_draws=20),
    replace(_SMALL, name="small windows, scores far below zero", layout=blocks(_ODD, _ODD), sunken=True),
    AttentionCase("softcap 20", causal((70, 41)), heads=(4, 2), softcap=20.0, scale=1.0, plain_draws=20),
    replace(_SMALL, name="small, softcap", softcap=2.0, scale=0.5, plain_draws=20),
    replace(_SMALL, name="small, softcap 50", softcap=50.0),
    AttentionCase("softcap, two runs", scattered(60, 110, runs=2), softcap=5.0, dims=(96, 96), plain_draws=20),
    AttentionCase("decode", full(1, 700), heads=(4, 4)),
    AttentionCase("decode, 3000 keys", full(1, 3000), heads=(2, 1), dims=(80, 72)),
    AttentionCase("decode, heads 8/2, batch", full(1, 400), heads=(8, 2), batch=2, dims=(128, 128)),
    AttentionCase("decode, heads 16/1", full(1, 333), heads=(16, 1), dims=(61, 61)),
    AttentionCase("decode, D 576, values of 512", full(1, 333), heads=(16, 1), dims=(576, 512)),
    AttentionCase("decode, cache partly filled", scattered(1, 300, batch=3, empty=0), heads=(4, 2), batch=3),
    AttentionCase("decode, batch of 8", filled(700, 1, 0, 640, 64, 3, 513, 256), heads=(4, 2), batch=8),
    AttentionCase("small decode", full(1, 90), heads=(4, 2), batch=2, dims=(32, 32), quick=True),
    AttentionCase("small decode, batch of 4", filled(40, 0, 90, 7), dims=(24, 40), batch=4, quick=True),
    AttentionCase("decode of 3 rows, softcap", last_rows(3, 700), heads=(4, 1), softcap=10.0, plain_draws=20),
    AttentionCase("decode of 5 rows", last_rows(5, 500), heads=(4, 2), batch=2, memory="heads_first"),
    AttentionCase("decode of 8 rows", last_rows(8, 1100), heads=(1, 1), dims=(96, 96), scale=-0.2),
    AttentionCase("decode, two runs", scattered(2, 800, runs=2, empty=0), heads=(4, 2), dims=(80, 80)),
    AttentionCase("prefill beside decode", blocks([70, 1, 1, 1], [70, 300, 5, 400]), heads=(4, 2)),
    AttentionCase("batch, one layout", causal((40, 30), padding=4), batch=3, plain_draws=20),
    AttentionCase("batch, layouts of their own", scattered(70, 90, batch=3), heads=(4, 2), batch=3, plain_draws=20),
    AttentionCase(
        "batch, runs of their own", scattered(50, 120, runs=2, batch=2), batch=2, dims=(80, 80), plain_draws=20
    ),
    AttentionCase("batch of one keys", full(40, 70), batch=3, kv_memory="expanded"),
    replace(_SMALL, name="small batch", layout=scattered(20, 30, batch=2), batch=2),
    AttentionCase("slices of a fused projection", causal((70, 41)), heads=(4, 2), memory="fused"),
    AttentionCase("small, fused", causal((13, 6)), memory="fused", dims=(16, 16), quick=True),
    AttentionCase("heads first", causal((70, 41)), heads=(4, 2), dims=(80, 80), memory="heads_first"),
    AttentionCase("heads first, batch", causal((70, 41)), batch=2, memory="heads_first"),
    AttentionCase("crop", causal((70, 41)), dims=(72, 72), memory="crop", kv_memory="fused"),
    AttentionCase("odd address", causal((50, 41)), dims=(61, 61), memory="odd", kv_memory="crop"),
    *(replace(case, lse_gradient=True) for case in _OF_LSE),
    *(replace(case, name=f"sinks, {case.name}", lse_gradient=True, sinks=True) for case in _OF_LSE),
    AttentionCase("sinks alone, heads 6/2", causal((40, 31), padding=9), heads=(6, 2), sinks=True, plain_draws=20),
    AttentionCase("beyond 2^31", full(5, 7), memory="far", dtypes=(torch.bfloat16,)),
    AttentionCase("beyond 2^31, batch", full(1, 20), batch=3, memory="far", dtypes=(torch.bfloat16,)),
)
