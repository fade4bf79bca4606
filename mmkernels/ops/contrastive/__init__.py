"""The contrastive losses of CLIP and SigLIP, without the N x N matrix of logits."""

from __future__ import annotations

from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends
from .. import _checks
from . import op

__all__ = ["clip_loss", "siglip_loss"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) over N pairs.

    With logits S = logit_scale * image_features @ text_features.T, the mean over both directions of the cross-entropy
    between each row (column) of S and its own index. Softmax, sums and gradients are accumulated in float32 whatever
    the dtype of the features, at any scale and for features of any length. Memory grows with N, never with N * N.

    Args:
        image_features: (N, D), float32, bfloat16 or float16 (float64 by the reference); usually of unit length.
        text_features: (N, D), the same dtype and device; row i belongs to image i.
        logit_scale: a number, NumPy's too, or a tensor of one element: the factor itself (CLIP's parameter already
            exponentiated).
        logit_bias: accepted as open_clip passes it. It shifts every logit alike, so the softmax is blind to it: the
            loss does not change and its gradient is zero.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        normalize: divide each feature by its length first (torch.nn.functional.normalize), in float32 whatever its
            dtype, which it then has again: a row of zeros stays one, and float16 rows may be longer than 65504.
        backend: "cuda", "triton", "cpu", "reference"; None takes the fastest that supports the call.

    Returns:
        A scalar tensor, float32 (float64 for float64 features), differentiable once in the features, logit_scale and
        logit_bias. When a gradient is wanted it is computed together with the loss, so that backward only scales it: in
        float32, and rounded to the dtype of the features after that, so that a loss scale does its work. Until then it
        takes 8 N D bytes, for half types twice what the features do.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    name = "clip_loss"
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it must be between 0 and 1")
    image, text = _features(name, image_features, text_features, normalize)
    scale = _scalar(name, "logit_scale", logit_scale, image)
    bias = None if logit_bias is None else _scalar(name, "logit_bias", logit_bias, image)
    return op.clip_loss(image, text, scale, bias, float(label_smoothing), backends.requested(backend))


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) over N pairs.

    With logits S = logit_scale * image_features @ text_features.T + logit_bias and z_ij = 1 where i = j, else -1, the
    loss is -1/N sum_ij log sigmoid(z_ij S_ij): the sum over all pairs, divided by N once.

    Args, returned value and errors are those of `clip_loss`; logit_bias counts here and has a gradient.
    """
    name = "siglip_loss"
    image, text = _features(name, image_features, text_features, normalize)
    scale = _scalar(name, "logit_scale", logit_scale, image)
    bias = _scalar(name, "logit_bias", logit_bias, image)
    return op.siglip_loss(image, text, scale, bias, backends.requested(backend))


def _features(name: str, image: Tensor, text: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    _checks.floating(name, "image_features", image)
    _checks.floating(name, "text_features", text)
    for label, value in (("image_features", image), ("text_features", text)):
        if value.dim() != 2 or 0 in value.shape:
            raise ValueError(f"{name}: {label} has shape {tuple(value.shape)}; it must be (N, D), N and D at least 1")
    if image.shape != text.shape:
        raise ValueError(
            f"{name}: image_features has shape {tuple(image.shape)}, text_features {tuple(text.shape)}; "
            "they must be equal, row i of one belonging to row i of the other"
        )
    _checks.same_device(name, "text_features", text, "image_features", image)
    if normalize:
        image, text = _normalized(image), _normalized(text)
    image, text = _checks.autocast(image, text)
    _checks.same_dtype(name, "text_features", text, "image_features", image)
    return image, text


def _normalized(features: Tensor) -> Tensor:
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide, dim=-1).to(features.dtype)


def _scalar(name: str, label: str, value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, (int, float, Real)):  # Real: NumPy's scalars, too
        return torch.full((), float(value), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    _checks.floating(name, label, value)
    if value.numel() != 1:
        raise ValueError(f"{name}: {label} has shape {tuple(value.shape)}; it must have exactly one element")
    _checks.same_device(name, label, value, "image_features", like)
    return value
