"""What label smoothing takes off each pair alike: sums of features are all it needs. Imports torch only.

With e the smoothing, a and b the shares of rows and columns in the loss, K what it is divided by, dS of each row that
has a positive is e a / M K smaller, that of each such column e b / N K. Therefore, s being the scale,

    loss   less  e s / K (a/M sum of p over such rows + b/N sum of p over such columns)
    dI_i   less  e s / K (a/M sum_j T_j, if image i has a positive, + b/N sum of T_j over texts that have one)
    dT_j   less  e s / K (b/N sum_i I_i, if text j has a positive, + a/M sum of I_i over images that have one)

and the sums of p = I T^T are products of the same sums of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .pairing import Pairing, Shares


@dataclass(frozen=True)
class FeatureSums:
    """(D,) each, float64: over all, and over those that have a positive."""

    images: Tensor
    texts: Tensor
    counted_images: Tensor
    counted_texts: Tensor

    @classmethod
    def of(cls, image: Tensor, text: Tensor, pairing: Pairing) -> FeatureSums:
        all_of_both = [x.sum(0, dtype=torch.float64) for x in (image, text)]
        if not pairing.by_ids and len(image) == len(text) == pairing.last - pairing.first:
            return cls(*all_of_both, *all_of_both)
        if pairing.by_ids:
            counts = pairing.image_counts, pairing.text_counts
            counted = (x.where(count[:, None] > 0, 0) for x, count in zip((image, text), counts, strict=True))
        else:
            counted = image[pairing.own_images], text[pairing.own_texts]
        return cls(*all_of_both, *(x.sum(0, dtype=torch.float64) for x in counted))

    def products(self) -> tuple[Tensor, Tensor]:
        """The sums of p over the rows, and over the columns, that have a positive."""
        return self.counted_images @ self.texts, self.images @ self.counted_texts

    def take_off(
        self,
        scale: Tensor,
        shares: Shares,
        label_smoothing: float,
        sizes: tuple[int, int],
        counted: tuple[slice | Tensor, slice | Tensor],
        d_image: Tensor,
        d_text: Tensor,
    ) -> Tensor:
        """From the gradients of both features, in place; returns what that of the scale is less by, float64.

        sizes: N and M. counted: of the rows of d_image and of d_text those that have a positive, a mask or a slice.
        """
        of_row, of_column = _of_each(shares, label_smoothing, *sizes)
        scale = scale.detach().to(torch.float64).reshape(())
        _take_off(d_image, scale * of_row * self.texts, counted[0])
        _take_off(d_text, scale * of_column * self.images, counted[1])
        d_image -= (scale * of_column * self.counted_texts).to(d_image.dtype)
        d_text -= (scale * of_row * self.counted_images).to(d_text.dtype)
        by_rows, by_columns = self.products()
        return of_row * by_rows + of_column * by_columns

    def loss(self, scale: Tensor, shares: Shares, label_smoothing: float, num_images: int, num_texts: int) -> Tensor:
        """What the loss is less by, float64."""
        of_row, of_column = _of_each(shares, label_smoothing, num_images, num_texts)
        by_rows, by_columns = self.products()
        return scale.detach().to(torch.float64).reshape(()) * (of_row * by_rows + of_column * by_columns)


def _of_each(shares: Shares, label_smoothing: float, num_images: int, num_texts: int):
    """What dS of each row that has a positive is less by, and of each such column."""
    factor = label_smoothing / shares.count
    return factor * shares.row / num_texts, factor * shares.column / num_images


def _take_off(gradient: Tensor, row: Tensor, counted: slice | Tensor) -> None:
    row = row.to(gradient.dtype)
    if isinstance(counted, slice):
        gradient[counted] -= row
    else:
        gradient -= row * counted[:, None]
