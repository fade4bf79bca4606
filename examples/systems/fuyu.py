"""Fuyu: a decoder alone. Patches of the picture enter it by one linear layer, as words do by their table.

Bavishi et al. 2023, https://www.adept.ai/blog/fuyu-8b (there is no paper); its decoder is Persimmon,
https://www.adept.ai/blog/persimmon-8b.

    row of patches -> linear -> p p p p <newline> --.
    row of patches -> linear -> p p p p <newline> ----> causal decoder -> answer
    question -> words ----> <bos> w w w w <answer> -'

No tower, no positions of the picture's own: a sign ends each row, so that the decoder can tell how wide a picture is,
and pictures of any size share a batch.

- attention of the decoder (causal, padded): `span_attention`
- the linear layer of the patches is one matrix product already, and is left as it is
- rotary embedding (of half of each head): its own

Two stages, and all is trained in both: captions of pictures of two digits side by side, then questions about
such pictures.
"""

import torch
from gallery.digits import NAMES, Questions, blind_accuracy, digits, draw_questions, held_out_questions, side_by_side
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, BREAK, EOS, FREE, IMAGE, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor
from transformers import FuyuConfig, FuyuForCausalLM

PATCH, SIDES = 8, (16, 24)  # of a digit, in pixels
NEWLINE, ANSWER = BREAK, FREE
DECODER = {"model_type": "persimmon", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
DECODER |= {"num_attention_heads": 4, "vocab_size": SIZE, "max_position_embeddings": 128}
DECODER |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def patches(picture: Tensor) -> Tensor:
    """(3, H, W) -> (number, PATCH * PATCH * 3), row by row."""
    cut = picture.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (3, rows, columns, PATCH, PATCH)
    return cut.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def read(pictures: Tensor, sides: list[int], texts: list[str], answers: list[str]) -> dict[str, Tensor]:
    """(N, 2, 8, 8), each pair of digits drawn as large as its side says: what the model takes."""
    prompts, pixels = [], []
    for pair, side, text in zip(pictures, sides, texts, strict=True):
        row = [IMAGE] * (2 * side // PATCH) + [NEWLINE]
        prompts.append([*row * (side // PATCH), BOS, *encode(text), ANSWER])
        pixels.append(patches(side_by_side(pair[None], side)[0]))
    return batch(prompts, [encode(answer) for answer in answers]) | {"pixel_values": torch.cat(pixels)[None]}


def draw_sides(count: int, generator: Generator) -> list[int]:
    return [SIDES[i] for i in torch.randint(len(SIDES), (count,), generator=generator).tolist()]


def build() -> System:
    fuyu = FuyuForCausalLM(FuyuConfig(text_config=DECODER, patch_size=PATCH, image_token_id=IMAGE))

    def captioned(generator: Generator) -> Tensor:
        drawn = draw_questions(digits(), 32, generator)
        told = [f"a {NAMES[left]} then a {NAMES[right]}" for left, right in drawn.labels.tolist()]
        return fuyu(**read(drawn.pictures, draw_sides(32, generator), [""] * 32, told)).loss

    def question(asked: Questions, sides: list[int]) -> dict[str, Tensor]:
        return read(asked.pictures, sides, asked.questions, asked.answers)

    def answered(generator: Generator) -> Tensor:
        return fuyu(**question(draw_questions(digits(), 32, generator), draw_sides(32, generator))).loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        inputs = question(asked, [SIDES[i % len(SIDES)] for i in range(len(asked.answers))])
        labels = inputs.pop("labels")
        return {"answers to questions": Score(accuracy(fuyu(**inputs).logits, labels), blind_accuracy(asked))}

    stages = [Stage("captions", captioned, [fuyu], 200, 1e-3), Stage("questions", answered, [fuyu], 400, 1e-3)]
    return System(fuyu, stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
