"""open_clip's configurations, each with its towers cut down."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

from .cases import Case
from .subject import CannotBeBuilt, Subject, first_that_runs

HAS_NAMES = False
MOST_PARAMETERS = 60_000_000
VISION = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"layers": 2, "width": 64, "heads": 4, "context_length": 16, "vocab_size": 100}
# Towers of timm by the start of their names: no argument of open_clip's cuts them; timm has small ones of their kind.
TIMM = {
    "vit_": "test_vit",
    "convnext": "test_convnext",
    "eva02": "eva02_tiny_patch14_224",
    "eva": "eva02_tiny_patch14_224",
}
TIMM |= {"swin": "swin_tiny_patch4_window7_224", "vitamin": "vitamin_small_224", "fastvit_mci": "fastvit_mci0"}
KEPT = ("vit_base_mci_224", "vit_relpos", "vit_pe_core")


def version() -> str:
    return open_clip.__version__


def cases(families: Collection[str] = ()) -> list[Case]:
    """One of all configurations that are the same when cut down. Families: clip, siglip, coca, and those that read text
    with a model of transformers, or see with one of timm."""
    found: dict[str, Case] = {}
    for name in open_clip.list_models():
        config = _cut(name)
        family = _family(name, config)
        if not families or family in families:
            found.setdefault(json.dumps(config, sort_keys=True), Case("open_clip", family, name))
    return sorted(found.values(), key=lambda case: case.key)


def _family(name: str, config: dict[str, Any]) -> str:
    if "multimodal_cfg" in config:
        return "coca"
    if "hf_model_name" in config["text_cfg"]:
        return "text of transformers"
    if "init_logit_bias" in config:
        return "siglip"
    return "vision of timm" if "timm_model_name" in config["vision_cfg"] else "clip"


def _cut(name: str) -> dict[str, Any]:
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["embed_dim"] = 32
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        known = vision["timm_model_name"]
        stem = next((x for x in TIMM if known.startswith(x)), None)
        if stem and not known.startswith(KEPT):
            vision["timm_model_name"] = TIMM[stem]
        if vision["timm_model_name"].startswith("test_"):
            vision["image_size"] = 160
        vision["timm_model_pretrained"] = False
    else:
        vision |= VISION
        if isinstance(open_clip.get_model_config(name)["vision_cfg"]["layers"], list):
            vision |= {"layers": [1, 1, 1, 1], "width": 32, "image_size": 64}
        if "attn_pooler_heads" in vision or vision.get("attentional_pool"):
            vision["attn_pooler_heads"] = 4
    if "hf_model_name" not in text:
        text |= TEXT
        text.pop("hf_tokenizer_name", None)
        text.pop("tokenizer_kwargs", None)
        if text.get("eos_id"):
            text["eos_id"] = 2
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 2, "width": 64, "heads": 4, "context_length": 16, "vocab_size": 100}
    return config


def subject(case: Case) -> Subject:
    return first_that_runs([("tiny", lambda: _build(case.name))], _candidates)


def _build(name: str) -> nn.Module:
    config = _cut(name)
    if "hf_model_name" in config["text_cfg"]:
        raise CannotBeBuilt(f"wants the configuration of {config['text_cfg']['hf_model_name']} from the hub")
    custom = config.pop("custom_text", False)
    make: Callable[..., nn.Module] = CustomTextCLIP if custom else CLIP
    if "multimodal_cfg" in config:
        from open_clip.coca_model import CoCa

        make = CoCa
    with torch.device("meta"):
        try:
            count = sum(p.numel() for p in make(**config).parameters())
        except (RuntimeError, NotImplementedError):
            count = 0
    if count > MOST_PARAMETERS:
        raise CannotBeBuilt(f"{count / 1e6:.0f} million parameters at its smallest")
    more = {} if "multimodal_cfg" in config else {"output_dict": True}
    return make(**config, **more)


class _Candidate:
    padded = False

    def __init__(self, size: int):
        torch.manual_seed(0)
        text = torch.randint(3, 90, (3, 16))
        text[:, 12:], text[:, 11] = 0, 99  # the end of the text has the largest number
        self.holds, self.values = "images, text", {"image": torch.randn(3, 3, size, size), "text": text}

    def make(self, side: str) -> dict:
        return self.values


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    size = model.visual.image_size
    yield _Candidate(size[0] if isinstance(size, (tuple, list)) else size)
