"""How a system is trained, accelerated or plain, and what it is judged by.

Plain is the model as its library has it, and the reference of every op that a file calls itself. The two are built from
the same seed and meet the same batches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

import mmkernels
from mmkernels.bench.measure import with_peak_memory

SHOWN = 8  # losses of a curve


@dataclass(frozen=True)
class Stage:
    """A part of the training: what is learned, from which loss, for how long. All else is frozen."""

    name: str
    loss: Callable[[Generator], Tensor]  # of a batch that it draws
    trained: Sequence[nn.Module | nn.Parameter]
    steps: int
    rate: float = 2e-3


class Score(NamedTuple):
    """What the trained system reaches on what was held out, and who has learned nothing."""

    value: float
    baseline: float


@dataclass(frozen=True)
class System:
    model: nn.Module
    stages: Sequence[Stage]
    scores: Callable[[], dict[str, Score]]


def main(build: Callable[[], System], description: str | None) -> None:
    """The command of every file: train, judge, tell."""
    options = _options(description)
    ways = ("plain", "accelerated") if options.both else ("plain" if options.plain else "accelerated",)
    runs = [Run(way, build, options.seed, options.dtype) for way in ways]
    for number, stage in enumerate(runs[0].system.stages):
        _train(runs, number, stage.steps if options.steps is None else min(options.steps, stage.steps))
    told = {run.way: run.told() for run in runs}
    if options.json:
        asked = {"dtype": options.dtype, "seed": options.seed, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps(asked | told, indent=1) + "\n")


@dataclass
class Run:
    """A system in training, plain or accelerated."""

    way: str
    build: Callable[[], System]
    seed: int
    dtype: str
    swapped: list[str] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.system = self.build()
        self.generator = Generator().manual_seed(self.seed)
        if self.way == "accelerated":
            self.swapped = str(mmkernels.accelerate(self.system.model)).splitlines()

    @contextmanager
    def served(self) -> Iterator[None]:
        casts = torch.autocast("cpu", torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()
        with mmkernels.use_backend("reference" if self.way == "plain" else "auto"), casts:
            yield

    def begin(self, number: int, steps: int) -> None:
        stage, model = self.system.stages[number], self.system.model
        model.train()
        model.requires_grad_(False)
        self.parameters = list(_parameters(stage.trained))
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=stage.rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, stage.rate, total_steps=max(steps, 2), pct_start=0.1
        )
        self.stage, self.losses, self.seconds = stage, [], []
        self.curves[stage.name] = self.losses

    def step(self) -> None:
        start = time.perf_counter()
        with self.served():
            loss = self.stage.loss(self.generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def told(self) -> dict:
        """What was learned, and what a step of the last stage takes."""

        def step() -> None:
            with self.served():
                loss = self.stage.loss(self.generator)
            loss.backward()

        _, peak_bytes = with_peak_memory(step, "cpu")
        self.optimizer.zero_grad()
        self.system.model.eval()
        with self.served(), torch.no_grad():
            scores = self.system.scores()
        step_ms = 1e3 * statistics.median(self.seconds)
        fell_back = []
        if self.way == "accelerated":  # a second call counts the calls that ran the model's own code
            fell_back = [each.what for each in mmkernels.accelerate(self.system.model, verbose=False).fallbacks]
            print("\n".join(f"fell back: {what}" for what in fell_back), end="\n" * bool(fell_back))
        for name, score in scores.items():
            print(f"{self.way}, {name}: {score.value:.3f} (who has learned nothing: {score.baseline:.3f})")
        print(f"{self.way}: {step_ms:.0f} ms a step, {peak_bytes / 2**20:.0f} MB held by it", flush=True)
        learned = {"curves": self.curves, "scores": scores}
        served = {"swapped": self.swapped, "fell_back": fell_back}
        return learned | served | {"step_ms": step_ms, "peak_bytes": peak_bytes}


def _train(runs: Sequence[Run], number: int, steps: int) -> None:
    """One stage; the runs alternate step by step, so that what the machine does meanwhile, it does to all."""
    for run in runs:
        run.begin(number, steps)
    for _ in range(steps):
        for run in runs:
            run.step()
    for run in runs:
        shown = run.losses[:: max(1, steps // SHOWN)]
        losses = " ".join(f"{loss:.3f}" for loss in shown)
        print(f"{run.way}, {run.stage.name}: loss {losses}, {sum(run.seconds):.0f} s", flush=True)


def _parameters(of: Iterable[nn.Module | nn.Parameter]) -> Iterable[nn.Parameter]:
    for each in of:
        yield from [each] if isinstance(each, nn.Parameter) else each.parameters()


def _options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--plain", action="store_true", help="without mmkernels' kernels")
    ways.add_argument("--both", action="store_true", help="plain and accelerated side by side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (float32)")
    parser.add_argument("--steps", type=int, metavar="N", help="a stage at most (all that it takes to learn)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write curves, scores, time and memory there")
    return parser.parse_args()
