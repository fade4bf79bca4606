"""Llama 3.2 Vision: a picture cut into tiles, which a frozen language model sees by cross-attention between its layers.

Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783 (section 7).

    picture -> tiles -> patches -> transformer -> transformer over all tiles (gated) -> projection
                                        '------- features of its first layer -----------'   |
                                                                                            v
    <image> question -> layer -> [ cross-attention -> layer -> layer ] -> cross-attention -> layer -> answer

- patch embedding of the picture tower: `patch_embed`
- attention of the tower (the patches of all tiles of a picture), of the language model (causal, padded), and from its
  words to the tiles: `span_attention`

Four stages. The picture tower learns digits' names, a digit a tile (the paper's learns from captions). The language
model learns from text alone, and stays as it is from there on. Then the adapter, which is the projection and the layers
of cross-attention, learns from captions of one digit, which is one tile and leaves the other empty, and after that from
questions about two digits, a tile each; the tower learns along, as in the paper. Cross-attention stands between the
layers of the language model, after every second one (the paper: fourth), and its gates start at zero: what reads text
alone skips it and reads as before.
"""

import torch
import torch.nn.functional as F
from gallery.digits import blind_accuracy, captions, digits, draw_questions, enlarged, held_out_questions
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, IMAGE, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

TILES, SIDE, PATCH = 2, 16, 8
ONE, TWO_ACROSS = 1, 2  # which of the shapes below a picture has, counted from one
SHAPE = {"hidden_size": 96, "intermediate_size": 192}
SHAPE |= {"initializer_range": 96**-0.5}  # the 0.02 of models is for layers as wide as theirs
VISION = SHAPE | {"num_hidden_layers": 2, "num_global_layers": 1}
VISION |= {"attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "max_num_tiles": TILES}
VISION |= {"supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0], "vision_output_dim": 192}
TEXT = SHAPE | {"num_hidden_layers": 6, "cross_attention_layers": [1, 4]}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 64}
TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def seen(pictures: Tensor) -> dict[str, Tensor]:
    """(N, digits, 8, 8), a digit a tile -> what shows them to the model."""
    count, each = pictures.shape[:2]
    tiles = enlarged(pictures.flatten(0, 1), SIDE).unflatten(0, (count, 1, each))
    tiles = F.pad(tiles, (0, 0) * 3 + (0, TILES - each))
    shown = (torch.arange(TILES) < each).long().expand(count, 1, -1)
    shape = torch.full((count, 1), TWO_ACROSS if each > 1 else ONE)
    return {"pixel_values": tiles, "aspect_ratio_mask": shown, "aspect_ratio_ids": shape}


def build() -> System:
    config = MllamaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE)
    llama = MllamaForConditionalGeneration(config)
    tower, language, namer = llama.model.vision_model, llama.model.language_model, nn.Linear(192, 10)
    for places in (tower.pre_tile_positional_embedding, tower.post_tile_positional_embedding):
        nn.init.constant_(places.gate, 0.5)  # zero, where longer trainings begin, would leave the tiles alike for long
        nn.init.normal_(places.embedding.weight)
    crossing = [layer for layer in language.layers if isinstance(layer, MllamaCrossAttentionDecoderLayer)]
    own = [layer for layer in language.layers if layer not in crossing]
    adapter = [llama.model.multi_modal_projector, *crossing]

    def named(generator: Generator) -> Tensor:
        """The digit of each tile."""
        drawn = draw_questions(digits(), 32, generator)
        features = tower(**seen(drawn.pictures))[0][:, 0].mean(2)
        return F.cross_entropy(namer(features).flatten(0, 1), drawn.labels.flatten())

    def asked(prompts: list[str], answers: list[str], pictures: Tensor | None) -> dict[str, Tensor]:
        """Words, and which tiles each of them sees: all that are shown, from <image> on."""
        start = [BOS] if pictures is None else [IMAGE, BOS]
        words = batch([[*start, *encode(prompt)] for prompt in prompts], [encode(answer) for answer in answers])
        if pictures is None:
            return words
        shown = seen(pictures)
        of_words = words["attention_mask"][:, :, None, None] * shown["aspect_ratio_mask"][:, None]
        return words | shown | {"cross_attention_mask": of_words}

    def read(generator: Generator) -> Tensor:
        """Questions, answered by who sees nothing, and captions."""
        drawn, some = draw_questions(digits(), 24, generator), digits().draw(8, generator)
        prompts, answers = drawn.questions + [""] * 8, drawn.answers + captions(some.labels)
        return llama(**asked(prompts, answers, None)).loss

    def captioned(generator: Generator) -> Tensor:
        drawn = digits().draw(32, generator)
        return llama(**asked([""] * 32, captions(drawn.labels), drawn.pictures[:, None])).loss

    def answered(generator: Generator) -> Tensor:
        drawn = draw_questions(digits(), 32, generator)
        return llama(**asked(drawn.questions, drawn.answers, drawn.pictures)).loss

    def scores() -> dict[str, Score]:
        drawn = held_out_questions()
        inputs = asked(drawn.questions, drawn.answers, drawn.pictures)
        right = accuracy(llama(**inputs).logits, inputs["labels"])
        return {"answers to questions": Score(right, blind_accuracy(drawn))}

    frozen = [language.embed_tokens, *own, language.norm, llama.lm_head]
    stages = [
        Stage("tower", named, [tower, namer], steps=250, rate=1e-3),
        Stage("language model", read, frozen, steps=100, rate=1e-3),
        Stage("adapter, captions", captioned, [tower, *adapter], steps=100, rate=1e-3),
        Stage("adapter, questions", answered, [tower, *adapter], steps=350, rate=1e-3),
    ]
    return System(nn.ModuleList([llama, namer]), stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
