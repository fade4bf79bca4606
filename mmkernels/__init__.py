"""Fused kernels for multimodal models, as drop-in torch modules with a plain PyTorch reference each."""

import torch  # noqa: F401  (first: the compiled core shares torch's OpenMP runtime)

from . import nn
from ._version import __version__
from .backends import BackendUnavailable, explain, use_backend
from .integrations import accelerate, compare, restore
from .ops._comm import DistributedError
from .ops.contrastive import clip_loss, siglip_loss
from .ops.patch_embed import patch_embed
from .ops.rotary_embed import rotary_embed
from .ops.similarity import max_similarity, nearest_code
from .ops.span_attention import span_attention
from .spans import RowSpans

__all__ = [
    "BackendUnavailable",
    "DistributedError",
    "RowSpans",
    "__version__",
    "accelerate",
    "clip_loss",
    "compare",
    "explain",
    "max_similarity",
    "nearest_code",
    "nn",
    "patch_embed",
    "restore",
    "rotary_embed",
    "siglip_loss",
    "span_attention",
    "use_backend",
]
