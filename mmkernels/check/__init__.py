"""The equivalence suite: every backend of every op equals its reference, within an error budget nobody picked."""

from .cases import CASES
from .draw import DTYPES
from .suite import Outcome, run_case, select

__all__ = ["CASES", "DTYPES", "Outcome", "run_case", "select"]
