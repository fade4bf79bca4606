"""Documents of every family that packs, as its processor would give them one at a time, and small random models.

A document is laid out by the lengths of its texts, and "i" for a picture: [3, "i", 5].
"""

import torch
import transformers as hf
from families import FAMILIES, IMAGE, TOWER, drawn, llama
from torch import Tensor
from torch.nn.functional import pad

PLACE = 99  # the token of a picture whose features do not take tokens' places (mllama, idefics)
LAYOUTS = [[3, "i", 5], [2, "i", 3, "i", 4], [7], [4, "i"], ["i", 6], [1], [2, "i", 2]]
OF_PICTURES = [[3, "i", 5], [2, "i", 3, "i", 4], ["i", 6], [2, "i", 2]]  # of families that take no text alone


def smolvlm() -> hf.PreTrainedModel:
    config = hf.SmolVLMConfig(vision_config=TOWER, text_config=llama(), scale_factor=2, image_token_id=IMAGE)
    return hf.SmolVLMForConditionalGeneration(config)


BUILDS = {family.name: family.build for family in FAMILIES} | {"smolvlm": smolvlm}
NAMES = [
    "llava", "llava_next", "idefics", "idefics2", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
    "pixtral", "gemma3", "paligemma", "mllama", "internvl", "aria", "fuyu", "janus", "emu3", "chameleon", "molmo2",
    "llama4",
]  # fmt: skip


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
        before, count, after, tensors = picture(name, number + len(pictures))
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


def picture(name: str, number: int) -> tuple[list[int], int, list[int], dict[str, Tensor]]:
    """Tokens before it, how many it takes, tokens after it, and its tensors, pictures first."""
    square, sized = torch.randn(1, 3, 32, 32), [(32, 32), (16, 32), (32, 24)][number % 3]
    counts = {"llava": 16, "janus": 16, "paligemma": 16, "gemma3": 4, "internvl": 4, "idefics": 1}
    if name in counts:
        return [], counts[name], [], {"pixel_values": square}
    if name in ("idefics2", "idefics3", "smolvlm"):
        mask = torch.zeros(1, 32, 32, dtype=torch.bool)
        mask[:, : sized[0], : sized[1]] = True
        return [], 5 if name == "idefics2" else 4, [], {"pixel_values": square, "pixel_attention_mask": mask}
    if name.startswith("qwen"):
        h, w = [(4, 6), (2, 4), (6, 4)][number % 3]
        grid = torch.tensor([[1, h, w]])
        return [103], h * w // 4, [104], {"pixel_values": torch.randn(h * w, 96), "image_grid_thw": grid}
    return OTHERS[name](number)


def _llava_next(number):
    size, tiles, count = [([64, 32], 3, 56), ([64, 64], 5, 88)][number % 2]
    return [], count, [], {"pixel_values": torch.randn(1, tiles, 3, 32, 32), "image_sizes": torch.tensor([size])}


def _pixtral(number):
    h, w = [(4, 4), (2, 3), (3, 4)][number % 3]
    tensors = {"pixel_values": torch.randn(1, 3, h * 8, w * 8), "image_sizes": torch.tensor([[h * 8, w * 8]])}
    return [], h * w, [], tensors


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
    "llava_next": _llava_next, "pixtral": _pixtral, "aria": _aria, "fuyu": _fuyu, "emu3": _emu3,
    "chameleon": _chameleon, "llama4": _llama4, "molmo2": _molmo2, "mllama": _mllama,
}  # fmt: skip


def joined(name: str, pictures: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of one document, as its processor pads and joins them."""
    found = {}
    for key in pictures[0] if pictures else ():
        parts = [each[key] for each in pictures]
        if key == "image_token_pooling":
            parts = [torch.where(x < 0, x, x + 16 * number) for number, x in enumerate(parts)]
        elif key != "image_patches" and not name.startswith("qwen"):
            shape = [max(x.shape[axis] for x in parts) for axis in range(1, parts[0].dim())]
            widths = [[y - x.shape[axis + 1] for axis, y in enumerate(shape)] for x in parts]
            parts = [pad(x, [w for y in reversed(each) for w in (0, y)]) for x, each in zip(parts, widths, strict=True)]
        in_a_row = name in ("idefics", "idefics2", "idefics3", "smolvlm", "mllama", "fuyu")
        found[key] = torch.cat(parts)[None] if in_a_row else torch.cat(parts)
    return found


def kinds_of(name: str, kinds: Tensor) -> dict[str, Tensor]:
    if name == "gemma3":
        return {"token_type_ids": kinds}
    if name == "paligemma":  # a prefix to two tokens behind the last picture
        prefix = torch.ones_like(kinds)
        prefix[:, : int(kinds[0].nonzero().max()) + 3] = 0
        return {"token_type_ids": prefix}
    return {"mm_token_type_ids": kinds.int()} if name == "molmo2" or name.startswith("qwen") else {}


def seen_by_text(name: str, places: list[int], pictures: list[dict], length: int) -> dict[str, Tensor]:
    """Each picture from its place to the next one's."""
    mask = torch.zeros(1, length, len(pictures), 2, dtype=torch.long)
    for number, (start, end, tensors) in enumerate(zip(places, [*places[1:], length], pictures, strict=True)):
        tiles = int(tensors["aspect_ratio_mask"].sum()) if name == "mllama" else 1
        mask[0, start:end, number, :tiles] = 1
    return {"cross_attention_mask": mask} if name == "mllama" else {"image_attention_mask": mask[..., 0]}
