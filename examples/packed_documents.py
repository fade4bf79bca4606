"""Documents of text and pictures through a small decoder, padded and packed, from the same weights.

    python examples/packed_documents.py                  # 16 documents, a minute or two on a laptop
    python examples/packed_documents.py --documents 32

Captions alternate with crops of real pictures, each of its own size; the text is causal, and the patches of a picture
see each other both ways. The padded model does what is usual: a convolution for each picture, every document padded to
the longest, SDPA with a dense mask. The packed one puts the documents back to back and tells `mmkernels.span_attention`
the row spans; its patches are embedded from bytes, all in one call of `mmkernels.patch_embed`. Printed are the largest
difference between their outputs, their losses over some steps of training, and what both take in time and memory.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import mmkernels
from mmkernels.bench.measure import with_peak_memory

PATCH, WIDTH, HEADS, LAYERS, LONGEST = 16, 256, 4, 4, 2048
MEAN, STD = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])
SUBJECTS = ["a temple roof in china", "an orange flower"]  # scikit-learn's two sample pictures
PLACES = ["top", "upper", "middle", "lower", "bottom"], ["left", "centre", "right"]
VOCABULARY = sorted({"<start>", "<picture>", "the", "of", ".", *PLACES[0], *PLACES[1], *" ".join(SUBJECTS).split()})
WORD = {word: number for number, word in enumerate(VOCABULARY)}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # (..., T, H, D) each


@dataclass(frozen=True)
class Documents:
    """Documents back to back: words, the pictures whose patches stand between them, and where those stand."""

    words: Tensor  # (T,), <picture> for a patch
    image_id: Tensor  # (T,), -1 for a word, else the number of the picture
    lengths: list[int]
    pictures: list[Tensor]  # (H, W, 3) uint8, in the order of the text

    @property
    def predicts(self) -> Tensor:
        """The tokens after which a word comes in the same document."""
        inside = torch.ones_like(self.words, dtype=torch.bool)
        inside[torch.tensor(self.lengths).cumsum(0) - 1] = False
        return inside & (self.image_id.roll(-1) < 0)


def make_documents(count: int, seed: int) -> Documents:
    chance, pictures = random.Random(seed), [torch.from_numpy(x.copy()) for x in load_sample_images().images]
    words, image_id, lengths, crops = [], [], [], []
    for _ in range(count):
        start = len(words)
        words.append(WORD["<start>"])
        for _ in range(chance.randint(0, 4)):
            crop, caption = crop_and_caption(pictures, chance)
            patches = crop.shape[0] * crop.shape[1] // PATCH**2
            words += [WORD["<picture>"]] * patches + caption
            image_id += [-1] * (len(words) - len(image_id) - patches - len(caption))
            image_id += [len(crops)] * patches
            crops.append(crop)
        for _ in range(chance.randint(1, 4)):  # text without a picture
            words += crop_and_caption(pictures, chance)[1]
        image_id += [-1] * (len(words) - len(image_id))
        lengths.append(len(words) - start)
    return Documents(torch.tensor(words), torch.tensor(image_id), lengths, crops)


def crop_and_caption(pictures: list[Tensor], chance: random.Random) -> tuple[Tensor, list[int]]:
    """Some part of a picture, and words for what it shows and where that was."""
    which = chance.randrange(len(pictures))
    sides = [PATCH * chance.randint(4, 16) for _ in range(2)]
    rooms = [room - side for room, side in zip(pictures[which].shape, sides, strict=False)]
    top, left = (chance.randint(0, room) for room in rooms)
    names = [name[at * len(name) // (room + 1)] for name, at, room in zip(PLACES, (top, left), rooms, strict=True)]
    caption = f"the {names[0]} {names[1]} of {SUBJECTS[which]} ."
    return pictures[which][top : top + sides[0], left : left + sides[1]], [WORD[word] for word in caption.split()]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)  # slices, nothing is copied
        x = x + self.out(attend(q, k, v).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Knows nothing of documents: how tokens find each other is `attend`'s business."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.word, self.position = nn.Embedding(len(VOCABULARY), WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(VOCABULARY)))

    def forward(self, words: Tensor, patches: Tensor, position: Tensor, attend: Attend) -> Tensor:
        """words, position: (..., T); patches: those of all pictures in order. -> the last layer's tokens."""
        is_patch = (words == WORD["<picture>"])[..., None]
        x = self.word(words).masked_scatter(is_patch, patches) + self.position(position)
        for layer in self.layers:
            x = layer(x, attend)
        return x


def padded(model: Decoder, documents: Documents) -> Tensor:
    """Logits of the tokens after which a word comes."""

    def batch(x: Tensor, filler: int) -> Tensor:
        return pad_sequence(x.split(documents.lengths), batch_first=True, padding_value=filler)

    pictures = [
        (picture.permute(2, 0, 1) / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1) for picture in documents.pictures
    ]
    patches = torch.cat([model.patch(picture[None])[0].flatten(1).T for picture in pictures])
    words, image_id = batch(documents.words, WORD["."]), batch(documents.image_id, -1)
    position = torch.arange(words.shape[1])
    mask = position <= position[:, None]
    mask = mask | ((image_id[:, None] == image_id[..., None]) & (image_id >= 0)[:, None])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None])
        return out.transpose(1, 2)

    return model.head(model(words, patches, position, attend)[batch(documents.predicts, False)])


def packed(model: Decoder, documents: Documents) -> Tensor:
    cu_seqlens = torch.tensor([0, *itertools.accumulate(documents.lengths)])
    spans = mmkernels.RowSpans.image_text(cu_seqlens, documents.image_id)
    position = torch.cat([torch.arange(length) for length in documents.lengths])
    rows = torch.cat([cut(picture) for picture in documents.pictures])
    patches = mmkernels.patch_embed(rows, model.patch.weight, model.patch.bias, mean=MEAN, std=STD, layout="hwc")
    x = model(documents.words, patches, position, lambda q, k, v: mmkernels.span_attention(q, k, v, spans))
    return model.head(x[documents.predicts])


def cut(picture: Tensor) -> Tensor:
    """(H, W, 3) -> a row of bytes a patch."""
    height, width, _ = picture.shape
    patches = picture.reshape(height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(1, 2)
    return patches.reshape(-1, PATCH * PATCH * 3)


def train(model: Decoder, forward: Callable, documents: Documents, steps: int, name: str) -> Iterator[float]:
    """The loss of every step, each before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    targets = documents.words.roll(-1)[documents.predicts]
    for _ in track(range(steps), f"{name:<7}"):
        loss = F.cross_entropy(forward(model, documents), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def timed(results: Iterator[float]) -> tuple[list[float], float]:
    """All of them, and the median of the seconds that each took."""
    values, seconds, start = [], [], time.perf_counter()
    for value in results:
        values.append(value)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return values, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="of training, at least 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    console, documents = Console(), make_documents(args.documents, args.seed)
    total, longest = sum(documents.lengths), max(documents.lengths)
    console.print(
        f"{args.documents} documents of {min(documents.lengths)} to {longest} tokens with {len(documents.pictures)} "
        f"pictures: {total} tokens packed, {args.documents * longest} padded"
    )
    outputs, losses = {}, {}
    table = Table("", "forward", "peak memory", "step of training", "peak memory")
    for name, forward in (("padded", padded), ("packed", packed)):
        torch.manual_seed(args.seed)
        model = Decoder()
        with torch.no_grad():
            outputs[name], peak = with_peak_memory(lambda m=model, f=forward: f(m, documents), "cpu")
            _, seconds = timed(forward(model, documents).sum().item() for _ in range(3))
        (losses[name], step_seconds), step_peak = with_peak_memory(
            lambda m=model, f=forward, n=name: timed(train(m, f, documents, args.steps, n)), "cpu"
        )
        table.add_row(name, *figures(seconds, peak), *figures(step_seconds, step_peak))
    console.print(table)
    difference = (outputs["padded"] - outputs["packed"]).abs().max().item()
    console.print(
        f"largest difference between the outputs: {difference:.1e}, the largest is {outputs['padded'].abs().max():.1f}"
    )
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    console.print(f"losses: {losses['packed'][0]:.4f} to {losses['packed'][-1]:.4f}, at most {apart:.1e} apart")


def figures(seconds: float, peak: int | None) -> tuple[str, str]:
    return f"{seconds * 1e3:.0f} ms", "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
