"""From a case to its rows: build, feed, judge."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import libraries
from .cases import Case, Row
from .subject import CannotBeBuilt, PlainFails
from .verdicts import judge


def warming_up(found: set[str]) -> list[Case]:
    """A case to run before processes are forked: what it imports, no fork has to import again. None with convolutions:
    oneDNN does not live through a fork once it has run one."""
    return [Case("transformers", "llama", "LlamaForCausalLM")] if "transformers" in found else []


def rows_of(case: Case) -> Iterator[Row]:
    """A row for each way; and before them one of the way "plain" when the plain model has run."""
    torch.set_num_threads(1)
    library = libraries.named(case.library)
    ways = libraries.ways(case.library)
    try:
        subject = library.subject(case)
        subject.measure()
        subject.generate("left")
    except CannotBeBuilt as reason:
        yield from (Row(case, way, "cannot be built", str(reason)) for way in ways)
        return
    except PlainFails as reason:
        yield from (Row(case, way, "plain fails", str(reason)) for way in ways)
        return
    yield Row(case, "plain", "right")
    yield from judge(case, subject, ways)
