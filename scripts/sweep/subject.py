"""A model to be judged, with what the plain one computes, in float32 and in float64."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from agreement import Values, in_float64
from torch import nn
from torch.utils._pytree import tree_map

from .drawing import drawn, same_noise
from .values import NoGradient, values

Inputs = dict[str, Any]
GENERATION = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
GENERATION |= {"pad_token_id": 0, "eos_token_id": None}
DRAWS = 4
PATIENCE = 30.0  # seconds of trying inputs
CACHES = ("dynamic", "static")


class PlainFails(Exception):
    """The plain model does not run on what it was given."""


@dataclass
class Generated:
    inputs: Inputs
    options: Inputs
    plain: Any
    truth: Any  # None where the model does not run in float64


@dataclass
class Subject:
    """calls: inputs by name. Everything of the plain model is computed once, for all ways of accelerating it."""

    model: nn.Module
    calls: dict[str, Inputs]
    holds: str = ""
    gradients: bool = True
    truth: dict[str, Values] = field(default_factory=dict)
    plain: dict[str, Values] = field(default_factory=dict)
    generated: dict[str, Generated] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def other_draws(self) -> list[Subject]:
        """The same model with other weights, for what may be luck: measured as this one is."""
        found = []
        for seed in range(1, DRAWS + 1):
            other = Subject(drawn(copy.deepcopy(self.model), seed), dict(self.calls), gradients=self.gradients)
            try:
                other.measure()
            except PlainFails:
                continue
            found.append(other)
        return found

    def measure(self) -> None:
        """Runs the plain model on every call. Raises PlainFails."""
        for name, inputs in list(self.calls.items()):
            try:
                self.plain[name] = self.values_of(self.model, inputs)
            except Exception as error:
                if len(self.calls) == 1 or not self.plain:
                    raise PlainFails(brief(error)) from error
                del self.calls[name]
                self.notes.append(f"plain fails {name}")
        exact = self._float64()
        for name, inputs in self.calls.items():
            if exact is not None:
                try:
                    self.truth[name] = self.values_of(exact, tree_map(in_float64, inputs))
                    if self._is_a_truth(name):
                        continue
                except Exception:
                    exact = None
            self._measure_by_nudging(name, inputs)
        self._drop_what_is_not_finite()
        self._note_what_takes_no_part()

    def _is_a_truth(self, name: str) -> bool:
        """Not where masks of the lowest number there is, added up, overflow in float64 only."""
        truth, plain = self.truth[name], self.plain[name]
        finite = (bool(truth[key].isfinite().all()) or not bool(x.isfinite().all()) for key, x in plain.items())
        return list(truth) == list(plain) and all(finite)

    def values_of(self, model: nn.Module, inputs: Inputs) -> Values:
        inputs = copy.deepcopy(inputs)  # some models write to what they are given
        with same_noise():
            if self.gradients:
                try:
                    return values(model, inputs, gradients=True)
                except NoGradient:
                    self.gradients = False
            with torch.no_grad():
                return values(model, inputs, gradients=False)

    def _float64(self) -> nn.Module | None:
        try:
            return copy.deepcopy(self.model).double()
        except Exception:
            return None

    def _measure_by_nudging(self, name: str, inputs: Inputs) -> None:
        """Where a model does not run in float64: the plain one is the truth, and how far it moves when its weights move
        by a few ulps is how much rounding matters to it."""
        nudged = copy.deepcopy(self.model)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in nudged.parameters():
                if p.is_floating_point():
                    p.mul_(1 + 4 * torch.finfo(p.dtype).eps * torch.randn(p.shape, generator=generator).to(p.dtype))
        self.truth[name] = {key: x.double() for key, x in self.plain[name].items()}
        self.plain[name] = self.values_of(nudged, inputs)
        if "no float64" not in self.notes:
            self.notes.append("no float64")

    def _drop_what_is_not_finite(self) -> None:
        for name in self.calls:
            found = (self.truth[name], self.plain[name])
            bad = [key for key in found[1] if not all(bool(x[key].isfinite().all()) for x in found)]
            if len(bad) == len(found[1]):
                raise PlainFails("gives nothing that is finite")
            if bad:
                self.notes.append(f"{len(bad)} of the plain model's {len(found[1])} tensors are not finite ({name})")
            for key in bad:
                for x in found:
                    del x[key]

    def _note_what_takes_no_part(self) -> None:
        """Inputs that a model ignores leave whole towers without a gradient: then this says nothing of them."""
        reached = {name for found in self.plain.values() for name, x in found.items() if bool(x.any())}
        names = [name for name, _ in self.model.named_parameters()]
        idle = [name for name in names if name not in reached]
        if self.gradients and len(idle) > len(names) // 4:
            self.notes.append(f"{len(idle)} of {len(names)} parameters get no gradient: {idle[0]}")

    # ---- generation

    def generate(self, side: str) -> None:
        """What the plain model says next, greedily, with either cache."""
        if not getattr(self.model, "can_generate", lambda: False)():
            return
        given = {k: x for k, x in self.calls.get(side, next(iter(self.calls.values()))).items() if k != "return_loss"}
        for cache in CACHES:
            for inputs, options in _ways_to_ask(given, cache):
                try:
                    plain = generate(self.model, inputs, options)
                except Exception as error:
                    reason = brief(error, 80)
                    continue
                exact = self._float64()
                try:
                    truth = generate(exact, tree_map(in_float64, inputs), options)
                except Exception:
                    truth = None
                self.generated[cache] = Generated(inputs, options, plain, truth)
                break
            else:
                self.notes.append(f"plain does not generate, {cache} cache: {reason}")


def _ways_to_ask(given: Inputs, cache: str) -> Iterator[tuple[Inputs, Inputs]]:
    """With the decoder's first words and without; and without the ends that some models name themselves."""
    options = GENERATION | {"cache_implementation": cache}
    for inputs in (given, {k: x for k, x in given.items() if not k.startswith("decoder_")}):
        yield inputs, options
        yield inputs, {name: x for name, x in options.items() if not name.endswith("token_id")}


def generate(model: nn.Module, inputs: Inputs, options: Inputs) -> Any:
    inputs = copy.deepcopy(inputs)  # BLIP writes to them
    with same_noise(), torch.no_grad():
        out = model.generate(**inputs, **options)
    if not hasattr(out, "sequences") or getattr(out, "logits", None) is None:
        raise TypeError("generate of its own, without logits")
    return out


def first_that_runs(
    models: Iterable[tuple[str, Callable[[], nn.Module]]], candidates: Callable[[nn.Module], Iterable]
) -> Subject:
    """Of all sizes a model can be built in, and all inputs it may take, the first on which the plain model runs."""
    built, failures, start = False, [], time.monotonic()
    for size, build in models:
        try:
            model = drawn(build())
        except Exception as error:
            failures.append(f"{size}: {brief(error)}")
            continue
        built = True
        for candidate in candidates(model):
            if time.monotonic() - start > PATIENCE:
                break
            try:
                sides = ("right", "left") if candidate.padded else ("",)
                calls = {side: candidate.make(side) for side in sides}
                with same_noise(), torch.no_grad():
                    model(**copy.deepcopy(calls[sides[0]]))
            except Exception as error:
                failures.append(f"{candidate.holds}: {brief(error)}")
                continue
            calls |= _with_other_media(model, candidate, list(candidates(model)), start)
            subject = Subject(model, calls, candidate.holds)
            subject.notes += [", ".join([candidate.holds, *(x for x in calls if x not in sides)])] + (
                [f"built with {size}"] if size != "tiny" else []
            )
            return subject
    first = failures[0] if failures else "nothing to build"
    raise PlainFails(first) if built else CannotBeBuilt(first)


def _with_other_media(model: nn.Module, first: Any, candidates: list, start: float) -> dict[str, Inputs]:
    """A call more for videos, or audio, where what ran first does without, and the model takes them too."""
    covered, calls = set(first.holds.split(" + ")), {}
    for candidate in candidates:
        if set(candidate.holds.split(" + ")) - covered - {"text"} and time.monotonic() - start < PATIENCE:
            try:
                inputs = candidate.make("right" if candidate.padded else "")
                with same_noise(), torch.no_grad():
                    model(**copy.deepcopy(inputs))
            except Exception:
                continue
            calls[candidate.holds] = inputs
            covered |= set(candidate.holds.split(" + "))
    return calls


class CannotBeBuilt(Exception):
    pass


def brief(error: BaseException, length: int = 160) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[1:2] if lines and lines[0].startswith("Class validation error") else lines[:2])
    return f"{type(error).__name__}: {text}"[:length]
