"""patch_embed: against the convolution it replaces, under compile and autocast, and every error.

That the backends equal the reference, within the error budget, is tests/test_check.py's.
"""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import patch_embed

DOUBLE = {"dtype": torch.float64}


def tokens(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)


def rows(images: torch.Tensor, size: tuple[int, int, int], order: str) -> torch.Tensor:
    """Videos (B, C, T, H, W) cut by hand into (B, N, K) rows; `order` permutes b t h w and c i y x."""
    b, c = images.shape[:2]
    grid = [length // part for length, part in zip(images.shape[2:], size, strict=True)]
    cut = images.reshape(b, c, grid[0], size[0], grid[1], size[1], grid[2], size[2])
    axes = dict(zip("bctihywx", range(8), strict=True))
    return cut.permute([axes[a] for a in "bthw" + order]).reshape(b, math.prod(grid), -1)


def test_reference_equals_conv2d_with_everything_added():
    images = torch.randn(2, 3, 35, 50, **DOUBLE)
    weight, bias = torch.randn(10, 3, 16, 16, **DOUBLE), torch.randn(10, **DOUBLE)
    prefix, positions = torch.randn(2, 10, **DOUBLE), torch.randn(8, 10, **DOUBLE)
    plain = tokens(F.conv2d(images, weight, bias, stride=16))
    call = {"prefix": prefix, "backend": "reference"}
    torch.testing.assert_close(
        patch_embed(images, weight, bias, pos_embed=positions, **call),
        torch.cat([prefix.expand(2, -1, -1), plain], 1) + positions,
    )
    torch.testing.assert_close(
        patch_embed(images, weight, bias, pos_embed=positions[2:], **call),
        torch.cat([prefix.expand(2, -1, -1), plain + positions[2:]], 1),
    )


@pytest.mark.parametrize(("layout", "order"), [("chw", "ciyx"), ("tchw", "icyx"), ("hwc", "iyxc")])
def test_rows_of_every_layout_equal_conv3d(backend, layout, order):
    videos, weight = torch.randn(2, 3, 4, 8, 12), torch.randn(5, 3, 2, 4, 4)
    plain = tokens(F.conv3d(videos, weight, stride=(2, 4, 4)))
    cut = rows(videos, (2, 4, 4), order)
    torch.testing.assert_close(patch_embed(cut, weight, layout=layout, backend=backend), plain)
    flat = patch_embed(cut.flatten(0, 1), weight, layout=layout, backend=backend)
    torch.testing.assert_close(flat, plain.flatten(0, 1))
    torch.testing.assert_close(patch_embed(videos, weight, backend=backend), plain)


@pytest.mark.parametrize(("layout", "order"), [("chw", "ciyx"), ("hwc", "iyxc")])
def test_a_linear_weight_takes_rows_and_images_in_its_own_order(backend, layout, order):
    images, conv = torch.randn(2, 3, 9, 12), torch.randn(5, 3, 4, 4)
    plain = tokens(F.conv2d(images, conv, stride=4))
    linear = rows(conv[:, :, None], (1, 4, 4), order).squeeze(1)  # (5, 48)
    torch.testing.assert_close(patch_embed(images, linear, layout=layout, backend=backend), plain)
    cut = rows(images[:, :, None, :8], (1, 4, 4), order)
    torch.testing.assert_close(patch_embed(cut, linear, layout=layout, backend=backend), plain)
    pixels = (images * 40 + 100).clamp(0, 255).byte()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
    normal = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    cut = rows(pixels[:, :, None, :8], (1, 4, 4), order)
    ours = patch_embed(cut, linear, mean=mean, std=std, layout=layout, backend=backend)
    torch.testing.assert_close(ours, tokens(F.conv2d(normal, conv, stride=4)))


def test_reference_gradients_are_those_of_the_result():
    images, weight = torch.randn(2, 2, 7, 9, **DOUBLE), torch.randn(3, 2, 3, 4, **DOUBLE)
    additions = [torch.randn(3, **DOUBLE), torch.randn(5, 3, **DOUBLE), torch.randn(1, 3, **DOUBLE)]
    inputs = [x.requires_grad_() for x in (images, weight, *additions)]
    assert torch.autograd.gradcheck(
        lambda images, weight, bias, positions, prefix: patch_embed(
            images, weight, bias, pos_embed=positions, prefix=prefix, backend="reference"
        ),
        inputs,
    )


def test_opcheck(backend):
    ops, images, weight = torch.ops.mmkernels, torch.randn(2, 3, 9, 12), torch.randn(5, 3, 4, 4)
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    additions = (torch.randn(5), torch.randn(7, 5), torch.randn(1, 5))
    mean, std = torch.rand(3), torch.rand(3) + 0.5
    torch.library.opcheck(ops.patch_embed, (images, weight, *additions, None, None, "chw", backend))
    torch.library.opcheck(ops.patch_embed, (pixels, weight, None, None, None, mean, std, "chw", backend))
    grad = torch.randn(2, 7, 5)
    for needs in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(ops.patch_embed_backward, (grad, images, weight, None, None, "chw", 1, *needs, backend))


def test_compiles_whole_and_once_whatever_the_batch(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight, bias, prefix = (torch.randn(*shape, requires_grad=True) for shape in ((6, 3, 4, 4), (6,), (1, 6)))

    def embed(images):
        return patch_embed(images, weight, bias, prefix=prefix, backend=backend)

    compiled = torch.compile(embed, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 8, 12), (4, 3, 12, 9), (5, 3, 16, 21)):
        images = torch.randn(shape, requires_grad=True)
        inputs, grad = (images, weight, bias, prefix), torch.randn_like(embed(images))
        torch.testing.assert_close(compiled(images), embed(images))
        torch.testing.assert_close(
            torch.autograd.grad(compiled(images), inputs, grad), torch.autograd.grad(embed(images), inputs, grad)
        )
    assert counter.frame_count == 1


def test_autocast_gives_its_dtype(backend):
    images, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(6, 3, 4, 4, requires_grad=True), torch.randn(6)
    with torch.autocast("cpu", torch.bfloat16):
        ours = patch_embed(images, weight, bias, backend=backend)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, patch_embed(images, weight.bfloat16(), bias.bfloat16(), backend=backend))
    (d_weight,) = torch.autograd.grad(ours.sum(), weight)
    assert d_weight.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    patch=st.tuples(st.integers(1, 3), st.integers(1, 17), st.integers(1, 17)),
    grid=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    rest=st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)),
    batch=st.integers(1, 2),
    channels=st.integers(1, 4),
    features=st.integers(1, 50),
    last=st.booleans(),
    uint8=st.booleans(),
)
def test_any_geometry_equals_the_convolution(patch, grid, rest, batch, channels, features, last, uint8):
    size = [g * p + min(r, p - 1) for g, p, r in zip(grid, patch, rest, strict=True)]
    images = torch.randn(batch, channels, *size)
    weight = torch.randn(features, channels, *patch) / math.sqrt(channels * math.prod(patch))
    normalisation = {}
    if uint8:
        images = (images * 60 + 128).clamp(0, 255).byte()
        normalisation = {"mean": torch.rand(channels), "std": torch.rand(channels) + 0.5}
    if last:
        images = images.to(memory_format=torch.channels_last_3d)
    plain = images.double()
    if uint8:
        mean, std = (value.double().view(-1, 1, 1, 1) for value in normalisation.values())
        plain = (plain / 255 - mean) / std
    truth = tokens(F.conv3d(plain, weight.double(), stride=patch))
    ours = patch_embed(images, weight, **normalisation, backend="cpu")
    pixels = channels * math.prod(patch)
    # What float32 rounding of the products' sums can come to; the error budget proper is tests/test_check.py's.
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=8 * math.sqrt(pixels) * 1.2e-7 * plain.abs().max())


X, W = torch.zeros(2, 3, 8, 12), torch.zeros(5, 3, 4, 4)
U, M = X.byte(), torch.ones(3)
ERRORS = [
    ((X.tolist(), W), {}, TypeError, "images must be a torch.Tensor, got list"),
    ((X.long(), W), {}, TypeError, "images has dtype torch.int64; accepted are float32"),
    ((X, W.long()), {}, TypeError, "weight has dtype torch.int64"),
    ((X, W.to("meta")), {}, ValueError, "weight is on meta, images on cpu"),
    ((X, W[0, 0, 0]), {}, ValueError, r"weight has shape \(4,\); accepted are \(E, C, P, P\)"),
    ((X[0, 0, 0], W), {}, ValueError, r"images has shape \(12,\); accepted are \(B, C, H, W\)"),
    ((X, W[:, :2]), {}, ValueError, "images has 3 channels, weight 2"),
    ((X, W.unsqueeze(2).expand(-1, -1, 2, -1, -1)), {}, ValueError, r"weight spans 2 frames; images must then be"),
    ((X[:, :, :3], W), {}, ValueError, "images of 1 x 3 x 12 .* smaller than one patch of 1 x 4 x 4"),
    ((X.reshape(2, -1, 48)[..., :47], W), {}, ValueError, "images has rows of 47 elements, weight .* rows of 48"),
    ((X, W), {"layout": "whc"}, ValueError, "layout is 'whc'; accepted are 'chw', 'hwc', 'tchw'"),
    ((X, W), {"layout": "hwc"}, ValueError, "layout is 'hwc', which names the order of rows already cut"),
    ((X, W.reshape(5, 48)[:, :45]), {}, ValueError, r"a weight of shape \(5, 45\) does not tell the patch size"),
    ((U, W), {}, ValueError, "uint8 images need mean and std"),
    ((U, W), {"mean": M}, ValueError, "uint8 images need mean and std"),
    ((X, W), {"mean": M, "std": M}, ValueError, "mean and std normalise uint8 images, images has dtype torch.float32"),
    ((U, W), {"mean": M[:2], "std": M}, ValueError, r"mean has shape \(2,\) .* it must be \(3,\) of float32"),
    ((U, W), {"mean": M, "std": M.double()}, ValueError, "std has shape .* dtype torch.float64"),
    ((U, W), {"mean": [0.5] * 3, "std": M}, TypeError, "mean must be a torch.Tensor, got list"),
    ((U, W), {"mean": M.to("meta"), "std": M}, ValueError, "mean is on meta, images on cpu"),
    (
        (U.reshape(2, -1, 48), W.reshape(5, 48)),
        {"mean": M, "std": M, "layout": "tchw"},
        ValueError,
        "mean has 3 .* does not place",
    ),
    ((X, W, torch.zeros(4)), {}, ValueError, r"bias has shape \(4,\); it must be \(5,\)"),
    ((X, W, torch.zeros(5).double()), {}, TypeError, "bias has dtype torch.float64, weight torch.float32"),
    ((X, W), {"prefix": torch.zeros(5)}, ValueError, r"prefix has shape \(5,\); it must be \(n, 5\)"),
    ((X.reshape(-1, 48), W), {"prefix": torch.zeros(1, 5)}, ValueError, "prefix needs images with a batch axis"),
    ((X, W), {"pos_embed": torch.zeros(7, 5)}, ValueError, r"pos_embed has shape \(7, 5\); it must be \(6, 5\)$"),
    (
        (X, W),
        {"pos_embed": torch.zeros(8, 5), "prefix": torch.zeros(1, 5)},
        ValueError,
        r"pos_embed has shape \(8, 5\); it must be \(6, 5\) or \(7, 5\)",
    ),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS, ids=[case[-1][:40] for case in ERRORS])
def test_errors_name_the_argument(args, options, kind, message):
    with pytest.raises(kind, match=f"patch_embed: {message}"):
        patch_embed(*args, **options)
