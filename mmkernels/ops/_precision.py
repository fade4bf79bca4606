"""How exact the user wants products to be."""

from __future__ import annotations

import torch


def tf32_is_allowed() -> bool:
    """Whether matrix products of float32 may round their operands to TF32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    # The older flag raises when the newer one was set, so it is asked only where the newer one does not exist.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
