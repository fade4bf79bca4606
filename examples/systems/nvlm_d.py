"""NVLM-D, decoder-only: all tiles of a picture are words of the language model, each tile behind its tag.

Dai et al. 2024, https://arxiv.org/abs/2409.11402.

    picture -> tile 1, tile 2, thumbnail -> patches -> transformer -> pixel shuffle -> two linear layers --.
                                                                                                            |
                      <image> <tile 1> . . . . <tile 2> . . . . <thumbnail> . . . . </image> question <----'
                                                      |
                                               language model -> answer

- patch embedding of the vision encoder: `patch_embed`
- attention of the encoder (all patches of a tile) and of the language model (causal, padded): `span_attention`
- rotary embedding of the language model: its own

A picture of two digits is larger than the encoder takes: it is cut into tiles, and the thumbnail is the whole at their
size. Four patches become a token. The published vision encoder and language model come trained; here they are trained
first, on names of digits and on text. Then, as published, pretraining trains the projector alone, and fine-tuning the
projector and the language model, on pictures and on text without any, of which it would else forget. The encoder stays
frozen.
"""

from gallery.nvlm import IMAGE_START, TAGS, TOKENS, decoder, system, tiles
from gallery.training import System, main
from gallery.words import BOS, IMAGE, IMAGE_END, batch
from torch import Tensor

SHOWN = [BOS, IMAGE_START, *(sign for tag in TAGS for sign in (tag, *[IMAGE] * TOKENS)), IMAGE_END]


def build() -> System:
    model = decoder()

    def given(pictures: Tensor, texts: list[list[int]], answers: list[list[int]]) -> dict[str, Tensor]:
        words = batch([SHOWN + text for text in texts], answers)
        return words | {"pixel_values": tiles(pictures).flatten(0, 1)}

    return system(model, [model.model.multi_modal_projector], given)


if __name__ == "__main__":
    main(build, __doc__)
