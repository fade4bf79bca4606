"""Baichuan-Omni, its branch of pictures: tiles beside a small copy of all, and a projector that pools by 2 x 2.

Li et al. 2024, https://arxiv.org/abs/2410.08565.

    picture -> tiles, then a small copy of all
                 |
                 '-> patches -> transformer -> two linear layers -> convolution of 2 x 2 -.
                                                                                           >  language model -> answer
    question --------------------------------> words --------------------------------------'

- loss of the tower before it comes here: `siglip_loss`
- patch embedding of the tower, and the convolution of the projector, whose stride is its kernel as well: `patch_embed`
- attention of the tower (all patches) and of the language model (causal, padded): `span_attention`
- rotary embedding of the language model: its own

The parts come as they came to the paper: a SigLIP tower that knows captions, ten here, and a language model that knows
text, here of pictures written out. Then three stages: the projector alone learns captions; projector and tower learn
captions and questions, the language model frozen still; and everything learns them, with plain text among them. The
paper's branches of video and sound, which come after, are not here.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gallery.digits import (
    NAMES,
    Questions,
    blind_accuracy,
    digits,
    draw_questions,
    enlarged,
    held_out_questions,
    side_by_side,
)
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, IMAGE, PAD, SIZE, THUMBNAIL, TILES, accuracy, batch, encode
from torch import Generator, Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmkernels import siglip_loss

SIDE, PATCH = 32, 8
GRID = SIDE // PATCH
TOKENS = [IMAGE] * (GRID // 2) ** 2  # of a tile
VISION = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


class BaichuanOmni(nn.Module):
    def __init__(self):
        super().__init__()
        width, words = VISION["hidden_size"], TEXT["hidden_size"]
        self.tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
        self.layers = nn.Sequential(nn.Linear(width, words), nn.GELU(), nn.Linear(words, words))
        self.pool = nn.Conv2d(words, words, 2, stride=2)
        self.language_model = LlamaForCausalLM(LlamaConfig(**TEXT))

    def forward(self, tiles: Tensor, input_ids: Tensor, **rest: Tensor) -> CausalLMOutputWithPast:
        """tiles: (N, 3, SIDE, SIDE), in the order in which they stand in the rows."""
        embedded = self.language_model.get_input_embeddings()(input_ids)
        if len(tiles):
            patches = self.layers(self.tower(tiles).last_hidden_state)
            tokens = self.pool(patches.transpose(1, 2).unflatten(2, (GRID, GRID))).flatten(2).transpose(1, 2)
            embedded = embedded.masked_scatter((input_ids == IMAGE)[..., None], tokens.to(embedded.dtype))
        return self.language_model(inputs_embeds=embedded, **rest)


class Captions(nn.Module):
    """What the tower learns from before it comes here: a feature for the caption of each digit."""

    def __init__(self):
        super().__init__()
        self.features = nn.Parameter(torch.randn(len(NAMES), VISION["hidden_size"]))
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-10.0))  # as SigLIP begins

    def forward(self, pictures: Tensor, labels: Tensor) -> Tensor:
        ids = {"image_ids": labels, "text_ids": torch.arange(len(NAMES))}
        return siglip_loss(pictures, self.features, self.scale, self.bias, normalize=True, **ids)


def tiles_of(pictures: Tensor) -> Tensor:
    """(N, 2, 8, 8) -> (N, 3, 3, SIDE, SIDE): left, right, and both, small, between bars."""
    small = F.pad(side_by_side(pictures, SIDE // 2), (0, 0, SIDE // 4, SIDE // 4), value=-1)
    return torch.cat([enlarged(pictures.flatten(0, 1), SIDE).unflatten(0, (-1, 2)), small[:, None]], 1)


def rows(asked: Questions, captioned: int = 0, in_words: int = 0) -> dict[str, Tensor]:
    """The first are captions and not questions, the last have words and no picture."""
    seen = len(asked.questions) - in_words
    prompts, answers = [], []
    for i, pair in enumerate(asked.labels.tolist()):
        left, right = ([number] for name in pair for number in encode(NAMES[name]))
        shown = [TILES[0], *TOKENS, TILES[1], *TOKENS, THUMBNAIL, *TOKENS]
        question, answer = encode(asked.questions[i]), encode(asked.answers[i])
        if i < captioned:
            question, answer = [], [*encode("a handwritten"), *left, *encode("and then"), *right]
        prompts.append([BOS, *(shown if i < seen else [TILES[0], *left, TILES[1], *right]), *question])
        answers.append(answer)
    return batch(prompts, answers) | {"tiles": tiles_of(asked.pictures[:seen]).flatten(0, 1)}


def build() -> System:
    model, captions = BaichuanOmni(), Captions()
    tower, language_model, projector = model.tower, model.language_model, [model.layers, model.pool]

    def contrasted(generator: Generator) -> Tensor:
        drawn = digits().draw(32, generator)
        return captions(tower(enlarged(drawn.pictures, SIDE)).pooler_output, drawn.labels)

    def learned(count: int, captioned: int, in_words: int = 0) -> Callable[[Generator], Tensor]:
        def loss(generator: Generator) -> Tensor:
            return model(**rows(draw_questions(digits(), count, generator), captioned, in_words)).loss

        return loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        inputs = rows(asked)
        labels = inputs.pop("labels")
        right = accuracy(model(**inputs).logits, labels)
        return {"answers to questions": Score(right, blind_accuracy(asked))}

    stages = [
        Stage("tower, before", contrasted, [tower, captions], steps=150, rate=1e-3),
        Stage("language model, before", learned(64, 16, 64), [language_model], steps=300, rate=1e-3),
        Stage("projector", learned(32, 32), projector, steps=100, rate=1e-3),
        Stage("projector and tower", learned(32, 8), [*projector, tower], steps=150, rate=1e-3),
        Stage("everything", learned(32, 8, 4), [model], steps=200, rate=1e-3),
    ]
    return System(nn.ModuleList([model, captions]), stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
