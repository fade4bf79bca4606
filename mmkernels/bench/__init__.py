"""Measurements: cases, peers, timing, gated by correctness. One definition for the CLI and for benchmarks/."""

from .cases import CASES
from .op import DTYPES, PASSES
from .runner import Report, Request, run

__all__ = ["CASES", "DTYPES", "PASSES", "Report", "Request", "run"]
