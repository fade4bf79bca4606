"""The contrastive losses where float32 is short of digits: losses near zero, logits of thousands, half types.

Two measures. The project's budget (mmkernels.check.budget). And what a kernel that loses nothing reaches: relative to
the result itself, some roundings of the dtype it is in, and of the products that the logits are made of, times the
largest of them. Plain PyTorch knows no loss of 1e-9, and would excuse anything.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import clip_loss, siglip_loss
from mmkernels.check.budget import Quantity
from mmkernels.check.cases import OPS
from mmkernels.check.contrastive_truth import contrastive_truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = {"clip_loss": clip_loss, "siglip_loss": siglip_loss}
PAIRS, WIDTH = 70, 64


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request) -> str:
    return request.param


# ---- inputs of a given loss


@dataclass(frozen=True)
class Inputs:
    op: str
    image: Tensor
    text: Tensor
    scale: float
    bias: float
    smoothing: float = 0.0

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Features in this dtype, and parameters of at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        parameters = [self.scale] if self.op == "clip_loss" else [self.scale, self.bias]
        features = [x.to(dtype) for x in (self.image, self.text)]
        return [x.requires_grad_() for x in (*features, *(torch.tensor(x, dtype=wide) for x in parameters))]

    def evaluate(self, loss: Callable[..., Tensor], dtype: torch.dtype, factor=1.0, **options) -> dict[str, Tensor]:
        """The loss, and the gradients of `factor` times it."""
        leaves = self.leaves(dtype)
        value = self.loss_of(leaves, loss, **options)
        names = ("image", "text", "scale", "bias")
        grads = torch.autograd.grad(value if factor == 1.0 else factor * value.float(), leaves)
        return {"loss": value.detach()} | dict(zip(names, grads, strict=False))

    def loss_of(self, leaves: list[Tensor], loss: Callable[..., Tensor], **options) -> Tensor:
        return loss(*leaves, **options, **({"label_smoothing": self.smoothing} if self.op == "clip_loss" else {}))

    @torch.no_grad()
    def true_loss(self) -> float:
        return self.loss_of(self.leaves(torch.float64), LOSSES[self.op], backend="reference").item()

    def ours(self, backend: str, dtype: torch.dtype, factor=1.0) -> dict[str, Tensor]:
        return self.evaluate(LOSSES[self.op], dtype, factor, backend=backend)

    def truth(self, factor=1.0) -> dict[str, Tensor]:
        found = self.evaluate(LOSSES[self.op], torch.float64, backend="reference")
        return {name: x if name == "loss" else factor * x for name, x in found.items()}

    @property
    def largest_logit(self) -> float:
        return (self.scale * self.image.double() @ self.text.double().T).abs().max().item() + abs(self.bias)


def inputs_of_loss(op: str, loss: float, scale: float, dtype: torch.dtype, smoothing: float = 0.0) -> Inputs:
    """Pairs that nearly agree, or, for a loss of CLIP beyond log N, that have nothing in common; their length makes the
    loss what is asked for, but for its smoothing."""
    image, text = F.normalize(torch.randn(2, PAIRS, WIDTH, dtype=torch.float64), dim=-1)
    agree = op == "siglip_loss" or loss < math.log(PAIRS)
    if agree:
        text = F.normalize(image + 0.02 * text, dim=-1)

    def inputs(size: float) -> Inputs:
        length = math.sqrt(size / scale)
        rounded = [(length * x).to(dtype) for x in (image, text)]
        return Inputs(op, *rounded, scale, -size / 2 if op == "siglip_loss" else 0.0)

    low, high = 1e-3, 1e3  # of the logits
    for _ in range(25):
        size = math.sqrt(low * high)
        small = inputs(size).true_loss() < loss
        low, high = (low, size) if small == agree else (size, high)
    return Inputs(**(vars(inputs(low)) | {"smoothing": smoothing}))


# ---- measures


def over_budget(inputs: Inputs, ours: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    roundings = {} if dtype == torch.float32 else {"rounding": dtype}
    rough = inputs.evaluate(OPS[inputs.op].plain, torch.float32, **roundings)
    numbers = (inputs.scale, inputs.bias, inputs.smoothing)
    _, response = contrastive_truth(inputs.op, inputs.image, inputs.text, *numbers)
    found = []
    for (name, value), moved in zip(ours.items(), (response.loss, *response.gradients().values()), strict=False):
        quantity = Quantity(name, value.dtype, rough[name].dtype)
        quantity.add(value, rough[name], truth[name], moved.abs().max().item())
        found.append(quantity.failure())
    return [failure for failure in found if failure]


def lost_digits(inputs: Inputs, ours: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    found = []
    for name, value in ours.items():
        error = ((value.double() - truth[name]).norm() / truth[name].norm()).item()
        limit = 4 * torch.finfo(value.dtype).eps + 8 * torch.finfo(torch.float32).eps * (1 + inputs.largest_logit)
        if not error <= limit:
            found.append(f"{name} is off by {error:.1e} of itself, more than {limit:.1e}")
    return found


# ---- losses near zero, and large logits


@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        *((loss, torch.float32) for loss in (1e-9, 1e-6, 1e-3, 1.0, 10.0)),
        *((loss, torch.bfloat16) for loss in (1e-9, 1e-3, 10.0)),
        *((loss, torch.float16) for loss in (1e-9, 1e-6, 1.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize(("op", "smoothing"), [("clip_loss", 0.0), ("clip_loss", 0.1), ("siglip_loss", 0.0)])
def test_no_digits_are_lost(backend, op, smoothing, scale, loss, dtype):
    inputs = inputs_of_loss(op, loss, scale, dtype, smoothing)
    truth = inputs.truth()
    failures = over_budget(inputs, inputs.ours(backend, dtype), truth, dtype)
    factor = 2.0 ** -math.frexp(truth["image"].abs().max().item())[1]  # a loss scale, for float16
    ours = inputs.ours(backend, dtype, factor)
    if (backend, dtype) == ("triton", torch.float16):  # holds dS in float16, where the smallest are subnormal
        ours = {name: ours[name] for name in ("loss", "scale")}
    failures += lost_digits(inputs, ours, inputs.truth(factor))
    assert not failures, "\n".join([f"true loss {truth['loss']:.1e}", *failures])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [30.0, -30.0, 9999.7, -9999.7])
def test_products_without_rounding_leave_none_in_the_differences(backend, scale, smoothing):
    """All products lie within 1 and 1.002 and are exact: so are their differences, and a logit of 10^4 is not."""
    inputs = exact_products(scale, smoothing)
    truth, ours = inputs.truth(), inputs.ours(backend, torch.float32)
    for name in ("loss", "image", "text"):
        value, expected = ours[name].double(), truth[name]
        if name != "loss":  # the column of ones, of which next to nothing is left, aside
            value, expected = value[:, 1:], expected[:, 1:]
        error = ((value - expected).norm() / expected.norm()).item()
        assert error < 2e-6, f"{name} is off by {error:.1e} of itself"


def exact_products(scale: float, smoothing: float) -> Inputs:
    """1, and 2^-13 more within a group of about ten, and 2^-9 more of a pair."""
    own, group = torch.eye(PAIRS), torch.eye(7)[torch.arange(PAIRS) % 7]
    image = torch.cat([torch.ones(PAIRS, 1), own * 2**-4, group * 2**-6], 1)
    text = torch.cat([torch.ones(PAIRS, 1), own * 2**-5, group * 2**-7], 1)
    return Inputs("clip_loss", image, math.copysign(1, scale) * text, scale, 0.0, smoothing)


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_equal_pairs_are_told_apart_for_certain(backend, scale):
    """Their largest logit is their own: nothing but the smoothing is left of the gradient, to its last digits."""
    image = F.normalize(torch.randn(PAIRS, WIDTH), dim=-1) * (200 / scale) ** 0.5
    inputs = Inputs("clip_loss", image, image.clone(), scale, 0.0, 0.1)
    truth, ours = inputs.truth(), inputs.ours(backend, torch.float32)
    for name, value in ours.items():
        assert (value.double() - truth[name]).norm() < 1e-6 * truth[name].norm(), name


@pytest.mark.parametrize("scale", [0.0, -0.5, -40.0, math.nan])
def test_scales_of_any_sign(backend, scale):
    for op in LOSSES:
        image, text = F.normalize(torch.randn(2, PAIRS, WIDTH, dtype=torch.float64), dim=-1).float()
        inputs = Inputs(op, image, text, scale, -1.0)
        truth, ours = inputs.truth(), inputs.ours(backend, torch.float32)
        for name, value in ours.items():
            error, size = (value.double() - truth[name]).norm(), truth[name].norm()
            if not value.dim():  # a mean of products, or of slopes, that cancel
                size = size.clamp(min=WIDTH**-0.5)
            assert error <= 1e-5 * size if scale == scale else error.isnan(), f"{op}: {name} is off by {error / size}"


# ---- the chain rule before the rounding


def half_features(dtype: torch.dtype, noise: float) -> tuple[Tensor, Tensor]:
    common = torch.randn(PAIRS, WIDTH)
    return tuple(F.normalize(common + noise * torch.randn(PAIRS, WIDTH), dim=-1).to(dtype) for _ in range(2))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_rounded_once_and_after_the_incoming_gradient(backend, op, dtype):
    image, text = half_features(dtype, 1.0)
    scale, bias = torch.tensor(20.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)
    parameters = (scale,) if op == "clip_loss" else (scale, bias)
    pairs = None, None, "positives"
    options = (*pairs, "both", 0.0, backend) if op == "clip_loss" else (*pairs, backend)
    _, *wide = getattr(torch.ops.mmkernels, f"{op}_with_grads")(image, text, *parameters, *options)
    for grad, x in zip(wide, (image, text, *parameters), strict=True):
        assert grad.dtype == torch.float32 and grad.shape == x.shape
        assert not torch.equal(grad, grad.to(dtype).float())  # a half result that was widened
    for factor in (0.3, 65536.0, 1e-3):
        leaves = [x.clone().requires_grad_() for x in (image, text, *parameters)]
        (factor * LOSSES[op](*leaves, backend=backend)).backward()
        for leaf, grad in zip(leaves, wide, strict=True):
            assert torch.equal(leaf.grad, (torch.tensor(factor) * grad).to(dtype))


@pytest.mark.parametrize("op", LOSSES)
def test_a_loss_scale_saves_small_gradients_of_float16(backend, op):
    """GradScaler's first scale, no number of float16 itself; the gradients are below its range but for the scale."""
    image, text = half_features(torch.float16, 0.1)
    scale, bias, factor = (20.0, -10.0, 65536.0) if op == "siglip_loss" else (12.0, 0.0, 65536.0)
    inputs = Inputs(op, image, text, scale, bias)
    ours, truth = inputs.ours(backend, torch.float16, factor), inputs.truth(factor)
    for name in ("image", "text"):
        assert ours[name].isfinite().all()
        small = truth[name].norm(dim=1).argsort()[: PAIRS // 2]
        error = (ours[name][small].double() - truth[name][small]).norm() / truth[name][small].norm()
        assert error < 4 * torch.finfo(torch.float16).eps


# ---- lengths in float32


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1e-2, 1.0, 4000.0], ids=["short", "usual", "beyond float16"])
def test_normalize(backend, op, dtype, length):
    image, text = (length * torch.randn(2, PAIRS, 512)).to(dtype)
    image[3], text[5] = 0, 0  # dropped samples
    parameters = (30.0,) if op == "clip_loss" else (30.0, -5.0)
    ours = LOSSES[op](image, text, *parameters, normalize=True, backend=backend)
    unit = [F.normalize(x.double(), dim=-1) for x in (image, text)]
    truth = LOSSES[op](*unit, *parameters, backend="reference")
    rounded = LOSSES[op](*(x.to(dtype) for x in unit), *parameters, backend="reference")
    assert ours.isfinite()
    assert abs(ours - truth) <= 2 * abs(rounded - truth) + 64 * torch.finfo(torch.float32).eps * ours.abs()


@pytest.mark.parametrize("op", LOSSES)
def test_normalize_has_gradients_of_long_rows(backend, op):
    image = (4000 * torch.randn(PAIRS, 512)).half()
    text = (image.float() + 4000 * torch.randn(PAIRS, 512)).half()
    parameters = (10.0,) if op == "clip_loss" else (10.0, -5.0)

    def gradients(dtype: torch.dtype, backend: str, factor: float) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (image, text)]
        loss = LOSSES[op](*leaves, *parameters, normalize=True, backend=backend)
        return torch.autograd.grad(factor * loss, leaves)

    factor = 2.0**16  # lengths of 10^5 make small gradients
    for ours, truth in zip(
        gradients(torch.half, backend, factor), gradients(torch.double, "reference", factor), strict=True
    ):
        assert (ours.double() - truth).norm() < 16 * torch.finfo(torch.half).eps * truth.norm()


# ---- NumPy's scalars


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64, np.int32])
def test_numpy_scalars_are_numbers(backend, kind):
    image, text = half_features(torch.float32, 1.0)
    assert torch.equal(clip_loss(image, text, kind(20), backend=backend), clip_loss(image, text, 20.0, backend=backend))
    ours = siglip_loss(image, text, kind(20), kind(-10), backend=backend)
    assert torch.equal(ours, siglip_loss(image, text, 20.0, -10.0, backend=backend))
