"""Drop-in modules over the ops."""

from .attention import SpanCrossAttention, SpanSelfAttention
from .contrastive import ClipLoss, SigLipLoss
from .gated_cross_attention import GatedCrossAttentionBlock
from .patch_embed import PatchConv2d, PatchConv3d, PatchEmbed
from .perceiver import PerceiverResampler

__all__ = [
    "ClipLoss",
    "GatedCrossAttentionBlock",
    "PatchConv2d",
    "PatchConv3d",
    "PatchEmbed",
    "PerceiverResampler",
    "SigLipLoss",
    "SpanCrossAttention",
    "SpanSelfAttention",
]
