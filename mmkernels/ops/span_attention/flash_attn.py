"""Span attention by flash-attn's kernels, where the spans are documents laid one after the other.

The function is that of reference.py; the kernels are not ours (`mmkernels.ops._flash_attn`), and this module mends
where they keep another contract:

- What no query sees, and queries that see nothing, are made 0 before each pass. flash-attn masks by a weight of 0, and
  0 * NaN is NaN wherever a tile reaches such rows: inside a document that is a window's early keys, beyond its end
  any row in flash-attn 3, which loads whole tiles by TMA. (flash-attn 2 and torch's build of it fill up with zeros.)
- It takes no gradient of the log-sum-exp: where there is one, a second backward pass adds what it gives q and k.
- Afterwards the rows of tokens that belong to no document, which it leaves as they were, become 0, and their
  log-sum-exp -inf; so does its +inf for a query without keys, which is given back as it came.
- Offsets are clamped to the tokens there are, so that none leads outside the tensors.
- Rows of a batch become documents of one long row, and so does the padding at the end of each: keys of nobody, zeros.

Nothing waits for the device, and therefore the longest document is not known: the kernels are told the number of all
tokens, and start a block of threads for every block of queries that any document might have. Those without work end at
once; of thousands of short documents they are the most of the time.

Memory moved beside flash-attn's own: k and v read and written once more in both passes, in the backward pass q and
d_out too, and the results.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _flash_attn
from .._aligned_rows import aligned_rows
from .._flash_attn import Varlen
from .params import Params

MAX_HEAD = 256
HALVES = (torch.bfloat16, torch.float16)


def unsupported(q: Tensor, k: Tensor, v: Tensor, params: Params) -> str | None:
    head = q.shape[-1]
    if q.device.type != _flash_attn.DEVICE:
        return f"it serves tensors on {_flash_attn.DEVICE}, q is on {q.device}"
    if q.dtype not in HALVES:
        return f"it serves q of bfloat16, float16, not {q.dtype}"
    if head > MAX_HEAD or head % 8:
        return f"it serves heads of up to {MAX_HEAD} numbers, a multiple of 8; those of q have {head}"
    if v.shape[-1] != head:
        return f"it serves values as wide as the keys; those of v have {v.shape[-1]} numbers, those of k {head}"
    if params.documents is None:
        return (
            "it serves spans that RowSpans.packed or RowSpans.full made, and these keep no documents (a compiled "
            "function hands them on only where the backend is named by argument or use_backend)"
        )
    if not params.scale > 0:
        return f"it serves scales above 0, not {params.scale}"
    major, minor = _flash_attn.capability(q.device)
    if major < 8:
        return f"{q.device} is sm_{major}{minor}; flash-attn needs sm_80 or later"
    return _flash_attn.unsupported(head, params.softcap, q.device)


def span_attention(q: Tensor, k: Tensor, v: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    if not _has_work(q, k, params):
        return torch.zeros_like(q, memory_format=torch.contiguous_format), _no_lse(q)
    idle, unseen = _idle(params, k.shape[1]), params.documents.unseen_keys(k.shape[1])
    call = _varlen(q, k, params)
    kernels = _flash_attn.provider(width, params.softcap, q.device)
    out, lse = kernels.forward(_row(aligned_rows(q)), _cleaned(k, unseen), _cleaned(v, unseen), call)
    out = out.reshape(batch, queries, heads, width).masked_fill_(idle[:, :, None, None], 0.0)
    lse = lse.reshape(heads, batch, queries).transpose(0, 1).masked_fill(idle[:, None], -torch.inf)
    return out, lse.contiguous()


def span_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_lse: Tensor | None,
    params: Params,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_work(q, k, params):
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    idle, unseen = _idle(params, k.shape[1]), params.documents.unseen_keys(k.shape[1])
    call = _varlen(q, k, params)
    kernels = _flash_attn.provider(q.shape[3], params.softcap, q.device)
    d_out, *rows = (_cleaned(x, rows) for x, rows in ((d_out, idle), (q, idle), (k, unseen), (v, unseen)))
    lse = lse.masked_fill(idle[:, None], torch.inf).transpose(0, 1).flatten(1).contiguous()
    grads = kernels.backward(d_out, *rows, _row(out), lse, call)
    if d_lse is not None:
        d_lse = _row(d_lse.masked_fill(idle[:, None], 0.0).transpose(1, 2))
        d_q, d_k, _ = kernels.backward(*_of_lse(d_lse, *rows), lse, call)
        grads = grads[0] + d_q, grads[1] + d_k, grads[2]
    return tuple(
        grad.contiguous().view(x.shape).masked_fill_(rows[..., None, None], 0.0)
        for grad, x, rows in zip(grads, (q, k, v), (idle, unseen, unseen), strict=True)
    )


def _of_lse(d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d_out, q, k, v and out of a backward pass whose dS, P (d_out . v - d_out . out) [times 1 - tanh^2], is P d_lse.

    v is 0, and d_out . out = -d_lse, (T, H) in float32. The 24 bits of such a number take three of half precision, and
    one of its powers of two beside each.
    """
    exponent = d_lse.frexp().exponent.clamp(-14, 15)  # those of float16
    power = torch.ldexp(torch.ones_like(d_lse), exponent).to(q.dtype)
    rest = -d_lse / power.float()
    d_out, out = torch.zeros_like(q), torch.zeros_like(q)
    for part in range(3):  # of 8 numbers, at least
        d_out[..., part] = power
        out[..., part] = rest
        rest = rest - out[..., part]
    return d_out, q, k, torch.zeros_like(v), out


def _has_work(q: Tensor, k: Tensor, params: Params) -> bool:
    """flash-attn refuses calls without documents, and those without tokens."""
    return q.numel() > 0 and k.numel() > 0 and params.documents.cu_seqlens.shape[0] > 1


def _no_lse(q: Tensor) -> Tensor:
    batch, queries, heads, _ = q.shape
    return q.new_full((batch, heads, queries), -torch.inf, dtype=torch.float32)


def _idle(params: Params, keys: int) -> Tensor:
    """(1, Tq), True for queries that see nothing."""
    return (params.lo.clamp(0, keys) >= params.hi.clamp(0, keys))[:, 0]


def _cleaned(x: Tensor, rows: Tensor) -> Tensor:
    """A copy of x, (B, T, H, D), as one row of tokens, with zeros where `rows`, (T,) or (1, T), says so."""
    return _row(x.masked_fill(rows[..., None, None], 0.0))


def _row(x: Tensor) -> Tensor:
    """(B, T, H, D) -> (B T, H, D); a batch whose rows do not lie one after the other is copied."""
    return x.flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, params: Params) -> Varlen:
    documents = params.documents
    batch, queries, keys = *q.shape[:2], k.shape[1]
    return Varlen(
        cu_seqlens_q=_offsets(documents.cu_seqlens, batch, queries),
        cu_seqlens_k=_offsets(documents.key_offsets, batch, keys),
        # Told that the longest document has 1 query, flash-attn takes every document for one of 1.
        max_seqlen_q=max(queries, 2),
        max_seqlen_k=keys,
        back=-1 if documents.window is None else documents.window - 1,
        ahead=0 if documents.causal else -1,
        scale=params.scale,
        softcap=params.softcap,
    )


def _offsets(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """Where the documents start in one row of all tokens of the batch; what is left of each row is a document too."""
    within = cu_seqlens.clamp(0, tokens)
    if batch == 1:
        return within
    first = torch.arange(batch, dtype=torch.int32, device=within.device) * tokens
    return pad((first[:, None] + within).flatten(), (0, 1), value=batch * tokens)
