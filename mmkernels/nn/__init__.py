"""Drop-in modules over the ops."""

from .contrastive import ClipLoss, SigLipLoss
from .patch_embed import PatchConv2d, PatchConv3d, PatchEmbed

__all__ = ["ClipLoss", "PatchConv2d", "PatchConv3d", "PatchEmbed", "SigLipLoss"]
