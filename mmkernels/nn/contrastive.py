"""The contrastive losses as modules, with open_clip's constructors and calls."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.contrastive import clip_loss, siglip_loss


class ClipLoss(nn.Module):
    """`open_clip.loss.ClipLoss` over `mmkernels.clip_loss`: same arguments, same result, no N x N logits.

    One process for now: `world_size` above 1 raises ValueError. `local_loss`, `gather_with_grad`, `cache_labels` and
    `use_horovod` say how open_clip gathers across processes and caches its labels; with one they change nothing.
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
        loss = clip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`open_clip.loss.SigLipLoss` over `mmkernels.siglip_loss`: same arguments, same result, no N x N logits.

    One process for now: `world_size` above 1 raises ValueError, so `dist_impl`, how open_clip exchanges texts between
    processes ("bidir", "shift", "reduce", "gather"), changes nothing.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
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

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of `mmkernels.siglip_loss`, or {"contrastive_loss": loss} if `output_dict`."""
        loss = siglip_loss(image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss


def _check_world_size(name: str, world_size: int) -> None:
    if world_size != 1:
        raise ValueError(
            f"{name}: world_size is {world_size}; this version computes the loss of one process only. Use open_clip's "
            f"{name} across processes, or world_size=1 for each process's own pairs"
        )
