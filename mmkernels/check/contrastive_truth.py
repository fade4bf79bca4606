"""The contrastive losses and their gradients by chunks of rows, in float64 unless told otherwise.

The formulas of mmkernels.ops.contrastive.reference, without its N x M matrices: the logits of a chunk are made, used
and dropped, twice for CLIP (the column sums must be complete before any gradient), once for SigLIP. The benchmarks take
the truth from here at sizes where the reference would need gigabytes.

`response` is the other half: how far each result moves when every logit moves by 2 ulp of float32 (see
mmkernels.check.budget). With delta that distance and A the sensitivity of dS to it, which is sigmoid(-z S) / N for
SigLIP, and for CLIP the probabilities, in both directions, times their share in the loss, and of a row's only positive
what its probability is short of 1:

    loss: delta sum A      dI: s delta A |T|      dT: s delta A^T |I|      ds: delta sum A |I T^T|      db: delta sum A

and for CLIP's loss with a label smoothing, which adds e (S_ii - mean S), 2 e delta more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.contrastive.pairing import Pairing, Shares
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
    pairing: Pairing | None = None,
    direction: str = "both",
) -> tuple[Sums, Sums]:
    """(truth, response) of "clip_loss" or "siglip_loss" on features (N, D) and (M, D), computed in `dtype`."""
    image, text = image.detach().to(dtype), text.detach().to(dtype)
    pairing = pairing or Pairing.of(len(image), len(text), None, None, "positives")
    if op == "clip_loss":
        return _clip(image, text, scale, label_smoothing, pairing, direction)
    return _siglip(image, text, scale, bias, pairing)


def _clip(
    image: Tensor, text: Tensor, scale: float, smoothing: float, pairing: Pairing, direction: str
) -> tuple[Sums, Sums]:
    rows, columns, largest = _logits_by_side(image, text, scale, pairing)
    shares = Shares.of(pairing, direction)
    delta = 2 * ulp(torch.float32, largest)
    truth, response = Sums.zeros(image, text), Sums.zeros(image, text)
    for side, share, length in ((rows, shares.row, len(text)), (columns, shares.column, len(image))):
        side.share = (share / shares.count) * (side.counts > 0).to(image.dtype)
        side.spread = smoothing * side.share / length
        truth.loss += (side.share * (side.losses() + smoothing * side.own)).sum()
    for part, products, positives, hidden in _chunks(image, text, pairing):
        logits = scale * products
        by_row, by_column = rows.at(part), columns.transposed()
        slopes, moves = zip(*(side.slopes(logits, positives, smoothing) for side in (by_row, by_column)), strict=True)
        d_logits, moved = (sum(x).masked_fill(hidden, 0) for x in (slopes, moves))
        truth.loss -= ((by_row.spread + by_column.spread) * logits).sum()
        _accumulate(truth, part, d_logits, products, image, text, scale)
        _accumulate(response, part, delta * moved, products.abs(), image.abs(), text.abs(), scale)
    response.loss += response.logit_bias + 2 * smoothing * delta
    truth.logit_bias.zero_()  # softmax is blind to a shift of every logit: exactly zero
    response.logit_bias.zero_()
    return truth, response


def _siglip(image: Tensor, text: Tensor, scale: float, bias: float, pairing: Pairing) -> tuple[Sums, Sums]:
    truth, response = Sums.zeros(image, text), Sums.zeros(image, text)
    largest = 0.0
    for part, products, positives, hidden in _chunks(image, text, pairing):
        logits = scale * products + bias
        largest = max(largest, logits.abs().max().item())
        signs = 2 * positives.to(logits.dtype) - 1
        truth.loss -= F.logsigmoid(signs * logits).masked_fill(hidden, 0).sum() / len(image)
        weight = torch.sigmoid(-signs * logits).masked_fill(hidden, 0) / len(image)
        _accumulate(truth, part, -signs * weight, products, image, text, scale)
        _accumulate(response, part, weight, products.abs(), image.abs(), text.abs(), scale)
    response.loss += response.logit_bias
    for value in (response.loss, *response.gradients().values()):
        value *= 2 * ulp(torch.float32, largest)
    return truth, response


@dataclass
class _Side:
    """Of each image or text: how many positives, their mean logit, and less that the log-sum-exp of the others and of
    the positives, of which a small loss is made."""

    counts: Tensor
    own: Tensor
    others: Tensor
    positives: Tensor
    share: Tensor | None = None  # of each, in the loss
    spread: Tensor | None = None  # what the smoothing takes off a row of dS

    def losses(self) -> Tensor:
        return torch.logaddexp(self.others, self.positives).where(self.counts > 0, 0)

    def at(self, part: slice) -> _Side:
        return _Side(*(x[part, None] for x in vars(self).values()))

    def transposed(self) -> _Side:
        return _Side(*(x[None, :] for x in vars(self).values()))

    def slopes(self, logits: Tensor, positives: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """This direction's part of dS, and how much of it moves with the logits."""
        shares = (logits - self.own - torch.logaddexp(self.others, self.positives)).exp()
        missed = (self.others - self.positives).sigmoid()
        single, target = self.counts == 1, 1 / self.counts.clamp(min=1)
        error = torch.where(positives, torch.where(single, -missed, shares - target), shares)
        moved = torch.where(positives & single, missed, shares)
        return self.share * (error + smoothing * target * positives) - self.spread, self.share * moved


def _logits_by_side(image: Tensor, text: Tensor, scale: float, pairing: Pairing) -> tuple[_Side, _Side, float]:
    """Of images and of texts; and the largest |logit|."""
    rows, largest = [], 0.0
    counts, own = text.new_zeros(len(text)), text.new_zeros(len(text))
    others, of_positives = (torch.full_like(own, -torch.inf) for _ in range(2))
    for _, products, positives, hidden in _chunks(image, text, pairing):
        logits = scale * products
        largest = max(largest, logits.abs().max().item())
        kept = logits.masked_fill(~positives, -torch.inf), logits.masked_fill(positives | hidden, -torch.inf)
        sums = logits.masked_fill(~positives, 0)
        rows.append((positives.sum(1).to(own.dtype), sums.sum(1), *(x.logsumexp(1) for x in kept)))
        counts, own = counts + positives.sum(0), own + sums.sum(0)
        of_positives = torch.logaddexp(of_positives, kept[0].logsumexp(0))
        others = torch.logaddexp(others, kept[1].logsumexp(0))
    found = [torch.cat(x) for x in zip(*rows, strict=True)], [counts, own, of_positives, others]
    sides = []
    for counts, own, of_positives, others in found:
        mean = own / counts.clamp(min=1)
        sides.append(_Side(counts, mean, others - mean, of_positives - mean))
    return *sides, largest


def _chunks(image: Tensor, text: Tensor, pairing: Pairing) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows, and of them the products, which are positives, and which count nowhere."""
    step = max(1, CHUNK_ELEMENTS // len(text))
    for first in range(0, len(image), step):
        part = slice(first, min(first + step, len(image)))
        of_part = pairing.rows(part.start, part.stop)
        shape = part.stop - part.start, len(text)
        positives, hidden = of_part.positives(*shape, text.device), of_part.hidden(*shape, text.device)
        hidden = torch.zeros_like(positives) if hidden is None else hidden
        yield part, image[part] @ text.T, positives, hidden


def _accumulate(
    sums: Sums, rows: slice, d_logits: Tensor, products: Tensor, image: Tensor, text: Tensor, scale: float
) -> None:
    sums.image_features[rows] += scale * (d_logits @ text)
    sums.text_features += scale * (d_logits.T @ image[rows])
    sums.logit_scale += (d_logits * products).sum()
    sums.logit_bias += d_logits.sum()
