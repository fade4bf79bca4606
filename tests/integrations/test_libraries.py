"""accelerate on models of timm and open_clip, and on torch's own modules."""

import open_clip
import pytest
import timm
import torch
from agreement import assert_agrees, assert_restored
from families import drawn
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import nn

from mmkernels import accelerate

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}


class Called(nn.Module):
    """A model under the names of its arguments."""

    def __init__(self, model: nn.Module, *names: str):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, **inputs):
        return self.model(*(inputs[name] for name in self.names))


def vit(**more) -> nn.Module:
    return timm.models.VisionTransformer(**VIT, **more)


def naflex() -> nn.Module:
    return timm.create_model("naflexvit_base_patch16_gap", embed_dim=64, depth=2, num_heads=4, num_classes=10)


def swin() -> nn.Module:
    sizes = {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32, "num_classes": 5, "window_size": 7}
    return timm.models.SwinTransformer(img_size=56, **sizes)


TIMM = {
    "vit": (vit, 32, 3),
    "vit, norms, map pooling": (lambda: vit(qk_norm=True, global_pool="map", class_token=False), 32, 3),
    "eva": (lambda: timm.models.Eva(**VIT, use_rot_pos_emb=True), 32, 1),
    "swin": (swin, 56, 1),
    "convnext": (lambda: timm.create_model("convnext_atto", num_classes=5), 32, 4),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    build, size, swapped = TIMM[name]
    model = Called(drawn(build()), "images")
    inputs = {"images": torch.randn(2, 3, size, size)}
    fast = assert_agrees(model, inputs)
    assert len(accelerate(fast, verbose=False).swapped) == swapped
    assert_restored(model, fast, inputs)


def test_naflexvit_with_padded_patches():
    """Pictures of unequal size as rows of patches: the mask that keeps padding out becomes spans."""
    model = drawn(naflex())
    patches, valid = torch.randn(2, 12, 16 * 16 * 3), torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    coordinates = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], -1).expand(2, -1, -1).contiguous()
    inputs = {"x": {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}}
    fast = assert_agrees(model, inputs)
    report = accelerate(fast, verbose=False)
    assert sum(entry.cls == "Attention" for entry in report.swapped) == 2 and not report.fallbacks
    assert_restored(model, fast, inputs)


@pytest.mark.parametrize("pooler", [False, True])
def test_open_clip(pooler):
    size = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
    vision = CLIPVisionCfg(**size, attentional_pool=pooler, attn_pooler_queries=5, attn_pooler_heads=4)
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=4, layers=2)
    model = Called(drawn(CLIP(32, vision, text, output_dict=True)), "image", "text")
    inputs = {"image": torch.randn(3, 3, 32, 32), "text": torch.randint(1, 90, (3, 16))}
    fast = assert_agrees(model, inputs)
    report = accelerate(fast, verbose=False)
    assert sum(entry.what == "attention" for entry in report.swapped) == 4 + pooler
    assert not report.fallbacks, report
    assert_restored(model, fast, inputs)


class Encoder(nn.Module):
    """Patches, then attention with both of torch's masks."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[1, -3:] = True
        x = x if self.batch_first else x.transpose(0, 1)
        masks = {"attn_mask": causal, "key_padding_mask": padding}
        return self.attention(x, x, x, need_weights=False, **masks)[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_attention_with_masks(batch_first):
    model, inputs = drawn(Encoder(batch_first)), {"images": torch.randn(2, 3, 32, 32)}
    fast = assert_agrees(model, inputs)
    report = accelerate(fast, verbose=False)
    assert len(report.swapped) == 2 and not report.fallbacks, report
    assert_restored(model, fast, inputs)


def test_torch_encoder_layers():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = Called(drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), "tokens")
    inputs = {"tokens": torch.randn(2, 7, 32)}
    fast = assert_agrees(model.train(), inputs)
    assert len(accelerate(fast, verbose=False).swapped) == 2


def test_open_clip_trains_with_the_fused_loss():
    """open_clip's training code makes its loss itself: the fused one takes its place by name."""
    from mmkernels.nn import ClipLoss

    image, text = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    theirs = open_clip.ClipLoss()(image, text, torch.tensor(10.0), output_dict=True)
    ours = ClipLoss()(image, text, torch.tensor(10.0), output_dict=True)
    assert theirs.keys() == ours.keys()
    torch.testing.assert_close(ours["contrastive_loss"], theirs["contrastive_loss"])
