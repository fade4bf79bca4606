"""torch.nn.MultiheadAttention and timm's attention, swapped: they check what they checked, and give what is asked."""

import copy
import threading

import pytest
import timm
import torch
from timm.layers import attention, set_fused_attn
from timm.utils import AttentionExtract
from torch import nn

from mmkernels import accelerate, restore
from mmkernels.integrations import _attend


def pair(*, batch_first: bool = True, **more) -> tuple[nn.Module, nn.Module]:
    plain = nn.MultiheadAttention(32, 4, batch_first=batch_first, **more)
    holder = nn.ModuleList([copy.deepcopy(plain)])
    accelerate(holder, verbose=False)
    return plain, holder[0]


def outcome(layer: nn.Module, *call, **options):
    try:
        return layer(*call, need_weights=False, **options)[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


X, Y = torch.randn(3, 5, 32), torch.randn(3, 7, 32)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
CALLS = {
    "is_causal without a mask": ((X, X, X), {"is_causal": True}),
    "is_causal and its mask": ((X, X, X), {"is_causal": True, "attn_mask": CAUSAL}),
    "is_causal and another mask": ((X, X, X), {"is_causal": True, "attn_mask": torch.zeros(5, 5, dtype=torch.bool)}),
    "is_causal, a mask and padding": (
        (X, X, X),
        {"is_causal": True, "attn_mask": CAUSAL, "key_padding_mask": torch.arange(5).expand(3, -1) > 3},
    ),
    "padding of other keys": ((X, X, X), {"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}),
    "padding of another batch": ((X, X, X), {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)}),
    "padding that broadcasts": ((X, X, X), {"key_padding_mask": torch.zeros(5, dtype=torch.bool)}),
    "padding of integers": ((X, X, X), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.long)}),
    "a mask of integers": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.uint8)}),
    "a mask that broadcasts": ((X, X, X), {"attn_mask": torch.zeros(1, 5, dtype=torch.bool)}),
    "a mask of another length": ((X, X, X), {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)}),
    "a mask a batch": ((X, X, X), {"attn_mask": torch.zeros(3, 5, 5, dtype=torch.bool)}),
    "a mask a head": ((X, X, X), {"attn_mask": CAUSAL.expand(12, -1, -1)}),
    "values of another length": ((X, Y, X), {}),
    "keys of another batch": ((X, Y[:2], Y[:2]), {}),
    "keys of another width": ((X, Y[..., :16], Y[..., :16]), {}),
    "other keys": ((X, Y, Y), {}),
    "without a batch": ((X[0], X[0], X[0]), {}),
    "a batch of none": ((X[:0], X[:0], X[:0]), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_computes_or_raises_as_torch(call):
    plain, fast = pair()
    given, options = CALLS[call]
    theirs, ours = (outcome(layer, *given, **options) for layer in (plain, fast))
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs)


def test_sequence_first_checks_its_own_axes():
    plain, fast = pair(batch_first=False)
    padding = torch.arange(3).expand(5, -1) > 1  # of 5 rows of 3 keys: X is that, sequence first
    for options in ({"key_padding_mask": padding}, {"key_padding_mask": padding.T}):
        theirs, ours = (outcome(layer, X, X, X, **options) for layer in (plain, fast))
        assert type(theirs) is type(ours) and (isinstance(theirs, str) or torch.allclose(theirs, ours, atol=1e-5))


class Block(nn.Module):
    """As open_clip's text tower: the mask is a buffer."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1), persistent=False)

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0]


def test_evaluated_in_inference_mode_trains_afterwards():
    block = Block()
    accelerate(block, verbose=False)
    with torch.inference_mode():
        block(X)
    block(X).sum().backward()
    plain = restore(copy.deepcopy(block))
    plain.zero_grad()
    plain(X).sum().backward()
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_restore_leaves_nothing_on_a_mask():
    block = Block()
    accelerate(block, verbose=False)
    block(X)
    restore(block)
    assert not vars(block.mask)


def test_a_buffer_that_is_written_to_counts():
    block = Block().eval()
    accelerate(block, verbose=False)
    with torch.inference_mode():
        block(X)
        block.mask.zero_()
    expected = restore(copy.deepcopy(block))(X)
    torch.testing.assert_close(block(X), expected)


def test_threads_keep_their_own():
    block = Block().eval()
    accelerate(block, verbose=False)
    block(X)
    seen = []
    thread = threading.Thread(target=lambda: (block(X), seen.append(len(_attend._kept.entries))))
    thread.start()
    thread.join()
    assert seen == [1]


# ---- timm


@pytest.fixture
def without_fused_attention():
    set_fused_attn(False)
    yield
    set_fused_attn(True)


def vit() -> nn.Module:
    return timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2).eval()


def test_hooks_on_the_weights_of_timm(without_fused_attention):
    plain = vit()
    fast = copy.deepcopy(plain)
    accelerate(fast, verbose=False)
    images = torch.randn(2, 3, 16, 16)
    expected = plain(images)
    torch.testing.assert_close(fast(images), expected)
    assert not accelerate(fast, verbose=False).fallbacks
    maps = [AttentionExtract(x, method="hook")(images) for x in (plain, fast)]
    assert len(maps[0]) == 2
    torch.testing.assert_close(maps[1], maps[0])
    assert "a hook on attn_drop" in accelerate(fast, verbose=False).fallbacks[0].what


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "of keys": {"attn_mask": torch.rand(2, 1, 1, 5) < 0.5},
    "of two axes": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "of three axes": {"attn_mask": torch.ones(2, 5, 5, dtype=torch.bool).tril()},
    "a mask and causal": {"attn_mask": torch.ones(5, 5, dtype=torch.bool), "is_causal": True},
}
MASKS["of keys"]["attn_mask"][..., 0] = True


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fused", [True, False])
def test_masks_of_timm(mask, fused):
    plain = attention.Attention(32, 4, qk_norm=True, norm_layer=nn.LayerNorm, gated=True).eval()
    plain.fused_attn = fused
    holder = nn.ModuleList([copy.deepcopy(plain)])
    accelerate(holder, verbose=False)
    x = torch.randn(2, 5, 32)
    outcomes = []
    for layer in (plain, holder[0]):
        try:
            outcomes.append(layer(x, **MASKS[mask]))
        except RuntimeError as error:
            outcomes.append(str(error))
    if isinstance(outcomes[0], str):
        assert outcomes[1] == outcomes[0]
    else:
        torch.testing.assert_close(outcomes[1], outcomes[0])


def test_a_timm_that_does_not_fit_is_left_with_its_reason(monkeypatch):
    def forward(self, x, attn_mask=None, is_causal=False, rope=None):
        raise AssertionError

    monkeypatch.setattr(attention.Attention, "forward", forward)
    report = accelerate(vit(), verbose=False)
    assert [entry.what for entry in report.swapped] == ["patch embedding"]
    assert [(entry.cls, entry.what) for entry in report.left if entry.path == ""] == [
        ("timm", f"timm {timm.__version__} has an attention that mmkernels does not know")
    ]
