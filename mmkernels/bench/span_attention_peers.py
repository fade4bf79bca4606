"""What a user would attend with instead. Whatever a mask cannot be said in is not offered for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence

from ..check.op import Call
from .op import PASSES, Function, Peer
from .span_attention_layouts import Layout, Segment


def peers(call: Call) -> list[Peer]:
    return [Peer(name, function) for name, function in (_sdpa_peers(call) | _varlen_peers(call)).items()]


def compile_flex(best: Peer, device: str) -> Peer:
    """FlexAttention: uncompiled it holds every score, and nobody runs it so."""
    passes = ("fwd",) if device == "cpu" else PASSES  # on a CPU FlexAttention has no backward
    return Peer("compiled FlexAttention", _flex(), compiled=True, passes=passes)


def _sdpa_peers(call: Call) -> dict[str, Function]:
    """By name, what a model's eager code does first."""
    layout: Layout = call.options["layout"]
    if call.tensors["q"].dim() == 4:
        return {"SDPA": _one_query, "SDPA, groups as queries": _groups_as_queries}
    if len(layout.segments) == 1 and not layout.masked:
        return {"SDPA": _whole}
    found: dict[str, Function] = {"SDPA" if layout.dense is None else "SDPA, dense mask": _dense}
    if len(layout.segments) == 1:
        return found
    found["SDPA per sequence"] = _per_sequence
    if layout.disjoint:
        equal = len({(x.queries.stop - x.queries.start, x.keys.stop - x.keys.start) for x in layout.segments}) == 1
        if equal and not layout.masked:
            found["SDPA, one batch"] = _batched
        else:
            found["SDPA, padded"] = _padded
    return found


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return x.transpose(0, 1)[None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def _dense(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return _sdpa(*map(_heads_first, (q, k, v)), attn_mask=layout.dense)[0].transpose(0, 1)


def _whole(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return _of_segment(q, k, v, layout.segments[0])


def _per_sequence(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return torch.cat([_of_segment(q, k, v, segment) for segment in layout.segments])


def _of_segment(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
    parts = q[segment.queries], k[segment.keys], v[segment.keys]
    out = _sdpa(*map(_heads_first, parts), attn_mask=segment.mask, is_causal=segment.causal)
    return out[0].transpose(0, 1)


def _batched(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Sequences of one length are a batch as they lie."""
    queries, keys, values = (x.unflatten(0, (len(layout.segments), -1)).transpose(1, 2) for x in (q, k, v))
    return _sdpa(queries, keys, values, is_causal=layout.causal).transpose(1, 2).flatten(0, 1)


def _padded(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """A batch of the longest length. What pads causal text comes after all that is read, and needs no mask."""
    segments = layout.segments

    def batch(x: Tensor, tokens: list[slice]) -> Tensor:
        return pad_sequence([x[own] for own in tokens], batch_first=True).transpose(1, 2)

    queries = batch(q, [segment.queries for segment in segments])
    keys, values = (batch(x, [segment.keys for segment in segments]) for x in (k, v))
    plain_causal = layout.causal and not layout.masked
    mask = None if plain_causal else _padding_mask(layout)
    out = _sdpa(queries, keys, values, attn_mask=mask, is_causal=plain_causal).transpose(1, 2)
    lengths = [segment.queries.stop - segment.queries.start for segment in segments]
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])


@functools.lru_cache(maxsize=1)
def _padding_mask(layout: Layout) -> Tensor:
    """(segments, 1, queries, keys) of a padded batch; what pads the queries sees key 0, since SDPA makes NaN of a row
    that sees nothing."""
    sizes = [(x.queries.stop - x.queries.start, x.keys.stop - x.keys.start) for x in layout.segments]
    device = layout.spans().device
    mask = torch.zeros(len(sizes), 1, *map(max, zip(*sizes, strict=True)), dtype=torch.bool, device=device)
    mask[..., 0] = True
    for row, segment, (queries, keys) in zip(mask[:, 0], layout.segments, sizes, strict=True):
        row[:queries, :keys] = True if segment.mask is None else segment.mask
    return mask


def _one_query(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    return _sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _groups_as_queries(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The query heads that share a key head as so many queries of it, which read its keys once: (B, Hkv, group, D)."""
    queries = q[:, 0].unflatten(1, (k.shape[2], -1))
    out = F.scaled_dot_product_attention(queries, k.transpose(1, 2), v.transpose(1, 2))
    return out.flatten(1, 2)[:, None]


def _flex() -> Function:
    """Compiled, for this shape only; the block mask is made anew in every call, as for every batch of documents.

    What a query sees is read from two numbers, which costs less than any function of documents and images, and blocks
    are made of these without asking for each pair; of one window alone compiled code makes both.
    """
    attention = torch.compile(flex_attention, dynamic=False)
    make_mask = torch.compile(create_block_mask, dynamic=False)

    def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        batched = q.dim() == 4
        queries, keys, values = (x.transpose(1, 2) if batched else _heads_first(x) for x in (q, k, v))
        block_mask = None
        if rule := _window_rule(layout):
            block_mask = make_mask(rule, None, None, queries.shape[2], keys.shape[2], device=q.device)
        elif layout.dense is not None:
            block_mask = layout.spans().to_block_mask()
        out = attention(queries, keys, values, block_mask=block_mask, enable_gqa=queries.shape[1] != keys.shape[1])
        return out.transpose(1, 2) if batched else out[0].transpose(0, 1)

    return flex


@functools.lru_cache(maxsize=1)
def _window_rule(layout: Layout) -> Callable[..., Tensor] | None:
    window = layout.window
    if not window or len(layout.segments) != 1:
        return None
    return lambda batch, head, query, key: (key <= query) & (query - key < window)


def _varlen_peers(call: Call) -> dict[str, Function]:
    """FlashAttention's calls for packed sequences, torch's and flash-attn's own, where they are and take the mask.

    As their users make them, at their best: with the longest lengths, with gradients in any order, and without what the
    backend "flash-attn" puts around the same kernels (mmkernels.ops._flash_attn) to keep our contract.
    """
    q, layout = call.tensors["q"], call.options["layout"]
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return {}
    if not layout.disjoint or (layout.masked and layout.window is None):
        return {}
    found = {}
    for name, load in (("torch varlen", _torch_varlen), ("flash-attn varlen", _flash_attn)):
        try:
            kernel = load()
        except (ImportError, AttributeError):
            continue
        found[name] = _varlen(kernel, layout, q.shape[0] if q.dim() == 4 else None)
    return found


def _varlen(kernel: Function, layout: Layout, batch: int | None) -> Function:
    """`kernel` on (q, k, v, cu_q, cu_k, longest_q, longest_k, causal, window)."""
    segments = layout.segments * (batch or 1)
    lengths = [[x.stop - x.start for x in (getattr(s, kind) for s in segments)] for kind in ("queries", "keys")]
    device = layout.spans().device
    cu_q, cu_k = (F.pad(torch.tensor(x).cumsum(0), (1, 0)).to(device, torch.int32) for x in lengths)
    window = (-1 if layout.window is None else layout.window - 1, 0) if layout.causal else (-1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        packed = (x.flatten(0, 1) if batch else x for x in (q, k, v))
        return kernel(*packed, cu_q, cu_k, *map(max, lengths), window).view(q.shape)

    return attend


def _torch_varlen() -> Function:
    from torch.nn.attention.varlen import varlen_attn

    asks = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 takes groups of heads unasked

    def attend(q, k, v, cu_q, cu_k, longest_q, longest_k, window):
        gqa = {"enable_gqa": q.shape[1] != k.shape[1]} if asks else {}
        return varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, window_size=window, **gqa)

    return attend


def _flash_attn() -> Function:
    from flash_attn import flash_attn_varlen_func

    def attend(q, k, v, cu_q, cu_k, longest_q, longest_k, window):
        causal = window[1] == 0
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, causal=causal, window_size=window)

    return attend
