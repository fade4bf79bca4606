"""What the tests of span attention share: inputs, softmax over a dense mask spelled out, and results with gradients."""

from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def threads(count: int):
    """Small work is done sooner by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def inputs(spans, heads=(2, 2), dims=(16, 16), dtype=torch.float32, batch=None) -> list[Tensor]:
    """q, k, v of standard normal numbers, leaves."""
    lead = [] if batch is None else [batch]
    shapes = ((spans.num_queries, heads[0], dims[0]), (spans.num_keys, heads[1], dims[0]))
    shapes += ((spans.num_keys, heads[1], dims[1]),)
    return [torch.randn(*lead, *shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def evaluate(function, tensors: list[Tensor], d_out: Tensor, *args, d_lse=None, **options) -> list[Tensor]:
    """out, lse, d_q, d_k, d_v; and d_sinks where these are a fourth tensor."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = function(
        *leaves[:3], *args, return_lse=True, **options, **dict(zip(["sinks"], leaves[3:], strict=False))
    )
    outputs, fed = (out,), (d_out.to(out),)
    if d_lse is not None:
        outputs, fed = (out, lse), (*fed, d_lse.to(lse))
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, fed)]


def dense_attention(q, k, v, mask, *, scale=None, softcap=None, sinks=None, return_lse=False) -> tuple[Tensor, Tensor]:
    """Softmax over a mask, (Tq, Tk) or (B, Tq, Tk), of tensors whose NaNs nobody sees; a sink is one more key."""
    q, k, v = (x.nan_to_num().transpose(-3, -2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    mask = mask[..., None, :, :]
    scores = torch.einsum("...id,...jd->...ij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seeing, keys = mask.any(-1, keepdim=True), mask.shape[-1]
    scores = torch.where(mask | ~seeing, scores, -torch.inf)
    lse_of_nothing = -torch.inf
    if sinks is not None:
        lse_of_nothing = sinks[:, None].expand(-1, q.shape[-2])
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    out = torch.where(seeing, scores.softmax(-1)[..., :keys] @ v, 0.0)
    return out.transpose(-3, -2), torch.where(seeing[..., 0], scores.logsumexp(-1), lse_of_nothing)
