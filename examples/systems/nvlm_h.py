"""NVLM-H, hybrid: the thumbnail of a picture is words of the language model, its tiles are read by cross-attention.

Dai et al. 2024, https://arxiv.org/abs/2409.11402; the layers after Alayrac et al. 2022 (Flamingo),
https://arxiv.org/abs/2204.14198.

    picture -> thumbnail, tile 1, tile 2 -> patches -> transformer -> pixel shuffle -> two linear layers
                                                                            |               |
    <image> <thumbnail> . . . . </image> question <----- of the thumbnail --'               | of the tiles
                          |                                                                 |
                          |                       keys and values: <tile 1> . . . . <tile 2> . . . .
                          |                                                   |
          every second layer of the language model, behind gated cross-attention
                          |
                       answer

- patch embedding of the vision encoder: `patch_embed`
- attention of the encoder (all patches of a tile) and of the language model (causal, padded): `span_attention`
- cross-attention (`GatedCrossAttentionBlock`): `span_attention`; the thumbnail and what follows it see all tiles
- rotary embedding of the language model: its own

The tags of tiles are the words they are in NVLM-D, but stand among the keys. Text without a picture passes no
cross-attention. The published vision encoder and language model come trained; here they are trained first, on names of
digits and on text. Then, as published, pretraining trains projector and cross-attention, whose gates begin closed, and
fine-tuning the language model too, on pictures and on text without any, of which it would else forget. The encoder
stays frozen.
"""

import torch
from gallery.nvlm import IMAGE_START, TAGS, TOKENS, decoder, insert_cross_attention, projected, system, tiles
from gallery.training import System, main
from gallery.words import BOS, IMAGE, IMAGE_END, THUMBNAIL, batch
from torch import Tensor

from mmkernels import RowSpans

SHOWN = [BOS, IMAGE_START, THUMBNAIL, *[IMAGE] * TOKENS, IMAGE_END]
TILE_TAGS = TAGS[:-1]
KEYS = len(TILE_TAGS) * (1 + TOKENS)


def build() -> System:
    model = decoder()
    blocks = insert_cross_attention(model)

    def given(pictures: Tensor, texts: list[list[int]], answers: list[list[int]]) -> dict:
        words = batch([SHOWN + text for text in texts], answers)
        cut = tiles(pictures)
        tags = model.get_input_embeddings()(torch.tensor(TILE_TAGS))
        tagged = [tags[:, None].expand(len(cut), -1, -1, -1), projected(model, cut[:, :-1])]
        spans = RowSpans.media(words["input_ids"] == THUMBNAIL, KEYS, num_keys=KEYS)
        return words | {"pixel_values": cut[:, -1], "tiles": torch.cat(tagged, 2).flatten(1, 2), "spans": spans}

    return system(model, [model.model.multi_modal_projector, *blocks], given)


if __name__ == "__main__":
    main(build, __doc__)
