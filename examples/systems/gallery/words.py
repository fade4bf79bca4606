"""A vocabulary of whole words, enough for all that the systems read and write, and the signs between them."""

from __future__ import annotations

import torch
from torch import Tensor

from .digits import NAMES

SIGNS = ("<pad>", "<bos>", "<image>", "<eos>", "<break>", "<image end>", "<thumbnail>",
         *(f"<tile {i}>" for i in range(1, 7)))  # fmt: skip
PAD, BOS, IMAGE, EOS, BREAK, IMAGE_END, THUMBNAIL = range(7)
TILES = range(7, 13)  # of tile 1 to 6
_OTHERS = "a handwritten picture of which digit is left right larger the yes no and then how many"
WORDS = (*NAMES, *_OTHERS.split())
SIZE = 64  # of the vocabulary, with room for a system's own signs from FREE on
FREE = len(SIGNS) + len(WORDS)
IGNORED = -100  # a label that is not learned

_NUMBER = {word: number for number, word in enumerate((*SIGNS, *WORDS))}


def encode(text: str) -> list[int]:
    return [_NUMBER[word] for word in text.split()]


def decode(numbers: list[int]) -> str:
    return " ".join((*SIGNS, *WORDS)[number] for number in numbers if number >= len(SIGNS))


def batch(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Tensor]:
    """What a language model is trained on: each prompt and its answer, padded on the right to the longest. Only the
    answers and the end are learned."""
    rows = [prompt + answer + [EOS] for prompt, answer in zip(prompts, answers, strict=True)]
    labels = [[IGNORED] * len(prompt) + row[len(prompt) :] for prompt, row in zip(prompts, rows, strict=True)]
    length = max(map(len, rows))

    def padded(lists: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in lists])

    mask = padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": padded(rows, PAD), "attention_mask": mask, "labels": padded(labels, IGNORED)}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Of the first word of each answer: (B, T, vocabulary), (B, T) as `batch` made them."""
    first = (labels != IGNORED).int().argmax(1)
    rows = torch.arange(len(labels))
    return (logits[rows, first - 1].argmax(-1) == labels[rows, first]).float().mean().item()
