"""What the three models of NVLM 1.0 share: tiles, vision encoder, language model, and how they are trained.

Dai et al. 2024, https://arxiv.org/abs/2409.11402.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration

from mmkernels import RowSpans
from mmkernels.nn import GatedCrossAttentionBlock

from .digits import NAMES, Questions, blind_accuracy, digits, draw_questions, held_out_questions, side_by_side
from .training import Score, Stage, System
from .words import BOS, EOS, FREE, IMAGE, PAD, SIZE, THUMBNAIL, TILES, accuracy, batch, encode

IMAGE_START = FREE
TAGS = (TILES[0], TILES[1], THUMBNAIL)  # of a picture's tiles, in the order of `tiles`
SIDE, PATCH = 32, 8
PATCHES = SIDE // PATCH  # a side
TOKENS = (PATCHES // 2) ** 2  # of a tile: pixel shuffle makes one of four patches
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
VISION |= {"layer_scale_init_value": 1.0, "initializer_range": 0.1}  # so narrow and shallow a model needs no less
TEXT = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
EVERY = 2  # layers of the language model a layer of cross-attention; 8 in the paper

# Pictures of two digits, the words after each and the answers to them -> what the model is called with.
Given = Callable[[Tensor, list[list[int]], list[list[int]]], dict]


def decoder() -> InternVLForConditionalGeneration:
    """InternViT, pixel shuffle, a projector of two layers and Qwen2: NVLM-D is built as InternVL is."""
    config = InternVLConfig(vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, tie_word_embeddings=False)
    return InternVLForConditionalGeneration(config)


class CrossAttended(nn.Module):
    """Layers of the language model behind one of gated cross-attention, which is left out where there are no tiles."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        width, heads, kv_heads = (TEXT[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        hidden = TEXT["intermediate_size"]
        self.block = GatedCrossAttentionBlock(width, hidden, heads, num_kv_heads=kv_heads, qk_norm=None)
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, tiles: Tensor | None = None, spans: RowSpans | None = None, **others) -> Tensor:
        if tiles is not None:
            hidden = self.block(hidden, tiles, spans)
        for layer in self.layers:
            hidden = layer(hidden, **others)
        return hidden


def insert_cross_attention(model: InternVLForConditionalGeneration) -> list[nn.Module]:
    """The new layers. They see what the model is called with as `tiles`, (N, tokens, width), each token its `spans`."""
    language = model.model.language_model
    groups = [language.layers[first : first + EVERY] for first in range(0, len(language.layers), EVERY)]
    language.layers = nn.ModuleList(CrossAttended(group) for group in groups)
    return [group.block for group in language.layers]


def tiles(pictures: Tensor) -> Tensor:
    """(N, 2, 8, 8) in [0, 1] -> (N, 3, 3, 32, 32): the left half and the right half of a picture of 32 x 64, and its
    thumbnail."""
    whole = side_by_side(pictures, SIDE)
    return torch.stack([*whole.chunk(2, dim=-1), F.avg_pool2d(whole, (1, 2))], 1)


def projected(model: InternVLForConditionalGeneration, cut: Tensor) -> Tensor:
    """(N, k, 3, 32, 32) -> (N, k, TOKENS, width): tiles as the language model takes them."""
    return model.get_image_features(cut.flatten(0, 1)).pooler_output.unflatten(0, cut.shape[:2])


def told(asked: Questions) -> dict[str, Tensor]:
    """Questions about pictures that are not shown, but told in words."""
    shown = [encode(f"left is {NAMES[left]} right is {NAMES[right]}") for left, right in asked.labels.tolist()]
    prompts = [[BOS, *words, *encode(text)] for words, text in zip(shown, asked.questions, strict=True)]
    return batch(prompts, [encode(answer) for answer in asked.answers])


def system(model: InternVLForConditionalGeneration, connectors: list[nn.Module], given: Given) -> System:
    """The vision encoder learns to name digits, in a tile or in half a thumbnail, and the language model to answer
    questions about pictures that are told in words. With both frozen, `connectors` learn from questions about pictures
    that are seen: pretraining. Fine-tuning trains the language model too, and half as many questions are about
    pictures told in words again, so that it does not forget them."""
    tower, namer = model.model.vision_tower, nn.Linear(VISION["hidden_size"], len(NAMES))
    language = [model.model.language_model, model.lm_head]  # with the layers inserted, which words alone do not reach

    def seen(asked: Questions) -> dict:
        return given(asked.pictures, [encode(text) for text in asked.questions], [encode(x) for x in asked.answers])

    def named(generator: Generator) -> Tensor:
        drawn = draw_questions(digits(), 16, generator)
        features = tower(tiles(drawn.pictures).flatten(0, 1)).last_hidden_state[:, 1:]
        left, right, whole = features.unflatten(1, (PATCHES, PATCHES)).unflatten(0, (-1, len(TAGS))).unbind(1)
        places = torch.stack([x.mean((1, 2)) for x in (left, right, *whole.chunk(2, dim=2))], 1)
        return F.cross_entropy(namer(places).flatten(0, 1), drawn.labels.repeat(1, 2).flatten())

    def read(generator: Generator) -> Tensor:
        return model(**told(draw_questions(digits(), 32, generator))).loss

    def aligned(generator: Generator) -> Tensor:
        return model(**seen(draw_questions(digits(), 32, generator))).loss

    def answered(generator: Generator) -> Tensor:
        pictures, words = (draw_questions(digits(), count, generator) for count in (24, 12))
        return model(**seen(pictures)).loss + model(**told(words)).loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        ways = {"answers to questions": seen(asked), "the same, told in words": told(asked)}
        right = {way: accuracy(model(**inputs).logits, inputs["labels"]) for way, inputs in ways.items()}
        return {way: Score(value, blind_accuracy(asked)) for way, value in right.items()}

    stages = [
        Stage("vision encoder", named, [tower, namer], 400),
        Stage("language model", read, language, 300, 1e-3),
        Stage("pretraining", aligned, connectors, 200, 1e-3),
        Stage("fine-tuning", answered, [model.model.multi_modal_projector, *language], 200, 1e-3),
    ]
    return System(nn.ModuleList([model, namer]), stages, scores)
