"""What compare runs: copies of the user's model, on copies of their inputs, all from one state of random generators.

Nothing of the user's is written to: not the model, its gradients and buffers, nor the inputs, nor any generator.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import report as reports
from .accelerate import accelerate, restore
from .report import Report
from .swap import swap_of
from .values import Projection, Values, named_inputs, step, values
from .watch import Watch

SHARED = 1 << 16  # elements from which a parameter is worth sharing


class Subject:
    """A model and its call, of which every run gets a copy."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict, loss: Callable | None):
        self.model, self.args, self.kwargs, self.loss = model, args, kwargs, loss
        self.random = Random()
        self.projection = Projection()
        self.swapped: list[str] = []  # paths, as soon as there is an accelerated twin
        weights, inputs = list(model.parameters()), list(named_inputs(args, kwargs).values())
        tensors = [*weights, *inputs]
        devices = {x.device.type for x in tensors}
        self.device = "cuda" if "cuda" in devices else "cpu"
        self.autocast = torch.get_autocast_dtype(self.device) if torch.is_autocast_enabled(self.device) else None
        dtypes = [x.dtype for x in weights or inputs if x.is_floating_point() and x.itemsize > 1] or [torch.float32]
        self.dtype = min([*dtypes, self.autocast or dtypes[0]], key=lambda dtype: dtype.itemsize)
        self.gradients = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        self._training = any(module.training for module in model.modules())

    def plain(self, draw: int = 0, dtype: torch.dtype | None = None) -> nn.Module:
        twin = self._twin(draw)
        if _is_accelerated(twin):
            restore(twin)
        for path, module in twin.named_modules():
            name = getattr(getattr(module, "config", None), "_attn_implementation", None)
            if isinstance(name, str) and name.startswith("mmkernels"):
                raise ValueError(
                    f'compare: {path or "the model"} was given attn_implementation="{name}" by name, which leaves no '
                    "plain model to compare with; load it without, and call accelerate"
                )
        return twin if dtype is None else twin.double() if dtype == torch.float64 else twin.float()  # complex ones stay

    def fast(self, draw: int = 0) -> tuple[nn.Module, Report]:
        """Where the user has accelerated the model, it stays what they made of it."""
        twin = self._twin(draw)
        report = accelerate(twin, only=() if _is_accelerated(twin) else None, verbose=False)
        self.swapped = list(dict.fromkeys(entry.path for entry in report.swapped))
        for module in twin.modules():
            module.__dict__.pop(reports._FALLBACKS, None)  # those of the user's own calls
        return twin, report

    def values(self, twin: nn.Module, dtype: torch.dtype | None = None, anew: bool = True) -> Values:
        """dtype: that of the truth. Not anew: from the random state as it is."""
        args, kwargs = self._inputs(dtype)
        if anew:
            self.random.put_back()
        exact = self.autocast is not None and dtype is not None
        options = {"loss": self.loss, "gradients": self.gradients, "projection": self.projection}
        with (
            torch.autocast(self.device, enabled=False) if exact else nullcontext(),
            Watch(twin, self.swapped, kwargs.get("attention_mask")) as watch,
        ):
            found = values(twin, args, kwargs, **options)
        found.modules, found.rows = watch.modules()
        return found

    def step(self, twin: nn.Module) -> None:
        """As one trains, or infers; without gradients left, so that every step allocates its own."""
        args, kwargs = self._inputs(None)
        step(
            twin,
            args,
            kwargs,
            loss=self.loss,
            gradients=self.gradients,
            projection=self.projection,
            all_outputs=False,
        )
        twin.zero_grad()

    def too_large(self, dtype: torch.dtype) -> str | None:
        """Only what is known beforehand: weights and their gradients."""
        from ..bench.machine import free_bytes

        count = sum(p.numel() * (1 + (self.gradients and p.requires_grad)) for p in self.model.parameters())
        needed, free = count * dtype.itemsize, free_bytes(self.device)
        return f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > free else None

    def _twin(self, draw: int) -> nn.Module:
        named = enumerate(self.model.parameters())
        memo = {id(p): self._parameter(p, draw, i) for i, p in named if type(p) is nn.Parameter}
        return _copied(self.model, memo, f"this {type(self.model).__name__}")

    def _parameter(self, p: nn.Parameter, draw: int, number: int) -> nn.Parameter:
        """Without the hooks and the gradient of the user's. Small ones, such as temperatures, are clamped in place by
        some models whenever they run, and a model in training may keep averages in large ones; else nobody writes to
        them, and twins need no memory of their own for them."""
        data = p.detach()
        if draw and data.is_floating_point():
            data = _nudged(data, self.autocast or data.dtype, f"{draw} {number}")
        elif self._training or data.numel() < SHARED:
            data = data.clone()
        return nn.Parameter(data, p.requires_grad)

    def _inputs(self, dtype: torch.dtype | None) -> tuple[tuple, dict]:
        """Copies: models write to caches that they are given, and backward to the gradients of inputs."""
        given = self.args, self.kwargs
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        memo = {id(x): _detached(x, dtype).requires_grad_(x.requires_grad) for x in tensors}
        return _copied(given, memo, "an input")


def _detached(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.detach().to(x.dtype if dtype is None or not x.is_floating_point() else dtype, copy=True)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _copied(x: object, memo: dict, name: str):
    try:
        return copy.deepcopy(x, memo)
    except Exception as error:
        raise ValueError(f"compare: {name} cannot be copied, which every run needs: {told(error)}") from error


def _nudged(x: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Each number moved by up to an ulp of the dtype that computes with it; and each row of K, by which a sum of K
    products is made that rounds K times, as a whole by up to the root of K ulp of the dtype that it is summed in. The
    same way for the same key."""
    wide = torch.promote_types(x.dtype, torch.float32)
    generator = torch.Generator(x.device).manual_seed(zlib.crc32(key.encode()))

    def noise(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device, dtype=wide) * 2 - 1

    factor = 1 + torch.finfo(dtype).eps * noise(x.shape)
    if x.dim() > 1 and len(x):
        terms, each_row = x[0].numel(), (len(x), *[1] * (x.dim() - 1))
        factor += math.sqrt(terms) * torch.finfo(wide).eps * noise(each_row)
    return (x * factor).to(x.dtype)


def _is_accelerated(model: nn.Module) -> bool:
    return any(swap_of(module) for module in model.modules())


class Random:
    """The state of every random generator that a model may draw from."""

    def __init__(self):
        self._torch = self._now()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy and (numpy.random.set_state, numpy.random.get_state())

    def put_back(self) -> None:
        torch.set_rng_state(self._torch[0])
        if len(self._torch) > 1:
            torch.cuda.set_rng_state_all(self._torch[1:])
        random.setstate(self._python)
        if self._numpy:
            set_state, state = self._numpy
            set_state(state)

    def ahead(self) -> bytes | None:
        """Where torch's are by now; None: where they were."""
        now = self._now()
        moved = not all(map(torch.equal, self._torch, now))
        return b"".join(x.numpy().tobytes() for x in now) if moved else None

    @staticmethod
    def _now() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
