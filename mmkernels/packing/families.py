"""What the inputs of a family of models need, beside being laid end to end, to be packed. Imports torch only.

A family is a `config.model_type` of transformers. What is said here was compared, family by family, with the documents
computed one at a time (`mmkernels.packing.assert_equal_to_separate`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """first_position: number of a document's first token. mrope: tokens are numbered along several axes, by the model's
    get_rope_index. images_in_a_row: pixel values are (1, images, ...), not (images, ...)."""

    first_position: int = 0
    mrope: bool = False
    images_in_a_row: bool = False


_PLAIN = Family()
_ROW = Family(images_in_a_row=True)
_MROPE = Family(mrope=True)

FAMILIES = {
    **dict.fromkeys(
        (
            "aria", "aya_vision", "chameleon", "cohere2_vision", "deepseek_vl", "emu3", "fuyu", "gemma3", "gemma4",
            "got_ocr2", "internvl", "janus", "lighton_ocr", "llama4", "llava", "llava_next", "llava_onevision",
            "mistral3", "molmo2", "ovis2", "video_llama_3", "vipllava",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(("idefics", "idefics2", "idefics3", "mllama", "smolvlm"), _ROW),
    **dict.fromkeys(
        (
            "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
            "qwen3_vl_moe",
        ),
        _MROPE,
    ),
    "paligemma": Family(first_position=1),
}  # fmt: skip


class RopeIndex:
    """`get_rope_index` of a model without the model: its class and its config, which pickle into a worker in a few
    kilobytes, where a bound method takes all weights along."""

    def __init__(self, model: nn.Module) -> None:
        self.owner, self.config = type(getattr(model, "model", model)), model.config

    def __getattr__(self, name: str):
        if name.startswith("__") or name in ("owner", "config"):
            raise AttributeError(name)
        return getattr(self.owner, name).__get__(self)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """(3, 1, L): the time, height and width of each token of one document."""
        return self.owner.get_rope_index(self, **inputs)[0]


def positions(document: dict[str, Tensor], family: Family, rope_index: RopeIndex | None) -> Tensor:
    """Of one document's tokens, as its family numbers them: (1, L), or (4, 1, L), the text's own first."""
    length = document["input_ids"].shape[1]
    text = torch.arange(family.first_position, family.first_position + length)[None]
    if not family.mrope:
        return text
    kinds = document.get("mm_token_type_ids")
    if kinds is None or not bool(kinds.any()):
        return text.expand(4, 1, -1).clone()
    grids = {name: document[name] for name in ("image_grid_thw", "video_grid_thw") if name in document}
    axes = rope_index(input_ids=document["input_ids"], mm_token_type_ids=kinds, **grids)
    return torch.cat([text[None], axes])
