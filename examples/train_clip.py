"""Train a transformers CLIPModel on crops of real pictures, plain and with mmkernels, from the same seed.

    python examples/train_clip.py                    # a small model, a minute or two on a laptop
    python examples/train_clip.py --size vit-b-32    # the sizes of openai/clip-vit-base-patch32, random weights

The plain run computes the loss as transformers does, with its N x N logits. The other run swaps two things: the patch
convolution for `mmkernels.nn.PatchConv2d`, on the same parameters, and the loss for `mmkernels.nn.ClipLoss`. Printed
are both loss curves, their largest difference, the time of a step and the peak memory.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_sample_images
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from mmkernels.bench.measure import with_peak_memory
from mmkernels.nn import ClipLoss, PatchConv2d

SIZES = {
    "small": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vision": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
        "patch": {"image_size": 64, "patch_size": 16},
        "projection_dim": 64,
    },
    "vit-b-32": {"text": {}, "vision": {}, "patch": {"image_size": 224, "patch_size": 32}, "projection_dim": 512},
}
WORDS = ["top", "upper", "middle", "lower", "bottom", "left", "centre", "right", "wide", "close"]
SUBJECTS = ["a temple roof in china", "an orange flower"]  # scikit-learn's two sample pictures
SPECIAL_TOKENS = {"bos_token_id": 254, "eos_token_id": 255, "pad_token_id": 255}
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([0.4815, 0.4578, 0.4082], [0.2686, 0.2613, 0.2758]))


def make_model(size: str, seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    sizes = SIZES[size]
    config = CLIPConfig(
        text_config={**sizes["text"], "vocab_size": 256, "max_position_embeddings": 64, **SPECIAL_TOKENS},
        vision_config={**sizes["vision"], **sizes["patch"]},
        projection_dim=sizes["projection_dim"],
    )
    return CLIPModel(config)


def with_mmkernels(model: CLIPModel) -> CLIPModel:
    embeddings = model.vision_model.embeddings
    embeddings.patch_embedding = PatchConv2d.from_conv(embeddings.patch_embedding)
    return model


def caption(subject: str, row: float, column: float, zoom: int) -> str:
    """What is on a crop, and where in the picture it was cut."""
    vertical = WORDS[min(int(row * 5), 4)]
    horizontal = WORDS[5 + min(int(column * 3), 2)]
    return f"{subject}, {vertical} {horizontal}, {'wide' if zoom < 2 else 'close'}"


def tokenize(texts: list[str]) -> torch.Tensor:
    """Bytes as tokens, 255 as the end: enough to tell the captions apart, and nothing to download."""
    encoded = [torch.tensor([*text.encode()[:63], 255]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=255)


def picture_pyramids(image_size: int) -> list[list[torch.Tensor]]:
    """Each sample picture at four sizes, so that crops of `image_size` show from all of it to a detail."""
    pyramids = []
    for picture in load_sample_images().images:
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
        shorter = min(pixels.shape[2:])
        sizes = [image_size + level * max(shorter - image_size, 0) // 3 for level in range(4)]
        scales = [size / shorter for size in sizes]
        levels = [F.interpolate(pixels, scale_factor=scale, mode="bilinear", antialias=True)[0] for scale in scales]
        pyramids.append([(level - MEAN) / STD for level in levels])
    return pyramids


def make_batch(pyramids, batch: int, image_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random crops of real pictures, (B, 3, S, S) normalised, and their captions as tokens."""
    images, texts = [], []
    for _ in range(batch):
        which = int(torch.randint(len(pyramids), (), generator=generator))
        zoom = int(torch.randint(4, (), generator=generator))
        row, column = torch.rand(2, generator=generator).tolist()
        picture = pyramids[which][zoom]
        top, left = (int(at * (size - image_size)) for at, size in zip((row, column), picture.shape[1:], strict=True))
        images.append(picture[:, top : top + image_size, left : left + image_size])
        texts.append(caption(SUBJECTS[which], row, column, zoom))
    return torch.stack(images), tokenize(texts)


def plain_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return image_text_contrastive_loss(scale * text @ image.T)


def train(model: CLIPModel, loss_fn, batches, name: str) -> tuple[list[float], float]:
    """The loss after each step, and the median time of a step in seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses, seconds = [], []
    for images, tokens in track(batches, f"{name:<9}"):
        start = time.perf_counter()
        image = F.normalize(model.get_image_features(images).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
        loss = loss_fn(image, text, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, statistics.median(seconds)


def report(console: Console, results: dict[str, tuple[list[float], float, int | None]]) -> None:
    (plain_name, plain), (ours_name, ours) = results.items()
    table = Table("step", plain_name, ours_name, "difference", title="loss")
    steps = len(plain[0])
    for step in sorted({0, *range(0, steps, max(steps // 8, 1)), steps - 1}):
        a, b = plain[0][step], ours[0][step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}")
    console.print(table)
    largest = max(abs(a - b) for a, b in zip(plain[0], ours[0], strict=True))
    console.print(f"largest difference between the curves: {largest:.2e}")
    for name, (_, seconds, peak) in results.items():
        memory = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
        console.print(f"{name:<9}  {seconds * 1e3:8.1f} ms a step, peak memory {memory} above the start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    console = Console()
    generator = torch.Generator().manual_seed(args.seed)
    image_size = SIZES[args.size]["patch"]["image_size"]
    pyramids = picture_pyramids(image_size)
    batches = [make_batch(pyramids, args.batch, image_size, generator) for _ in range(args.steps)]
    runs = {"plain": (lambda model: model, plain_loss), "mmkernels": (with_mmkernels, ClipLoss())}
    results = {}
    for name, (prepare, loss_fn) in runs.items():
        model = prepare(make_model(args.size, args.seed))
        (losses, seconds), peak = with_peak_memory(lambda m=model, f=loss_fn, n=name: train(m, f, batches, n), "cpu")
        results[name] = losses, seconds, peak
    report(console, results)


if __name__ == "__main__":
    main()
