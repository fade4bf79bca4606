"""Fused kernels for multimodal models, as drop-in torch modules with a plain PyTorch reference each."""

import torch  # noqa: F401  (first: the compiled core shares torch's OpenMP runtime)

from . import nn
from ._version import __version__
from .backends import BackendUnavailable, explain, use_backend
from .ops.contrastive import clip_loss, siglip_loss
from .ops.patch_embed import patch_embed

__all__ = [
    "BackendUnavailable",
    "__version__",
    "clip_loss",
    "explain",
    "nn",
    "patch_embed",
    "siglip_loss",
    "use_backend",
]
