"""Registration of rotary embedding: schema, shapes for tracing, and autograd. Imports torch only.

Inside, x is (B, T, H, D), and the tables are (B or 1, T, D), contiguous, of float32 (float64 for such x).
"""

from __future__ import annotations

import torch

from ... import backends
from .._autograd import Op, folded, is_forward_mode
from .._registration import register
from .reference import rotate


def _rotate(x, cos, sin, interleaved, transposed, backend):
    x = x if x.stride(-1) == 1 else x.contiguous()  # a gradient may come in any layout
    return backends.select("rotary_embed", backend, x).rotary_embed(x, cos, sin, interleaved, transposed)


def _rotate_fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_op = register(
    "rotary_embed(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool transposed, str backend) -> Tensor",
    _rotate,
    _rotate_fake,
)


class _RotaryEmbed(Op):
    """Linear in x, whose gradient is the transposed rotation, and in the tables, for those who learn them."""

    forward = staticmethod(_op)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cos, sin, *ctx.call = inputs
        learned = any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if learned else None, cos, sin)
        if is_forward_mode():
            ctx.save_for_forward(x, cos, sin)

    @staticmethod
    def backward(ctx, d_out):
        (x, cos, sin), (interleaved, transposed, backend) = ctx.saved_tensors, ctx.call
        d_x = _apply(d_out, cos, sin, interleaved, not transposed, backend) if ctx.needs_input_grad[0] else None
        tables = (None, None) if x is None else _table_gradients(d_out, x, cos, interleaved, transposed)
        return d_x, *tables, None, None, None

    @staticmethod
    def jvp(ctx, t_x, t_cos, t_sin, *_):
        x, cos, sin = ctx.saved_tensors
        zeros = torch.zeros_like
        out = None if t_x is None else _apply(t_x, cos, sin, *ctx.call)
        if t_cos is None and t_sin is None:
            return out
        tables = (zeros(cos) if t_cos is None else t_cos), (zeros(sin) if t_sin is None else t_sin)
        turned = _apply(x, *tables, *ctx.call)
        return turned if out is None else out + turned

    vmap = folded(_op, batched=1, shared=2)


def _table_gradients(d_out, x, cos, interleaved, transposed):
    x, d_out = x.to(cos.dtype), d_out.to(cos.dtype)
    turned = x * rotate(d_out, interleaved) if transposed else rotate(x, interleaved) * d_out
    axes = (2,) if len(cos) == len(x) else (0, 2)
    return tuple(product.sum(axes).view(cos.shape) for product in (x * d_out, turned))


def _apply(x, cos, sin, interleaved, transposed, backend):
    return _RotaryEmbed.call((x, cos, sin), x, cos, sin, interleaved, transposed, backend)


def rotary_embed(x, cos, sin, interleaved, backend):
    return _apply(x, cos, sin, interleaved, False, backend)
