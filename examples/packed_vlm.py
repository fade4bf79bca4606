"""Train a small vision-language model on documents of unlike lengths: padded, as is usual, and packed.

    python examples/packed_vlm.py                     # like LLaVA: every picture is 196 tokens; about a minute
    python examples/packed_vlm.py --model qwen2_vl    # like Qwen2-VL: pictures at their own size; two minutes
    python examples/packed_vlm.py --all               # and two ways in between

A document is up to two pictures and a text, which says what is where in them: crops of scikit-learn's two photographs,
and bytes as tokens. Most texts are short and some are long: their lengths are log-normal, as those of real data are.
"plain" is the model as transformers has it, with its fastest attention on a CPU (sdpa), "ours" is the same one after
`mmkernels.accelerate(model)`. All start from one seed and take the same documents in each step of the optimizer, so
their losses have to agree. Printed are those losses, the tokens trained in a second of CPU time, on one thread, where
padding does not count as a token, and the peak memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import mmkernels
from mmkernels.bench.measure import with_peak_memory
from mmkernels.packing import Collator, Limits, plan

Document = dict[str, Tensor]

ROOM = 4096  # tokens of a pack
BATCH = 8  # documents of a padded batch: the default of transformers' Trainer
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]))

# ---- two small models with random weights. Bytes are tokens 0 to 255, and a few more have a meaning.

START, PICTURE, PICTURE_START, PICTURE_END, VOCABULARY = 256, 257, 258, 259, 260
TEXT = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "bos_token_id": START,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def llava() -> PreTrainedModel:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2,
        "num_attention_heads": 3, "image_size": 224, "patch_size": 16,
    }  # fmt: skip
    text = TEXT | {"model_type": "llama"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=PICTURE, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 192, "hidden_size": 256, "num_heads": 3, "patch_size": 14}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}}
    marks = {"vision_start_token_id": PICTURE_START, "vision_end_token_id": PICTURE_END}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=PICTURE, **marks)
    return Qwen2VLForConditionalGeneration(config)


# ---- documents, as the models' processors would give them


def square(crop: Tensor) -> tuple[int, Document]:
    """For LLaVA: (3, H, W) -> its tokens, and pixels of one size."""
    return 196, {"pixel_values": F.interpolate(crop[None], (224, 224), mode="bilinear", antialias=True)}


def native(crop: Tensor) -> tuple[int, Document]:
    """For Qwen2-VL: a row for each patch of 14 x 14 pixels and 2 equal frames, of which squares of 4 are a token."""
    height, width = (side // 28 for side in crop.shape[1:])
    crop = crop[:, : 28 * height, : 28 * width].expand(2, -1, -1, -1)
    rows = crop.reshape(2, 3, height, 2, 14, width, 2, 14).permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, 1176)
    return height * width, {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width]])}


MODELS = {"llava": (llava, square), "qwen2_vl": (qwen2_vl, native)}
SUBJECTS = "a temple in china", "an orange flower"  # scikit-learn's two photographs
ROWS, COLUMNS = ("top", "upper part", "middle", "lower part", "bottom"), ("left", "centre", "right")
COLOURS = {
    "black": (0, 0, 0), "grey": (128, 128, 128), "white": (255, 255, 255), "red": (180, 40, 40),
    "orange": (230, 130, 40), "yellow": (220, 210, 80), "green": (60, 110, 50), "blue": (80, 120, 180),
    "brown": (110, 75, 45),
}  # fmt: skip


def make_document(chance: random.Random, to_tokens: Callable[[Tensor], tuple[int, Document]]) -> Document:
    """With none to two pictures, and text of log-normal length: half of the texts have less than 200 bytes."""
    which = chance.randrange(len(SUBJECTS))
    photograph = torch.from_numpy(load_sample_images().images[which].copy()).permute(2, 0, 1)
    ids, pictures, crop = [START], [], photograph
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        crop = cut(photograph, chance)
        count, tensors = to_tokens((crop / 255 - MEAN) / STD)
        ids += [PICTURE_START, *[PICTURE] * count, PICTURE_END]
        pictures.append(tensors)
    length = max(8, min(3000, int(chance.lognormvariate(5.3, 0.9))))
    ids += description(SUBJECTS[which], crop, length, chance).encode()
    tokens = torch.tensor([ids])
    document = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    document["labels"] = tokens.masked_fill(tokens == PICTURE, -100)
    if to_tokens is native:
        document["mm_token_type_ids"] = (tokens == PICTURE).int()
    for name in pictures[0] if pictures else ():
        document[name] = torch.cat([each[name] for each in pictures])
    return document


def cut(photograph: Tensor, chance: random.Random) -> Tensor:
    """A part of it, its sides log-normal as far as there is room."""
    side, shape = chance.lognormvariate(6.4, 0.5), chance.lognormvariate(0, 0.3)
    sizes = side * shape, side / shape
    sides = [min(room, max(112, int(x))) for room, x in zip(photograph.shape[1:], sizes, strict=True)]
    top, left = (chance.randint(0, room - x) for room, x in zip(photograph.shape[1:], sides, strict=True))
    return photograph[:, top : top + sides[0], left : left + sides[1]]


def description(subject: str, crop: Tensor, length: int, chance: random.Random) -> str:
    """Sentences on the colours of its parts, as many as the length needs."""
    means = F.adaptive_avg_pool2d(crop.float(), (len(ROWS), len(COLUMNS)))
    nearest = torch.cdist(means.flatten(1).T, torch.tensor([*COLOURS.values()]).float()).argmin(1)
    text = f"{subject}."
    while len(text) < length:
        place = chance.randrange(len(nearest))
        row, column = ROWS[place // len(COLUMNS)], COLUMNS[place % len(COLUMNS)]
        text += f" the {row} {column} is {[*COLOURS][nearest[place]]}."
    return text[:length]


def padded(documents: list[Document]) -> Document:
    """As a processor pads a batch: to the longest, pictures end to end."""
    longest = max(document["input_ids"].shape[1] for document in documents)
    batch = {}
    for name in dict.fromkeys(name for document in documents for name in document):
        parts = [document[name] for document in documents if name in document]
        if name in ("input_ids", "attention_mask", "labels", "mm_token_type_ids"):
            filler = -100 if name == "labels" else 0
            parts = [F.pad(x, (0, longest - x.shape[1]), value=filler) for x in parts]
        batch[name] = torch.cat(parts)
    return batch


# ---- training


@dataclass
class Way:
    """A model with its optimizer, how documents become its batches, and what was measured."""

    name: str
    model: PreTrainedModel
    batches: Callable[[list[Document]], list[Document]]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0  # computed, padding included
    peak: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)

    def step(self, documents: list[Document]) -> None:
        """Of the optimizer. The loss is the mean over the tokens of all documents, however they are batched."""
        predicted = sum(int((document["labels"][:, 1:] != -100).sum()) for document in documents)
        loss, start = 0.0, time.process_time()
        for batch in self.batches(documents):
            out = self.model(**batch, num_items_in_batch=predicted, use_cache=False)
            out.loss.backward()
            loss += out.loss.item()
            self.tokens += batch["input_ids"].numel()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds += time.process_time() - start
        self.losses.append(loss)


def ways_to_train(name: str, seed: int, in_between: bool) -> list[Way]:
    def model(*, ours: bool) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = MODELS[name][0]()
        if ours:
            mmkernels.accelerate(model, verbose=False)
        return model

    packer = model(ours=True)
    collator = Collator.of(packer)

    def as_they_come(documents: list[Document]) -> list[Document]:
        return [padded(documents[at : at + BATCH]) for at in range(0, len(documents), BATCH)]

    def by_length(documents: list[Document]) -> list[Document]:
        return as_they_come(sorted(documents, key=tokens_of))

    def packed(documents: list[Document]) -> list[Document]:
        packs = plan([tokens_of(document) for document in documents], Limits(ROOM))
        return [collator([documents[number] for number in pack]) for pack in packs]

    between = [
        Way("sorted plain", model(ours=False), by_length),
        Way("padded ours", model(ours=True), as_they_come),
    ]
    return [
        Way("padded plain", model(ours=False), as_they_come),
        *(between if in_between else []),
        Way("packed ours", packer, packed),
    ]


def tokens_of(document: Document) -> int:
    return document["input_ids"].shape[1]


def train(ways: list[Way], steps: list[list[Document]], console: Console) -> None:
    """Way by way in each step, so that all of them meet the same hours of the machine."""
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=len(steps) * len(ways))
        for number, documents in enumerate(steps):
            for way in ways:
                _, peak = with_peak_memory(lambda way=way, documents=documents: way.step(documents), "cpu")
                way.peak = max(way.peak, peak or 0)
                progress.advance(task)
            losses = ", ".join(f"{way.name} {way.losses[-1]:.6f}" for way in ways)
            console.print(f"step {number + 1}, loss: {losses}")


def report(ways: list[Way], real: int, console: Console) -> None:
    table = Table("", "tokens a\nCPU second", "times", "CPU\nseconds", "peak\nmemory", "not\npadding")
    for way in ways:
        times = ways[0].seconds / way.seconds
        memory = f"{way.peak / 2**20:.0f} MiB" if way.peak else "unknown"
        share = f"{real / way.tokens:.0%}"
        table.add_row(way.name, f"{real / way.seconds:.0f}", f"{times:.2f}", f"{way.seconds:.1f}", memory, share)
    console.print(table)
    apart = max(abs(a / b - 1) for way in ways for a, b in zip(way.losses, ways[0].losses, strict=True))
    console.print(f"losses: at most {apart:.1e} apart, relative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llava")
    parser.add_argument("--steps", type=int, default=4, help="of the optimizer")
    parser.add_argument("--documents", type=int, default=16, help="in each step")
    parser.add_argument("--all", action="store_true", help="also padded batches sorted by length, and accelerated ones")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)  # waiting threads would count as CPU time
    console, chance = Console(), random.Random(args.seed)
    to_tokens = MODELS[args.model][1]
    steps = [[make_document(chance, to_tokens) for _ in range(args.documents)] for _ in range(args.steps)]
    lengths = [tokens_of(document) for documents in steps for document in documents]
    console.print(
        f"{args.steps} steps of {args.documents} documents, {min(lengths)} to {max(lengths)} tokens, median "
        f"{statistics.median(lengths):.0f}; {BATCH} a padded batch, packs of {ROOM} tokens"
    )
    ways = ways_to_train(args.model, args.seed, args.all)
    train(ways, steps, console)
    report(ways, sum(lengths), console)


if __name__ == "__main__":
    main()
