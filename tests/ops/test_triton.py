"""What is particular to the Triton backend: whom it refuses, how it walks pixels, how much memory a launcher asks for.

That its kernels are right is tests/test_check.py's, what they compile to is tests/compile's.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import backends
from mmkernels.ops.patch_embed.geometry import patch_geometry

triton = pytest.importorskip("triton", reason="the Triton backend needs triton, which has wheels for Linux only")

from mmkernels.ops import _triton  # noqa: E402
from mmkernels.ops._aligned_rows import aligned_rows  # noqa: E402
from mmkernels.ops.contrastive import triton as contrastive  # noqa: E402
from mmkernels.ops.contrastive.pairing import Pairing, Shares  # noqa: E402
from mmkernels.ops.patch_embed import triton as patch_embed  # noqa: E402


def test_reasons(monkeypatch):
    features, images = torch.zeros(2, 8), torch.zeros(1, 3, 8, 8)
    assert "text_features has dtype torch.float64" in contrastive.unsupported(features, features.double())
    assert "images has dtype torch.int16; the Triton kernels take" in patch_embed.unsupported(images.short(), images)
    assert "weight has dtype torch.uint8" in patch_embed.unsupported(images.byte(), images.byte())
    monkeypatch.setattr(_triton, "INTERPRET", triton.language.constexpr(False))
    assert "run on a GPU, or interpreted with TRITON_INTERPRET=1" in contrastive.unsupported(features, features)
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    assert "triton is 3.3.1; the kernels need 3.4" in backends.missing.__wrapped__("triton")


def test_float32_is_exact_unless_the_user_allows_tf32():
    had = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _triton.precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert _triton.precision(torch.float32) == "tf32"
        assert _triton.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(had)


@pytest.mark.parametrize("width", [8, 13])
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_the_kernels_cannot_load_are_copied(width, offset):
    x = torch.randn(5, 16, dtype=torch.float64).float()[:, offset : offset + width]
    rows = aligned_rows(x)
    assert (rows is x) == (width == 8 and offset == 0)
    assert rows.stride(0) % 8 == 0 and rows.stride(1) == 1 and rows.data_ptr() % 16 == 0
    assert torch.equal(rows[:, :width], x) and not rows[:, width:].any()


def pixels_of(images: torch.Tensor, weight: torch.Tensor, layout: str = "chw") -> patch_embed.Pixels:
    return patch_embed.Pixels.of(images, patch_geometry(images, weight, None, layout))


def test_pixels_are_walked_in_the_order_of_memory():
    images, weight = torch.zeros(2, 3, 32, 64, dtype=torch.bfloat16), torch.zeros(5, 3, 16, 16)
    plain = pixels_of(images, weight)
    assert plain.sizes == (1, 3, 16, 16) and plain.unit and plain.vector == 8 and plain.channel_inner == 256
    last = pixels_of(images.to(memory_format=torch.channels_last), weight)
    assert last.sizes == (1, 1, 16, 48) and last.unit and last.vector == 8 and last.channel_inner == 1
    rows = pixels_of(torch.zeros(7, 768, dtype=torch.uint8), weight, "hwc")
    assert rows.sizes == (1, 1, 1, 768) and rows.vector == 16 and rows.channel_inner == 1
    repeated = pixels_of(torch.zeros(2, 1, 32, 64).expand(2, 3, 32, 64), weight)
    assert repeated.strides == (0, 0, 64, 1) and repeated.channel_inner == 256


@pytest.mark.parametrize(("width", "vector"), [(64, 2), (63, 1), (70, 2)])
def test_vectors_never_straddle_what_is_aligned(width, vector):
    weight = torch.zeros(5, 3, 14, 14)
    images = torch.zeros(2, 3, 30, width, dtype=torch.bfloat16)
    assert pixels_of(images, weight).vector == vector
    assert pixels_of(images[..., 1:], weight).vector == 1
    assert not pixels_of(images[..., ::2], weight).unit


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("loss", ["clip_loss_with_grads", "siglip_loss_with_grads", "clip_loss", "siglip_loss"])
def test_workspace_does_not_grow_with_the_square_of_the_batch(monkeypatch, loss):
    n, width = 2**17, 64
    monkeypatch.setattr(contrastive, "WORKSPACE", 2**28)
    monkeypatch.setattr(contrastive, "launch", lambda *args, **meta: None)
    monkeypatch.setattr(_triton, "family", lambda device: "sm90")
    features, scalar = torch.empty(n, width, device="meta"), torch.empty((), device="meta")
    with Largest() as largest:
        pairing = Pairing.of(n, n, None, None, "positives")
        rest = (pairing, Shares.of(pairing, "both"), 0.1) if loss.startswith("clip") else (scalar, pairing, n)
        getattr(contrastive, loss)(features, features, scalar, *rest)
    assert largest.bytes <= contrastive.WORKSPACE
