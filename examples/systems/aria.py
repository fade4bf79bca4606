"""Aria: a language model of many experts, which learns from words and pictures together, and its own picture tower.

Li et al. 2024, https://arxiv.org/abs/2410.05993.

    picture -> patches -> transformer -> projector: learned queries --.
    (of any shape, padded to a square)   attend to the patches         >  mixture of experts -> answer
    question --------------------------> words ------------------------'

- patch embedding of the picture tower: `patch_embed`
- attention of the tower (nobody sees the patches of padding), of the projector (from queries to patches) and of the
  language model (causal): `span_attention`
- rotary embedding and experts of the language model: its own

A picture of medium size has 16 patches and becomes 4 tokens; a large one has 36 and becomes 8: the number of patches
says how many of the queries ask. A layer of the language model has experts that read every token, and others of which a
router picks two a token; a second loss keeps the router from always picking the same.

The tower is pre-trained, here on the digits' names. Then four stages, as published: the language model alone learns
from text, where scenes are told in words; all of it, the tower too, from captions of pictures; from long documents of
several pictures and captions each; and from questions about two digits side by side.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from gallery.digits import NAMES, Questions, blind_accuracy, digits, draw_questions, held_out_questions, side_by_side
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, FREE, IMAGE, IMAGE_END, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor, nn
from transformers import AriaConfig, AriaForConditionalGeneration
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

PATCH, MEDIUM, LARGE = 8, 32, 48  # longest edges of pictures
QUERIES = {(MEDIUM // PATCH) ** 2: 4, (LARGE // PATCH) ** 2: 8}
IMAGE_START = FREE
BATCH = 32
WIDE = 0.1  # what weights are drawn with: for layers as narrow as these, 0.02 is too small
VISION = {"model_type": "idefics3_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": LARGE, "patch_size": PATCH, "initializer_range": WIDE}
EXPERTS = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 2}
TEXT = {"model_type": "aria_text", "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 32}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": SIZE, "initializer_range": WIDE}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, **EXPERTS}


def either_size(generator: Generator) -> int:
    return (MEDIUM, LARGE)[torch.randint(2, (), generator=generator)]


def seen(pairs: Tensor, size: int) -> dict[str, Tensor]:
    """(N, 2, 8, 8) -> pictures twice as wide as high, padded below to a square, and which pixels are no padding."""
    mask = torch.zeros(len(pairs), size, size, dtype=torch.bool)
    mask[:, : size // 2] = True
    return {"pixel_values": F.pad(side_by_side(pairs, size // 2), (0, 0, 0, size // 2)), "pixel_mask": mask}


def tokens(size: int) -> list[int]:
    return [IMAGE_START, *[IMAGE] * QUERIES[(size // PATCH) ** 2], IMAGE_END]


def told(pairs: Tensor) -> list[list[int]]:
    names = ((NAMES[left], NAMES[right]) for left, right in pairs.tolist())
    return [encode(f"a handwritten {left} and then a handwritten {right}") for left, right in names]


def build() -> System:
    config = AriaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, initializer_range=WIDE,
                        projector_patch_to_query_dict=QUERIES)  # fmt: skip
    aria = AriaForConditionalGeneration(config)
    tower, namer = aria.model.vision_tower, nn.Linear(VISION["hidden_size"], 2 * len(NAMES))
    nn.init.normal_(tower.embeddings.position_embedding.weight)  # as large as the patches, which would hide them

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        output = aria(**inputs, output_router_logits=True)
        experts, picked = EXPERTS["moe_num_experts"], EXPERTS["moe_topk"]
        return output.loss + 0.01 * load_balancing_loss_func(output.router_logits, experts, picked)

    def named(generator: Generator) -> Tensor:
        """Left and right from the mean of all patches, which so learn to say where they are."""
        asked = draw_questions(digits(), BATCH, generator)
        inputs = seen(asked.pictures, either_size(generator))
        patches = aria.get_image_features(**inputs, return_dict=True).last_hidden_state
        features = patches[:, : patches.shape[1] // 2].mean(1)
        return F.cross_entropy(namer(features).unflatten(1, (2, -1)).flatten(0, 1), asked.labels.flatten())

    def read(generator: Generator) -> Tensor:
        asked = draw_questions(digits(), BATCH, generator)
        scenes = zip(told(asked.labels), asked.questions, strict=True)
        prompts = [[BOS, *scene, *encode(question)] for scene, question in scenes]
        return loss(batch(prompts, [encode(answer) for answer in asked.answers]))

    def captioned(generator: Generator) -> Tensor:
        asked, size = draw_questions(digits(), BATCH, generator), either_size(generator)
        return loss(batch([[BOS, *tokens(size)]] * BATCH, told(asked.labels)) | seen(asked.pictures, size))

    def documents(generator: Generator) -> Tensor:
        """Of four pictures each, and their captions."""
        asked = draw_questions(digits(), BATCH, generator)
        captions = [[*chain(*told(labels))] for labels in asked.labels.unflatten(0, (-1, 4))]
        prompts = [[BOS, *tokens(MEDIUM) * 4]] * len(captions)
        return loss(batch(prompts, captions) | seen(asked.pictures, MEDIUM))

    def question(asked: Questions, size: int) -> dict[str, Tensor]:
        prompts = [[BOS, *tokens(size), *encode(text)] for text in asked.questions]
        return batch(prompts, [encode(answer) for answer in asked.answers]) | seen(asked.pictures, size)

    def answered(generator: Generator) -> Tensor:
        return loss(question(draw_questions(digits(), BATCH, generator), either_size(generator)))

    def score(size: int) -> Score:
        asked = held_out_questions()
        inputs = question(asked, size)
        labels = inputs.pop("labels")
        return Score(accuracy(aria(**inputs).logits, labels), blind_accuracy(asked))

    language = [aria.model.language_model, aria.lm_head]
    stages = [
        Stage("tower", named, [tower, namer], steps=400),
        Stage("language", read, language, steps=80, rate=1e-3),
        Stage("captions", captioned, [aria], steps=200, rate=1e-3),
        Stage("long documents", documents, [aria], steps=40, rate=5e-4),
        Stage("questions", answered, [aria], steps=300, rate=1e-3),
    ]
    names = {"answers, medium pictures": MEDIUM, "answers, large pictures": LARGE}
    return System(nn.ModuleList([aria, namer]), stages, lambda: {name: score(size) for name, size in names.items()})


if __name__ == "__main__":
    main(build, __doc__)
