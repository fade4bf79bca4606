"""Which images and texts belong together, and how much the loss of each counts. Imports torch only.

Three ways to say what belongs together, by the ids of images and texts:

    none             image i and text i, as far as there are both
    "positives"      all that have equal ids, however many
    "ignored"        image i and text i; other pairs of equal ids count nowhere, neither as positives nor as negatives

An image or a text without a positive has no loss of its own: it is a negative of the others (a hard negative, a queue
of earlier texts). The loss of a direction is the mean over those that have one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SAME = ("positives", "ignored")
DIRECTIONS = ("both", "image_to_text", "text_to_image")


@dataclass(frozen=True)
class Pairing:
    """Images i in [first, last) have a text of their own, i + offset. The rest is there with ids only."""

    offset: int
    first: int
    last: int
    same: str | None = None
    image_ids: Tensor | None = None  # (N,), (M,): int32, equal where the ids are, from 0 on
    text_ids: Tensor | None = None
    image_counts: Tensor | None = None  # (N,), (M,): int32, with "positives": how many each has, elsewhere too
    text_counts: Tensor | None = None

    @classmethod
    def of(cls, num_images: int, num_texts: int, image_ids: Tensor | None, text_ids: Tensor | None, same: str):
        """Of all images and all texts; ids of any value, int64."""
        pairs = 0, 0, min(num_images, num_texts)
        if image_ids is None or text_ids is None:
            return cls(*pairs)
        labels, counts = label(image_ids, text_ids)
        counts = counts if same == "positives" else (None, None)
        return cls(*pairs, same, *labels, *counts)

    @property
    def by_ids(self) -> bool:
        return self.same == "positives"

    @property
    def own_images(self) -> slice:
        return slice(self.first, self.last)

    @property
    def own_texts(self) -> slice:
        return slice(self.first + self.offset, self.last + self.offset)

    @property
    def counted(self) -> tuple[slice | Tensor, slice | Tensor]:
        """The images and the texts that have a positive."""
        if not self.by_ids:
            return self.own_images, self.own_texts
        return self.image_counts > 0, self.text_counts > 0

    def chunks(self, num_images: int, num_texts: int, step: int) -> Iterator[tuple[int, int]]:
        """(first, count) of at most `step` images at a time. Either all of a chunk have an own text, or none has one,
        where one without would meet a text at the offset."""
        first, last, offset = self.first, self.last, self.offset
        edges = [0, num_images]
        if not self.by_ids and (first > max(0, -offset) or last < min(num_images, num_texts - offset)):
            edges = [0, first, last, num_images]
        for start, stop in pairwise(edges):
            for image in range(start, stop, step):
                yield image, min(step, stop - image)

    def rows(self, start: int, stop: int) -> Pairing:
        """Of the images from `start` to `stop` alone."""
        part = slice(start, stop)
        ids, counts = (None if x is None else x[part] for x in (self.image_ids, self.image_counts))
        first, last = (min(max(x, start), stop) - start for x in (self.first, self.last))
        offset = self.offset + start
        return Pairing(offset, first, last, self.same, ids, self.text_ids, counts, self.text_counts)

    def positives(self, num_images: int, num_texts: int, device: torch.device) -> Tensor:
        """(N, M) bool."""
        return self._same() if self.by_ids else self._own(num_images, num_texts, device)

    def hidden(self, num_images: int, num_texts: int, device: torch.device) -> Tensor | None:
        """(N, M) bool: the pairs that count nowhere. None: there are none."""
        return self._same() & ~self._own(num_images, num_texts, device) if self.same == "ignored" else None

    def _same(self) -> Tensor:
        return self.image_ids[:, None] == self.text_ids

    def _own(self, num_images: int, num_texts: int, device: torch.device) -> Tensor:
        images, texts = (torch.arange(count, device=device) for count in (num_images, num_texts))
        own = torch.where((images >= self.first) & (images < self.last), images + self.offset, -1)
        return own[:, None] == texts


def label(image_ids: Tensor, text_ids: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((N,), (M,)) labels, equal where the ids are; and of each image how many texts are labelled as it, of each text
    how many images. All int32; nothing waits for the device."""
    ids, order = torch.sort(torch.cat((image_ids, text_ids)))
    steps = torch.zeros_like(ids, dtype=torch.int32)
    steps[1:] = ids[1:] != ids[:-1]
    labels = torch.empty_like(steps).scatter_(0, order, steps.cumsum(0, dtype=torch.int32))
    images, texts = labels.split((len(image_ids), len(text_ids)))
    return (images, texts), (_number_of(texts, images, len(ids)), _number_of(images, texts, len(ids)))


def _number_of(labels: Tensor, at: Tensor, most: int) -> Tensor:
    """How often each of the labels `at` is among `labels`."""
    counts = torch.zeros(most, dtype=torch.int32, device=labels.device)
    return counts.scatter_add_(0, labels.long(), torch.ones_like(labels))[at.long()]


@dataclass(frozen=True)
class Shares:
    """loss = (row sum_i of the images' losses + column sum_j of the texts') / count. Numbers, or tensors of float64
    where only the device knows them; shares are at most 1."""

    row: float | Tensor
    column: float | Tensor
    count: float | Tensor

    @classmethod
    def of(cls, pairing: Pairing, direction: str) -> Shares:
        if not pairing.by_ids:
            return cls.of_counts(pairing.last - pairing.first, pairing.last - pairing.first, direction)
        counted = ((x > 0).sum(dtype=torch.float64).clamp(min=1) for x in (pairing.image_counts, pairing.text_counts))
        return cls.of_counts(*counted, direction)

    @classmethod
    def of_counts(cls, images: int | Tensor, texts: int | Tensor, direction: str) -> Shares:
        """Of so many images and texts that have a positive."""
        if direction == "image_to_text":
            return cls(1.0, 0.0, images)
        if direction == "text_to_image":
            return cls(0.0, 1.0, texts)
        if not isinstance(images, Tensor):
            return cls(0.5, 0.5, images)
        fewer = torch.minimum(images, texts)
        return cls(0.5 * fewer / images, 0.5 * fewer / texts, fewer)
