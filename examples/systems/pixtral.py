"""Pixtral: pictures at their own size and shape, all of a batch in one row of the tower, none padded.

Agrawal et al. 2024, https://arxiv.org/abs/2410.07073.

    picture of 2 x 3 patches --.
                                >- one row of patches -> transformer -> two linear layers --.
    picture of 3 x 2 patches --'                                                             >- causal decoder -> answer
    question -> words -----------------------------------------------------------------------'

    in the decoder: p p p <break> p p p <end> p p <break> p p <break> p p <end> w w w w

In the tower a patch sees the patches of its own picture alone (a block-diagonal mask), and has its row and column by
two-dimensional rotary embedding. In the decoder a sign stands between two rows of patches, and another one after the
last.

- patch embedding of the tower: `patch_embed`
- attention of the tower (pictures back to back) and of the decoder (causal, padded): `span_attention`
- rotary embedding of both: their own

Two stages, and all is trained in both: documents of pictures and their captions by turns, the tower from scratch; then
questions about two pictures, of which the first counts as the left one.
"""

from statistics import fmean

import torch
import torch.nn.functional as F
from gallery.digits import Questions, blind_accuracy, captions, digits, draw_questions, held_out_questions
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, BREAK, EOS, IGNORED, IMAGE, IMAGE_END, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

PATCH, MOST = 8, 3  # pixels of a patch; rows and columns of a picture: 2 or 3
VISION = {"model_type": "pixtral", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
VISION |= {"num_attention_heads": 4, "image_size": MOST * PATCH, "patch_size": PATCH}
TEXT = {"model_type": "mistral", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "sliding_window": None}


def shaped(pictures: Tensor, grids: Tensor) -> dict[str, Tensor]:
    """(N, 8, 8) in [0, 1], each stretched to its rows and columns of patches: what the tower takes. It cuts off what
    a picture has not."""
    pixels = torch.zeros(len(pictures), 3, MOST * PATCH, MOST * PATCH)
    for own, picture, (height, width) in zip(pixels, pictures, (grids * PATCH).tolist(), strict=True):
        grown = F.interpolate(picture[None, None], (height, width), mode="bilinear", align_corners=False)
        own[:, :height, :width] = 2 * grown[0] - 1
    return {"pixel_values": pixels, "image_sizes": grids * PATCH}


def signs(grid: list[int]) -> list[int]:
    """Of a picture in the decoder: its rows, a sign between two of them, and one at the end."""
    rows, columns = grid
    return [*[*[IMAGE] * columns, BREAK] * (rows - 1), *[IMAGE] * columns, IMAGE_END]


def draw_grids(count: int, generator: Generator) -> Tensor:
    """Of the two pictures of a document."""
    return torch.randint(2, MOST + 1, (count, 2, 2), generator=generator)


def build() -> System:
    config = LlavaConfig(
        vision_config=VISION,
        text_config=TEXT,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pixtral = LlavaForConditionalGeneration(config)

    def interleaved(generator: Generator) -> Tensor:
        drawn, grids = digits().draw(64, generator), draw_grids(32, generator)
        told = iter(captions(drawn.labels))
        documents = [[sign for grid in two for sign in signs(grid) + encode(next(told))] for two in grids.tolist()]
        inputs = batch([[BOS]] * 32, documents)
        is_sign = torch.isin(inputs["labels"], torch.tensor([IMAGE, BREAK, IMAGE_END]))  # those are not written
        inputs["labels"] = inputs["labels"].masked_fill(is_sign, IGNORED)
        return pixtral(**inputs, **shaped(drawn.pictures, grids.flatten(0, 1))).loss

    def question(asked: Questions, grids: Tensor) -> dict[str, Tensor]:
        both = zip(grids.tolist(), asked.questions, strict=True)
        prompts = [[BOS, *signs(left), *signs(right), *encode(text)] for (left, right), text in both]
        inputs = batch(prompts, [encode(answer) for answer in asked.answers])
        return inputs | shaped(asked.pictures.flatten(0, 1), grids.flatten(0, 1))

    def answered(generator: Generator) -> Tensor:
        return pixtral(**question(draw_questions(digits(), 32, generator), draw_grids(32, generator))).loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        grids = draw_grids(len(asked.answers), torch.Generator().manual_seed(0))
        right = []
        for each in torch.arange(len(grids)).split(50):  # the plain tower's mask grows with the square of all patches
            own = slice(each[0], each[-1] + 1)
            some = Questions(asked.pictures[own], asked.labels[own], asked.questions[own], asked.answers[own])
            inputs = question(some, grids[own])
            labels = inputs.pop("labels")
            right.append(accuracy(pixtral(**inputs).logits, labels))
        return {"answers to questions": Score(fmean(right), blind_accuracy(asked))}

    stages = [
        Stage("documents", interleaved, [pixtral], 300, 1e-3),
        Stage("questions", answered, [pixtral], 450, 1e-3),
    ]
    return System(pixtral, stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
