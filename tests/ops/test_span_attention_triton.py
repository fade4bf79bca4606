"""What is particular to span attention's Triton backend: whom it refuses, how it cuts heads and splits work, what it
copies, and that kernels walk only what is seen.

That its kernels are right on the layouts that models use is tests/test_check.py's, what they compile to, and that other
lengths compile nothing again, is tests/compile's.
"""

import random

import pytest
import torch

from mmkernels import RowSpans, span_attention

triton = pytest.importorskip("triton", reason="the Triton backend needs triton, which has wheels for Linux only")

from mmkernels.ops import _triton  # noqa: E402
from mmkernels.ops.span_attention import triton as backend  # noqa: E402
from mmkernels.ops.span_attention import triton_tiles as tiles  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(spans: RowSpans, heads: int = 2, key_heads: int = 1, dim: int = 16, batch: tuple[int, ...] = ()):
    q, *kv = (
        torch.randn(*batch, tokens, count, dim, device=DEVICE)
        for tokens, count in ((spans.num_queries, heads), (spans.num_keys, key_heads), (spans.num_keys, key_heads))
    )
    return q, *kv


def results(backend: str, spans: RowSpans, tensors, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = span_attention(*leaves, spans, backend=backend, return_lse=True, **options)
    fed = torch.cos(out.detach()), torch.cos(lse.detach())  # NaN for the lse of nothing
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, fed)


def test_reasons():
    x, wide = torch.zeros(1, 3, 2, 64), torch.zeros(1, 3, 2, 577)
    assert backend.unsupported(x, x, x) is None
    assert "heads of up to 576 numbers, those of q have 577" in backend.unsupported(wide, wide, x)
    assert "those of v have 577" in backend.unsupported(x, x, wide)
    assert "q has dtype torch.float64" in backend.unsupported(x.double(), x.double(), x.double())


def test_float32_ends_at_256_on_a_gpu(monkeypatch):
    """Where its products are exact, and no tile of wider heads fits into shared memory."""
    monkeypatch.setattr(_triton, "family", lambda device: "sm90")
    wide = torch.zeros(1, 3, 2, 264)
    assert backend.unsupported(wide, wide, wide) == (
        "in float32 it serves heads of up to 256 numbers, those of q have 264"
    )
    assert backend.unsupported(*[wide.bfloat16()] * 3) is None


def test_heads_are_cut_where_padding_would_cost():
    cut = {1: (16, 0), 24: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 112: (128, 0)}
    cut |= {
        128: (128, 0),
        160: (128, 32),
        192: (128, 64),
        256: (256, 0),
        264: (256, 64),
        320: (256, 64),
        384: (256, 128),
    }
    cut |= {512: (512, 0), 576: (512, 64)}
    for numbers, parts in cut.items():
        assert tiles.Width(numbers).parts == parts
        assert sum(parts) >= tiles.Width(numbers).padded >= numbers


@pytest.mark.parametrize("family", list(tiles.TILES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_head_has_tiles_that_the_kernels_can_walk(family, dtype):
    for kernel in ("forward", "few_rows", "query_grad", "key_grads"):
        for numbers in range(1, tiles.largest_head(family, dtype) + 1):
            tile = tiles.tile_of(kernel, family, dtype, tiles.Width(numbers), tiles.Width(17))
            assert max(tile.BLOCK_M, tile.BLOCK_N) <= tiles.LARGEST_BLOCK  # offsets in a tile take 32 bits
            assert kernel != "key_grads" or tile.BLOCK_M == 16 or tile.BLOCK_M % 32 == 0  # an entry tells of 32 queries
            assert kernel != "few_rows" or tile.BLOCK_M == tiles.FEW_ROWS


def random_spans(queries: int, keys: int, runs: int, generator: random.Random) -> RowSpans:
    """Runs that begin and end near each other for neighbouring queries, so that blocks have common parts, and gaps."""
    rows = []
    for _ in range(runs):
        steps = [(generator.randint(-9, keys), generator.randint(-9, 2 * keys)) for _ in range(1 + queries // 45)]
        rows.append([tuple(x + generator.randint(0, 3) for x in steps[i // 45]) for i in range(queries)])
    spans = torch.tensor(rows, dtype=torch.int32)
    lo, hi = spans[..., 0].sort(0)[0], spans[..., 1].sort(0)[0]
    hi[:-1] = torch.minimum(hi[:-1], lo[1:])  # disjoint and ascending
    return RowSpans(lo.to(DEVICE), hi.to(DEVICE), keys)


@pytest.mark.parametrize("runs", [1, 3])
def test_random_layouts(seed, runs):
    generator = random.Random(seed)
    spans = random_spans(generator.randint(65, 110), generator.randint(100, 160), runs, generator)
    tensors = inputs(spans)
    for ours, right in zip(results("triton", spans, tensors), results("reference", spans, tensors), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize(
    ("dim", "value_dim", "queries"), [(264, 320, 20), (512, 512, 20), (576, 512, 20), (576, 512, 1)]
)
def test_wide_heads(dim, value_dim, queries):
    spans = RowSpans.packed(torch.tensor([0, queries]), torch.tensor([0, 45]), causal=True).to(DEVICE)
    q, k, _ = inputs(spans, dim=dim)
    tensors = q, k, torch.randn(*k.shape[:-1], value_dim, device=DEVICE)
    for ours, right in zip(results("triton", spans, tensors), results("reference", spans, tensors), strict=True):
        torch.testing.assert_close(ours, right)


def test_the_gradients_of_keys_in_steps_of_half_an_entry_of_their_table(seed, monkeypatch):
    """Where more rows of wide heads do not fit."""
    spans = random_spans(90, 130, 2, random.Random(seed))
    tensors, whole = inputs(spans), backend.tile_of
    half = _triton.Tile(16, 32, None, 4, 1)
    monkeypatch.setattr(
        backend, "tile_of", lambda kernel, *call: half if kernel == "key_grads" else whole(kernel, *call)
    )
    for ours, right in zip(results("triton", spans, tensors), results("reference", spans, tensors), strict=True):
        torch.testing.assert_close(ours, right)


def test_documents_are_isolated_though_they_share_blocks():
    spans = RowSpans.packed(torch.tensor([0, 13, 41, 60]), causal=True)
    spans, document = spans.to(DEVICE), slice(13, 41)
    tensors = inputs(spans)
    right = results("triton", spans, tensors)
    for x, bad in enumerate((torch.nan, torch.nan, torch.inf)):
        spoilt = [y.clone() for y in tensors]
        spoilt[x][document] = bad
        found = results("triton", spans, spoilt)
        for ours, expected in zip(found, right, strict=True):
            ours, expected = (y.T if y.dim() == 2 else y for y in (ours, expected))  # lse: (heads, queries)
            for other in (slice(0, 13), slice(41, 60)):
                assert torch.equal(ours[other], expected[other])
        assert not found[0][40].isfinite().any()


def test_parts_of_keys_and_of_queries_add_up(monkeypatch):
    spans = RowSpans.packed(torch.tensor([0, 30, 70]), torch.tensor([0, 60, 130]), causal=True).to(DEVICE)
    tensors = inputs(spans)
    monkeypatch.setattr(backend, "PROGRAMS", 0)
    whole = results("triton", spans, tensors)
    monkeypatch.setattr(backend, "PROGRAMS", 256)
    monkeypatch.setattr(backend, "SPLIT_STEP", 32)
    launched = []

    def note(kernel, *args, **meta):
        launched.append(kernel)
        _triton.launch(kernel, *args, **meta)

    monkeypatch.setattr(backend, "launch", note)
    for parts, right in zip(results("triton", spans, tensors), whole, strict=True):
        torch.testing.assert_close(parts, right)
    assert backend.merge in launched


def test_key_table_leaves_out_what_no_query_sees():
    """Sliding windows: a block of keys is walked with a few blocks of queries, however long the text."""
    spans = RowSpans.packed(torch.tensor([0, 640]), causal=True, window=64).to(DEVICE)
    tile = _triton.Tile(32, 64, None, 4, 1)
    table = backend._key_table(spans.hulls(), 640, 640, 10, tile)[0, 0]
    first, end, full, full_end = table.T
    visible = spans.to_dense()
    for block, keys in enumerate(range(0, 640, 64)):
        sees = visible[:, keys : keys + 64].view(20, 32, 64)
        some, every = sees.any(-1).any(-1).nonzero(), sees.all(-1).all(-1)
        assert (first[block], end[block]) == (some.min(), some.max() + 1)
        assert every[full[block] : full_end[block]].all() and (every.any() == (full_end[block] > full[block]))


def test_rows_far_apart_are_copied_only_where_32_bits_are_too_few():
    x = torch.empty(1, device="meta").as_strided((1, 300, 2, 64), (2**40, 2**24 - 8, 64, 1))
    assert backend._rows(x) is x
    far = x.as_strided((1, 300, 2, 64), (2**40, 2**24, 64, 1))
    assert backend._rows(far).stride() == (300 * 128, 128, 64, 1)
    heads_first = x.as_strided((1, 3, 2, 64), (2**40, 64, 2**24, 1))
    assert backend._rows(heads_first) is heads_first
    assert backend._rows(heads_first, packed=True).stride() == (3 * 128, 128, 64, 1)


def test_the_spans_of_an_environment_backend_need_no_hulls(monkeypatch):
    monkeypatch.setenv("MMKERNELS_BACKEND", "triton")
    spans = RowSpans.full(5, 7, device=DEVICE)
    tensors = inputs(spans)
    for ours, right in zip(results("auto", spans, tensors), results("reference", spans, tensors), strict=True):
        torch.testing.assert_close(ours, right)
