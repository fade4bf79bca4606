"""The seed of a run of the tests, and what is tried in turn: too long to be tried in every run, it is drawn."""

import os
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")

# Handed down by the environment, so that all processes of a parallel run draw from one seed.
SEED = int(os.environ.setdefault("MMKERNELS_TEST_SEED", str(random.randrange(2**31))))


def some(choices: Iterable[T], count: int = 1) -> list[T]:
    """`count` of them, in their order; all, if there are no more."""
    choices = list(choices)
    drawn = random.Random(f"{SEED} {choices}").sample(range(len(choices)), min(count, len(choices)))
    return [choices[i] for i in sorted(drawn)]
