"""The contrastive losses as modules, with open_clip's constructors and calls."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from .._warnings import warn
from ..ops._comm import Comm
from ..ops.contrastive import clip_loss, clip_loss_of_rank, siglip_loss, siglip_loss_of_rank


class ClipLoss(nn.Module):
    """`open_clip.loss.ClipLoss` over `mmkernels.clip_loss`: same arguments, same result, no N x N logits.

    With `world_size` above 1 the loss is that over the pairs of all ranks of torch.distributed's default group, and the
    value and the gradients of the features on each rank are open_clip's in the same mode: with `gather_with_grad` its
    part times the number of ranks, for DDP to average, without for a loop that adds the ranks' up; `local_loss` makes
    the value that of this rank's rows and columns. `local_loss` without `gather_with_grad` is warned of: each rank's
    features lack what the other ranks' softmaxes say of them (measured on 4 ranks: less than half of the gradient, and
    24 % off its direction). The gradient of the scale is that of the whole loss on every rank, but in that mode.
    `cache_labels` changes nothing. `use_horovod` raises ValueError.

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
        if use_horovod and world_size > 1:
            raise ValueError("ClipLoss: use_horovod is True; this package exchanges by torch.distributed alone")
        if local_loss and not gather_with_grad and world_size > 1:
            warn(
                "mmkernels: ClipLoss(local_loss=True, gather_with_grad=False) does not train on the gradient of the "
                "loss: what other ranks' softmaxes say of this rank's features is left out; set gather_with_grad=True"
            )
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
        elif self.world_size == 1:
            loss = clip_loss(image_features, text_features, logit_scale, logit_bias, backend=backends.of_module(self))
        else:
            loss = self._across(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _across(self, image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
        group, backend = _world(type(self).__name__, self.rank, self.world_size), backends.of_module(self)
        if not self.local_loss:
            reduce = "mean" if self.gather_with_grad else "sum"
            return clip_loss(image, text, scale, bias, group=group, reduce=reduce, backend=backend)
        of_rank = clip_loss_of_rank if self.gather_with_grad else _without_other_ranks
        return of_rank(image, text, scale, bias, group, backend)

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

    With `world_size` above 1, over the pairs of all ranks of the default group, with open_clip's value (the mean over
    this rank's images) and gradients (for DDP to average). `dist_impl`, how open_clip exchanges texts ("bidir",
    "shift", "reduce", "gather"), gives the same numbers by all of them, and ours gathers; `chunk_size`, by how many
    rows newer versions cut their logits, changes nothing. Of subclasses, as for `ClipLoss`.
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
            call = image_features, text_features, logit_scale, 0.0 if logit_bias is None else logit_bias
            backend = backends.of_module(self)
            group = None if self.world_size == 1 else _world(type(self).__name__, self.rank, self.world_size)
            loss = siglip_loss(*call, backend=backend) if group is None else siglip_loss_of_rank(*call, group, backend)
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
    own = any(name in vars(loss) or getattr(type(loss), name) is not getattr(cls, name) for name in names)
    if own and loss.world_size > 1:
        raise ValueError(
            f"{type(loss).__name__}: it has a get_logits or get_ground_truth of its own, and world_size is "
            f"{loss.world_size}; what those mean across processes is open_clip's to know: use its {cls.__name__}"
        )
    return own


def _world(name: str, rank: int, world_size: int) -> dist.ProcessGroup:
    """The default group, which has to be what the module was told."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"{name}: world_size is {world_size}, but torch.distributed is not initialised")
    found = dist.get_rank(), dist.get_world_size()
    if found != (rank, world_size):
        raise ValueError(
            f"{name}: it was made for rank {rank} of {world_size}, and this process is rank {found[0]} of {found[1]}"
        )
    return dist.group.WORLD


def _without_other_ranks(
    image: Tensor, text: Tensor, scale, bias, group: dist.ProcessGroup, backend: str | None
) -> Tensor:
    """The mean of two losses of this rank: of its images over all texts, of its texts over all images, as constants."""
    comm, losses = Comm("ClipLoss", group), []
    if image.device.type == "cpu":  # a GPU would be waited for at every step: there they are taken to be equal
        comm.agree({"the number of pairs": len(image)}, (), None, image.device)
    for own, other, what in ((image, text, "texts"), (text, image, "images")):
        every = list(comm.all_gather(other.detach(), [len(other)] * comm.size, what).chunk(comm.size))
        every.insert(0, every.pop(comm.rank))  # this rank's are its rows' own; the others belong to nobody
        losses.append(clip_loss(own, torch.cat(every), scale, bias, direction="image_to_text", backend=backend))
    return sum(losses) / 2
