"""open_clip's losses over ours: the same modules, with their ranks and modes, and no N x N logits.

Its models are torch.nn's and timm's modules, which other finders know.
"""

from __future__ import annotations

import inspect
import types

from open_clip import loss as losses
from torch import nn

from .. import nn as ours
from .finding import Finding
from .swap import plain_class

_SIGNATURE = ["self", "image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]
_WITHOUT_OTHERS = "loss, without what other ranks' softmaxes say of its features (gather_with_grad is False)"


class _ClipLoss(ours.ClipLoss, losses.ClipLoss):
    """What CoCaLoss calls as its base."""


def coca_loss(plain: type) -> type:
    """CoCaLoss adds a loss of its own to its base's: ours comes between the two."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return types.new_class(plain.__name__, (plain, _ClipLoss), exec_body=lambda body: body.update(names))


def fits() -> str | None:
    return None


def swapped(model: nn.Module) -> None:
    pass


def restored(model: nn.Module) -> None:
    pass


def find(module: nn.Module, path: str, parent: nn.Module | None) -> list[Finding]:
    if not isinstance(module, (losses.ClipLoss, losses.SigLipLoss)):
        return []
    reason = _why_left(module)
    if reason is not None:
        return [Finding("loss", left=reason)]
    part = {losses.ClipLoss: ours.ClipLoss, losses.SigLipLoss: ours.SigLipLoss, losses.CoCaLoss: coca_loss}
    partial = getattr(module, "local_loss", False) and not module.gather_with_grad and module.world_size > 1
    return [Finding("loss", parts=(part[plain_class(module)],), what=_WITHOUT_OTHERS if partial else None)]


def _why_left(loss: nn.Module) -> str | None:
    cls = plain_class(loss)
    if cls is losses.DistillClipLoss:
        return "it learns from a teacher's logits, all N x N of them"
    if cls not in (losses.ClipLoss, losses.SigLipLoss, losses.CoCaLoss):
        return "a subclass of open_clip's loss, which mmkernels does not know"
    base = losses.SigLipLoss if cls is losses.SigLipLoss else losses.ClipLoss
    if list(inspect.signature(base.forward).parameters) != _SIGNATURE:
        return (
            f"the {base.__name__} of this open_clip is called otherwise than that of open_clip 3, with its logit_bias"
        )
    if {"get_logits", "get_ground_truth"} & vars(loss).keys():
        return "the instance has logits or labels of its own"
    if getattr(loss, "use_horovod", False) and loss.world_size > 1:
        return "it exchanges by Horovod; mmkernels by torch.distributed alone"
    return None
