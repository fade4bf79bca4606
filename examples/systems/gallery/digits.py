"""Pictures to learn from that come with scikit-learn: 1,797 handwritten digits of 8 x 8 pixels, a fourth of them held
out, and captions and questions about them."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Digits:
    pictures: Tensor  # (N, 8, 8), in [0, 1]
    labels: Tensor  # (N,)

    def draw(self, count: int, generator: Generator) -> Digits:
        chosen = torch.randint(len(self.labels), (count,), generator=generator)
        return Digits(self.pictures[chosen], self.labels[chosen])


@functools.cache
def digits(held_out: bool = False) -> Digits:
    """Every fourth digit is held out; no picture is in both."""
    found = load_digits()
    place = torch.arange(len(found.target))
    own = (place % 4 == 3) == held_out
    return Digits(torch.tensor(found.images / 16, dtype=torch.float32)[own], torch.tensor(found.target)[own])


def enlarged(pictures: Tensor, size: int = 32) -> Tensor:
    """(N, 8, 8) in [0, 1] -> (N, 3, size, size) in [-1, 1]."""
    grown = F.interpolate(pictures[:, None], (size, size), mode="bilinear", align_corners=False)
    return (2 * grown - 1).expand(-1, 3, -1, -1).contiguous()


def side_by_side(pictures: Tensor, size: int = 32) -> Tensor:
    """(N, k, 8, 8) in [0, 1] -> (N, 3, size, k * size) in [-1, 1]."""
    return enlarged(pictures.flatten(0, 1), size).unflatten(0, pictures.shape[:2]).transpose(1, 2).permute(
        0, 1, 3, 2, 4).flatten(3)  # fmt: skip


def captions(labels: Tensor) -> list[str]:
    return [f"a handwritten {NAMES[label]}" for label in labels.tolist()]


@dataclass(frozen=True)
class Questions:
    """Of two digits each, the left and the right one of a picture."""

    pictures: Tensor  # (N, 2, 8, 8), in [0, 1]
    labels: Tensor  # (N, 2)
    questions: list[str]
    answers: list[str]


# question -> its answer for the digits that are left and right
_KINDS = {
    "which digit is left": lambda left, right: NAMES[left],
    "which digit is right": lambda left, right: NAMES[right],
    "which digit is larger": lambda left, right: NAMES[max(left, right)],
    "is the left digit larger": lambda left, right: "yes" if left > right else "no",
}


def draw_questions(of: Digits, count: int, generator: Generator) -> Questions:
    """`count` pairs of digits, and a question about each."""
    drawn = of.draw(2 * count, generator)
    labels = drawn.labels.unflatten(0, (count, 2))
    kinds = [[*_KINDS][i] for i in torch.randint(len(_KINDS), (count,), generator=generator).tolist()]
    answers = [_KINDS[kind](*pair) for kind, pair in zip(kinds, labels.tolist(), strict=True)]
    return Questions(drawn.pictures.unflatten(0, (count, 2)), labels, kinds, answers)


def held_out_questions(count: int = 400) -> Questions:
    return draw_questions(digits(held_out=True), count, torch.Generator().manual_seed(0))


def blind_accuracy(asked: Questions) -> float:
    """Of who sees no picture, and gives to each question the answer that is right most often."""
    pairs = list(zip(asked.questions, asked.answers, strict=True))
    best = {kind: Counter(answer for each, answer in pairs if each == kind).most_common(1)[0][1] for kind in _KINDS}
    return sum(best.values()) / len(pairs)
