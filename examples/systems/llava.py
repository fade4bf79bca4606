"""LLaVA: a frozen picture tower, two linear layers that make its features words, and a language model.

Liu et al. 2023, https://arxiv.org/abs/2304.08485 and https://arxiv.org/abs/2310.03744.

    picture -> patches -> transformer -> projector --.
                                                      >  language model -> answer
    question -------------> words -------------------'

- patch embedding of the picture tower: `patch_embed`
- attention of the tower (all patches) and of the language model (causal, padded): `span_attention`
- rotary embedding of the language model: its own

Three stages: the tower learns from the digits' names, as CLIP's did from captions; then the projector alone from
captions; then projector and language model together from questions about two digits side by side.
"""

import torch.nn.functional as F
from gallery.digits import blind_accuracy, captions, digits, draw_questions, enlarged, held_out_questions
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, IMAGE, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

SIDE, PATCH = 32, 8
PATCHES = (SIDE // PATCH) ** 2
VISION = {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}
TEXT = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def build() -> System:
    config = LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_index=IMAGE, vision_feature_layer=-1)
    llava = LlavaForConditionalGeneration(config)
    namer = nn.Linear(VISION["hidden_size"], 10)
    tower, projector = llava.model.vision_tower, llava.model.multi_modal_projector

    def named(generator: Generator) -> Tensor:
        drawn = digits().draw(32, generator)
        features = tower(enlarged(drawn.pictures)).last_hidden_state[:, 1:].mean(1)
        return F.cross_entropy(namer(features), drawn.labels)

    def captioned(generator: Generator) -> Tensor:
        drawn = digits().draw(32, generator)
        asked = batch([[BOS, *[IMAGE] * PATCHES]] * 32, [encode(caption) for caption in captions(drawn.labels)])
        return llava(**asked, pixel_values=enlarged(drawn.pictures)).loss

    def question(asked) -> dict[str, Tensor]:
        """Two pictures, one after the other, then the question."""
        prompts = [[BOS, *[IMAGE] * (2 * PATCHES), *encode(text)] for text in asked.questions]
        pixels = enlarged(asked.pictures.flatten(0, 1), SIDE)
        return batch(prompts, [encode(answer) for answer in asked.answers]) | {"pixel_values": pixels}

    def answered(generator: Generator) -> Tensor:
        return llava(**question(draw_questions(digits(), 32, generator))).loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        inputs = question(asked)
        labels = inputs.pop("labels")
        right = accuracy(llava(**inputs).logits, labels)
        return {"answers to questions": Score(right, blind_accuracy(asked))}

    model = nn.ModuleList([llava, namer])
    stages = [
        Stage("tower", named, [tower, namer], steps=200),
        Stage("projector", captioned, [projector], steps=100),
        Stage("projector and language model", answered, [projector, llava.model.language_model, llava.lm_head], 400),
    ]
    return System(model, stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
