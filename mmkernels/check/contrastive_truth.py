"""The contrastive losses and their gradients by chunks of rows, in float64 unless told otherwise.

The formulas of mmkernels.ops.contrastive.reference, without its N x N matrices: the logits of a chunk are made, used
and dropped, twice for CLIP (the column sums must be complete before any gradient), once for SigLIP. The benchmarks take
the truth from here at sizes where the reference would need gigabytes.

`response` is the other half: how far each result moves when every logit moves by 2 ulp of float32 (see
mmkernels.check.budget). With delta that distance and A = |dS|'s sensitivity to it, which is sigmoid(-z S) / N for
SigLIP, and for CLIP (P + Q) / 2N off the diagonal, and on it what that is short of 1 / N:

    loss: delta sum A      dI: s delta A |T|      dT: s delta A^T |I|      ds: delta sum A |I T^T|      db: delta sum A

and for CLIP's loss with a label smoothing, which adds e (S_ii - mean S), 2 e delta more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import ulp

CHUNK_ELEMENTS = 1 << 24  # logits alive at a time: 128 MB of float64


@dataclass
class Sums:
    """A loss and its gradients, or how far they respond; both are sums over the pairs."""

    loss: Tensor
    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    named: tuple[str, ...] = field(default=("image_features", "text_features", "logit_scale", "logit_bias"), repr=False)

    @classmethod
    def zeros(cls, image: Tensor, text: Tensor) -> Sums:
        scalars = (image.new_zeros(()) for _ in range(3))
        return cls(next(scalars), torch.zeros_like(image), torch.zeros_like(text), next(scalars), next(scalars))

    def gradients(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.named}


def contrastive_truth(
    op: str,
    image: Tensor,
    text: Tensor,
    scale: float,
    bias: float = 0.0,
    label_smoothing: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Sums, Sums]:
    """(truth, response) of "clip_loss" or "siglip_loss" on features (N, D) of any dtype, computed in `dtype`."""
    image, text = image.detach().to(dtype), text.detach().to(dtype)
    if op == "clip_loss":
        return _clip(image, text, scale, label_smoothing)
    return _siglip(image, text, scale, bias)


def _clip(image: Tensor, text: Tensor, scale: float, label_smoothing: float) -> tuple[Sums, Sums]:
    count = len(image)
    own, row_others, column_others, largest = _logits_of_others(image, text, scale)
    row_loss, column_loss = (torch.logaddexp(x, torch.zeros_like(x)) for x in (row_others, column_others))
    missed = (row_others.sigmoid() + column_others.sigmoid()) / 2  # what an own pair's probability is short of 1
    delta = 2 * ulp(torch.float32, largest)
    truth, response = Sums.zeros(image, text), Sums.zeros(image, text)
    truth.loss += (row_loss + column_loss).mean() / 2 + label_smoothing * own.mean()
    for rows, products in _chunks(image, text):
        logits = scale * products
        diagonal = _diagonal(rows, logits)
        softmaxes = [logits - (own + row_loss)[rows, None], logits - (own + column_loss)]
        error = torch.where(diagonal == 1, -missed[rows, None], sum(x.exp() for x in softmaxes) / 2) / count
        smoothing = label_smoothing * (diagonal - 1 / count) / count
        truth.loss -= label_smoothing * logits.sum() / count**2
        _accumulate(truth, rows, error + smoothing, products, image, text, scale)
        _accumulate(response, rows, delta * error.abs(), products.abs(), image.abs(), text.abs(), scale)
    response.loss += response.logit_bias + 2 * label_smoothing * delta
    truth.logit_bias.zero_()  # softmax is blind to a shift of every logit: exactly zero
    response.logit_bias.zero_()
    return truth, response


def _siglip(image: Tensor, text: Tensor, scale: float, bias: float) -> tuple[Sums, Sums]:
    truth, response = Sums.zeros(image, text), Sums.zeros(image, text)
    largest = 0.0
    for rows, products in _chunks(image, text):
        logits = scale * products + bias
        largest = max(largest, logits.abs().max().item())
        signs = 2 * _diagonal(rows, logits) - 1
        truth.loss -= F.logsigmoid(signs * logits).sum() / len(image)
        weight = torch.sigmoid(-signs * logits) / len(image)
        _accumulate(truth, rows, -signs * weight, products, image, text, scale)
        _accumulate(response, rows, weight, products.abs(), image.abs(), text.abs(), scale)
    response.loss += response.logit_bias
    for value in (response.loss, *response.gradients().values()):
        value *= 2 * ulp(torch.float32, largest)
    return truth, response


def _logits_of_others(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """The logits of own pairs; less those, the log-sum-exp of the others in each row and in each column, of which a
    small loss is made; and the largest |logit|."""
    own, rows_lse, largest = [], [], 0.0
    columns_lse = torch.full((len(text),), -torch.inf, dtype=image.dtype, device=image.device)
    for rows, products in _chunks(image, text):
        logits = scale * products
        largest = max(largest, logits.abs().max().item())
        own.append(logits.diagonal(rows.start).clone())
        others = logits.masked_fill(_diagonal(rows, logits) == 1, -torch.inf)
        rows_lse.append(others.logsumexp(1))
        columns_lse = torch.logaddexp(columns_lse, others.logsumexp(0))
    own = torch.cat(own)
    return own, torch.cat(rows_lse) - own, columns_lse - own, largest


def _chunks(image: Tensor, text: Tensor) -> Iterator[tuple[slice, Tensor]]:
    step = max(1, CHUNK_ELEMENTS // len(text))
    for first in range(0, len(image), step):
        rows = slice(first, min(first + step, len(image)))
        yield rows, image[rows] @ text.T


def _diagonal(rows: slice, logits: Tensor) -> Tensor:
    """The rows of the identity matrix that belong to this chunk."""
    diagonal = torch.zeros_like(logits)
    diagonal.diagonal(rows.start).fill_(1)
    return diagonal


def _accumulate(
    sums: Sums, rows: slice, d_logits: Tensor, products: Tensor, image: Tensor, text: Tensor, scale: float
) -> None:
    sums.image_features[rows] += scale * (d_logits @ text)
    sums.text_features += scale * (d_logits.T @ image[rows])
    sums.logit_scale += (d_logits * products).sum()
    sums.logit_bias += d_logits.sum()
