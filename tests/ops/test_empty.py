"""Batches, sequences and grids of nothing: they train, and every gradient is there and zero."""

import pytest
import torch

from mmkernels import RowSpans, clip_loss, max_similarity, nearest_code, patch_embed, rotary_embed, span_attention
from mmkernels.nn import PatchConv2d, PatchConv3d, PatchEmbed, SpanCrossAttention, SpanSelfAttention


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    return request.param


def attention(batch, queries, keys, **options):
    shapes = [(queries, 4, 16), (keys, 2, 16), (keys, 2, 16)]
    tensors = [torch.randn(*batch, *shape) for shape in shapes]
    spans = RowSpans.full(queries, keys)
    return lambda *x, backend: span_attention(*x, spans, backend=backend, **options), tensors


def patches(images, weight, **options):
    tensors = [torch.randn(images), torch.randn(weight), torch.randn(weight[0])]
    return lambda *x, backend: patch_embed(*x, backend=backend, **options), tensors


def rotary(*shape):
    tables = [torch.randn(shape[-3], shape[-1]) for _ in range(2)]
    return lambda *x, backend: rotary_embed(*x, backend=backend), [torch.randn(shape), *tables]


def nearest(vectors):
    call = lambda x, codes, backend: nearest_code(x, codes, backend=backend).quantised + 0 * x  # noqa: E731
    return call, [torch.randn(vectors, 8), torch.randn(6, 8)]


def similar(texts, images):
    return lambda *x, backend: max_similarity(*x, backend=backend), [torch.randn(*texts, 8), torch.randn(*images, 8)]


CALLS = {
    "attention, no rows": attention((0,), 5, 7),
    "attention, no queries": attention((2,), 0, 7),
    "attention, no keys": attention((2,), 5, 0),
    "attention, packed, nothing": attention((), 0, 0),
    "attention, no rows, lse": attention((0,), 5, 7, return_lse=True),
    "patches, no images": patches((0, 3, 8, 8), (6, 3, 4, 4)),
    "patches, no videos": patches((0, 3, 4, 8, 8), (6, 3, 2, 4, 4)),
    "patches, no rows": patches((0, 48), (6, 48)),
    "patches, batches of no rows": patches((2, 0, 48), (6, 48)),
    "rotary, no rows": rotary(0, 5, 2, 8),
    "rotary, no tokens": rotary(0, 2, 8),
    "codes of no vectors": nearest(0),
    "no texts": similar((0, 3), (4, 5)),
    "texts of nothing": similar((2, 0), (4, 5)),
    "no images": similar((2, 3), (0, 5)),
    "images of nothing": similar((2, 3), (4, 0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_trains(name, backend):
    call, tensors = CALLS[name]
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = call(*leaves, backend=backend)
    loss = sum(x.masked_fill(x.isinf(), 0.0).sum() for x in (out if isinstance(out, tuple) else (out,)))
    grads = torch.autograd.grad(loss, leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))


MODULES = {
    "PatchConv2d": lambda: (PatchConv2d(3, 8, 4, stride=4), (0, 3, 8, 8)),
    "PatchConv3d": lambda: (PatchConv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)), (0, 3, 2, 4, 4)),
    "PatchEmbed": lambda: (PatchEmbed(3, 8, 4, num_patches=4, num_prefix=1), (0, 3, 8, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_train(name):
    module, shape = MODULES[name]()
    module(torch.randn(shape, requires_grad=True)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_attention_modules_train():
    module = SpanSelfAttention(32, 2)
    module(torch.randn(0, 5, 32), RowSpans.full(5, 5)).sum().backward()
    assert not any(p.grad.any() for p in module.parameters())
    module = SpanCrossAttention(32, 2)
    module(torch.randn(0, 5, 32), torch.randn(0, 7, 32), RowSpans.full(5, 7)).sum().backward()
    assert not any(p.grad.any() for p in module.parameters())


def test_a_loss_of_no_pairs_is_refused():
    with pytest.raises(ValueError, match=r"clip_loss: image_features has shape \(0, 8\); it must be \(N, D\), N and D"):
        clip_loss(torch.randn(0, 8), torch.randn(0, 8), 1.0)
