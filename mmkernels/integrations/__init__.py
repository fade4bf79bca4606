"""mmkernels inside the models that people already have."""

from .accelerate import accelerate, restore
from .compare import compare
from .comparison import Comparison
from .report import Entry, Report

__all__ = ["Comparison", "Entry", "Report", "accelerate", "compare", "restore"]
