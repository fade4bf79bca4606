"""The masks of transformers as spans: equal to the dense ones, on random settings of every mask function."""

import copy
import pickle
import random

import pytest
import torch
from transformers import PerceiverConfig, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.perceiver import modeling_perceiver  # noqa: F401 (which says what Perceiver supports)

from mmkernels.integrations.transformers import masks
from mmkernels.integrations.transformers.attention import span_attention_forward
from mmkernels.integrations.transformers.masks import additive_span_mask, span_mask
from mmkernels.integrations.transformers.span_mask import SpanMask, is_dense, spans_of

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


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_dense_mask(seed, name, kind):
    draw = random.Random(seed)
    for _ in range(75):
        arguments = setting(draw, name)
        if kind == "bool":
            arguments |= draw.choice([{}, {"dtype": torch.bfloat16}])  # of the model, in which the mask is none
            dense, mask = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False), span_mask(**arguments)
        else:
            arguments["dtype"] = draw.choice([torch.float32, torch.bfloat16])
            dense, mask = masking_utils.eager_mask(**arguments), additive_span_mask(**arguments)
        if isinstance(mask, SpanMask):
            assert mask.untyped_storage().nbytes() == 0 or not is_dense(mask)
            assert_runs_are_apart(mask)
        assert isinstance(mask, SpanMask) == (name != "unknown")
        assert mask.shape == (*dense.shape[:1], 1, *dense.shape[2:]) and mask.dtype == dense.dtype
        assert torch.equal(mask.expand_as(dense) + 0, dense + 0), arguments


def assert_runs_are_apart(mask: SpanMask) -> None:
    """Ascending, and they do not touch."""
    if mask.code is not None:
        spans = spans_of(mask, mask.shape[2])
        some = spans.lo < spans.hi
        assert ((spans.lo[:, 1:] > spans.hi[:, :-1]) | ~some[:, 1:]).all()


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked", "blocks", "sliding and blocks"])
def test_one_run_where_padding_is_on_one_side(seed, name):
    draw = random.Random(seed)
    for style in ("left", None):
        mask = None if style is None else padding(draw, 2, 40, style)
        left = torch.zeros(2, dtype=torch.long) if mask is None else (mask.cumsum(-1) == 0).sum(-1)
        sizes = {"batch_size": 2, "q_length": 40, "kv_length": 40}
        made = span_mask(**sizes, mask_function=function(draw, name, 2, 40, 7, left), attention_mask=mask)
        assert spans_of(made, 40).runs == 1


def test_costs_no_dense_mask(seed):
    """8 bytes a query and run, however many keys there are."""
    blocks = masking_utils.or_masks(causal, masking_utils.blockwise_overlay(torch.arange(30000).view(1, -1) // 100))
    mask = span_mask(batch_size=1, q_length=30000, kv_length=30000, mask_function=blocks)
    assert mask.code.untyped_storage().nbytes() == 8 * 30000 and not mask.made


# ---- a mask of spans where a mask is expected: each operation sees the dense one


def a_mask(kind: torch.dtype) -> tuple[SpanMask, torch.Tensor]:
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :4] = False
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "attention_mask": padding}
    if kind == torch.bool:
        return span_mask(**sizes), masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)
    return additive_span_mask(**sizes, dtype=kind), masking_utils.eager_mask(**sizes, dtype=kind)


USES = {
    "compared": lambda mask: mask != 0,
    "added to scores": lambda mask: torch.ones(2, 3, 9, 9) + mask,
    "joined": lambda mask: torch.cat([mask, mask], dim=-1),
    "padded": lambda mask: torch.nn.functional.pad(mask, (0, 3)),
    "a head's": lambda mask: mask[:, 0],
    "fewer keys": lambda mask: mask[:, :, :, :5],
    "other keys": lambda mask: mask[..., 2:],
    "the last queries": lambda mask: mask[:, :, -3:] + 0,
    "every other query": lambda mask: mask[:, :, ::2] + 0,
    "summed": lambda mask: mask.sum(-1),
    "repeated": lambda mask: mask.repeat(1, 2, 1, 1),
    "expanded": lambda mask: mask.expand(-1, 4, -1, -1),
    "of another dtype": lambda mask: mask.to(torch.float64),
    "asked": lambda mask: torch.tensor(bool((mask == 0).any())),
    "chosen by": lambda mask: torch.where(mask == 0, 1.0, -1.0),
    "indexed": lambda mask: mask[torch.tensor([1, 0])],
    "in sdpa": lambda mask: torch.nn.functional.scaled_dot_product_attention(
        *[torch.ones(2, 1, 9, 4)] * 3, attn_mask=mask
    ),
    "a list": lambda mask: torch.tensor(mask.tolist()),
}


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("use", USES)
def test_is_the_mask_it_stands_for(use, kind, how):
    mask, dense = a_mask(kind)
    used = USES[use]
    expected = used(dense)
    if how == "compiled":
        torch.compiler.reset()
        used = torch.compile(used, backend="aot_eager")
    assert torch.equal(used(mask), expected)


WRITES = {
    "filled": lambda mask: mask.fill_(0),
    "written through a view": lambda mask: mask[:, 0].fill_(0),
    "set": lambda mask: mask.__setitem__((slice(None), slice(None), 3), 0),
    "and'ed": lambda mask: mask.mul_(0),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_counts(write):
    """In attention too, which reads spans of a mask that nobody wrote to."""
    mask, dense = a_mask(torch.float32)
    for x in (mask, dense):
        WRITES[write](x)
    assert torch.equal(mask + 0, dense)
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    module = torch.nn.Module()
    ours, _ = span_attention_forward(module, q, k, v, mask)
    theirs, _ = sdpa_attention_forward(module, q, k, v, dense)
    seeing = (dense == 0).any(-1)[:, 0]  # what sees nothing is padding, of which nobody asks
    torch.testing.assert_close(ours[seeing], theirs[seeing])


def test_keeps_spans_where_it_can():
    mask, dense = a_mask(torch.bool)
    last = mask[:, :, -3:]
    assert isinstance(last, SpanMask) and torch.equal(last + 0, dense[:, :, -3:] + 0)
    for same in (mask.detach(), mask.to("cpu"), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert isinstance(same, SpanMask) and torch.equal(same + 0, dense + 0)
    assert not isinstance(mask.to(torch.float32), SpanMask)


def test_refuses_where_no_bool_mask_is_known():
    """Of a model by name: the padding of Perceiver, which would be added to its scores."""
    padding = torch.ones(2, 9, dtype=torch.bool)
    function = masking_utils.bidirectional_mask_function
    sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function, "attention_mask": padding}
    mask = span_mask(**sizes, config=PerceiverConfig())
    with pytest.raises(ValueError, match=r"perceiver models compute attention themselves.*accelerate\(model\)"):
        torch.ones(2, 1, 9, 9) + mask
    q = torch.randn(2, 2, 9, 8)
    span_attention_forward(torch.nn.Module(), q, q, q, mask)  # attention reads its spans
    unknown = masking_utils.and_masks(function, lambda b, h, q, k: (q + k) % 3 != 0)
    sizes |= {"mask_function": unknown, "dtype": torch.bfloat16}
    assert torch.equal(span_mask(**sizes, config=PerceiverConfig()), masking_utils.eager_mask(**sizes))


@pytest.mark.parametrize("style", ["left", "holes", "both"])
@pytest.mark.parametrize("of", [masking_utils.bidirectional_mask_function, causal], ids=["bidirectional", "causal"])
def test_every_query_sees_a_mask_of_one_row(seed, of, style):
    """As sdpa broadcasts it. Other numbers of rows are for nobody."""
    seen = padding(random.Random(seed), 2, 12, style)
    seen[:, 3], seen[:, 0] = True, False  # where nothing is hidden, sdpa has no mask to broadcast
    sizes = {"batch_size": 2, "q_length": 1, "kv_length": 12, "q_offset": 11, "mask_function": of}
    mask, dense = (make(**sizes, attention_mask=seen) for make in (span_mask, masking_utils.sdpa_mask))
    q, k, v = (torch.randn(2, 2, n, 8) for n in (9, 12, 12))
    ours, _ = span_attention_forward(torch.nn.Module(), q, k, v, mask)
    theirs, _ = sdpa_attention_forward(torch.nn.Module(), q, k, v, dense)
    torch.testing.assert_close(ours, theirs)
    mask = span_mask(**sizes | {"q_length": 4, "q_offset": 8}, attention_mask=seen)
    if mask.code is not None:
        with pytest.raises((ValueError, RuntimeError), match="4"):
            span_attention_forward(torch.nn.Module(), q, k, v, mask)


def test_no_mask_where_sdpa_has_none():
    """It is not the same as a mask that hides nothing: a layer that calls itself causal is so without one (Phi-4's
    vision tower)."""
    of = masking_utils.bidirectional_mask_function
    for hidden in (0, 1):
        seen = torch.ones(2, 9, dtype=torch.bool)
        seen[1, :hidden] = False
        sizes = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": of, "attention_mask": seen}
        for skip in (True, False):
            theirs = masking_utils.sdpa_mask(**sizes, allow_is_bidirectional_skip=skip, allow_is_causal_skip=False)
            for make in (span_mask, additive_span_mask):
                assert (make(**sizes, allow_is_bidirectional_skip=skip) is None) == (theirs is None)


@pytest.mark.parametrize("seed", range(20))
def test_tables_are_looked_up_where_a_packed_query_stands(seed):
    """Not by its position in the document, with which transformers asks the function that it remaps (Gemma 3's sliding
    layers): the mask of a pack is those of its documents alone, also where images meet at a boundary."""
    draw = random.Random(seed)
    length, window = 24, draw.randint(2, 9)
    places, ids = positions(draw, 1, length), block_ids(draw, 1, length, True)
    sequences = masking_utils.find_packed_sequence_indices(places)
    sequences = torch.zeros_like(places) if sequences is None else sequences
    sliding = masking_utils.sliding_window_causal_mask_function(window)
    given = masking_utils.or_masks(sliding, masking_utils.blockwise_overlay(ids))
    packed_function = masking_utils.packed_sequence_compatibility_function(given, places, sequences)
    sizes = {"batch_size": 1, "q_length": length, "kv_length": length}
    mask = span_mask(mask_function=packed_function, **sizes)
    assert isinstance(mask, SpanMask) and not is_dense(mask)

    expected = torch.zeros(length, length, dtype=torch.bool)
    for document in sequences.unique():
        own = (sequences[0] == document).nonzero()[:, 0]
        alone = masking_utils.or_masks(sliding, masking_utils.blockwise_overlay(ids[:, own]))
        sizes = {"batch_size": 1, "q_length": len(own), "kv_length": len(own)}
        seen = masking_utils.sdpa_mask(mask_function=alone, use_vmap=True, allow_is_causal_skip=False, **sizes)[0, 0]
        expected[own[:, None], own] = seen
    assert torch.equal(mask.dense()[0, 0], expected)


@pytest.mark.parametrize("additive", [False, True])
def test_a_function_that_nobody_knows_is_cut_by_documents(additive, monkeypatch):
    """Of a row of 5 and 3 tokens and one of padding, and a row of one document."""
    offsets, length = torch.tensor([0, 5, 8, 9, 18], dtype=torch.int32), 9
    monkeypatch.setattr(masks, "told", lambda: offsets)
    make = additive_span_mask if additive else masks.bool_span_mask
    sizes = {"batch_size": 2, "q_length": length, "kv_length": length}

    def unknown(batch, head, q, k):
        return k <= q + 1

    mask = make(mask_function=unknown, use_vmap=True, **sizes)
    mask = mask == 0 if additive else mask
    document = torch.bucketize(torch.arange(18), offsets[1:], right=True).view(2, length)
    place = torch.arange(length)
    expected = (place <= place[:, None] + 1) & (document[:, :, None] == document[:, None])
    assert torch.equal(mask.expand(2, 1, -1, -1)[:, 0], expected)
