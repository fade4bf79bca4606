"""Qwen2-VL: pictures of any resolution and videos, whose patches take two frames each.

Wang et al. 2024, https://arxiv.org/abs/2409.12191.

    frames -> patches of 2 frames -> transformer -> merger: 2 x 2 patches into one --.
                                                                                      >  causal decoder -> answer
    question -> words --------------- <vision start> v v v v <vision end> w w w -----'

A picture is a video of two equal frames. The tower turns queries and keys by row and column, the decoder by time, row
and column (M-RoPE), where a word has the same number for all three.

- patch embedding of the tower, of rows that are cut already: `patch_embed`
- rotary embedding of the tower: `rotary_embed`; of the decoder: its own
- attention of the tower (all pictures and frames back to back) and of the decoder (causal, padded): `span_attention`

Four stages. First the language model, which reads digits that are named by words, and repeats them or answers questions
about them: it stands for Qwen2, which was there before. Then the tower alone, from captions that the frozen language
model is to say. Then all, from captions of pictures and videos. Then the tower is locked, and the language model learns
to answer questions about two digits side by side, and goes on with videos, where one digit comes after the other.
"""

from collections import Counter
from functools import partial

import torch
from gallery.digits import NAMES, Questions, blind_accuracy, digits, draw_questions, held_out_questions, side_by_side
from gallery.training import Score, Stage, System, main
from gallery.words import BOS, EOS, FREE, IGNORED, IMAGE, PAD, SIZE, accuracy, batch, encode
from torch import Generator, Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

PATCH, FRAMES, MERGED, SIDES = 4, 2, 2, (16, 24)  # sides of a digit, in pixels
STILL, MOVING = "{} left {} right", "{} then {}"  # captions
VIDEO, START, END = FREE, FREE + 1, FREE + 2
SIGNS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}
SIGNS |= {"vision_end_token_id": END}
VISION = {"depth": 2, "embed_dim": 96, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 128, "patch_size": PATCH}
VISION |= {"temporal_patch_size": FRAMES, "spatial_merge_size": MERGED}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}  # of time, row, column
TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": SIZE, "max_position_embeddings": 128, "rope_parameters": ROTARY}
TEXT |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def patches(frames: Tensor) -> tuple[Tensor, list[int]]:
    """(T, 3, H, W) -> patches as rows of numbers, those that are merged one after the other; and how many there are
    in time, rows and columns."""
    cut = frames.unflatten(3, (-1, MERGED, PATCH)).unflatten(2, (-1, MERGED, PATCH)).unflatten(0, (-1, FRAMES))
    times, _, _, rows, _, _, columns = cut.shape[:7]
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4), [times, rows * MERGED, columns * MERGED]


def read(seen: list[Tensor], texts: list[str], answers: list[str]) -> dict[str, Tensor]:
    """What the model takes: texts that have one picture or one longer video each."""
    prompts, pictures, videos = [], [], []
    for frames, text in zip(seen, texts, strict=True):
        sign, kind = (IMAGE, pictures) if len(frames) == FRAMES else (VIDEO, videos)
        kind.append(patches(frames))
        prompts.append([BOS, START, *[sign] * (len(kind[-1][0]) // MERGED**2), END, *encode(text)])
    inputs = batch(prompts, [encode(answer) for answer in answers])
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int()
    for kind, pixels, grids in (
        (pictures, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if kind:
            inputs |= {pixels: torch.cat([rows for rows, _ in kind]), grids: torch.tensor([grid for _, grid in kind])}
    return inputs


def shown(drawn: Questions, sides: list[int], moving: bool) -> list[Tensor]:
    """Of two digits: side by side in two equal frames, or one after the other, for two frames each."""
    both = [side_by_side(pair[None], side) for pair, side in zip(drawn.pictures, sides, strict=True)]
    if moving:
        return [torch.cat(each.chunk(2, 3)).repeat_interleave(FRAMES, 0) for each in both]
    return [each.expand(FRAMES, -1, -1, -1) for each in both]


def told(drawn: Questions, form: str) -> list[str]:
    return [form.format(NAMES[left], NAMES[right]) for left, right in drawn.labels.tolist()]


def draw_sides(count: int, generator: Generator) -> list[int]:
    return [SIDES[i] for i in torch.randint(len(SIDES), (count,), generator=generator).tolist()]


def build() -> System:
    qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=VISION, **SIGNS))
    tower, language = qwen.model.visual, [qwen.model.language_model, qwen.lm_head]

    def in_words(generator: Generator) -> Tensor:
        drawn = draw_questions(digits(), 32, generator)
        named, texts = told(drawn, STILL), [""] * 16 + drawn.questions[16:]
        prompts = [[BOS, START, *encode(pair), END, *encode(text)] for pair, text in zip(named, texts, strict=True)]
        return qwen(**batch(prompts, [encode(answer) for answer in named[:16] + drawn.answers[16:]])).loss

    def watched(pictures: int, videos: int, asked: bool, generator: Generator) -> Tensor:
        still, moving = (draw_questions(digits(), count, generator) for count in (pictures, videos))
        texts, answers = (still.questions, still.answers) if asked else ([""] * pictures, told(still, STILL))
        seen = shown(still, draw_sides(pictures, generator), moving=False)
        seen += shown(moving, draw_sides(videos, generator), moving=True)
        return qwen(**read(seen, texts + [""] * videos, answers + told(moving, MOVING))).loss

    def scores() -> dict[str, Score]:
        asked = held_out_questions()
        sides = [SIDES[i % len(SIDES)] for i in range(len(asked.answers))]
        inputs = read(shown(asked, sides, moving=False), asked.questions, asked.answers)
        labels = inputs.pop("labels")
        answered = Score(accuracy(qwen(**inputs).logits, labels), blind_accuracy(asked))
        captions = told(asked, MOVING)
        inputs = read(shown(asked, sides, moving=True), [""] * len(sides), captions)
        labels = inputs.pop("labels")[:, 1:]
        right = (qwen(**inputs).logits[:, :-1].argmax(-1) == labels) | (labels == IGNORED)
        most = Counter(captions).most_common(1)[0][1] / len(captions)
        named = Score(right.all(1).float().mean().item(), most)
        return {"answers to questions": answered, "captions of videos": named}

    stages = [
        Stage("language", in_words, language, 250, 1e-3),
        Stage("tower", partial(watched, 32, 0, False), [tower], 200, 1e-3),
        Stage("all", partial(watched, 24, 8, False), [qwen], 150, 1e-3),
        Stage("tower locked", partial(watched, 24, 8, True), language, 200, 1e-3),
    ]
    return System(qwen, stages, scores)


if __name__ == "__main__":
    main(build, __doc__)
