"""Measurements: cases, peers, timing, gated by correctness. One definition for the CLI and for benchmarks/."""

from .cases import CASES, GROWTH
from .op import DTYPES, PASSES
from .runner import Report, Request, run

__all__ = ["CASES", "DTYPES", "GROWTH", "PASSES", "Report", "Request", "run"]
