"""Tensors that are sharded over processes are refused by name: no rule says how an op runs on their shards."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

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


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


X, IMAGES, WEIGHT = torch.randn(5, 4, 8), torch.randn(2, 3, 8, 8), torch.randn(6, 3, 4, 4)
FEATURES, TABLE, SPANS = torch.randn(4, 8), torch.randn(5, 8), RowSpans.full(5, 5)
CALLS = {
    "span_attention: q": (lambda x: span_attention(x, X, X, SPANS), X),
    "span_attention: v": (lambda x: span_attention(X, X, x, SPANS), X),
    "span_attention: sinks": (lambda x: span_attention(X, X, X, SPANS, sinks=x), torch.randn(4)),
    "patch_embed: images": (lambda x: patch_embed(x, WEIGHT), IMAGES),
    "patch_embed: weight": (lambda x: patch_embed(IMAGES, x), WEIGHT),
    "patch_embed: bias": (lambda x: patch_embed(IMAGES, WEIGHT, x), torch.randn(6)),
    "rotary_embed: x": (lambda x: rotary_embed(x, TABLE, TABLE), X),
    "rotary_embed: sin": (lambda x: rotary_embed(X, TABLE, x), TABLE),
    "nearest_code: x": (lambda x: nearest_code(x, FEATURES), X),
    "nearest_code: codes": (lambda x: nearest_code(X, x), FEATURES),
    "max_similarity: images": (lambda x: max_similarity(FEATURES, x), X),
    "max_similarity: cu_texts": (lambda x: max_similarity(FEATURES, X, cu_texts=x), torch.tensor([0, 4])),
    "clip_loss: image_features": (lambda x: clip_loss(x, FEATURES, 1.0), FEATURES),
    "siglip_loss: text_features": (lambda x: siglip_loss(FEATURES, x, 1.0, 0.0), FEATURES),
    "clip_loss: logit_scale": (lambda x: clip_loss(FEATURES, FEATURES, x), torch.tensor([1.0])),
}


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_refused_by_name(mesh, name, placement):
    call, x = CALLS[name]
    call(x)
    with pytest.raises(TypeError, match=f"{name} is a DTensor"):
        call(distribute_tensor(x, mesh, [placement]))
    call(distribute_tensor(x, mesh, [placement]).to_local())
