"""Spans in FlashMask's columns: the same pairs, in the smallest form that can say them."""

import random

import pytest
import torch
from span_layouts import BUILDERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import RowSpans

ANY_LENGTHS = (1, 9, 40)
FORMS = ((1, True), (2, True), (2, False), (4, False))  # numbers of a key, and causal: the smaller the earlier


@pytest.fixture
def rng(seed):
    return random.Random(seed)


def told_by(columns: Tensor, causal: bool, num_queries: int) -> Tensor:
    """(batch, queries, keys) of columns (batch, keys, n): what PaddlePaddle's documentation of `flashmask_attention`
    says of every query and key. A causal mask that is not square has no meaning here."""
    query, key = torch.arange(num_queries)[:, None], torch.arange(columns.shape[1])
    number = [columns[:, None, :, n] for n in range(columns.shape[-1])]
    if causal:
        assert num_queries == columns.shape[1]
        later = query >= number[0]
        return ~((query < key) | (later if len(number) == 1 else later & (query < number[1])))
    if len(number) == 2:
        return ~((query >= number[0]) | (query < number[1]))
    lts, lte, uts, ute = number
    return ~(((lts <= query) & (query < lte)) | ((uts <= query) & (query < ute)))


def hidden_runs(column: Tensor) -> list[list[int]]:
    """The runs of rows of a column that are False."""
    runs: list[list[int]] = []
    for row in (~column).nonzero().flatten().tolist():
        if runs and runs[-1][-1] == row - 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def all_columns(numbers: int, num_queries: int) -> Tensor:
    """(1, ways, numbers): every way to number a column."""
    return torch.cartesian_prod(*[torch.arange(num_queries + 1)] * numbers).reshape(1, -1, numbers)


def can_say(column: Tensor, key: int, numbers: int, causal: bool) -> bool:
    """Tries every way of the smaller forms."""
    if numbers == 4:
        return len(hidden_runs(column)) <= 2
    ways, num_queries = all_columns(numbers, len(column)), len(column)
    query, (first, *rest) = torch.arange(num_queries)[:, None], ways[0].T
    hidden = query >= first
    if causal:
        hidden = (hidden if not rest else hidden & (query < rest[0])) | (query < key)
    else:
        hidden |= query < rest[0]
    return bool((~hidden == column[:, None]).all(0).any())


def check(spans: RowSpans) -> tuple[int, bool] | None:
    """The form; None where there is none, and an error says so."""
    dense = spans.to_dense()
    dense = dense if dense.dim() == 3 else dense[None]
    batch, num_queries, num_keys = dense.shape
    if any(len(hidden_runs(row[:, key])) > 2 for row in dense for key in range(num_keys)):
        with pytest.raises(ValueError, match=r"RowSpans.to_flashmask: key \d+"):
            spans.to_flashmask()
        return None
    columns, causal = spans.to_flashmask()
    assert columns.dtype == torch.int32 and columns.is_contiguous()
    assert columns.shape[:3] == (batch, 1, num_keys)
    assert torch.equal(told_by(columns[:, 0], causal, num_queries), dense)
    check_order(columns[:, 0], causal, num_queries)
    return columns.shape[-1], causal


def check_order(columns: Tensor, causal: bool, num_queries: int) -> None:
    """FlashMask's kernels walk down a block of columns: the upper run before the lower, and nothing beyond the ends."""
    numbers = columns.unbind(-1)
    start = torch.arange(columns.shape[1]).expand(columns.shape[:2]) if causal else torch.zeros(columns.shape[:2])
    order = {(1, True): [0], (2, True): [0, 1], (2, False): [1, 0], (4, False): [2, 3, 0, 1]}[len(numbers), causal]
    ascending = torch.stack([start, *(numbers[n] for n in order), torch.full_like(start, num_queries)])
    assert (ascending.diff(dim=0) >= 0).all()


def smallest(dense: Tensor) -> tuple[int, bool]:
    _, num_queries, num_keys = dense.shape
    for numbers, causal in FORMS:
        if causal and num_queries != num_keys:
            continue
        if all(can_say(row[:, key], key, numbers, causal) for row in dense for key in range(num_keys)):
            return numbers, causal
    raise AssertionError("no form")


@pytest.mark.parametrize("name", BUILDERS)
def test_the_same_pairs(name, rng):
    for _ in range(12):
        check(BUILDERS[name](rng, ANY_LENGTHS).spans)


@pytest.mark.parametrize(
    "name, form",
    [("packed", (2, False)), ("causal", (1, True)), ("causal, window", (1, True)), ("prefix_lm", (2, False)),
     ("keys of their own", (2, False)), ("image_text", (2, False)), ("image_text, union", (4, False)),
     ("media, immediate, none in empty rows, packed", (2, False))],
)  # fmt: skip
def test_the_form_of_a_layout_is_small(name, form, rng):
    for _ in range(12):
        found = check(BUILDERS[name](rng, ANY_LENGTHS).spans)
        assert found is not None and found[0] <= form[0] and (found[1] or not form[1])


def of_few_hidden_runs(rng: random.Random) -> RowSpans:
    """Of any keys, each hidden from two runs of queries at most, those above the diagonal now and then among them."""
    batch, num_queries = rng.choice([None, 1, 2]), rng.randint(1, 8)
    num_keys = rng.choice([num_queries, num_queries, rng.randint(1, 8)])
    style = rng.choice(["any", "one run is seen", "causal", "causal, seen until", "causal, seen late"])
    places = torch.randint(0, num_queries + 1, (batch or 1, num_keys, 4)).sort(-1).values
    query = torch.arange(num_queries)[:, None]
    key = torch.arange(num_keys)
    a, b, c, d = (x[:, None] for x in places.unbind(-1))
    seen = {
        "any": ~(((a <= query) & (query < b)) | ((c <= query) & (query < d))),
        "one run is seen": (a <= query) & (query < b),
        "causal": (query >= key) & ~((a <= query) & (query < b)),
        "causal, seen until": (query >= key) & (query < d),
        "causal, seen late": (query >= key) & (query >= a) & ~((c <= query) & (query < d)),
    }[style]
    return RowSpans.from_dense(seen if batch is not None else seen[0])


def test_the_form_is_the_smallest(rng):
    found = set()
    for _ in range(120):
        spans = of_few_hidden_runs(rng)
        form = check(spans)
        if form is not None:
            dense = spans.to_dense()
            assert form == smallest(dense if dense.dim() == 3 else dense[None])
            found.add(form)
    assert found == set(FORMS)


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# What the documentation shows: the mask by our words where they say it, and its numbers, those of a key together.
DOCUMENTED = {
    "causal document": (True, [[4], [4], [4], [4], [7], [7], [7], [10], [10], [10]]),
    "sliding window": (True, [[3], [4], [5], [6], [7], [8], [9], [10], [10], [10]]),
    "share question": (True, [[10]] * 4 + [[7]] * 3 + [[10]] * 3),
    "causal blockwise": (True, [[4, 7]] * 4 + [[10, 10]] * 6),
    "document": (False, [[4, 0]] * 4 + [[7, 4]] * 3 + [[10, 7]] * 3),
    "prefix of documents": (False, [[3, 0]] * 2 + [[3, 2]] + [[5, 3]] * 2 + [[10, n] for n in (5, 5, 7, 8, 9)]),
    "prefix": (False, [[10, 0]] * 5 + [[10, n] for n in range(5, 10)]),
    "global and window": (
        False,
        [[10, 10, 0, 0], [10, 10, 0, 0], [4, 10, 0, 0], [5, 10, 0, 0]]
        + [[min(key + 2, 10), 10, 2, key - 1] for key in range(4, 10)],
    ),
}  # fmt: skip
OURS = {
    "causal document": lambda: RowSpans.packed(int32([0, 4, 7, 10]), causal=True),
    "sliding window": lambda: RowSpans.packed(int32([0, 10]), causal=True, window=3),
    "document": lambda: RowSpans.packed(int32([0, 4, 7, 10])),
    "prefix of documents": lambda: RowSpans.prefix_lm(int32([0, 3, 5, 10]), int32([2, 2, 2])),
    "prefix": lambda: RowSpans.prefix_lm(int32([0, 10]), int32([5])),
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_the_documentation_shows(name):
    causal, numbers = DOCUMENTED[name]
    columns = int32(numbers)[None]
    dense = told_by(columns, causal, 10)[0]
    spans = OURS[name]() if name in OURS else RowSpans.from_dense(dense)
    assert torch.equal(spans.to_dense(), dense)
    found = spans.to_flashmask()
    assert found._asdict() == {"startend_row_indices": found.startend_row_indices, "causal": causal}
    assert torch.equal(found.startend_row_indices[:, 0], columns)


def test_no_order_or_place_of_runs_matters(rng):
    """Runs that are empty anywhere, end to end, or beyond the keys; strided tensors."""
    for _ in range(30):
        spans = of_few_hidden_runs(rng)
        lo, hi = (x.clone() for x in spans.with_axes())
        hi[:, -1] = torch.where(hi[:, -1] == spans.num_keys, spans.num_keys + 5, hi[:, -1])
        middle = (lo + hi) // 2
        pieces = [lo, torch.zeros_like(lo), middle], [middle, torch.zeros_like(lo) - 3, hi]
        wide = [torch.stack(x, 2).flatten(1, 2).repeat_interleave(2, -1)[..., ::2] for x in pieces]
        cut = RowSpans(*wide, spans.num_keys)
        assert not cut.lo.is_contiguous() or cut.num_queries == 1
        assert torch.equal(cut.to_dense().reshape(-1), spans.to_dense().reshape(-1))
        if check(cut) is not None:
            assert torch.equal(cut.to_flashmask()[0], spans.to_flashmask()[0])


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (0, 0)])
def test_nothing_to_say(sizes):
    columns, _ = RowSpans.full(*sizes).to_flashmask()
    assert columns.shape[:3] == (1, 1, sizes[1])


def test_causal_is_only_said_of_squares():
    """Versions of FlashMask refuse a causal mask of other sizes, or let its diagonal end at the last key."""
    for num_queries in (3, 7):
        spans = RowSpans.packed(int32([0, num_queries]), int32([0, 5]), causal=True)
        assert check(spans) == (2, False)


@pytest.mark.parametrize("batch", [None, 3])
def test_what_cannot_be_said_is_named(batch):
    seen = torch.ones(batch or 1, 12, 7, dtype=torch.bool)
    seen[-1, [0, 1, 3, 5, 6, 7, 9, 11], 4] = False
    seen[-1, [0, 5, 9], 6] = False
    spans = RowSpans.from_dense(seen if batch else seen[0])
    where = "key 4 of row 2 of the batch" if batch else "key 4"
    rows = "5 runs of queries, 0 to 1, 3, 5 to 7, 9, ...; FlashMask says 2 at most, to_block_mask"
    with pytest.raises(ValueError, match=f"^RowSpans.to_flashmask: {where} is hidden from {rows}"):
        spans.to_flashmask()


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("windowed", [False, True])
def test_the_mask_is_never_made(windowed):
    tokens = 3000
    spans = RowSpans.packed(int32([0, 700, tokens]), causal=True, window=50 if windowed else None)
    with Largest() as largest:
        spans.to_flashmask()
    assert largest.numbers <= 10 * tokens
    with Largest() as largest:
        spans.to_dense()
    assert largest.numbers == tokens**2
