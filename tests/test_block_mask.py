"""Spans in the words of FlexAttention: the same pairs, block by block, and the same attention."""

import random

import pytest
import torch
from span_layouts import BUILDERS
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mmkernels import RowSpans, span_attention

ANY_LENGTHS = (1, 9, 40)


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def of_any_runs(rng: random.Random) -> RowSpans:
    """One to three runs a query, with gaps or end to end, with a batch axis or without."""
    batch, runs, queries, keys = rng.choice([None, 1, 3]), rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 70)
    places = torch.randint(0, keys + 1, (batch or 1, queries, 2 * runs)).sort(-1).values
    lo, hi = places.int().unflatten(-1, (runs, 2)).movedim(1, -1).unbind(2)
    return RowSpans(*(x[0] if batch is None else x for x in (lo, hi)), keys)


def told_by(mask: BlockMask) -> torch.Tensor:
    """(batch, queries, keys): True where a block that is listed, whole or not, lets a pair through."""
    batch = mask.kv_num_blocks.shape[0]
    (queries, keys), (rows, columns) = mask.seq_lengths, mask.BLOCK_SIZE
    found = torch.zeros(batch, queries, keys, dtype=torch.bool)
    pairs = torch.meshgrid(*(torch.arange(n) for n in (batch, queries, keys)), indexing="ij")
    rule = mask.mask_mod(pairs[0], torch.zeros_like(pairs[0]), *pairs[1:])
    kinds = (mask.kv_num_blocks, mask.kv_indices, rule), (mask.full_kv_num_blocks, mask.full_kv_indices, rule | True)
    for counts, indices, seen in kinds:
        for b, block in torch.cartesian_prod(torch.arange(batch), torch.arange(counts.shape[-1])).tolist():
            for column in indices[b, 0, block, : counts[b, 0, block]].tolist():
                place = b, slice(block * rows, (block + 1) * rows), slice(column * columns, (column + 1) * columns)
                assert not found[place].any()  # no block is listed twice
                found[place] = seen[place]
    return found


def check(spans: RowSpans, block_size: int | tuple[int, int]) -> BlockMask:
    mask, dense = spans.to_block_mask(block_size), spans.to_dense()
    dense = dense if dense.dim() == 3 else dense[None]
    assert torch.equal(told_by(mask), dense)
    rows, columns = mask.BLOCK_SIZE
    for b, block in torch.cartesian_prod(torch.arange(len(dense)), torch.arange(mask.kv_num_blocks.shape[-1])).tolist():
        for column in mask.kv_indices[b, 0, block, : mask.kv_num_blocks[b, 0, block]].tolist():
            part = dense[b, block * rows : (block + 1) * rows, column * columns : (column + 1) * columns]
            assert part.any()  # no work for nothing
    return mask


@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_pairs(name, rng):
    checked = 0
    for _ in range(12):
        spans = BUILDERS[name](rng, ANY_LENGTHS).spans
        if spans.num_queries and spans.num_keys:
            check(spans, rng.choice([8, 16, (16, 8), (7, 5)]))
            checked += 1
    assert checked


def test_any_runs(rng):
    for _ in range(40):
        check(of_any_runs(rng), rng.choice([1, 8, (16, 8), 128]))


def test_whole_blocks_are_told():
    """Causal, blocks of 16: those below the diagonal need no mask."""
    mask = check(RowSpans.packed(torch.tensor([0, 64]), causal=True), 16)
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3]
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_the_same_attention(heads, rng):
    for _ in range(3):
        spans = of_any_runs(rng)
        batch = spans.batch or 1
        q = torch.randn(batch, spans.num_queries, heads[0], 16)
        k, v = torch.randn(2, batch, spans.num_keys, heads[1], 16)
        theirs = flex_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), block_mask=spans.to_block_mask(), enable_gqa=heads[0] != heads[1]
        )
        ours = span_attention(q, k, v, spans)
        # Theirs is plain operations in float32, in another order.
        torch.testing.assert_close(theirs.transpose(1, 2), ours, rtol=1e-4, atol=1e-5)


def test_it_is_what_the_spans_were(rng):
    spans = of_any_runs(rng)
    mask, before = spans.to_block_mask(8), spans.to_dense()
    spans.lo.fill_(0), spans.hi.fill_(10**6)
    assert torch.equal(told_by(mask), before if before.dim() == 3 else before[None])


@pytest.mark.parametrize(
    ("block_size", "error", "said"),
    [(0, ValueError, "block_size is 0"), ((8, 0), ValueError, r"block_size is \(8, 0\)"), (1.5, TypeError, "an int"),
     ((8, 8, 8), ValueError, "one int or two"), (True, TypeError, "an int")],
)  # fmt: skip
def test_what_is_refused(block_size, error, said):
    with pytest.raises(error, match=f"RowSpans.to_block_mask: .*{said}"):
        RowSpans.full(3, 4).to_block_mask(block_size)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_nothing_is_no_mask(sizes):
    with pytest.raises(ValueError, match=f"there are {sizes[0]} queries and {sizes[1]} keys; none is no mask"):
        RowSpans.full(*sizes).to_block_mask()
