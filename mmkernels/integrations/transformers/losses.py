"""The losses of CLIP and SigLIP inside transformers' models, without the N x N logits that their outputs hold.

`LOSSES` has a mixin for each model whose loss is one of the two. With return_loss=True the model's own forward runs,
except that its logits are computed only if they are read (`lazy_logits`), and that a fused loss takes their place:
float32 whatever the model's dtype, and the model's own where no kernel serves it. Derivatives of the loss do not pass
through the logits. Any other call is the model's own, and so is every call under torch.compile, whose graphs return
tensors.

`why_left` says of the other models with a contrastive loss why it is left to them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends
from ...ops.contrastive import clip_loss, siglip_loss
from .._tracing import is_traced
from ..report import count_fallback
from ..swap import plain_class
from .lazy_logits import Logits, lazy, putting_off


class _ContrastiveLoss:
    """Mixed into a model before its class; `forward` keeps the signature that the model's own has."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        plain = getattr(super(), "forward", None)
        if plain is None or cls.forward is not plain:  # a mixin, or a class made of a swapped one
            return
        places = {name: place for place, name in enumerate([*inspect.signature(plain).parameters][1:])}  # without self

        @functools.wraps(plain)
        def forward(self, *args, **kwargs):
            if torch.compiler.is_compiling() or is_traced():
                return plain(self, *args, **kwargs)
            return self._forward(plain, _Call(places, args, kwargs))

        cls.forward = forward

    def _forward(self, plain: Callable, call: _Call):
        if not call.given("return_loss"):
            return plain(self, *call.args, **call.kwargs)
        own_loss = self._own_loss(inspect.unwrap(plain))
        returns_tuple = _returns_tuple(self.config, call.given("return_dict"))
        if own_loss is None or returns_tuple:
            count_fallback(self, "a tuple is returned" if returns_tuple else "a loss that mmkernels does not know")
            return plain(self, *call.args, **call.kwargs)
        without = call.put("return_loss", None)
        output = putting_off(plain)(self, *without.args, **without.kwargs)
        logits = output.logits_per_text
        if logits is None:  # one of the two inputs is missing, and the model lets it be
            return output
        output["loss"] = self._loss(logits, own_loss)
        output.move_to_end("loss", last=False)
        return lazy(output)

    def _loss(self, logits: Logits | Tensor, own_loss: Callable[[Tensor], Tensor]) -> Tensor:
        reason = self._why_own(logits, own_loss)
        if reason is None:
            return self._fused(logits, backends.of_module(self))
        count_fallback(self, reason)
        return own_loss(logits.tensor() if isinstance(logits, Logits) else logits)

    def _why_own(self, logits: Logits | Tensor, own_loss: Callable[[Tensor], Tensor]) -> str | None:
        """Why the model's own loss serves the call; None: it does not."""
        if not isinstance(logits, Logits) or logits.is_computed or not self._is_known(logits, own_loss):
            return "a loss that mmkernels does not know"
        image, text = logits.columns, logits.rows
        if image.shape != text.shape or 0 in image.shape:
            return "images and texts that are not pairs"
        if backends.of_module(self) is None and not backends.has_kernel("contrastive", image, text):
            return f"no kernel serves {image.dtype} on {image.device.type}"
        return None

    def _own_loss(self, forward: Callable) -> Callable[[Tensor], Tensor] | None:
        """The loss that `forward`, without its decorators, takes of its logits; None: not known."""
        raise NotImplementedError

    def _is_known(self, logits: Logits, own_loss: Callable[[Tensor], Tensor]) -> bool:
        raise NotImplementedError

    def _fused(self, logits: Logits, backend: str | None) -> Tensor:
        raise NotImplementedError


class ClipLoss(_ContrastiveLoss):
    """A function of the model's module computes the loss of logits; whatever is there at a call, it is compared."""

    label_smoothing = 0.0

    def _own_loss(self, forward):
        functions = list(_losses_called_by(forward))
        return functions[0] if len(functions) == 1 else None

    def _is_known(self, logits, own_loss):
        inner = tuple(_losses_called_by(own_loss))
        return logits.scale is not None and logits.bias is None and _is_clips(own_loss, inner, self.label_smoothing)

    def _fused(self, logits, backend):
        scale = logits.scale.to(logits.device)
        return clip_loss(logits.columns, logits.rows, scale, label_smoothing=self.label_smoothing, backend=backend)


class AlignLoss(ClipLoss):
    label_smoothing = 0.1


class SiglipLoss(_ContrastiveLoss):
    """The loss stands in the forward itself; it is known by its wording."""

    def _own_loss(self, forward):
        return _siglips if _is_worded_as_siglips(forward) else None

    def _is_known(self, logits, own_loss):
        return logits.scale is not None and logits.bias is not None

    def _fused(self, logits, backend):
        scale, bias = logits.scale.to(logits.device), logits.bias.to(logits.device)
        return siglip_loss(logits.columns, logits.rows, scale, bias, backend=backend)


class _Call:
    """The arguments of a call, by the names that a function with parameters at these places gives them."""

    def __init__(self, places: dict[str, int], args: tuple, kwargs: dict):
        self.places, self.args, self.kwargs = places, args, kwargs

    def _place(self, name: str) -> int | None:
        place = self.places.get(name, len(self.args))
        return place if place < len(self.args) else None

    def given(self, name: str):
        place = self._place(name)
        return self.kwargs.get(name) if place is None else self.args[place]

    def put(self, name: str, value) -> _Call:
        place = self._place(name)
        if place is None:
            return _Call(self.places, self.args, self.kwargs | {name: value})
        return _Call(self.places, (*self.args[:place], value, *self.args[place + 1 :]), self.kwargs)


def _returns_tuple(config, return_dict: bool | None) -> bool:
    if return_dict is None:
        return not config.return_dict or getattr(config, "torchscript", False)
    return not return_dict


# ---- which loss a model's own is


def _losses_called_by(function: Callable) -> Iterator[Callable]:
    """The functions of its module that are named a loss, as they are now."""
    code = getattr(function, "__code__", None)
    for name in () if code is None else code.co_names:
        called = function.__globals__.get(name)
        if name.endswith("_loss") and callable(called):
            yield called


@functools.cache
def _is_clips(function: Callable, inner: tuple[Callable, ...], label_smoothing: float) -> bool:
    """Whether it makes CLIP's loss of a few logits: a user may have put another in its place, or in that of one of
    those it calls, `inner`, and another version of transformers may write another."""
    logits = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0], [-0.5, 2.0, 1.5]], device="cpu", dtype=torch.float64)
    labels = torch.arange(3, device="cpu")
    ways = (F.cross_entropy(x, labels, label_smoothing=label_smoothing) for x in (logits, logits.t()))
    try:
        return torch.allclose(function(logits), sum(ways) / 2)
    except Exception:  # of a stranger's function
        return False


_SIGLIPS = """
eye = torch.eye(logits_per_text.size(0), device=logits_per_text.device)
m1_diag1 = -torch.ones_like(logits_per_text) + 2 * eye
loglik = torch.nn.functional.logsigmoid(m1_diag1 * logits_per_text)
nll = -torch.sum(loglik, dim=-1)
loss = nll.mean()
"""


def _siglips(logits: Tensor) -> Tensor:
    signs = -torch.ones_like(logits) + 2 * torch.eye(logits.size(0), device=logits.device)
    return -torch.sum(F.logsigmoid(signs * logits), dim=-1).mean()


@functools.cache
def _is_worded_as_siglips(forward: Callable) -> bool:
    lines = [line.strip() for line in _source(forward).splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("#")).find(_SIGLIPS.strip()) >= 0


def _source(function: Callable) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (TypeError, OSError):
        return ""


_MODELS = "transformers.models."

LOSSES: dict[str, type] = {
    _MODELS + "align.modeling_align.AlignModel": AlignLoss,
    _MODELS + "altclip.modeling_altclip.AltCLIPModel": ClipLoss,
    _MODELS + "blip.modeling_blip.BlipModel": ClipLoss,
    _MODELS + "chinese_clip.modeling_chinese_clip.ChineseCLIPModel": ClipLoss,
    _MODELS + "clip.modeling_clip.CLIPModel": ClipLoss,
    _MODELS + "clipseg.modeling_clipseg.CLIPSegModel": ClipLoss,
    _MODELS + "clvp.modeling_clvp.ClvpModelForConditionalGeneration": ClipLoss,
    _MODELS + "groupvit.modeling_groupvit.GroupViTModel": ClipLoss,
    _MODELS + "metaclip_2.modeling_metaclip_2.MetaClip2Model": ClipLoss,
    _MODELS + "owlv2.modeling_owlv2.Owlv2Model": ClipLoss,
    _MODELS + "owlvit.modeling_owlvit.OwlViTModel": ClipLoss,
    _MODELS + "siglip.modeling_siglip.SiglipModel": SiglipLoss,
    _MODELS + "siglip2.modeling_siglip2.Siglip2Model": SiglipLoss,
    _MODELS + "tipsv2.modeling_tipsv2.Tipsv2Model": ClipLoss,
    _MODELS + "vision_text_dual_encoder.modeling_vision_text_dual_encoder.VisionTextDualEncoderModel": ClipLoss,
}

# ---- what is left

_OTHER_PAIRS = "its loss takes log 2 of every pair that does not belong together; SigLIP's pushes such pairs apart"
_SAMPLED = "its loss draws other frames for each frame to tell it from; CLIP's takes the whole batch"

LEFT: dict[str, str] = {
    _MODELS + "bridgetower.modeling_bridgetower.BridgeTowerForContrastiveLearning": (
        "its loss is the mean of three, each of one direction: text to image, and either to both; CLIP's has two ways"
    ),
    _MODELS + "clap.modeling_clap.ClapModel": (
        "its loss has two scales, and its softmax runs over the sounds both times; CLIP's has one, and runs both ways"
    ),
    _MODELS + "flava.modeling_flava.FlavaForPreTraining": (
        "its loss takes the pairs of all processes, but for those that it skips, and is one of several"
    ),
    _MODELS + "oneformer.modeling_oneformer.OneFormerLoss": (
        "its loss contrasts the queries of an image with those of a text, beside losses of masks and classes"
    ),
    _MODELS + "pe_audio.modeling_pe_audio.PeAudioModel": _OTHER_PAIRS,
    _MODELS + "pe_audio.modeling_pe_audio.PeAudioFrameLevelModel": _OTHER_PAIRS,
    _MODELS + "pe_audio_video.modeling_pe_audio_video.PeAudioVideoModel": _OTHER_PAIRS,
    _MODELS + "pe_video.modeling_pe_video.PeVideoModel": _OTHER_PAIRS,
    _MODELS + "roc_bert.modeling_roc_bert.RoCBertForPreTraining": (
        "its loss contrasts texts with altered ones in one direction only, beside that of masked words"
    ),
    _MODELS + "videoprism.modeling_videoprism.VideoPrismClipModel": (
        "its loss is the sigmoid loss of probabilities; SigLIP's is that of logits"
    ),
    _MODELS + "wav2vec2.modeling_wav2vec2.Wav2Vec2ForPreTraining": _SAMPLED,
    _MODELS + "wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2ConformerForPreTraining": _SAMPLED,
    _MODELS + "x_clip.modeling_x_clip.XCLIPModel": (
        "its loss has a text of its own for each video, so that its logits are no product of two matrices"
    ),
}


def why_left(module: nn.Module) -> str | None:
    """Why the contrastive loss that a module computes in its forward is left as it is; None where it computes none, or
    one that LOSSES has."""
    cls = plain_class(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name in LOSSES or isinstance(module, _ContrastiveLoss):
        return None
    return LEFT.get(name) or ("a contrastive loss that mmkernels does not know" if _is_contrastive(cls) else None)


@functools.cache
def _is_contrastive(cls: type) -> bool:
    if cls.__module__.startswith(("torch.", "mmkernels.")):
        return False
    forward = inspect.unwrap(cls.forward)
    source = _source(forward)
    if not any(word in source for word in ("contrastive_loss", "clip_loss", "logsigmoid")):
        return False
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return any(_is_contrastive_call(call, forward.__globals__) for call in calls)


def _is_contrastive_call(call: ast.Call, names: dict) -> bool:
    path = ast.unparse(call.func).split(".")
    if path[-1] == "logsigmoid":
        return any("logit" in ast.unparse(argument) for argument in call.args)
    if "contrastive_loss" not in path[-1] and "clip_loss" not in path[-1]:
        return False
    called = functools.reduce(lambda holder, name: getattr(holder, name, None), path[1:], names.get(path[0]))
    return not getattr(called, "__module__", "").startswith("mmkernels.")
