"""The ops as one writes them in eager PyTorch today, with autograd: what the error budget and the benchmarks measure
against. Each takes the arguments of the op it stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products in float32 on a GPU too: cuDNN's convolutions take TF32 unless told otherwise, three digits that
    would make the budget a thousand times too generous."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def clip_loss(image_features, text_features, logit_scale, logit_bias=None, *, label_smoothing=0.0, normalize=False):
    """Both matrices of logits spelled out and a cross-entropy over each, as open_clip trains on one device."""
    image, text, scale, bias = _prepare(image_features, text_features, logit_scale, logit_bias, normalize)
    logits_per_image = scale * image @ text.T
    logits_per_text = scale * text @ image.T
    if bias is not None:
        logits_per_image, logits_per_text = logits_per_image + bias, logits_per_text + bias
    labels = torch.arange(len(image), device=image.device)
    losses = [F.cross_entropy(x, labels, label_smoothing=label_smoothing) for x in (logits_per_image, logits_per_text)]
    return sum(losses) / 2


def siglip_loss(image_features, text_features, logit_scale, logit_bias, *, normalize=False):
    image, text, scale, bias = _prepare(image_features, text_features, logit_scale, logit_bias, normalize)
    logits = scale * image @ text.T + bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(image)


def _prepare(image, text, scale, bias, normalize: bool):
    if normalize:
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return image, text, *(x.reshape(()) if isinstance(x, Tensor) else x for x in (scale, bias))


def patch_embed(
    images, weight, bias=None, *, pos_embed=None, prefix=None, mean=None, std=None, layout="chw"
):  # fmt: skip
    """The strided convolution of a vision model, or the linear layer where the patches come as rows."""
    if images.dtype == torch.uint8:
        images = normalized(images, mean, std, weight, layout)
    images = images.to(weight.dtype)
    if images.dim() >= 4 and weight.dim() >= 4:
        tokens = convolution(images, weight, bias)
    elif images.dim() >= 4:
        side = math.isqrt(weight.shape[1] // images.shape[1])
        tokens = F.linear(cut(images, (1, side, side), layout), weight, bias)
    else:
        tokens = F.linear(images, rows(weight, layout), bias)
    num_prefix = 0 if prefix is None else len(prefix)
    if pos_embed is not None and len(pos_embed) == tokens.shape[-2]:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], 1)
    if pos_embed is not None and num_prefix and len(pos_embed) == tokens.shape[-2]:
        tokens = tokens + pos_embed
    return tokens


def convolution(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, [T,] H, W) -> (B, N, E) by the convolution the checkpoint's weight belongs to."""
    convolve = F.conv2d if weight.dim() == 4 else F.conv3d
    return convolve(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def cut(images: Tensor, patch: tuple[int, int, int], layout: str = "chw") -> Tensor:
    """(B, C, [T,] H, W) -> (B, N, K): one row a patch, its pixels in the order that `layout` names."""
    if images.dim() == 4:
        images = images.unsqueeze(2)
    batch, channels, *sizes = images.shape
    grid = [size // step for size, step in zip(sizes, patch, strict=True)]
    (t, y, x), (gt, gy, gx) = patch, grid
    images = images[:, :, : gt * t, : gy * y, : gx * x].reshape(batch, channels, gt, t, gy, y, gx, x)
    inner = {"chw": (1, 3, 5, 7), "hwc": (3, 5, 7, 1), "tchw": (3, 1, 5, 7)}[layout]
    return images.permute(0, 2, 4, 6, *inner).reshape(batch, gt * gy * gx, -1)


def rows(weight: Tensor, layout: str = "chw") -> Tensor:
    """The weight as (E, K), its columns in the order that `layout` names; an (E, K) weight is in it already."""
    if weight.dim() == 2:
        return weight
    if weight.dim() == 4:
        weight = weight.unsqueeze(2)
    order = {"chw": (0, 1, 2, 3, 4), "hwc": (0, 2, 3, 4, 1), "tchw": (0, 2, 1, 3, 4)}[layout]
    return weight.permute(order).flatten(1)


def normalized(images: Tensor, mean: Tensor, std: Tensor, weight: Tensor, layout: str = "chw") -> Tensor:
    """uint8 -> (images / 255 - mean) / std in float32 (float64 for a float64 weight), before it is rounded."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if images.dim() >= 4:
        shape = (-1, *[1] * (images.dim() - 2))
        return (images.to(wide) / 255 - mean.view(shape)) / std.view(shape)
    channel = channel_of_column(len(mean), images.shape[-1], weight, layout)
    return (images.to(wide) / 255 - mean[channel]) / std[channel]


def channel_of_column(channels: int, columns: int, weight: Tensor, layout: str) -> Tensor:
    """Which channel each column of rows already cut belongs to."""
    if layout == "hwc":
        return torch.arange(columns, device=weight.device) % channels
    frames = weight.shape[2] if layout == "tchw" and weight.dim() == 5 else 1
    pixels = columns // (channels * frames)
    return torch.arange(columns, device=weight.device) // pixels % channels


def span_attention(q, k, v, spans, *, scale=None, softcap=None, sinks=None, return_lse=False):
    """SDPA with a dense mask, or with a softcap the eager code that Gemma 2 is left with, and with sinks gpt-oss.

    A row without keys sees all of them and is zeroed afterwards, as idefics does; what no query sees is zeroed before,
    since a masked NaN is a NaN.
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

    if softcap is None and sinks is None:
        out = _sdpa(queries, keys, values, mask | idle, scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = scores(mask | idle).softmax(-1, dtype=wide).to(q.dtype)
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


def rotary_embed(x, cos, sin, *, interleaved=False):
    """As transformers' vision towers turn their queries and keys; or interleaved, as its Cohere does."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, cos, sin = x.to(dtype), cos.unsqueeze(-2).to(dtype), sin.unsqueeze(-2).to(dtype)
    if interleaved:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), -1).flatten(-2)
    else:
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
    return (wide * cos + turned * sin).to(x.dtype)
