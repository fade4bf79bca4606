"""Fused kernels for multimodal models, as drop-in torch modules with a plain PyTorch reference each."""

import torch  # noqa: F401  (first: the compiled core shares torch's OpenMP runtime)

from . import nn
from .backends import BackendUnavailable, explain, use_backend
from .ops.contrastive import clip_loss, siglip_loss
from .ops.patch_embed import patch_embed

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "clip_loss",
    "explain",
    "nn",
    "patch_embed",
    "siglip_loss",
    "use_backend",
]
