"""What a call of patch_embed reads, adds and writes: a record each, for all backends. Only op.py makes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .geometry import PatchGeometry


class Patches(NamedTuple):
    """The two sides of the product: the patches of the images, normalised where there is a mean, and the weight."""

    images: Tensor
    weight: Tensor
    mean: Tensor | None  # contiguous
    std: Tensor | None
    geometry: PatchGeometry


class Additions(NamedTuple):
    """What is added to the product. Contiguous, or None."""

    bias: Tensor | None  # (E,)
    positions: Tensor | None  # (N, E) or (prefix + N, E)
    prefix: Tensor | None  # (prefix, E)

    @property
    def num_prefix(self) -> int:
        return 0 if self.prefix is None else self.prefix.shape[0]

    @property
    def num_positions(self) -> int:
        return 0 if self.positions is None else self.positions.shape[0]


class Gradients(NamedTuple):
    """What a backward pass fills, or None."""

    images: Tensor | None  # given as zeros: pixels past the last whole patch
    weight: Tensor | None
    bias: Tensor | None  # (E,)
    geometry: PatchGeometry  # of these images and this weight
