"""compare(model, *inputs): the proof that accelerate keeps a model right and makes it fast, on the user's own data.

Every run is of a copy of the model, on a copy of its inputs, from the same state of every random generator, so that
nothing of the user's is touched and dropout drops the same. How wrong a result may be: agreement.py.

A quantity of few elements, a loss above all, can be lucky: plain code that happens to round to the truth would leave
the accelerated model a budget of nothing; and some models, of mixtures and recurrences, amplify what they round by
more in one run than in the next. So where a budget is overrun, the median of several draws decides: the same
model with each weight moved by some rounding, which changes every rounding of all three runs.

Where no wider dtype can tell the truth (the model's code takes no float64, or draws other random numbers in it), the
plain model is the truth, and its own error is taken to be how far its results move when its weights move so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..check.precision import exact_float32
from . import report as reports
from .agreement import Quantity, measured, modules_measured, over_draws
from .comparison import Comparison, Cost
from .first_wrong import FirstWrong, first_wrong
from .subject import Subject, told
from .values import Values
from .watch import Watch

DRAWS = 4  # more of them, where one is not enough
SECONDS = 1.0  # of measuring time, or three rounds if they take longer


class _Measured(NamedTuple):
    outputs: Sequence[Quantity]
    gradients: Sequence[Quantity]
    modules: Sequence[Quantity]  # what those that were swapped return


def compare(
    model: nn.Module,
    /,
    *inputs: object,
    loss: Callable[[object], Tensor] | None = None,
    verbose: bool = True,
    **kwargs: object,
) -> Comparison:
    """Run `model(*inputs, **kwargs)` plain and accelerated, and say whether they agree, and what each costs.

    The truth is the plain model in float64 (float32 where that fails or does not fit; the table says which). An output
    or gradient passes if, in the norm over its elements, it is off by at most twice as much as the plain model's is in
    its own dtype, plus 2 ulp for each module swapped; these add as independent errors do, in squares. Where that is
    overrun, the median of five draws of rounding decides. What each swapped module returns has to pass as well, in its
    rows that have a gradient. Outputs that are no floating numbers have to be equal. Rows that a 2-D `attention_mask`
    among the keywords calls padding do not count, nor do caches. Time and memory are told only of a result that passed.
    The model is left exactly as it was, and so are all random generators; hooks of your own run with the copies too. It
    takes memory for two more models (in evaluation mode their large weights are shared with yours), and before that for
    one in float64.

    Args:
        model: in training or evaluation, on any device, accelerated before (then with what it has, by the backend it
            has) or not. Under `torch.autocast` it runs in its dtype, under `torch.no_grad` forward only.
        *inputs, **kwargs: what the model takes, tensors of any shape or whatever else. Those that require a gradient
            are compared by it, too.
        loss: the model's output -> a floating tensor of one element to go backward from. None: a fixed random
            projection of every floating output. With a loss that reads what your training reads, the times are those
            of your step. Where nothing requires a gradient, the run is forward only.
        verbose: print the comparison.

    Returns:
        The comparison: `.ok`, and what led to it. A disagreement raises nothing: `.wrong` lists what disagrees, and
        `.first_wrong` is the path of the module where it begins. Nor does an accelerated model that fails where the
        plain one runs: that is not ok, and `.exception` says why.

    Raises:
        TypeError: model is no nn.Module, or the loss returns something else than a floating tensor of one element.
        ValueError: nothing in the model could be swapped, or it, or its inputs, cannot be copied.
        Exception: whatever the plain model raises on these inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compare: model is a {type(model).__name__}; it must be a torch.nn.Module")
    subject = Subject(model, inputs, kwargs, loss)
    try:
        with torch.inference_mode(False):  # copies made in it could not be trained
            comparison = _compare(subject)
    finally:
        subject.random.put_back()
    if verbose:
        comparison.print()
    return comparison


def _compare(subject: Subject) -> Comparison:
    (fast, report), plain = subject.fast(), subject.plain()
    with exact_float32():
        theirs = subject.values(plain)
        drawn = subject.random.ahead()
        truth = _find_truth(subject, theirs, drawn is not None)
        ours, exception = _attempt(partial(subject.values, fast))
        other_draws = ours is not None and subject.random.ahead() != drawn
        report.fallbacks = reports.fallbacks(fast)
        found = _Measured((), (), ()) if ours is None else _verdict(subject, truth, theirs, ours, not other_draws)
        ok = exception is None and all(x.ok for each in found for x in each)
        where = None if ok else _where(subject, truth, found.gradients)
    costs = _costs(subject, plain, fast) if ok else (None, None)
    return Comparison(
        model=type(subject.model).__name__,
        backward=subject.gradients,
        truth=truth.name,
        outputs=list(found.outputs),
        gradients=list(found.gradients),
        modules=list(found.modules),
        report=report,
        exception=exception,
        other_draws=other_draws,
        first_wrong=where and where.path,
        why=where and where.why,
        plain=costs[0],
        accelerated=costs[1],
    )


def _attempt(run: Callable[[], Values]) -> tuple[Values | None, str | None]:
    try:
        return run(), None
    except Exception as error:  # of the accelerated model: it is a finding, not the end
        return None, told(error)


# ---- verdict


@dataclass(frozen=True)
class _Truth:
    values: Values
    dtype: torch.dtype | None  # None: the plain model's own
    name: str


def _find_truth(subject: Subject, plain: Values, drew: bool) -> _Truth:
    """drew: whether the plain model draws random numbers."""
    other = subject.values(subject.plain(), anew=False) if drew else None
    reasons = []
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        if dtype.itemsize <= subject.dtype.itemsize:
            continue
        try:
            reason = subject.too_large(dtype)
            found = None if reason else subject.values(subject.plain(dtype=dtype), dtype)
        except Exception as error:  # whatever a model's code has against a dtype
            reason, found = told(error), None
        if found is not None:
            reason = _why_no_truth(found, plain, other)
        if reason is None:
            return _Truth(found, dtype, f"the plain model in {name}" + "".join(f" ({x})" for x in reasons))
        reasons.append(f"{name}: {reason}")
    because = "; ".join(reasons) or f"it computes in {str(subject.dtype).removeprefix('torch.')} already"
    return _Truth(plain, None, f"the plain model itself, there is no better one ({because})")


def _why_no_truth(truth: Values, plain: Values, other: Values | None) -> str | None:
    """other: plain from another state of the random generators, where these matter. A device may draw other numbers
    for another dtype; then the truth is as far from plain as that is."""
    if truth.outputs.keys() != plain.outputs.keys() or truth.gradients.keys() != plain.gradients.keys():
        return "it gives other outputs or gradients"
    if any(x.shape != plain.outputs[name].shape for name, x in truth.outputs.items()):
        return "it gives outputs of other shapes"
    apart = _apart(truth, plain)
    if other is not None and math.hypot(*apart.values()) > math.hypot(*_apart(other, plain).values()) / 2:
        return "it draws other random numbers"
    far = next((name for name, distance in apart.items() if not distance <= 0.5), None)  # then zeros would pass
    return None if far is None else f"its {far} is {apart[far]:.0%} away from the plain model's, too far for rounding"


def _apart(one: Values, plain: Values) -> dict[str, float]:
    """The relative distance of each floating output."""
    found = {}
    for name, x in plain.outputs.items():
        if x.is_floating_point() and x.shape == one.outputs[name].shape and x.norm() > 0:
            found[name] = ((one.outputs[name].double() - x.double()).norm() / x.double().norm()).item()
    return found


def _verdict(subject: Subject, truth: _Truth, plain: Values, ours: Values, more: bool) -> _Measured:
    """more: whether further draws may tell more, where a budget is overrun."""
    if truth.dtype is None:
        nudged = (subject.values(subject.plain(draw)) for draw in range(1, DRAWS + 1))
        return _over([_measure(subject, plain, each, ours) for each in nudged])
    first = _measure(subject, truth.values, plain, ours)
    overrun = [x for each in first for x in each if not x.ok]
    if not overrun or not more or any(x.complaint for x in overrun):
        return first
    draws = [first]
    for draw in range(1, DRAWS + 1):
        exact = subject.values(subject.plain(draw, truth.dtype), truth.dtype)
        both = (subject.values(x) for x in (subject.plain(draw), subject.fast(draw)[0]))
        draws.append(_measure(subject, exact, *both))
    return _over(draws)


def _measure(subject: Subject, truth: Values, plain: Values, ours: Values) -> _Measured:
    swapped = math.sqrt(len(subject.swapped))  # of 64 layers in bfloat16, the plain sum would excuse any result
    return _Measured(
        *measured(truth, plain, ours, swapped, subject.dtype), modules_measured(truth, plain, ours, subject.dtype)
    )


def _over(draws: list[_Measured]) -> _Measured:
    return _Measured(*(over_draws(list(same)) for same in zip(*draws, strict=True)))


def _where(subject: Subject, truth: _Truth, gradients: Sequence[Quantity]) -> FirstWrong | None:
    """Runs all three again, and keeps what modules give and are given on the way."""
    twins = [(subject.plain(dtype=truth.dtype), truth.dtype), (subject.plain(), None), (subject.fast()[0], None)]
    if truth.dtype is None:
        twins[1] = subject.plain(1), None
    watches = []
    for twin, dtype in twins:
        with Watch(twin, subject.swapped, subject.kwargs.get("attention_mask"), wide=True) as watch:
            _attempt(partial(subject.values, twin, dtype))
        watches.append(watch)
    return first_wrong(*watches, subject.swapped, [x.name for x in gradients if not x.ok], subject.dtype)


# ---- what it costs


def _costs(subject: Subject, plain: nn.Module, fast: nn.Module) -> tuple[Cost, Cost]:
    """Of the twins, which have run before."""
    from ..bench.measure import Stopwatch, with_peak_memory  # bench stands above: it is loaded for this alone

    runs = {name: partial(subject.step, twin) for name, twin in (("plain", plain), ("accelerated", fast))}
    peaks = {name: with_peak_memory(run, subject.device)[1] for name, run in runs.items()}
    timings = Stopwatch(subject.device).alternate(runs, SECONDS)
    return tuple(Cost(timings[name].ms, timings[name].p10, timings[name].p90, peaks[name]) for name in runs)
