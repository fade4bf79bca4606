"""Train a CLIP on several processes with gradient accumulation, as open_clip does and with mmkernels, from one seed.

    pip install "mmkernels[examples]" && pip install --no-deps open_clip_torch
    torchrun --nproc-per-node 2 examples/train_clip_distributed.py
    torchrun --nproc-per-node 2 examples/train_clip_distributed.py --wrap fsdp2 --accumulate 4 --batch 64

The towers are those of transformers' CLIPModel, and the plain loss is open_clip's own. Both runs train on the loss over
all pairs of all ranks and all microbatches. Plain is what open_clip's training does with `--accum-freq A`: for each
microbatch the loss over everything, A times, of which only the features of that microbatch have a gradient. The
gradient of `logit_scale` then comes out A times too large, since each of the A losses has all of it; Adam hides that,
clipping of the gradients' norm and other optimizers do not.

The other run is GradCache (https://arxiv.org/abs/2101.06983) over `mmkernels.nn.ClipLoss`: the features of all
microbatches without a graph, one loss on them, then each microbatch once more, fed with its features' gradients. The
loss is computed once, and the scale's gradient is the loss's. Towers that draw random numbers (dropout) have to draw
the same ones both times, in either run; these draw none.

Printed are both loss curves, their largest difference, the gradient of the scale at the first step, the time of a step
and the peak memory of a rank.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from train_clip import SIZES, make_batch, make_model, picture_pyramids, report
from transformers import CLIPModel

import mmkernels.nn
from mmkernels.bench.contrastive import open_clip_losses
from mmkernels.bench.measure import with_peak_memory

IMAGE_SIZE = SIZES["small"]["patch"]["image_size"]
Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S) and tokens (B, L)


class Towers(nn.Module):
    """A CLIPModel that is called as open_clip's: images and tokens in, features and scale out."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip, self.logit_scale = clip, clip.logit_scale

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = F.normalize(self.clip.get_image_features(images).pooler_output, dim=-1)
        text = F.normalize(self.clip.get_text_features(tokens).pooler_output, dim=-1)
        return image, text, self.logit_scale.exp()


# ---- the two ways to wrap


class Replicated:
    """By DDP, which averages all gradients."""

    def __init__(self, model: Towers) -> None:
        self.model, self.scale = DistributedDataParallel(model), model.logit_scale

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients stay on the rank until the last microbatch."""
        return contextlib.nullcontext() if last else self.model.no_sync()


class Sharded:
    """By FSDP2, which averages the gradients of what it shards: all but the scale, a single number."""

    def __init__(self, model: Towers) -> None:
        for tower in (model.clip.vision_model, model.clip.text_model):
            for layer in tower.encoder.layers:
                fully_shard(layer)
        self.model, self.scale = fully_shard(model, ignored_params={model.logit_scale}), model.logit_scale

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


WRAPS = {"ddp": Replicated, "fsdp2": Sharded}

# ---- the two steps: gradients of the loss over all microbatches of all ranks


def plain_step(wrapped: Replicated | Sharded, loss_fn: nn.Module, batches: list[Batch]) -> Tensor:
    """As open_clip's training accumulates. Returns this rank's value."""
    with torch.no_grad():
        cached = [wrapped.model(*batch)[:2] for batch in batches]
    for k, batch in enumerate(batches):
        with wrapped.accumulating(k == len(batches) - 1):
            *features, scale = wrapped.model(*batch)
            now = [*cached[:k], features, *cached[k + 1 :]]
            image, text = (torch.cat(parts) for parts in zip(*now, strict=True))
            loss = loss_fn(image, text, scale)
            loss.backward()
    if isinstance(wrapped, Sharded):  # open_clip's is a part of it on each rank
        dist.all_reduce(wrapped.scale.grad)
        wrapped.scale.grad /= dist.get_world_size()
    return loss.detach()


def cached_step(wrapped: Replicated | Sharded, loss_fn: nn.Module, batches: list[Batch]) -> Tensor:
    """GradCache. Returns this rank's value."""
    with torch.no_grad():
        cached = [wrapped.model(*batch) for batch in batches]
    image, text = (torch.cat([each[k] for each in cached]).requires_grad_() for k in (0, 1))
    scale = cached[0][2].clone().requires_grad_()
    loss = loss_fn(image, text, scale)
    loss.backward()
    sizes = [len(images) for images, _ in batches]
    for k, (batch, *gradients) in enumerate(zip(batches, image.grad.split(sizes), text.grad.split(sizes), strict=True)):
        last = k == len(batches) - 1
        with wrapped.accumulating(last):
            # The scale's comes once, and as zero before: DDP waits for all parameters.
            torch.autograd.backward(wrapped.model(*batch), [*gradients, scale.grad * last])
    return loss.detach()


# ---- training


def make_batches(args: argparse.Namespace, rank: int) -> list[list[Batch]]:
    """Of this rank: for each step its microbatches."""
    generator = torch.Generator().manual_seed(args.seed * 1000 + rank)
    pyramids = picture_pyramids(IMAGE_SIZE)
    draw = partial(make_batch, pyramids, args.batch, IMAGE_SIZE, generator)
    return [[draw() for _ in range(args.accumulate)] for _ in range(args.steps)]


def train(
    wrapped: Replicated | Sharded, step: Callable[..., Tensor], loss_fn: nn.Module, steps: list[list[Batch]]
) -> tuple[list[float], float, float]:
    """The loss after each step, the median seconds of a step, and the first gradient of the scale."""
    optimizer = torch.optim.AdamW(wrapped.model.parameters(), lr=5e-4, foreach=False)
    losses, seconds, first = [], [], None
    for batches in steps:
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = step(wrapped, loss_fn, batches)
        first = wrapped.scale.grad.item() if first is None else first
        optimizer.step()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        seconds.append(time.perf_counter() - start)
    return losses, torch.tensor(seconds).median().item(), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=WRAPS, default="ddp")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="pairs of a microbatch on a rank")
    parser.add_argument("--accumulate", type=int, default=4, help="microbatches of a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    console = Console(quiet=rank > 0)
    steps = make_batches(args, rank)

    open_clip = open_clip_losses()
    if open_clip is None:
        raise SystemExit("open_clip is what this compares with: pip install --no-deps open_clip_torch")
    mode = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": ranks}
    runs = {
        "plain": (plain_step, open_clip.ClipLoss(**mode)),
        "mmkernels": (cached_step, mmkernels.nn.ClipLoss(**mode)),
    }
    results, scales = {}, {}
    for name, (step, loss) in runs.items():
        console.print(f"{name}: {args.steps} steps of {args.accumulate} x {args.batch} pairs on {ranks} ranks")
        wrapped = WRAPS[args.wrap](Towers(make_model("small", args.seed)))
        call = partial(train, wrapped, step, loss, steps)
        (losses, seconds, scales[name]), peak = with_peak_memory(call, "cpu")
        results[name] = losses, seconds, peak
    report(console, results)
    of_plain, of_ours = scales.values()
    ratio = f"plain {of_plain:.6g}, mmkernels {of_ours:.6g}: {of_plain / of_ours:.4f} x"
    console.print(f"gradient of logit_scale at first: {ratio}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
