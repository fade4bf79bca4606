"""Every op as a function of its tensors, beside the same in plain PyTorch, which is right in float64."""

import torch
import torch.nn.functional as F
from dense_attention import dense_attention

from mmkernels import (
    RowSpans,
    clip_loss,
    max_similarity,
    nearest_code,
    patch_embed,
    rotary_embed,
    siglip_loss,
    span_attention,
)

ROWS = torch.arange(5, dtype=torch.int32)
SPANS = RowSpans(torch.stack([ROWS * 0, ROWS + 2]), torch.stack([ROWS // 2, ROWS + 3]), 7)  # the first row: one run
BATCHED = RowSpans(*(torch.stack([x, x + 1]) for x in (SPANS.lo, SPANS.hi)), 7)


def attention(q, k, v, sinks, backend, spans=SPANS):
    options = {"scale": 0.7, "softcap": 4.0, "sinks": sinks, "return_lse": True, "backend": backend}
    return span_attention(q, k, v, spans.to(q.device), **options)


def plain_attention(q, k, v, sinks, spans=SPANS):
    return dense_attention(q, k, v, spans.to_dense(), scale=0.7, softcap=4.0, sinks=sinks, return_lse=True)


def plain_patches(images, weight, bias, positions, prefix):
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + positions
    return torch.cat([prefix.expand(len(images), -1, -1), tokens], 1)


def plain_rotary(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def plain_interleaved(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2)


def plain_clip(image, text, scale):
    logits, label = scale * image @ text.T, torch.arange(len(image))
    return sum(F.cross_entropy(x, label, label_smoothing=0.1) for x in (logits, logits.T)) / 2


def plain_siglip(image, text, scale, bias):
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def plain_nearest(x, codes):
    return x + codes[torch.cdist(x.detach(), codes.detach()).argmin(1)]


def plain_similarity(texts, images):
    return torch.einsum("ntd,mpd->nmtp", texts, images).amax(3).sum(2)


# ours, with a backend; plain; the shapes of their tensors
OPS = {
    "span_attention": (attention, plain_attention, [(5, 4, 8), (7, 2, 8), (7, 2, 6), (4,)]),
    "span_attention, a batch": (
        lambda *x, backend: attention(*x, backend, BATCHED),
        lambda *x: plain_attention(*x, BATCHED),
        [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6), (4,)],
    ),
    "patch_embed": (
        lambda i, w, b, pos, prefix, backend: patch_embed(i, w, b, pos_embed=pos, prefix=prefix, backend=backend),
        plain_patches,
        [(2, 3, 9, 8), (6, 3, 4, 4), (6,), (4, 6), (2, 6)],
    ),
    "rotary_embed": (
        lambda x, cos, sin, backend: rotary_embed(x, cos, sin, backend=backend),
        plain_rotary,
        [(5, 3, 8), (5, 8), (5, 8)],
    ),
    "rotary_embed, interleaved": (
        lambda x, cos, sin, backend: rotary_embed(x, cos, sin, interleaved=True, backend=backend),
        plain_interleaved,
        [(5, 3, 8), (5, 4), (5, 4)],
    ),
    "clip_loss": (
        lambda i, t, s, backend: clip_loss(i, t, s, label_smoothing=0.1, backend=backend),
        plain_clip,
        [(5, 8), (5, 8), ()],
    ),
    "siglip_loss": (
        lambda i, t, s, b, backend: siglip_loss(i, t, s, b, backend=backend),
        plain_siglip,
        [(5, 8), (5, 8), (), ()],
    ),
    "nearest_code": (
        lambda x, codes, backend: x + nearest_code(x, codes, backend=backend).quantised,
        plain_nearest,
        [(5, 8), (7, 8)],
    ),
    "max_similarity": (
        lambda t, i, backend: max_similarity(t, i, backend=backend),
        plain_similarity,
        [(5, 2, 8), (3, 4, 8)],
    ),
}
# Whose gradients can be differentiated.
TWICE = ("patch_embed", "rotary_embed", "rotary_embed, interleaved", "nearest_code", "max_similarity")
ONCE = [name for name in OPS if name not in TWICE]


def drawn(name):
    """Ours, plain, and what they take."""
    ours, plain, shapes = OPS[name]
    return ours, plain, [torch.randn(shape) / 2 for shape in shapes]


def wide(x):
    if isinstance(x, (tuple, list)):
        return type(x)(map(wide, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_same(ours, truth):
    """In the norm of each tensor: second derivatives cancel, and single numbers are sums of terms near 1."""
    if isinstance(truth, (tuple, list)):
        assert len(ours) == len(truth)
        for one, other in zip(ours, truth, strict=True):
            assert_same(one, other)
        return
    assert ours.shape == truth.shape and ours.isfinite().all()
    assert (ours - truth).norm() <= 2e-5 * (truth.norm() + (0.1 if truth.numel() == 1 else 0.01))


def scalar(f):
    """Of all that f returns, each element with a weight of its own; not linear in them."""

    def of(*inputs):
        return sum((x * torch.linspace(1, 2, x.numel(), dtype=x.dtype)).sum() for x in sines(f)(*inputs))

    return of


def sines(f):
    """Of all that f returns, flat."""

    def of(*inputs):
        out = f(*inputs)
        return tuple(x.sin().flatten() for x in (out if isinstance(out, tuple) else (out,)))

    return of


def by(ours, backend):
    return lambda *inputs: ours(*inputs, backend=backend)
