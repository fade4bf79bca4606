"""What accelerating a model in one way makes of it: right, left to its own path, refused, or WRONG."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from agreement import Values, measured, misses
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels
from mmkernels.integrations.agreement import Quantity, over_draws
from mmkernels.integrations.report import fallbacks

from .cases import Case, Row
from .drawing import as_measured, same_noise
from .subject import Subject, brief, generate

BY_NAME = "mmkernels"
SAYS_WHY = ("mmkernels", "attn_implementation", "attention implementation", "_attn_implementation")


class Refused(Exception):
    """The model does not take the name of the attention, and says so."""


class Left(Exception):
    """There is nothing to accelerate."""


def judge(case: Case, subject: Subject, ways: tuple[str, ...]) -> Iterator[Row]:
    for way in ways:
        start = time.monotonic()
        row = _judge(case, subject, way)
        row.notes = [*subject.notes, *row.notes]
        row.seconds = round(time.monotonic() - start, 2)
        yield row


def _judge(case: Case, subject: Subject, way: str) -> Row:
    make = {"accelerate": _accelerated, "by name": _by_name}[way]
    try:
        fast, entries, left = make(subject.model)
    except Left as reason:
        return Row(case, way, "left", str(reason))
    except Refused as reason:
        return Row(case, way, "refused", str(reason))
    except Exception as error:
        return Row(case, way, "WRONG", f"raises when accelerated: {brief(error, 300)}")
    row = Row(case, way, "right", swapped=dict(entries))
    wrong = []
    try:
        calls = _calls_of_mmkernels(fast, subject)
        # By name, what falls back goes the way of sdpa or of eager code, whichever the plain model goes.
        others = max(sum(entries.values()), sum(calls.values()), len(fallbacks(fast)))
        wrong += _wrong_values(fast, subject, others, lambda model: make(model)[0])
        wrong += _wrong_words(fast, subject, others)
    except Exception as error:
        if way == "by name" and _says_why(error):
            return Row(case, way, "refused", brief(error, 300))
        return Row(case, way, "WRONG", f"raises where plain runs: {brief(error, 300)}", row.swapped)
    row.notes += [f"left: {x}" for x in left] + [f"fell back: {x}" for x in _fallbacks(fast)]
    if wrong:
        row.verdict, row.why = "WRONG", "; ".join([*wrong[:3], f"{len(wrong)} in all"])
    elif not calls:
        row.verdict, row.why = "left", "; ".join(_fallbacks(fast) + left) or "no call reaches mmkernels"
    return row


# ---- the two ways


def _accelerated(model: nn.Module) -> tuple[nn.Module, Counter, list[str]]:
    fast = copy.deepcopy(model)
    try:
        report = mmkernels.accelerate(fast, verbose=False)
    except ValueError as error:
        if "nothing to swap" in str(error):
            raise Left(str(error).partition(": ")[2]) from None
        raise
    if list(fast.state_dict()) != list(model.state_dict()):
        raise AssertionError("accelerate changes the state_dict")
    return fast, Counter(entry.cls for entry in report.swapped), _kinds_left(report)


def _kinds_left(report) -> list[str]:
    return [f"{cls}: {what}" for cls, what in Counter((entry.cls, entry.what) for entry in report.left)]


def _by_name(model: nn.Module) -> tuple[nn.Module, Counter, list[str]]:
    """As attn_implementation="mmkernels", given when the model is made."""
    import mmkernels.integrations.transformers  # noqa: F401  (registers the name)

    config = copy.deepcopy(model.config)
    try:
        fast = type(model)._from_config(config, attn_implementation=BY_NAME)
    except Exception as error:
        if _says_why(error):
            raise Refused(brief(error, 300)) from None
        raise
    fast.load_state_dict({name: x for name, x in model.state_dict().items() if "_orig_mod." not in name})  # compiled
    _same_buffers(model, fast)
    return as_measured(fast), Counter(), []


def _same_buffers(model: nn.Module, fast: nn.Module) -> None:
    """Some are drawn when a model is made, and are not saved with it."""
    theirs = dict(model.named_buffers())
    with torch.no_grad():
        for name, buffer in fast.named_buffers():
            if name in theirs and theirs[name].shape == buffer.shape:
                buffer.copy_(theirs[name])


def _says_why(error: Exception) -> bool:
    return any(words in str(error) for words in SAYS_WHY)


# ---- what it computes


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmkernels":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


def _calls_of_mmkernels(fast: nn.Module, subject: Subject) -> Counter:
    """Which of mmkernels' operators run in a forward: what really happens, whatever a report says."""
    inputs = next(iter(subject.calls.values()))
    with same_noise(), torch.no_grad(), _Counting() as counting:
        fast(**inputs)
    return counting.calls


def _wrong_values(fast: nn.Module, subject: Subject, others: int, make: Callable[[nn.Module], nn.Module]) -> list[str]:
    """others: modules that compute otherwise than the plain model's. make: of a plain model, the one to be judged."""
    wrong = []
    for name, inputs in subject.calls.items():
        ours = subject.values_of(fast, inputs)
        missing = sorted(subject.truth[name].keys() - ours.keys())
        if missing:
            wrong.append(f"{', '.join(missing[:3])}: not there when accelerated")
            continue
        found = _measured(subject, name, ours, others)
        overrun = [x for x in found if not x.ok]
        if overrun and not any(x.complaint for x in overrun):  # then it counts only if it is over more draws
            twins = ((other, other.values_of(make(other.model), other.calls[name])) for other in _with(name, subject))
            found = over_draws([found, *(_measured(other, name, ours, others) for other, ours in twins)])
        wrong += _named(name, [str(x) for x in found if not x.ok])
    return wrong


def _with(call: str, subject: Subject) -> list[Subject]:
    return [other for other in subject.other_draws if call in other.calls]


def _measured(subject: Subject, call: str, ours: Values, others: int) -> list[Quantity]:
    truth, plain = subject.truth[call], subject.plain[call]
    return measured(truth, plain, {name: ours[name] for name in truth}, others)


def _named(call: str, found: list[str]) -> list[str]:
    place = f"padding {call}: " if call in ("left", "right") else f"{call}: " if call else ""
    return [place + x for x in found]


def _wrong_words(fast: nn.Module, subject: Subject, swapped: int) -> list[str]:
    wrong = []
    for cache, told in subject.generated.items():
        certain = told.truth is not None and torch.equal(told.truth.sequences, told.plain.sequences)
        if told.truth is not None and not certain:
            continue  # a tie, that rounding decides
        ours = generate(fast, told.inputs, told.options)
        if not torch.equal(ours.sequences, told.plain.sequences):
            wrong.append(f"generates other tokens, {cache} cache")
        elif certain:
            logits = (_logits(x) for x in (told.truth, told.plain, ours))
            wrong += [f"{cache} cache: {x}" for x in misses(*logits, swapped)]
    return wrong


def _logits(out) -> Values:
    return {f"output {i}": step.masked_fill(step.isinf(), 0.0) for i, step in enumerate(out.logits)}


def _fallbacks(fast: nn.Module) -> list[str]:
    reasons = Counter()
    for entry in fallbacks(fast):
        reasons[entry.cls, entry.what.rpartition(" (")[0]] += 1
    return [f"{cls}: {what}" for cls, what in reasons]
