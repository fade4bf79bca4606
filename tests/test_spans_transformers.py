"""RowSpans against the masks that transformers' own code makes of the same layouts."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma3TextConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from mmkernels import RowSpans

LAYOUTS, WINDOW = 25, 5
TEXT, IMAGE, END = 0, 1, 2  # tokens


@pytest.fixture(params=range(LAYOUTS))
def rng(request, seed) -> random.Random:
    return random.Random(seed + request.param)


def runs_of(rng: random.Random, *tokens: int) -> Tensor:
    """A row of runs, up to 9 tokens long, of these tokens."""
    return torch.tensor([token for _ in range(rng.randint(1, 8)) for token in [rng.choice(tokens)] * rng.randint(1, 9)])


def arguments(config: type, tokens: int, **others) -> dict[str, object]:
    """What a model hands to the functions that make masks."""
    config = config(num_hidden_layers=1, sliding_window=WINDOW)
    config._attn_implementation = "sdpa"
    given = {"config": config, "inputs_embeds": torch.zeros(1, tokens, 8), "attention_mask": None}
    return given | {"past_key_values": None, "position_ids": None} | others


def assert_same(spans: RowSpans, mask: Tensor) -> None:
    """mask: (1, 1, queries, keys), True where a query sees a key, or 0 in a tensor to be added."""
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    assert torch.equal(spans.to_dense(), seen)
    assert torch.equal(RowSpans.from_dense(seen, max_runs=1).to_dense(), seen)


def test_packed_documents(rng):
    """Which transformers tells by positions that begin again."""
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(2, 5))]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    given = arguments(Gemma2Config, sum(lengths), position_ids=positions)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    assert_same(RowSpans.packed(cu_seqlens, causal=True), create_causal_mask(**given))
    windowed = RowSpans.packed(cu_seqlens, causal=True, window=WINDOW)
    assert_same(windowed, create_sliding_window_causal_mask(**given))


def test_gemma3(rng):
    token_types = runs_of(rng, TEXT, IMAGE)
    blocks = get_block_sequence_ids_for_mask((token_types == IMAGE).int()[None])
    masks = create_masks_for_vision_model(**arguments(Gemma3TextConfig, len(token_types), block_sequence_ids=blocks))
    row, image_id = torch.tensor([0, len(token_types)]), torch.where(token_types == IMAGE, 0, -1)
    assert_same(RowSpans.image_text(row, image_id), masks["full_attention"])
    assert_same(RowSpans.image_text(row, image_id, window=WINDOW), masks["sliding_attention"])


def test_paligemma(rng):
    """Image and prompt are types of 0, the answer is of 1; PaliGemma 2 has sliding layers too."""
    prefix, tokens = rng.randint(1, 20), rng.randint(21, 30)
    token_types = (torch.arange(tokens) >= prefix).long()[None]
    blocks = torch.where(token_types == 0, 0, -1)
    given = arguments(Gemma2Config, tokens, block_sequence_ids=blocks)
    row = torch.tensor([0, tokens])
    assert_same(RowSpans.prefix_lm(row, torch.tensor([prefix])), create_causal_mask(**given))
    union = RowSpans.image_text(row, blocks[0], window=WINDOW, window_rule="union")
    assert_same(union, create_sliding_window_causal_mask(**given))


def test_idefics(rng):
    """Documents end with a token; a text token sees the last image of its document."""
    tokens = torch.tensor([rng.choice([TEXT, TEXT, TEXT, IMAGE, END]) for _ in range(rng.randint(1, 40))])
    tokens[rng.randrange(len(tokens))] = IMAGE
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda _: IMAGE, eos_token_id=END)
    last_image, _ = image_attention_mask_for_packed_input_ids(tokens[None], tokenizer, "pt")
    images = int((tokens == IMAGE).sum())
    seen = incremental_to_binary_attention_mask(last_image, "pt", num_classes=images)
    ends = (tokens == END).nonzero()[:, 0] + 1
    spans = RowSpans.media(
        tokens == IMAGE, 3, cu_seqlens=torch.cat([torch.tensor([0]), ends, torch.tensor([len(tokens)])])
    )
    assert_same(spans, seen.bool().repeat_interleave(3, 2)[None])


def test_mllama(rng):
    """Images in groups, of one to four tiles each, padded to four by theirs; a row that sees nothing sees all."""
    tokens = torch.tensor([rng.choice([TEXT, TEXT, IMAGE]) for _ in range(rng.randint(1, 25))])
    tokens[rng.randrange(len(tokens))] = IMAGE
    locations = tokens == IMAGE
    tiles = torch.tensor([rng.randint(1, 4) for _ in range(int(locations.sum()))])
    reach = get_cross_attention_token_mask(tokens.tolist(), IMAGE)
    dense = convert_sparse_cross_attention_mask_to_dense([reach], [tiles.tolist()], 4, len(tokens))
    mask, _ = _prepare_cross_attention_mask(torch.from_numpy(dense).float(), 3, torch.float32)
    there = (torch.arange(4) < tiles[:, None]).flatten().repeat_interleave(3)
    spans = RowSpans.media(locations, tiles * 3, attend="group", empty_rows="all")
    assert_same(spans, mask[..., there])
