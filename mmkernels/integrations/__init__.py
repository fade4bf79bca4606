"""mmkernels inside the models that people already have."""

from .accelerate import accelerate, restore
from .report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]
