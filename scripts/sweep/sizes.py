"""What a configuration says of the sizes of inputs, wherever in it that stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from . import overrides

TEXT = ("text_config", "thinker_config", "decoder", "language_config", "text_encoder", "llm_config", "decoder_config")
VISION = (
    "vision_config",
    "image_config",
    "visual_config",
    "vision",
    "encoder",
    "backbone_config",
    "vision_tower_config",
)
AUDIO = ("audio_config", "speech_config", "encoder_config", "audio_encoder", "encoder", "sound_config")


class Sizes:
    """Sizes of one model's inputs."""

    def __init__(self, model: nn.Module, family: str = ""):
        self.model, self.config = model, model.config
        self.given = overrides.INPUTS.get(family, {}) | overrides.INPUTS.get(type(model).__name__, {})

    def parts(self, *preferred: str) -> Iterator[Any]:
        """The configuration's parts, those of a preferred name first, then itself, then all others."""
        everything = list(walk(self.config))
        yield from (part for name, part in everything if name in preferred)
        yield self.config
        yield from (part for name, part in everything if name not in preferred)

    def find(self, *names: str, parts: tuple[str, ...] = (), default: Any = None) -> Any:
        for part in self.parts(*parts):
            for name in names:
                value = getattr(part, name, None)
                if value is not None:
                    return value
        return default

    def number(self, *names: str, parts: tuple[str, ...] = (), default: int) -> int:
        value = self.find(*names, parts=parts, default=default)
        while isinstance(value, (list, tuple)):
            value = value[-1]
        if isinstance(value, dict):
            value = value.get("height") or value.get("shortest_edge") or default
        return int(value) if isinstance(value, (int, float)) else default

    # ---- text

    @property
    def vocabulary(self) -> int:
        embeddings = getattr(self.model, "get_input_embeddings", lambda: None)
        try:
            table = embeddings()
        except (NotImplementedError, AttributeError):
            table = None
        if isinstance(table, nn.Embedding):
            return table.num_embeddings
        return self.number("vocab_size", parts=TEXT, default=50)

    @property
    def width(self) -> int:
        return self.number("hidden_size", "d_model", parts=TEXT, default=32)

    @property
    def text_length(self) -> int | None:
        return self.number("max_position_embeddings", "max_text_len", parts=TEXT, default=1000)

    @property
    def pad(self) -> int:
        value = self.find("pad_token_id", parts=TEXT, default=0)
        return value if isinstance(value, int) and 0 <= value < self.vocabulary else 0

    @property
    def end(self) -> int:
        value = self.find("eos_token_id", parts=TEXT, default=2)
        value = value[0] if isinstance(value, list) else value
        return value if isinstance(value, int) and 0 <= value < self.vocabulary else 2

    def token(self, kind: str) -> int | None:
        """The one that stands for an image, a video or audio in the text."""
        names = [f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id", f"{kind}_soft_token_id"]
        if kind == "image":
            names += ["media_token_id", "image_patch_token_id", "img_context_token_id"]
        vocabulary = self.find("vocabulary_map", default={})
        value = vocabulary.get(f"<{kind}>", self.find(*names))
        return value if isinstance(value, int) else None

    def around(self, kind: str) -> tuple[list[int], list[int]]:
        """The tokens that models look for at the borders of an image."""
        stem = "audio" if kind == "audio" else "vision"
        pairs = ((f"{stem}_start_token_id", f"{stem}_end_token_id"), ("image_start_token_id", "image_end_token_id"))
        for names in pairs:
            found = [self.find(name) for name in names]
            if isinstance(found[0], int):
                return [found[0]], [found[1]] if isinstance(found[1], int) else []
        return [], []

    # ---- images

    @property
    def image(self) -> int:
        if "image" in self.given:
            return self.given["image"]
        return self.number(
            "image_size", "img_size", "input_size", "resolution", "max_img_size", parts=VISION, default=64
        )

    @property
    def patch(self) -> int:
        return self.number("patch_size", parts=VISION, default=8)

    @property
    def channels(self) -> int:
        value = self.find("num_channels", "in_channels", "in_chans", "num_input_channels", parts=VISION, default=3)
        return value if isinstance(value, int) else 3

    @property
    def frames(self) -> int:
        return self.number("num_frames", "frames_per_clip", "num_image_with_embedding", parts=VISION, default=4)

    # ---- audio

    @property
    def mels(self) -> int:
        if "mels" in self.given:
            return self.given["mels"]
        names = (
            "num_mel_bins",
            "n_mels",
            "feature_size",
            "input_feat_per_channel",
            "feature_dim",
            "mel_dim",
            "input_dim",
        )
        return self.number(*names, "num_mels", "input_feat_size", parts=AUDIO, default=80)


def walk(config: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedConfig

    for name, part in vars(config).items():
        if isinstance(part, PreTrainedConfig) and depth < 4:
            yield name, part
            yield from walk(part, depth + 1)
