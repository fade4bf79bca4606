"""The contrastive losses as modules, with open_clip's constructors and calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.contrastive import clip_loss, siglip_loss


class ClipLoss(nn.Module):
    """`open_clip.loss.ClipLoss` over `mmkernels.clip_loss`: same arguments, same result, no N x N logits.

    One process for now: `world_size` above 1 raises ValueError. `local_loss`, `gather_with_grad`, `cache_labels` and
    `use_horovod` say how open_clip gathers across processes and caches its labels; with one they change nothing.

    A subclass with a `get_logits` or `get_ground_truth` of its own has its loss computed from them, N x N logits and
    all, as open_clip's `forward` does.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        _check_world_size(type(self).__name__, world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of `mmkernels.clip_loss`, or {"contrastive_loss": loss} if `output_dict`."""
        if _has_own(self, ClipLoss):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, logits[0].shape[0])
            loss = sum(F.cross_entropy(x, labels) for x in logits) / 2
        else:
            loss = clip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The N x N logits of images by texts and of texts by images, for who wants to see them."""
        logits = logit_scale * image_features @ text_features.T + (0.0 if logit_bias is None else logit_bias)
        return logits, logits.T

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        return torch.arange(num_logits, device=device)


class SigLipLoss(nn.Module):
    """`open_clip.loss.SigLipLoss` over `mmkernels.siglip_loss`: same arguments, same result, no N x N logits.

    One process for now: `world_size` above 1 raises ValueError, so `dist_impl`, how open_clip exchanges texts between
    processes ("bidir", "shift", "reduce", "gather"), changes nothing; nor does `chunk_size`, by how many rows newer
    versions cut their logits. Of subclasses, as for `ClipLoss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        _check_world_size(type(self).__name__, world_size)
        accepted = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in accepted:
            raise ValueError(f"SigLipLoss: dist_impl is {dist_impl!r}; accepted are {', '.join(map(repr, accepted))}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of `mmkernels.siglip_loss`, or {"contrastive_loss": loss} if `output_dict`."""
        if _has_own(self, SigLipLoss):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, image_features.dtype, len(image_features))
            loss = -F.logsigmoid(labels * logits).sum() / len(image_features)
        else:
            loss = siglip_loss(image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The N x N logits of images by texts, for who wants to see them."""
        return logit_scale * image_features @ text_features.T + (0.0 if logit_bias is None else logit_bias)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return labels if negative_only else labels + 2 * torch.eye(num_logits, device=device, dtype=dtype)


def _has_own(loss: nn.Module, cls: type) -> bool:
    """Whether a subclass, or the loss itself, says what the logits or labels are."""
    names = ("get_logits", "get_ground_truth")
    return any(name in vars(loss) or getattr(type(loss), name) is not getattr(cls, name) for name in names)


def _check_world_size(name: str, world_size: int) -> None:
    if world_size != 1:
        raise ValueError(
            f"{name}: world_size is {world_size}; this version computes the loss of one process only. Use open_clip's "
            f"{name} across processes, or world_size=1 for each process's own pairs"
        )
