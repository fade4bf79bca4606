"""Documents of every family that packs, as its processor would give them one at a time, and small random models.

A document is laid out by the lengths of its texts, and "i" for a picture: [3, "i", 5].
"""

import copy
from collections.abc import Callable

import torch
import transformers as hf
from families import FAMILIES, IMAGE, TEXT, TOWER, VISION, drawn, llama
from torch import Tensor
from torch.nn.functional import pad

PLACE = 99  # the token of a picture whose features do not take tokens' places (mllama, idefics)
LAYOUTS = [[3, "i", 5], [2, "i", 3, "i", 4], [7], [4, "i"], ["i", 6], [1], [2, "i", 2]]
OF_PICTURES = [[3, "i", 5], [2, "i", 3, "i", 4], ["i", 6], [2, "i", 2]]  # of families that take no text alone


SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {**TOWER, "model_type": "pixtral"}
QWEN2 = {**TEXT, "model_type": "qwen2"}
COHERE2 = {**TEXT, "model_type": "cohere2", "sliding_window": 6}
COHERE2 |= {"layer_types": ["sliding_attention", "full_attention"]}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": 102, "vision_start_token_id": 103, "vision_end_token_id": 104}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


def of_parts(name: str, vision: dict, text: dict, **more) -> Callable[[], hf.PreTrainedModel]:
    """A model of a tower and of a language model, by the name that its classes begin with."""

    def build() -> hf.PreTrainedModel:
        parts = copy.deepcopy({"vision_config": vision, "text_config": text})  # configs write into rope_parameters
        config = getattr(hf, f"{name}Config")(**parts, **more)
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return build


def glm4v(name: str, **text) -> Callable[[], hf.PreTrainedModel]:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "image_size": 16}
    tokens = {"image_token_id": IMAGE, "video_token_id": 102, "image_start_token_id": 103, "image_end_token_id": 104}
    text = {**TEXT, "rope_parameters": MROPE, **text}
    return of_parts(name, {**vision, "out_hidden_size": 32}, text, **tokens)


BUILDS = {family.name: family.build for family in FAMILIES} | {
    "smolvlm": of_parts("SmolVLM", TOWER, llama(), scale_factor=2, image_token_id=IMAGE),
    "mistral3": of_parts(
        "Mistral3",
        PIXTRAL,
        {**TEXT, "model_type": "mistral", "sliding_window": 6},
        image_token_index=IMAGE,
    ),
    "llava_onevision": of_parts(
        "LlavaOnevision",
        SIGLIP,
        QWEN2,
        image_token_index=IMAGE,
        video_token_index=102,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    ),
    "vipllava": of_parts(
        "VipLlava",
        {**TOWER, "model_type": "clip_vision_model"},
        llama(),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, 0],
    ),
    "aya_vision": of_parts("AyaVision", SIGLIP, COHERE2, image_token_index=IMAGE),
    "cohere2_vision": of_parts("Cohere2Vision", SIGLIP, COHERE2, image_token_id=IMAGE, alignment_intermediate_size=48),
    "deepseek_vl": of_parts("DeepseekVL", SIGLIP, llama(), image_token_id=IMAGE),
    "got_ocr2": of_parts(
        "GotOcr2",
        {**TOWER, "patch_size": 4, "output_channels": 16, "mlp_dim": 48, "window_size": 3, "global_attn_indexes": [1]},
        QWEN2,
        image_token_index=IMAGE,
    ),
    "ovis2": of_parts(
        "Ovis2",
        {**TOWER, "vocab_size": 20, "hidden_stride": 2},
        QWEN2,
        image_token_id=IMAGE,
        visual_indicator_token_ids=[103, 104, 105, 106, 107],
        vocab_size=120,
        hidden_size=32,
    ),
    "video_llama_3": of_parts(
        "VideoLlama3", {**VISION, "patch_size": 4}, QWEN2, image_token_id=IMAGE, video_token_id=102
    ),
    "lighton_ocr": of_parts(
        "LightOnOcr",
        PIXTRAL,
        {**TEXT, "model_type": "qwen3"},
        image_token_id=IMAGE,
    ),
    "paddleocr_vl": of_parts(
        "PaddleOCRVL",
        {**VISION, "patch_size": 4, "image_size": 16},
        {**TEXT, "rope_parameters": MROPE},
        **TOKENS,
    ),
    "glm4v": glm4v("Glm4v"),
    "glm46v": glm4v("Glm46V"),
    "glm_ocr": glm4v("GlmOcr"),
    "glm4v_moe": glm4v("Glm4vMoe", head_dim=16, n_routed_experts=4, first_k_dense_replace=1, **EXPERTS),
    "qwen3_vl_moe": of_parts(
        "Qwen3VLMoe",
        {
            **{"depth": 2, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48},
            **{"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
        {**TEXT, "rope_parameters": MROPE, "num_experts": 4, **EXPERTS},
        **TOKENS,
    ),
}
NAMES = [
    "llava", "llava_next", "llava_onevision", "vipllava", "idefics", "idefics2", "idefics3", "smolvlm", "qwen2_vl",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "paddleocr_vl",
    "video_llama_3", "pixtral", "mistral3", "lighton_ocr", "gemma3", "gemma4", "paligemma", "mllama", "internvl",
    "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "got_ocr2", "ovis2", "fuyu", "janus", "emu3", "chameleon",
    "molmo2", "llama4",
]  # fmt: skip
IN_GRIDS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "paddleocr_vl",
    "video_llama_3",
)  # fmt: skip


def model_of(name: str, seed: int = 0) -> hf.PreTrainedModel:
    torch.manual_seed(seed)
    return drawn(BUILDS[name]()).eval()


def documents_of(name: str) -> list[dict[str, Tensor]]:
    layouts = {"idefics": OF_PICTURES, "paligemma": [["i", 8], ["i", 4], ["i", 9], ["i", 6]]}.get(name, LAYOUTS)
    return [document(name, layout, number) for number, layout in enumerate(layouts)]


def document(name: str, layout: list, number: int) -> dict[str, Tensor]:
    ids, kinds, pictures, places = [], [], [], []
    for part in layout:
        if part != "i":
            first = 41 if name in ("chameleon", "emu3") else 3
            ids += torch.randint(first, PLACE, (part,)).tolist()
            kinds += [0] * part
            continue
        before, count, after, tensors = picture(name, number + len(pictures), layout.count("i"))
        places.append(len(ids))
        ids += before + [PLACE if name in ("mllama", "idefics") else IMAGE] * count + after
        kinds += [0] * len(before) + [1] * count + [0] * len(after)
        pictures.append(tensors)
    found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    found |= joined(name, pictures) | kinds_of(name, torch.tensor([kinds]))
    if pictures and name in ("mllama", "idefics"):
        found |= seen_by_text(name, places, pictures, len(ids))
    found["labels"] = found["input_ids"].masked_fill(found["input_ids"] == IMAGE, -100)
    return found


def picture(name: str, number: int, pictures: int) -> tuple[list[int], int, list[int], dict[str, Tensor]]:
    """Tokens before it, how many it takes, tokens after it, and its tensors, pictures first; `pictures`: how many its
    document has."""
    square, sized = torch.randn(1, 3, 32, 32), [(32, 32), (16, 32), (32, 24)][number % 3]
    counts = {"llava": 16, "vipllava": 16, "janus": 16, "paligemma": 16, "deepseek_vl": 16, "idefics": 1}
    counts |= dict.fromkeys(("gemma3", "internvl", "aya_vision", "cohere2_vision", "got_ocr2"), 4)
    if name in counts:
        return [], counts[name], [], {"pixel_values": square}
    if name in ("idefics2", "idefics3", "smolvlm"):
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[:, : sized[0], : sized[1]] = True
        return [], 5 if name == "idefics2" else 4, [], {"pixel_values": square, "pixel_attention_mask": mask}
    if name in IN_GRIDS:
        h, w = [(4, 6), (2, 4), (6, 4)][number % 3]
        patch = {"video_llama_3": (48,), "paddleocr_vl": (3, 4, 4)}.get(name, (96,))
        tensors = {"pixel_values": torch.randn(h * w, *patch), "image_grid_thw": torch.tensor([[1, h, w]])}
        if name == "video_llama_3":
            return [], h * w // 4, [], tensors | {"image_merge_sizes": torch.tensor([2])}
        return [103], h * w // 4, [104], tensors
    if name == "llava_onevision" and pictures > 1:  # of several, none is cut into tiles
        return [], 17, [], {"pixel_values": square[None], "image_sizes": torch.tensor([sized])}
    return OTHERS[name](number)


def _llava_next(number):
    size, tiles, count = [([64, 32], 3, 56), ([64, 64], 5, 88)][number % 2]
    return [], count, [], {"pixel_values": torch.randn(1, tiles, 3, 32, 32), "image_sizes": torch.tensor([size])}


def _pixtral(number):
    h, w = [(4, 4), (2, 3), (3, 4)][number % 3]
    tensors = {"pixel_values": torch.randn(1, 3, h * 8, w * 8), "image_sizes": torch.tensor([[h * 8, w * 8]])}
    return [], h * w, [], tensors


def _mistral3(number):
    h, w = [(4, 4), (2, 4), (4, 2)][number % 3]
    tensors = {"pixel_values": torch.randn(1, 3, h * 8, w * 8), "image_sizes": torch.tensor([[h * 8, w * 8]])}
    return [], h * w // 4, [], tensors


def _gemma4(number):
    """4 x 4 patches, 4 x 2 from a processor that pads to no more, and 4 x 2 padded to 16."""
    seen, room = [(16, 16), (8, 8), (8, 16)][number % 3]
    places = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1)[None, :room].clone()
    places[:, seen:] = -1
    return [], seen // 4, [], {"pixel_values": torch.rand(1, room, 192), "image_position_ids": places}


def _ovis2(number):
    return [103], 4, [104], {"pixel_values": torch.randn(1, 3, 32, 32)}


def _aria(number):
    mask = torch.ones(1, 32, 32, dtype=torch.bool)
    mask[0, 24:] = number % 2 == 0
    return [], 5, [], {"pixel_values": torch.randn(1, 3, 32, 32), "pixel_mask": mask}


def _fuyu(number):
    count = [6, 4, 9][number % 3]
    return [], count, [], {"image_patches": torch.randn(count, 192)}


def _emu3(number):
    return [], 72, [], {"pixel_values": torch.randn(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}


def _chameleon(number):
    return [], 64, [], {"pixel_values": torch.randn(1, 3, 16, 16)}


def _llama4(number):
    return [], 4, [], {"pixel_values": torch.randn(1, 3, 16, 16)}


def _molmo2(number):
    pooling = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4).clone()
    if number % 2:
        pooling[2, 3] = -1
    tensors = {"pixel_values": torch.randn(1, 16, 48), "image_num_crops": torch.ones(1, dtype=torch.long)}
    return [], 4, [], tensors | {"image_token_pooling": pooling, "image_grids": torch.tensor([[2, 2, 0, 0]])}


def _mllama(number):
    tiles = [2, 1][number % 2]
    pixels = torch.zeros(1, 2, 3, 16, 16)
    pixels[:, :tiles] = torch.randn(1, tiles, 3, 16, 16)
    present = torch.tensor([[1, 1 if tiles == 2 else 0]])
    ratio = torch.tensor([2 if tiles == 2 else 1])
    return [], 1, [], {"pixel_values": pixels, "aspect_ratio_ids": ratio, "aspect_ratio_mask": present}


OTHERS = {
    "llava_next": _llava_next, "llava_onevision": _llava_next, "pixtral": _pixtral, "mistral3": _mistral3,
    "lighton_ocr": _mistral3, "gemma4": _gemma4, "ovis2": _ovis2, "aria": _aria, "fuyu": _fuyu, "emu3": _emu3,
    "chameleon": _chameleon, "llama4": _llama4, "molmo2": _molmo2, "mllama": _mllama,
}  # fmt: skip


def joined(name: str, pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of one document, as its processor pads and joins them."""
    found = {}
    for key in pictures[0] if pictures else ():
        parts = [each[key] for each in pictures]
        if key == "image_token_pooling":
            parts = [torch.where(x < 0, x, x + 16 * number) for number, x in enumerate(parts)]
        elif key != "image_patches" and name not in IN_GRIDS:
            shape = [max(x.shape[axis] for x in parts) for axis in range(1, parts[0].dim())]
            widths = [[y - x.shape[axis + 1] for axis, y in enumerate(shape)] for x in parts]
            value = -1 if key == "image_position_ids" else 0
            parts = [
                pad(x, [w for y in reversed(each) for w in (0, y)], value=value)
                for x, each in zip(parts, widths, strict=True)
            ]
        in_a_row = name in ("idefics", "idefics2", "idefics3", "smolvlm", "mllama", "fuyu")
        found[key] = torch.cat(parts)[None] if in_a_row else torch.cat(parts)
    if name == "llava_onevision" and pictures:
        found["batch_num_images"] = torch.tensor([len(pictures)])
    return found


def kinds_of(name: str, kinds: Tensor) -> dict[str, Tensor]:
    if name == "gemma3":
        return {"token_type_ids": kinds}
    if name == "paligemma":  # a prefix to two tokens behind the last picture
        prefix = torch.ones_like(kinds)
        prefix[:, : int(kinds[0].nonzero().max()) + 3] = 0
        return {"token_type_ids": prefix}
    told = ("molmo2", "gemma4", *IN_GRIDS)
    return {"mm_token_type_ids": kinds.int()} if name in told and name != "video_llama_3" else {}


def seen_by_text(name: str, places: list[int], pictures: list[dict], length: int) -> dict[str, Tensor]:
    """Each picture from its place to the next one's."""
    mask = torch.zeros(1, length, len(pictures), 2, dtype=torch.long)
    for number, (start, end, tensors) in enumerate(zip(places, [*places[1:], length], pictures, strict=True)):
        tiles = int(tensors["aspect_ratio_mask"].sum()) if name == "mllama" else 1
        mask[0, start:end, number, :tiles] = 1
    return {"cross_attention_mask": mask} if name == "mllama" else {"image_attention_mask": mask[..., 0]}
