"""Small models, documents and packs to train with; the snippets of the manual; and what they have to come to."""

import re
from pathlib import Path

import torch
from documents import document, model_of
from torch import Tensor, nn
from torch.nn.functional import pad

from mmkernels.packing import Collator, PackedDataset

MANUAL = Path(__file__).parents[2] / "docs" / "packing.md"
RATE = 0.1  # of plain gradient descent: a gradient that is off shows in the weights as it is

# Of 14 documents, 8 packs with 5 to 60 tokens, the fourth and the seventh without a picture: two steps of 4 packs.
LAYOUTS = [
    [3, "i", 25], [2], [2, "i", 3, "i", 4], [4, "i"], [5], ["i", 6], [1], [2, "i", 30], [9], [6, "i", 1], [2, "i", 2],
    [4], [12, "i", 3], [1, "i", 9],
]  # fmt: skip
PACKS = [[0, 1], [2], [3, 5, 6], [4], [7, 8], [9], [11], [10, 12, 13]]


def documents_for(name: str) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return [document(name, layout, number) for number, layout in enumerate(LAYOUTS)]


def blank_for(name: str) -> dict[str, Tensor]:
    torch.manual_seed(6)
    return document(name, [1, "i"], 0)


def snippet(needle: str) -> str:
    """The one block of code of the manual that holds this."""
    blocks = re.findall(r"^```python\n(.*?)^```", MANUAL.read_text(), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if needle in block)
    return found


def padded(documents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As a batch of several rows."""
    longest = max(x["input_ids"].shape[1] for x in documents)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}
    batch = {}
    for name in dict.fromkeys(name for x in documents for name in x):
        rows = [x[name] for x in documents if name in x]
        if name in fills:
            rows = [pad(x, (0, longest - x.shape[1]), value=fills[name]) for x in rows]
        batch[name] = torch.cat(rows)
    return batch


def plain_losses(name: str, steps: list[list[list[int]]]) -> tuple[list[float], Tensor]:
    """Losses of each step, and the weights after the last, of the plain model on padded batches, one a step."""
    model, documents = model_of(name).train(), documents_for(name)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in steps:
        loss = model(**padded([documents[number] for pack in step for number in pack])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, weights(model)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()])


def losses_of(model: nn.Module) -> list[float]:
    """A list that fills with the losses which the model returns."""
    losses: list[float] = []
    model.register_forward_hook(lambda _, __, out: losses.append(out.loss.item()))
    return losses


def names_for(name: str, model: nn.Module, collator: Collator, packs: list[list[int]]) -> dict[str, object]:
    """What a snippet finds."""
    return {
        "model": model,
        "collator": collator,
        "documents": documents_for(name),
        "packs": packs,
        "PackedDataset": PackedDataset,
        "DataLoader": torch.utils.data.DataLoader,
    }


def arguments(folder: str, **more: object) -> dict[str, object]:
    """Of a TrainingArguments, beside what the snippet says: on a CPU, a step's loss told, nothing saved."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }


class Told:
    """A Trainer that remembers itself, whose losses a snippet throws away."""

    last: object = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        Told.last = self

    @staticmethod
    def losses() -> list[float]:
        return [entry["loss"] for entry in Told.last.state.log_history if "loss" in entry]
