"""The contrastive losses of CLIP and SigLIP, without the N x N matrix of logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends
from .. import _checks
from . import distributed, op
from .pairing import DIRECTIONS, SAME

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh | tuple[DeviceMesh, str]

__all__ = ["clip_loss", "siglip_loss"]


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same: str = "positives",
    direction: str = "both",
    group: Group | None = None,
    reduce: str = "mean",
    sizes: str | Sequence[int] | Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The symmetric cross-entropy of CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020) over pairs.

    With logits S = logit_scale * image_features @ text_features.T, the mean over both directions of the cross-entropy
    between each row (column) of S and its own index. Softmax, sums and gradients are accumulated in float32 whatever
    the dtype of the features, at any scale and for features of any length. Memory grows with N + M, never with N * M.

    An image or a text that has no positive has no loss of its own and is a negative of the others: with M > N, texts
    from N on are hard negatives (NegCLIP, https://arxiv.org/abs/2210.01936) or a queue of earlier ones (MoCo). The loss
    of a direction is the mean over those that have one, 0 if none has. docs/contrastive.md names the losses of the
    field by their settings.

    Args:
        image_features: (N, D), float32, bfloat16 or float16 (float64 by the reference); usually of unit length.
        text_features: (M, D), the same dtype and device; without ids, text i belongs to image i, as far as there are
            both.
        logit_scale: a number, NumPy's too, or a tensor of one element: the factor itself (CLIP's parameter already
            exponentiated).
        logit_bias: accepted as open_clip passes it. It shifts every logit alike, so the softmax is blind to it: the
            loss does not change and its gradient is zero.
        label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
        normalize: divide each feature by its length first (torch.nn.functional.normalize), in float32 whatever its
            dtype, which it then has again: a row of zeros stays one, and float16 rows may be longer than 65504.
        image_ids: (N,), int64, on the same device: what each image shows, such as the number of its caption.
        text_ids: (M,), int64, the same of each text. Ids are compared tile by tile; there is no N x M mask.
        same: what equal ids say. "positives": these pairs, and no others, belong together, and the targets of a row are
            uniform over its positives (UniCL, https://arxiv.org/abs/2204.03610). "ignored": text i belongs to image i,
            and other pairs of equal ids are left out, neither positive nor negative (duplicate captions); not with
            label_smoothing.
        direction: "both"; "image_to_text": the images' losses alone (InfoNCE, https://arxiv.org/abs/1807.03748);
            "text_to_image".
        group: None: this process's images and texts alone. A ProcessGroup of torch.distributed, a one-dimensional
            DeviceMesh or (DeviceMesh, name of a dimension): those of all its ranks, each of which calls with its own.
            The loss is the mean over all of them, the same on every rank; ids are compared across ranks, and without
            ids a rank's own row i and row i belong together. Every rank must call, with the same options.
        reduce: with a group, what the training loop does with the ranks' gradients: "mean" (DDP, FSDP average them),
            "sum". Either way what comes of it is the gradient of the loss. Those of logit_scale and logit_bias are
            the same on every rank as they are.
        sizes: with a group, how many images and texts each rank has: a number, or a pair of numbers, for each; or
            "exchange": the ranks ask each other, and compare their arguments. None: "exchange" on a CPU; on a GPU as
            many as here, unchecked, since asking waits for the device.
        backend: "cuda", "triton", "cpu", "reference"; None takes the fastest that supports the call.

    Returns:
        A scalar tensor, float32 (float64 for float64 features), differentiable once in the features, logit_scale and
        logit_bias. When a gradient is wanted it is computed together with the loss, so that backward only scales it: in
        float32, and rounded to the dtype of the features after that, so that a loss scale does its work. Until then it
        takes 4 (N + M) D bytes, for half types twice what the features do.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
        DistributedError: an exchange between the ranks failed; the message names it, and who did not answer. Where
            arguments are compared, a rank's wrong argument is a ValueError on all of them.
    """
    arguments = partial(
        _clip_arguments, image_features, text_features, logit_scale, logit_bias, label_smoothing, normalize, image_ids,
        text_ids, same, direction, backend,
    )  # fmt: skip
    if group is None:
        return op.clip_loss(*arguments())
    across = distributed.arguments("clip_loss", group, reduce, sizes, False, image_features, arguments)
    return op.clip_loss_across(*across)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    normalize: bool = False,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same: str = "positives",
    group: Group | None = None,
    reduce: str = "mean",
    sizes: str | Sequence[int] | Sequence[tuple[int, int]] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) over pairs.

    With logits S = logit_scale * image_features @ text_features.T + logit_bias and z_ij = 1 for pairs that belong
    together, else -1, the loss is -1/N sum_ij log sigmoid(z_ij S_ij): the sum over all pairs, divided once by the
    number of images. Pairs that same="ignored" leaves out are not in the sum.

    Args, returned value and errors are those of `clip_loss`; logit_bias counts here and has a gradient.
    """
    arguments = partial(
        _siglip_arguments, image_features, text_features, logit_scale, logit_bias, normalize, image_ids, text_ids, same,
        backend,
    )  # fmt: skip
    if group is None:
        return op.siglip_loss(*arguments())
    across = distributed.arguments("siglip_loss", group, reduce, sizes, False, image_features, arguments)
    return op.siglip_loss_across(*across)


def clip_loss_of_rank(
    image: Tensor, text: Tensor, scale: Tensor | float, bias, group: Group, backend: str | None
) -> Tensor:
    """`clip_loss` across ranks, gradients and all, but for its value: the mean over this rank's images and texts."""
    options = 0.0, False, None, None, "positives", "both", backend
    arguments = partial(_clip_arguments, image, text, scale, bias, *options)
    return op.clip_loss_across(*distributed.arguments("clip_loss", group, "mean", None, True, image, arguments))


def siglip_loss_of_rank(
    image: Tensor, text: Tensor, scale: Tensor | float, bias, group: Group, backend: str | None
) -> Tensor:
    """`siglip_loss` across ranks, but for its value: the mean over this rank's images."""
    arguments = partial(_siglip_arguments, image, text, scale, bias, False, None, None, "positives", backend)
    return op.siglip_loss_across(*distributed.arguments("siglip_loss", group, "mean", None, True, image, arguments))


def _clip_arguments(
    image, text, scale, bias, label_smoothing, normalize, image_ids, text_ids, same, direction, backend
) -> tuple:  # fmt: skip
    name = "clip_loss"
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing is {label_smoothing}; it must be between 0 and 1")
    _checks.one_of(name, "direction", direction, DIRECTIONS)
    image, text = _features(name, image, text, normalize)
    _check_ids(name, image_ids, text_ids, same, image, text)
    if label_smoothing and image_ids is not None and same == "ignored":
        raise ValueError(
            f"{name}: label_smoothing is {label_smoothing} with same='ignored'; it spreads over pairs that are not "
            "ignored, which nothing here counts. Set it to 0"
        )
    scale = _scalar(name, "logit_scale", scale, image)
    bias = None if bias is None else _scalar(name, "logit_bias", bias, image)
    options = same, direction, float(label_smoothing), backends.requested(backend)
    return image, text, scale, bias, image_ids, text_ids, *options


def _siglip_arguments(image, text, scale, bias, normalize, image_ids, text_ids, same, backend) -> tuple:
    name = "siglip_loss"
    image, text = _features(name, image, text, normalize)
    _check_ids(name, image_ids, text_ids, same, image, text)
    scale, bias = _scalar(name, "logit_scale", scale, image), _scalar(name, "logit_bias", bias, image)
    return image, text, scale, bias, image_ids, text_ids, same, backends.requested(backend)


def _features(name: str, image: Tensor, text: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    for label, value, rows in (("image_features", image, "N"), ("text_features", text, "M")):
        _checks.floating(name, label, value)
        if value.dim() != 2 or 0 in value.shape:
            raise ValueError(
                f"{name}: {label} has shape {tuple(value.shape)}; it must be ({rows}, D), {rows} and D at least 1"
            )
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{name}: image_features has shape {tuple(image.shape)}, text_features {tuple(text.shape)}; features of "
            "both must have the same length"
        )
    _checks.same_device(name, "text_features", text, "image_features", image)
    if normalize:
        image, text = _normalized(image), _normalized(text)
    image, text = _checks.autocast(image, text)
    _checks.same_dtype(name, "text_features", text, "image_features", image)
    return image, text


def _check_ids(name: str, image_ids: Tensor | None, text_ids: Tensor | None, same: str, image: Tensor, text: Tensor):
    _checks.one_of(name, "same", same, SAME)
    if (image_ids is None) != (text_ids is None):
        given, other = ("image_ids", "text_ids") if text_ids is None else ("text_ids", "image_ids")
        raise ValueError(f"{name}: {given} is given without {other}; ids are compared, so give both or neither")
    for label, ids, of, features in (
        ("image_ids", image_ids, "image_features", image),
        ("text_ids", text_ids, "text_features", text),
    ):
        if ids is None:
            continue
        _checks.tensor(name, label, ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"{name}: {label} has dtype {ids.dtype}; accepted is int64")
        if ids.shape != (len(features),):
            raise ValueError(
                f"{name}: {label} has shape {tuple(ids.shape)}; it must be ({len(features)},), one for each row of {of}"
            )
        _checks.same_device(name, label, ids, of, features)


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
