"""The masks of transformers as spans: equal to the dense ones, on random settings of every mask function."""

import random

import pytest
import torch
from transformers import masking_utils

from mmkernels.integrations.transformers.codes import decode, is_code
from mmkernels.integrations.transformers.masks import span_mask

causal = masking_utils.causal_mask_function


def block_ids(draw, batch, length, unique):
    """Runs of one id each, -1 between some of them; not `unique`: an id may come in several places."""
    ids = torch.full((batch, length), -1)
    for row in ids:
        at = number = 0
        while at < length:
            size = draw.randint(1, 5)
            if draw.random() < 0.5:
                row[at : at + size] = number if unique else draw.randint(0, 2)
                number += 1
            at += size
    return ids


def positions(draw, batch, length):
    """Of packed sequences: rising by one in each, from 0 or from 3."""
    found = torch.zeros(batch, length, dtype=torch.long)
    for row in found:
        at = 0
        while at < length:
            size, first = draw.randint(1, length), draw.choice([0, 0, 3])
            row[at : at + size] = torch.arange(first, first + size)[: length - at]
            at += size
    return found


def padding(draw, batch, length, style):
    mask = torch.ones(batch, length, dtype=torch.bool)
    for row in mask:
        cut = draw.randint(0, length)
        if style == "left":
            row[:cut] = False
        elif style == "right":
            row[cut:] = False
        elif style == "both":
            row[: cut // 2], row[length - cut // 3 :] = False, False
        elif style == "holes":
            row[:] = torch.tensor([draw.random() > 0.4 for _ in row])
        elif style == "before what is generated":
            row[cut // 2 : length - 2] = False
    return mask


def packed(draw, batch, length, window):
    base = draw.choice(
        [
            causal,
            masking_utils.sliding_window_causal_mask_function(window),
            masking_utils.chunked_causal_mask_function(window, torch.zeros(batch, dtype=torch.long)),
        ]
    )
    places = positions(draw, batch, length)
    sequences = masking_utils.find_packed_sequence_indices(places)
    if sequences is None:
        return base
    found = masking_utils.packed_sequence_compatibility_function(base, places, sequences)
    if base is causal and draw.random() < 0.5:
        blocks = masking_utils.blockwise_overlay(block_ids(draw, batch, length, True))
        return masking_utils.or_masks(found, blocks)
    return found


def function(draw, name, batch, length, window, left):
    sliding = masking_utils.sliding_window_causal_mask_function(window)

    def blocks(unique=True):
        return masking_utils.blockwise_overlay(block_ids(draw, batch, length, unique))

    overlay = masking_utils.sliding_window_overlay(window)
    return {
        "causal": lambda: causal,
        "bidirectional": lambda: masking_utils.bidirectional_mask_function,
        "sliding": lambda: sliding,
        "sliding both ways": lambda: masking_utils.sliding_window_bidirectional_mask_function(window),
        "chunked": lambda: masking_utils.chunked_causal_mask_function(window, left),
        "blocks": lambda: masking_utils.or_masks(causal, blocks()),
        "blocks of repeated ids": lambda: masking_utils.or_masks(causal, blocks(unique=False)),
        "sliding or blocks": lambda: masking_utils.or_masks(sliding, blocks(unique=draw.random() < 0.5)),
        "sliding and blocks": lambda: masking_utils.and_masks(overlay, masking_utils.or_masks(causal, blocks())),
        "unknown": lambda: masking_utils.or_masks(causal, lambda b, h, q, k: (q + k) % 3 == 0),
    }[name]()


NAMES = ["causal", "bidirectional", "sliding", "sliding both ways", "chunked", "blocks", "blocks of repeated ids"]
NAMES += ["sliding or blocks", "sliding and blocks", "unknown", "packed"]
STYLES = [None, "left", "right", "both", "holes", "before what is generated"]


def setting(draw, name):
    """The arguments of a mask function: lengths, caches, padding."""
    batch, length = draw.randint(1, 3), draw.randint(1, 17)
    cache = draw.choice(["none", "none", "dynamic", "static", "sliding"]) if name != "packed" else "none"
    past = draw.randint(0, 9) if cache != "none" else 0
    queries = draw.choice([1, length]) if cache != "none" else length
    sizes = {"batch_size": batch, "q_length": queries, "kv_length": past + queries, "q_offset": past, "kv_offset": 0}
    if cache == "static":
        sizes |= {"kv_length": past + queries + draw.randint(0, 6), "q_offset": draw.choice([past, torch.tensor(past)])}
    if cache == "sliding" and past:
        skipped = draw.randint(0, past)
        sizes |= {"kv_offset": skipped, "kv_length": past + queries - skipped}
    style = draw.choice(STYLES) if name != "packed" else None
    mask = None if style is None else padding(draw, batch, past + queries, style)
    left = torch.zeros(batch, dtype=torch.long) if mask is None else (mask.cumsum(-1) == 0).sum(-1)
    window = draw.randint(1, 7)
    if name == "packed":
        made = packed(draw, batch, length, window)
    else:
        made = function(draw, name, batch, max(sizes["kv_length"] + sizes["kv_offset"], past + queries), window, left)
    return sizes | {"mask_function": made, "attention_mask": mask}


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_mask(seed, name):
    draw = random.Random(seed)
    for _ in range(150):
        arguments = setting(draw, name)
        dense = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
        spans = span_mask(**arguments)
        queries, keys = arguments["q_length"], arguments["kv_length"]
        if name == "bidirectional" and arguments["attention_mask"] is not None:
            assert spans.dtype == torch.bool and (queries == 1 or spans.stride(2) == 0)
        elif name == "unknown":
            assert spans.dtype == torch.bool
        else:
            assert is_code(spans) and spans.shape[2:] == (queries, keys) and (keys == 1 or spans.stride(3) == 0)
            spans = decode(spans)
            some = spans.lo < spans.hi
            apart = (spans.lo[:, 1:] > spans.hi[:, :-1]) | ~some[:, 1:]
            assert apart.all(), "runs are ascending and do not touch"
            spans = spans.to_dense()[:, None]
        assert torch.equal(spans.expand_as(dense), dense), arguments


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "blocks", "sliding and blocks"])
def test_one_run_where_padding_is_on_one_side(seed, name):
    draw = random.Random(seed)
    for style in ("left", None):
        mask = None if style is None else padding(draw, 2, 40, style)
        left = torch.zeros(2, dtype=torch.long) if mask is None else (mask.cumsum(-1) == 0).sum(-1)
        code = span_mask(2, 40, 40, mask_function=function(draw, name, 2, 40, 7, left), attention_mask=mask)
        assert code.shape[1] == 1


def test_code_is_no_mask():
    """What does not know it refuses it, in place of attending wrongly."""
    code = span_mask(1, 4, 4)
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(RuntimeError):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=code)


def test_costs_no_dense_mask(seed):
    """8 bytes a query and run, however many keys there are."""
    blocks = masking_utils.or_masks(causal, masking_utils.blockwise_overlay(torch.arange(30000).view(1, -1) // 100))
    code = span_mask(1, 30000, 30000, mask_function=blocks)
    assert code.untyped_storage().nbytes() == 8 * 30000
