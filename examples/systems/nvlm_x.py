"""NVLM-X, cross-attention: the language model reads tiles through layers of their own, and tags say which it reads.

Dai et al. 2024, https://arxiv.org/abs/2409.11402; the layers after Alayrac et al. 2022 (Flamingo),
https://arxiv.org/abs/2204.14198.

    picture -> tile 1, tile 2, thumbnail -> patches -> transformer -> pixel shuffle -> one linear layer
                                                                                           |
    <image> <tile 1> <tile 2> <thumbnail> </image> question                                | keys and values
                          |                                                                |
          every second layer of the language model, behind gated cross-attention <---------'
                          |
                       answer

- patch embedding of the vision encoder: `patch_embed`
- attention of the encoder (all patches of a tile) and of the language model (causal, padded): `span_attention`
- cross-attention (`GatedCrossAttentionBlock`): `span_attention`; a tag sees the tokens of its tile, and what follows
  the tags sees those of all tiles
- rotary embedding of the language model: its own

There is no resampler, which would mix the tokens of a picture: the paper found it to hurt where text is to be read.
Text without a picture passes no cross-attention. The published vision encoder and language model come trained; here
they are trained first, on names of digits and on text. Then, as published, pretraining trains projector and
cross-attention, whose gates begin closed, and fine-tuning the language model too, on pictures and on text without any,
of which it would else forget. The encoder stays frozen.
"""

import torch
from gallery.nvlm import IMAGE_START, TAGS, TOKENS, decoder, insert_cross_attention, projected, system, tiles
from gallery.training import System, main
from gallery.words import BOS, IMAGE_END, batch
from torch import Tensor, nn

from mmkernels import RowSpans

SHOWN = [BOS, IMAGE_START, *TAGS, IMAGE_END]


def spans_of(ids: Tensor) -> RowSpans:
    """Of a row's tiles, one after the other."""
    is_tag = torch.isin(ids, torch.tensor(TAGS))
    end = (TOKENS * is_tag.cumsum(1)).int()
    begin = torch.where(is_tag, end - TOKENS, 0)
    return RowSpans(begin[:, None], end[:, None], TOKENS * len(TAGS))


def build() -> System:
    model = decoder()
    two_layers = model.model.multi_modal_projector
    projector = nn.Sequential(two_layers.layer_norm, two_layers.linear_1)
    model.model.multi_modal_projector = projector
    blocks = insert_cross_attention(model)

    def given(pictures: Tensor, texts: list[list[int]], answers: list[list[int]]) -> dict:
        words = batch([SHOWN + text for text in texts], answers)
        keys = projected(model, tiles(pictures)).flatten(1, 2)
        return words | {"tiles": keys, "spans": spans_of(words["input_ids"])}

    return system(model, [projector, *blocks], given)


if __name__ == "__main__":
    main(build, __doc__)
