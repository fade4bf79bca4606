"""The largest of many inner products: the code nearest to a vector, and the similarity of sets of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import backends
from .. import _checks
from . import op


class NearestCode(NamedTuple):
    """What `nearest_code` returns."""

    indices: Tensor
    quantised: Tensor


def nearest_code(x: Tensor, codes: Tensor, *, backend: str | None = None) -> NearestCode:
    """Vector quantisation: of each vector the code with the least Euclidean distance, without the N x K distances.

    van den Oord et al. 2017, https://arxiv.org/abs/1711.00937; how Emu3, Janus and Chameleon make pictures tokens.

    Args:
        x: (..., D), floating: float32, bfloat16 or float16 (the reference backend: float64 too), any strides.
        codes: (K, D), K and D at least 1, of the same dtype (under autocast of any).
        backend: "triton", "cpu", "reference"; None takes the fastest of them that supports the call.

    Returns:
        indices: (...), int64: which code is nearest, as far as float32 tells; of equally near ones the first.
        quantised: (..., D), in the dtype of codes: codes[indices], differentiable by codes, any number of times, with
            gradients that are the same in every run. x has no gradient: for the straight-through estimate take
            `x + (quantised - x).detach()`, for the losses of codebook and commitment the squares of
            `quantised - x.detach()` and `quantised.detach() - x`.

        A vector that holds NaN is nearest to code 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    name = "nearest_code"
    for label, value in (("x", x), ("codes", codes)):
        _checks.floating(name, label, value)
    if codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"{name}: codes has shape {tuple(codes.shape)}; it must be (K, D), K and D at least 1")
    if x.dim() < 1 or x.shape[-1] != codes.shape[-1]:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}; for codes of {tuple(codes.shape)} it must be "
                         f"(..., {codes.shape[-1]})")  # fmt: skip
    _checks.same_device(name, "codes", codes, "x", x)
    rows, table = _checks.autocast(x.reshape(-1, x.shape[-1]), codes)
    _checks.same_dtype(name, "codes", table, "x", rows)
    indices, quantised = op.nearest_code(rows, table, backends.requested(backend))
    return NearestCode(indices.view(x.shape[:-1]), quantised.to(codes.dtype).view(x.shape))


def max_similarity(
    texts: Tensor,
    images: Tensor,
    *,
    cu_texts: Tensor | None = None,
    cu_images: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """How similar each text is to each image: of each of its tokens the largest inner product with a token of the
    image, summed over its tokens, without the products of all tokens:

        S_nm = sum over the tokens t of text n of max over the tokens p of image m of <t, p>

    With one token a text it is BLIP-2's image-text similarity (Li et al. 2023, https://arxiv.org/abs/2301.12597), whose
    images have a token for each query; with several the late interaction of ColBERT and ColPali (Faysse et al. 2024,
    https://arxiv.org/abs/2407.01449), whose pages are the images.

    Args:
        texts: (N, T, D), or (N, D) for one token each; or with `cu_texts` (tokens of all texts, D), one after the
            other. Floating: float32, bfloat16 or float16 (the reference backend: float64 too), any strides.
        images: (M, P, D) or (M, D), or with `cu_images` (tokens of all images, D), of the same dtype (under autocast
            of any).
        cu_texts: (N + 1), int32 or int64: where in `texts` each text begins, and where the last one ends, as
            `RowSpans.packed` takes it, on the device of texts. It begins with 0 and never falls, which is not checked;
            tokens after the last text are padding.
        cu_images: (M + 1), the same for the images.
        backend: "triton", "cpu", "reference"; None takes the fastest of them that supports the call.

    Returns:
        (N, M), float32 (float64 for such inputs); differentiable by texts and images, any number of times, where the
        largest is one: of equals the first has the gradient, which is the same in every run. A text without tokens has
        0, and any other with an image without tokens -inf.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
        BackendUnavailable: the backend asked for cannot serve the call.
    """
    name = "max_similarity"
    for label, value in (("texts", texts), ("images", images)):
        _checks.floating(name, label, value)
    _checks.same_device(name, "images", images, "texts", texts)
    rows, of_texts = _tokens("texts", texts, cu_texts)
    columns, of_images = _tokens("images", images, cu_images)
    if rows.shape[1] != columns.shape[1] or not rows.shape[1]:
        raise ValueError(f"{name}: a token of texts has {rows.shape[1]} numbers and one of images {columns.shape[1]}; "
                         "they must be as many, at least 1")  # fmt: skip
    rows, columns = _checks.autocast(rows, columns)
    _checks.same_dtype(name, "images", columns, "texts", rows)
    return op.max_similarity(rows, of_texts, columns, of_images, backends.requested(backend))


def _tokens(label: str, x: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """All tokens one after the other, and where each text, or image, begins, and the last one ends."""
    name, given = "max_similarity", tuple(x.shape)
    if cu is None:
        if x.dim() not in (2, 3):
            raise ValueError(f"{name}: {label} has shape {given}; it must be (N, tokens, D), or (N, D) for one token "
                             f"each, or come with cu_{label}")  # fmt: skip
        each = x.shape[1] if x.dim() == 3 else 1
        return x.reshape(-1, x.shape[-1]), each * torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
    _checks.tensor(name, f"cu_{label}", cu)
    if x.dim() != 2:
        raise ValueError(f"{name}: {label} has shape {given}; with cu_{label} it must be (tokens of all, D)")
    if cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or not len(cu):
        raise ValueError(f"{name}: cu_{label} has dtype {cu.dtype} and shape {tuple(cu.shape)}; it must be int32 or "
                         "int64, of one axis, one number more than there are of them")  # fmt: skip
    _checks.same_device(name, f"cu_{label}", cu, label, x)
    return x, cu.to(torch.int32)
