"""What trainers take: packs as a dataset, and a model whose loss weighs packs by their tokens. Imports torch only."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from .._warnings import warn


class PackedDataset(Dataset):
    """Packs, each a list of its documents, for whatever takes a map-style dataset of torch.

    Item k is `[data[number] for number in packs[k]]`, which `Collator` makes a batch of: in a DataLoader with
    `batch_size=1, collate_fn=collator`, in a Trainer with `per_device_train_batch_size=1, data_collator=collator`.
    Documents are read when their pack is asked for, in a DataLoader's workers where it has any.

    Args:
        data: documents by number, `data[number]`: a list, or a dataset that reads a file and runs the processor.
        packs: lists of documents' numbers, as `plan` and `shard` give them.

    Raises:
        TypeError: data has no items, or a pack is not made of whole numbers.
        ValueError: there are no packs, a pack is empty, or it holds a number that is none of data.
    """

    def __init__(self, data: Any, packs: Sequence[Sequence[int]]) -> None:
        if not hasattr(data, "__getitem__"):
            raise TypeError(
                f"PackedDataset: data is of type {type(data).__name__}; it must give documents by data[number]"
            )
        if not len(packs):
            raise ValueError("PackedDataset: there are no packs")
        count = len(data) if hasattr(data, "__len__") else None
        self.data, self.packs = data, [_numbers(at, pack, count) for at, pack in enumerate(packs)]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, at: int) -> list[Any]:
        """The documents of pack `at`. IndexError: there is no such pack."""
        return [self.data[number] for number in self.packs[at]]


def _numbers(at: int, pack: Sequence[int], count: int | None) -> list[int]:
    try:
        numbers = [index(number) for number in pack]
    except TypeError:
        raise TypeError(f"PackedDataset: pack {at} is {pack!r}; it must be a list of documents' numbers") from None
    if not numbers:
        raise ValueError(f"PackedDataset: pack {at} is empty")
    wrong = next((x for x in numbers if x < 0 or (count is not None and x >= count)), None)
    if wrong is not None:
        of = "data counts from 0" if count is None else f"data has {count}, from 0 to {count - 1}"
        raise ValueError(f"PackedDataset: pack {at} holds document {wrong}; {of}")
    return numbers


def weighed_by_tokens(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's, with `accepts_loss_kwargs = True` where its loss is one that does.

    Classes with `accepts_loss_kwargs = False` (Qwen2.5-VL, Qwen3-VL, Gemma 4, ...) make transformers' Trainer average
    the mean losses of what a step accumulates, and of its ranks. Packs hold unequal numbers of tokens, so that tokens
    would count unequally. The attribute is set on this one model, which is where Trainer looks, and a warning says so,
    or that its loss cannot be weighed.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    if getattr(model, "accepts_loss_kwargs", True):
        return model
    name = f"{type(model).__name__} says accepts_loss_kwargs = False"
    if _divides_by_count(inspect.unwrap(type(model).forward)):
        model.accepts_loss_kwargs = True
        warn(
            f"Collator: {name}: transformers' Trainer would average the mean losses of packs, though these hold "
            "unequal numbers of tokens. It is set to True on this model, whose loss divides by num_items_in_batch; set "
            "it yourself, before, to hear nothing of it"
        )
    else:
        warn(
            f"Collator: {name}, and its loss does not divide by num_items_in_batch: transformers' Trainer averages the "
            "mean losses of packs, though these hold unequal numbers of tokens. Take a newer transformers, or give "
            "Trainer a compute_loss_func"
        )
    return model


def _divides_by_count(forward: Callable) -> bool:
    """Whether the forward hands keywords that it does not know on to transformers' loss."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    losses = [call for call in calls if ast.unparse(call.func) == "self.loss_function"]
    return bool(losses) and all(any(keyword.arg is None for keyword in call.keywords) for call in losses)
