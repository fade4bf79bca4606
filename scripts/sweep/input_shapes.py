"""The shapes that images, videos, audio and all else come in, by the names of forward's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .sizes import Sizes

ROWS = 2
PREFIX_BY_TYPE = {"gemma3", "paligemma", "gemma3n", "t5gemma2", "git", "colpali", "gemma4"}
# Parameters of get_image_features and its kin, and what forward calls the same thing.
SAME_THING = {"input_features": "input_features", "feature_attention_mask": "input_features_mask"}


@dataclass
class Media:
    """What goes in beside the text: values, or functions that make them; and the kinds of placeholder in the text."""

    holds: str
    values: dict[str, Any]
    kinds: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)  # of placeholders in a batch, where asking does not tell
    text: bool = True


def media(sizes: Sizes, names: set[str], family: str) -> Iterator[Media]:
    """Every combination of a shape of images and one of audio, and without them."""
    images = [*_images(sizes, names), *_videos(sizes, names)]
    audio = [*_audio(sizes, names)]
    nothing = Media("", {})
    for image, sound in product([*images, nothing], [*audio, nothing]):
        holds = " + ".join(x.holds for x in (image, sound) if x.holds)
        yield Media(holds, image.values | sound.values, image.kinds + sound.kinds, image.counts | sound.counts)


# ---- images


def _rows(names: set[str]) -> int:
    return 3 if "return_loss" in names else ROWS


def _images(sizes: Sizes, names: set[str]) -> Iterator[Media]:
    known = ("pixel_values", "image", "pixel_values_images")
    name = sizes.given.get("image_name", next((n for n in known if n in names), None))
    grid = next((n for n in ("image_grid_thw", "grid_thw") if n in names), None)
    if grid and (name or "hidden_states" in names):
        yield _grid(sizes, name or "hidden_states", grid, "image")
    if "flattened_patches" in names:
        yield Media("images", {"flattened_patches": lambda: _numbered_patches(sizes)})
    if "image_patches" in names:
        width = sizes.channels * sizes.patch**2
        yield Media("images", {"image_patches": lambda: torch.randn(2, 6, width)}, ("image",), {"image": 12})
    if name is None:
        return
    rows, side, channels = _rows(names), sizes.image, sizes.channels
    if "spatial_shapes" in names:
        yield _naflex(sizes, rows)
    if "image_attention_mask" in names and sizes.config.model_type == "idefics":
        yield _images_seen_by_words(sizes)
    if "aspect_ratio_ids" in names:
        yield _tiles(sizes)
    if "image_token_pooling" in names or "pooled_patches_idx" in names:
        yield _pooled(sizes)
    if "image_position_ids" in names or "pixel_position_ids" in names:
        yield _positioned(sizes, names)
    whole = {"image_sizes": torch.tensor([[side, side]] * rows)} if "image_sizes" in names else {}
    for shape in _image_shapes(rows, channels, side, sizes.frames, sizes.patch, "pixel_attention_mask" in names):
        more = {}
        if "pixel_attention_mask" in names and len(shape) == 5:
            more["pixel_attention_mask"] = _padded_pictures(shape)
        for sizes_too in ({}, whole) if whole else ({},):
            values = {name: lambda shape=shape: torch.randn(*shape), **sizes_too, **more}
            yield Media("images", values, ("image",))


def _image_shapes(
    rows: int, channels: int, side: int, frames: int, patch: int, many: bool
) -> Iterator[tuple[int, ...]]:
    one = (channels, side, side)
    first = [(rows, 2, *one)] if many else []
    yield from (*first, (rows, *one), (rows, frames, *one), (rows, channels, frames, side, side), (rows, 1, *one))
    for other in (64, 224):
        if other != side:
            yield (rows, channels, other, other)
    yield from ((rows, 2, *one), (rows, 3, *one), (rows, 5, *one), (rows, (side // patch) ** 2, channels * patch**2))


def _padded_pictures(shape: tuple[int, ...]) -> Tensor:
    """The first with fewer rows, the second with fewer columns."""
    mask = torch.ones(*shape[:2], *shape[-2:], dtype=torch.bool)
    half = shape[-1] // 2
    mask[0, 0, half:], mask[1, 0, :, half:] = False, False
    return mask


def _grid(sizes: Sizes, name: str, grid: str, kind: str, times: int = 1) -> Media:
    """Pictures as rows of patches, of 4 x 8 and 8 x 4 patches: each as many tokens."""
    patch, frames = sizes.patch, sizes.number("temporal_patch_size", parts=("vision_config",), default=1)
    grids = torch.tensor([[times, 4, 8], [times, 8, 4]])
    width = sizes.channels * frames * patch**2
    merge = sizes.number("spatial_merge_size", parts=("vision_config",), default=2)
    flat = {name: lambda: torch.randn(int(grids.prod(-1).sum()), width), grid: grids}
    count = int(grids.prod(-1).sum()) // merge**2
    return Media(f"{kind}s", flat, (kind,), {kind: count})


def _naflex(sizes: Sizes, rows: int) -> Media:
    mask = torch.ones(rows, 20, dtype=torch.long)
    mask[1, 12:] = 0
    grids = torch.tensor([[4, 5], [3, 4], [5, 4]])[:rows]
    width = sizes.channels * sizes.patch**2
    values = {
        "pixel_values": lambda: torch.randn(rows, 20, width),
        "pixel_attention_mask": mask,
        "spatial_shapes": grids,
    }
    return Media("images", values, ("image",))


def _tiles(sizes: Sizes) -> Media:
    """mllama: two images a row, of two tiles and of one."""
    most, side = sizes.number("max_num_tiles", default=2), sizes.image
    seen = torch.zeros(2, 13, 2, most, dtype=torch.long)
    seen[0, 3:, 0, :2], seen[0, 8:, 1, 0], seen[1, 6:, 0, 0] = 1, 1, 1
    tiles = torch.zeros(2, 2, most, dtype=torch.long)
    tiles[..., 0], tiles[0, 0, 1] = 1, 1
    values = {
        "pixel_values": lambda: torch.randn(2, 2, most, sizes.channels, side, side),
        "aspect_ratio_ids": torch.tensor([[2, 1], [1, 1]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": seen,
    }
    return Media("images", values, ())


def _images_seen_by_words(sizes: Sizes) -> Media:
    """Idefics: two images a row, and which of them each word looks at."""
    seen = torch.zeros(2, 13, 2, dtype=torch.long)
    seen[0, 2:7, 0], seen[0, 7:, 1], seen[1, 5:, 0] = 1, 1, 1
    side = sizes.image
    pixels = {"pixel_values": lambda: torch.randn(2, 2, sizes.channels, side, side)}
    return Media("images", {**pixels, "image_attention_mask": seen})


def _pooled(sizes: Sizes) -> Media:
    """Molmo 2: a crop an image, 2 x 2 tokens of 2 x 2 patches each."""
    patch = sizes.patch
    places = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    pooling = torch.cat([places, places + 16])
    pooling[2, 3] = -1
    values = {
        "pixel_values": lambda: torch.randn(2, 16, 3 * patch**2),
        "image_num_crops": torch.ones(2, dtype=torch.long),
        "image_token_pooling": pooling,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
    }
    return Media("images", values, ("image",), {"image": 8})


def _positioned(sizes: Sizes, names: set[str]) -> Media:
    """Gemma 4: patches with their (x, y), padding at (-1, -1)."""
    pool = sizes.number("pooling_kernel_size", parts=("vision_config",), default=2)
    rows, columns = 2 * pool, 2 * pool
    x, y = torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")
    places = torch.stack([x.flatten(), y.flatten()], -1).expand(2, -1, -1).contiguous()
    name = "image_position_ids" if "image_position_ids" in names else "pixel_position_ids"
    width = sizes.channels * sizes.patch**2
    return Media("images", {"pixel_values": lambda: torch.rand(2, rows * columns, width), name: places}, ("image",))


def _numbered_patches(sizes: Sizes) -> Tensor:
    """Pix2Struct and Kosmos-2.5: a patch begins with its row and column, from 1; padding has 0."""
    rows, columns = torch.meshgrid(torch.arange(1.0, 4), torch.arange(1.0, 5), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).expand(2, -1, -1)
    patches = torch.cat([places, torch.randn(2, 12, sizes.channels * sizes.patch**2)], -1)
    patches[1, 9:] = 0
    return patches


# ---- videos


def _videos(sizes: Sizes, names: set[str]) -> Iterator[Media]:
    name = "pixel_values_videos"
    if name not in names:
        return
    if "video_grid_thw" in names:
        for frames in (2, 1):
            yield _grid(sizes, name, "video_grid_thw", "video", frames)
    one, frames = (sizes.channels, sizes.image, sizes.image), sizes.frames
    for shape in ((_rows(names), frames, *one), (_rows(names), sizes.channels, frames, *one[1:])):
        yield Media("videos", {name: lambda shape=shape: torch.randn(*shape)}, ("video",))


# ---- audio


def _audio(sizes: Sizes, names: set[str]) -> Iterator[Media]:
    rows = _rows(names)
    if "input_features" in names:
        if "is_longer" in names:  # CLAP: spectrograms as images of one channel
            yield Media("audio", {"input_features": lambda: torch.randn(rows, 1, 60, sizes.mels)})
        length = 2 * sizes.number("max_source_positions", parts=("audio_config",), default=32)
        seen = _frames_seen(rows, length)
        masks = ("input_features_mask", "feature_attention_mask", "is_longer")
        more = {n: seen for n in masks[:2] if n in names}
        whole = {name: torch.ones_like(x) for name, x in more.items()}
        for frames_last, extra in product((True, False), (more, whole, {}) if more else ({},)):
            shape = (rows, sizes.mels, length) if frames_last else (rows, length, sizes.mels)
            yield Media("audio", {"input_features": lambda shape=shape: torch.randn(*shape), **extra}, ("audio",))
    if "input_values" in names:
        for shape in (
            (rows, 6400),
            (rows, 1, 6400),
            (rows, sizes.number("max_length", default=64), sizes.mels),
            (rows, 60, 80),
        ):
            yield Media("audio", {"input_values": lambda shape=shape: torch.randn(*shape) * 0.3}, ("audio",))


def _frames_seen(rows: int, length: int) -> Tensor:
    seen = torch.ones(rows, length, dtype=torch.long)
    seen[-1, length * 3 // 4 :] = 0
    return seen


# ---- all else

Maker = Callable[[Sizes, dict], Any]


def _like_text(low: int, high: int) -> Maker:
    def make(sizes: Sizes, given: dict) -> Tensor | None:
        ids = given.get("input_ids")
        return None if ids is None else torch.randint(low, high, ids.shape)

    return make


def _boxes(sizes: Sizes, given: dict) -> Tensor | None:
    ids = given.get("input_ids")
    if ids is None:
        return None
    corner = torch.randint(0, 100, (*ids.shape, 2))
    boxes = torch.cat([corner, corner + torch.randint(1, 20, corner.shape)], -1)
    if sizes.config.model_type == "bros":
        return boxes[..., [0, 1, 2, 1, 2, 3, 0, 3]].float() / 200
    return boxes.float() / 200 if sizes.config.model_type == "udop" else boxes


def _decoder_ids(sizes: Sizes, given: dict) -> Tensor:
    rows = next((len(x) for x in given.values() if isinstance(x, Tensor)), ROWS)
    most = min(50, sizes.number("vocab_size", parts=("decoder", "text_config"), default=50))
    codebooks = sizes.given.get("decoder_codebooks")
    return torch.randint(3, most, (rows, 7, codebooks) if codebooks else (rows, 7))


def _image_places(sizes: Sizes, given: dict) -> Tensor | None:
    """Kosmos-2: the tokens that an image's embeddings take the place of."""
    ids = given.get("input_ids")
    if ids is None or "pixel_values" not in given:
        return None
    places = torch.zeros_like(ids)
    places[:, 5 : 5 + sizes.number("latent_query_num", default=5)] = 1  # past what either side pads
    return places


def _patches_hidden(sizes: Sizes, given: dict) -> Tensor:
    return torch.rand(ROWS, (sizes.image // sizes.patch) ** 2) > 0.5


def _series(length: str) -> Maker:
    def make(sizes: Sizes, given: dict) -> Tensor:
        config = sizes.config
        past = (config.context_length or 12) + max(getattr(config, "lags_sequence", None) or [0])
        steps = past if length == "past" else getattr(config, "prediction_length", 6)
        return torch.rand(ROWS, steps)

    return make


def _past_values(sizes: Sizes, given: dict) -> Tensor:
    if getattr(sizes.config, "lags_sequence", None):
        return _series("past")(sizes, given)
    steps, channels = sizes.number("context_length", default=12), sizes.number("num_input_channels", default=1)
    return torch.rand(ROWS, steps, channels)


def _time_features(length: str) -> Maker:
    def make(sizes: Sizes, given: dict) -> Tensor:
        return torch.rand(*_series(length)(sizes, given).shape, getattr(sizes.config, "num_time_features", 0))

    return make


OTHERS: dict[str, Maker] = {
    "bbox": _boxes,
    "codebook_idx": lambda sizes, given: 2,
    "bool_masked_pos": _patches_hidden,
    "decoder_input_ids": _decoder_ids,
    "qformer_input_ids": lambda sizes, given: torch.randint(3, 50, (ROWS, 7)),
    "qformer_attention_mask": lambda sizes, given: torch.ones(ROWS, 7, dtype=torch.long),
    "hidden_states": lambda sizes, given: torch.randn(ROWS, 9, sizes.width),
    "encoder_hidden_states": lambda sizes, given: torch.randn(
        ROWS, 9, sizes.number("encoder_hidden_size", "encoder_width", default=sizes.width)
    ),
    "query_embeds": lambda sizes, given: torch.randn(ROWS, 5, sizes.width),
    "image_embeds_position_mask": _image_places,
    "past_time_features": _time_features("past"),
    "past_observed_mask": lambda sizes, given: torch.ones(_series("past")(sizes, given).shape),
    "future_values": _series("future"),
    "future_time_features": _time_features("future"),
    "visual_feats": lambda sizes, given: torch.randn(ROWS, 6, sizes.number("visual_feat_dim", default=32)),
    "visual_pos": lambda sizes, given: torch.rand(ROWS, 6, sizes.number("visual_pos_dim", default=4)),
    "visual_embeds": lambda sizes, given: torch.randn(ROWS, 6, sizes.number("visual_embedding_dim", default=32)),
    "past_values": lambda sizes, given: _past_values(sizes, given),
    "states": lambda sizes, given: torch.randn(ROWS, 6, sizes.number("state_dim", default=17)),
    "actions": lambda sizes, given: torch.randn(ROWS, 6, sizes.number("act_dim", default=4)),
    "rewards": lambda sizes, given: torch.randn(ROWS, 6, 1),
    "returns_to_go": lambda sizes, given: torch.randn(ROWS, 6, 1),
    "timesteps": lambda sizes, given: torch.arange(6).expand(ROWS, -1),
    "task_inputs": lambda sizes, given: torch.randint(3, 50, (ROWS, sizes.number("task_seq_len", default=9))),
    "spectrogram": lambda sizes, given: torch.randn(ROWS, 20, sizes.number("model_in_dim", default=80)),
    "inputs": lambda sizes, given: torch.randn(ROWS, 9, sizes.number("d_model", default=32)),
}
OPTIONAL = {"states", "actions", "rewards", "returns_to_go", "timesteps"}
OPTIONAL |= {"bbox", "decoder_input_ids", "future_values", "future_time_features", "qformer_attention_mask"}
OPTIONAL |= {"image_embeds_position_mask", "visual_feats", "visual_pos", "visual_embeds", "past_values"}


def wants(model: nn.Module, name: str, media: Media) -> bool:
    """Whether a parameter that need not be given is given all the same."""
    if name == "decoder_input_ids":
        cls = type(model).__name__
        both = bool(getattr(model.config, "is_encoder_decoder", False))
        makes_its_own = both and ("SequenceClassification" in cls or "QuestionAnswering" in cls)
        return not makes_its_own and ("Encoder" not in cls or both)
    if name == "encoder_hidden_states":
        return "QFormer" in type(model).__name__
    if name == "bool_masked_pos":
        return "MaskedImage" in type(model).__name__ and model.config.model_type != "beit"
    return name in OPTIONAL
