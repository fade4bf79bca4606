"""RowSpans: every builder against plain loops over tokens, on random layouts; without synchronising; compiled once."""

import copy
import itertools
import pickle
import random
import re

import pytest
import torch
import torch._dynamo.testing
from span_layouts import BUILDERS, image_ids, int32, located_images, offsets
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import RowSpans
from mmkernels.spans import HULL_ROWS, Documents

LAYOUTS = 300


@pytest.fixture
def rng(seed) -> random.Random:
    return random.Random(seed)


def assert_mask(spans: RowSpans, want: torch.Tensor) -> None:
    got = spans.to_dense()
    assert got.shape == want.shape and spans.lo.dtype == spans.hi.dtype == torch.int32
    assert torch.equal(got, want), f"\ngot\n{got.int()}\nwant\n{want.int()}"


# --- every builder against its oracle ---------------------------------------------------------------------------------


def test_full():
    for num_queries, num_keys in ((3, 5), (0, 5), (3, 0)):
        spans = RowSpans.full(num_queries, num_keys)
        assert_mask(spans, torch.ones(num_queries, num_keys, dtype=torch.bool))
    assert RowSpans.full(3, 5, device="meta").device.type == "meta"


@pytest.mark.parametrize("builder", BUILDERS)
def test_builders(rng, builder):
    for _ in range(LAYOUTS):
        layout = BUILDERS[builder](rng)
        assert_mask(layout.spans, layout.oracle())


def test_sizes_of_tensors_on_the_cpu_are_read():
    cu, cu_k = int32([0, 3, 3, 7]), int32([0, 2, 5, 6])
    assert RowSpans.packed(cu).num_queries == RowSpans.packed(cu).num_keys == 7
    spans = RowSpans.packed(cu, cu_k)
    assert (spans.num_queries, spans.num_keys) == (7, 6)
    assert RowSpans.packed(cu, num_keys=9).num_keys == 9
    assert RowSpans.prefix_lm(cu, int32([1, 0, 2])).num_queries == 7
    locations = torch.tensor([[True, False, True], [False, False, True]])
    assert RowSpans.media(locations[0], 5).num_keys == 10
    assert RowSpans.media(locations[0], int32([5, 1])).num_keys == 6
    assert RowSpans.media(locations, 5).num_keys == 10
    assert RowSpans.media(locations, int32([[5, 1], [7, 2]])).num_keys == 9
    assert RowSpans.media(locations[0, :0], 5).num_keys == 0


# --- masks, hulls, and the class itself -------------------------------------------------------------------------------


def random_mask(rng, *shape) -> torch.Tensor:
    often = rng.choice([0.0, 0.3, 0.8, 1.0])
    return torch.rand(shape) < often


def test_from_dense_gives_the_mask_back(rng):
    for _ in range(LAYOUTS):
        shape = [rng.randint(0, 9), rng.randint(0, 12)]
        mask = random_mask(rng, *([rng.randint(0, 3)] if rng.random() < 0.4 else []), *shape)
        spans = RowSpans.from_dense(mask)
        assert_mask(spans, mask)
        assert spans.batch == (mask.shape[0] if mask.dim() == 3 else None)
        text = ["".join("01"[key] for key in row) for row in mask.flatten(0, -2).tolist()]
        assert spans.runs == max([1, *(len(re.findall("1+", row)) for row in text)])
        lo, hi = (x.movedim(-2, -1).flatten(0, -2).tolist() for x in (spans.lo, spans.hi))
        for row, starts, ends in zip(text, lo, hi, strict=True):  # disjoint, ascending, none longer than needed
            runs = [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]
            assert runs == [match.span() for match in re.finditer("1+", row)]


def test_from_dense_names_the_first_row_with_too_many_runs():
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    with pytest.raises(ValueError, match=r"RowSpans.from_dense: row 2 of mask has 3 runs of keys; max_runs is 2"):
        RowSpans.from_dense(mask, max_runs=2)
    with pytest.raises(ValueError, match="row 1, 0 of mask has 2 runs"):
        RowSpans.from_dense(torch.stack([mask[1:2], mask[:1]]), max_runs=1)
    assert RowSpans.from_dense(mask, max_runs=3).runs == 3


def test_hulls(rng):
    for _ in range(60):
        batch, runs, queries = rng.choice([None, 1, 3]), rng.randint(1, 3), rng.choice([0, 1, 31, 32, 33, 70, 100])
        num_keys = rng.choice([0, 5, 50])
        shape = (runs, queries) if batch is None else (batch, runs, queries)
        lo, hi = (torch.randint(-9, num_keys + 9, shape, dtype=torch.int32) for _ in range(2))
        hulls = RowSpans(lo, hi, num_keys).hulls()
        blocks = -(-queries // HULL_ROWS)
        assert hulls.shape == (batch or 1, runs, blocks, 4) and hulls.dtype == torch.int32
        lo, hi = (x.clamp(0, num_keys).reshape(batch or 1, runs, queries).tolist() for x in (lo, hi))
        for b in range(batch or 1):
            for r in range(runs):
                for n in range(blocks):
                    rows = range(n * HULL_ROWS, min(queries, (n + 1) * HULL_ROWS))
                    spans = [(lo[b][r][i], hi[b][r][i]) for i in rows]
                    seeing = [(a, z) for a, z in spans if a < z]
                    whole = seeing if len(seeing) == len(spans) else [(num_keys, 0)]
                    want = [
                        min((a for a, _ in seeing), default=num_keys),
                        max((z for _, z in seeing), default=0),
                        max(a for a, _ in whole),
                        min(z for _, z in whole),
                    ]
                    assert hulls[b, r, n].tolist() == want


def test_hulls_are_made_once_and_kept():
    spans = RowSpans.packed(int32([0, 40, 100]), causal=True)
    assert spans.hulls() is spans.hulls()
    assert spans.to("cpu") is spans and spans.to("meta").num_keys == 100


WRITES = {
    "lo": lambda spans: spans.lo.fill_(7),
    "hi": lambda spans: spans.hi.sub_(3),
    "in inference mode": lambda spans: torch.inference_mode()(spans.hi.fill_)(50),
    "another hi": lambda spans: setattr(spans, "hi", spans.hi - 3),
}


@pytest.mark.parametrize("builder", ["packed", "full"])
@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_counts(write, builder):
    """As into the static buffers of a CUDA graph."""
    for made_in in (False, True):
        with torch.inference_mode(made_in):
            spans = RowSpans.full(100, 100) if builder == "full" else RowSpans.packed(int32([0, 40, 100]), causal=True)
            before = spans.hulls().clone()
            assert spans.documents() is not None
            WRITES[write](spans)
            fresh = RowSpans(spans.lo, spans.hi, 100)
            assert torch.equal(spans.hulls(), fresh.hulls()) and not torch.equal(spans.hulls(), before)
            assert made_in or (spans.documents() is None and spans.to("meta").documents() is None)


def test_spans_that_are_not_contiguous_are_read_as_they_stand():
    lo, hi = torch.zeros(9, 2, dtype=torch.int32)[:, 0], torch.full((9, 2), 9, dtype=torch.int32)[:, 0]
    spans = RowSpans(lo, hi, 9)
    spans.with_axes()
    hi.fill_(4)
    assert torch.equal(spans.with_axes()[1], hi.view(1, 1, 9))


@pytest.mark.parametrize("builder", ["packed", "full"])
def test_nothing_is_kept_of_a_tracer_or_a_transform(builder):
    """Whose tensors end with it: an eager call afterwards would compute with them."""

    def made():
        return RowSpans.full(6, 6) if builder == "full" else RowSpans.packed(int32([0, 4, 6]), causal=True)

    def everything(spans):
        return [*spans.with_axes(), spans.hulls(), spans.documents().cu_seqlens]

    class Uses(torch.nn.Module):
        def __init__(self, spans):
            super().__init__()
            self.spans = spans

        def forward(self, x):
            return x + sum(part.sum() for part in everything(self.spans))

    def within_fakes(uses):
        with FakeTensorMode(allow_non_fake_inputs=True):
            uses(torch.zeros(2))

    ways = [
        lambda uses: torch.export.export(uses, (torch.zeros(2),), strict=False),
        lambda uses: torch.func.grad(lambda x: uses(x).sum())(torch.zeros(2)),
        lambda uses: torch.func.vmap(uses)(torch.zeros(2)),
        within_fakes,
    ]
    for use in ways:
        spans = made()
        use(Uses(spans))
        for part, expected in zip(everything(spans), everything(made()), strict=True):
            assert type(part) is torch.Tensor and torch.equal(part, expected)
            assert not torch._C._functorch.is_functorch_wrapped_tensor(part)


def test_from_dense_needs_little_beside_its_mask():
    """No tensor of more than a byte for each of its elements, where there are few runs."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    mask = RowSpans.packed(int32([0, 100, 400]), causal=True).to_dense()
    with Watch():
        RowSpans.from_dense(mask)
    assert largest <= mask.nbytes


def test_copies_and_pickles_keep_the_documents():
    for spans in (RowSpans.full(3, 5), RowSpans.packed(int32([0, 2, 5]), causal=True)):
        for same in (copy.deepcopy(spans), pickle.loads(pickle.dumps(spans))):
            assert torch.equal(same.to_dense(), spans.to_dense())
            assert torch.equal(mask_of_documents(same.documents(), *spans.to_dense().shape), spans.to_dense())
            same.hi.fill_(1)
            assert same.documents() is None and spans.documents() is not None


def test_repr_and_to():
    spans = RowSpans.full(3, 5)
    assert repr(spans) == "RowSpans(num_queries=3, num_keys=5, runs=1, batch=None, device=cpu)"
    moved = spans.to("meta")
    assert (moved.device.type, moved.lo.shape, moved.num_keys) == ("meta", (3,), 5)


# --- the documents that spans remember --------------------------------------------------------------------------------

OF_DOCUMENTS = [name for name in BUILDERS if name.startswith(("packed", "causal", "keys of their own"))]


def mask_of_documents(documents: Documents, num_queries: int, num_keys: int) -> torch.Tensor:
    """As flash-attn's documentation has it: the last query of a causal document stands at its last key."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    offsets = documents.cu_seqlens.tolist(), documents.key_offsets.tolist()
    for (first, last), (first_k, last_k) in zip(*(itertools.pairwise(x) for x in offsets), strict=True):
        shift = (last_k - first_k) - (last - first)
        for i, j in itertools.product(range(last - first), range(last_k - first_k)):
            back = i + shift - j
            near = documents.window is None or back < documents.window
            mask[first + i, first_k + j] = not documents.causal or (back >= 0 and near)
    return mask


@pytest.mark.parametrize("builder", OF_DOCUMENTS)
def test_documents_are_what_the_spans_say(rng, builder):
    for _ in range(LAYOUTS):
        spans = BUILDERS[builder](rng).spans
        documents, visible = spans.documents(), spans.to_dense()
        assert torch.equal(mask_of_documents(documents, *visible.shape), visible)
        assert torch.equal(documents.unseen_keys(spans.num_keys), ~visible.any(0))
        assert documents.cu_seqlens.dtype == documents.key_offsets.dtype == torch.int32


def test_full_spans_are_one_document():
    for shape in ((3, 5), (0, 5), (3, 0)):
        spans = RowSpans.full(*shape)
        assert torch.equal(mask_of_documents(spans.documents(), *shape), spans.to_dense())
        assert spans.documents() is spans.documents()
        for moved in (spans.to("meta"), RowSpans.full(*shape).to("meta")):  # made before, and after
            assert moved.documents().cu_seqlens.device.type == "meta"


def test_documents_go_where_the_spans_go_and_no_one_else_has_them(rng):
    spans = RowSpans.packed(int32([0, 3, 9]), int32([0, 2, 4]), causal=True, window=2)
    moved = spans.to("meta").documents()
    assert moved.cu_seqlens.device.type == moved.cu_seqlens_k.device.type == "meta"
    assert (moved.causal, moved.window) == (True, 2)
    assert torch.utils._pytree.tree_map(lambda leaf: leaf, spans).documents() is None
    assert torch.utils._pytree.tree_map(lambda leaf: leaf, RowSpans.full(3, 4)).documents() is None
    assert RowSpans(spans.lo, spans.hi, 4).documents() is None
    for name in set(BUILDERS) - set(OF_DOCUMENTS):
        assert BUILDERS[name](rng).spans.documents() is None, name


def test_the_next_batch_in_the_same_offsets_changes_no_spans():
    offsets, offsets_k = int32([0, 3, 9]), int32([0, 2, 4])
    own, other = RowSpans.packed(offsets, causal=True), RowSpans.packed(offsets, offsets_k)
    offsets.zero_(), offsets_k.zero_()
    for spans in (own, other):
        assert torch.equal(mask_of_documents(spans.documents(), *spans.to_dense().shape), spans.to_dense())


# --- without synchronising, and compiled once -------------------------------------------------------------------------


def build_all(cu_seqlens, image_id, prefix_lengths, locations, sizes) -> list[RowSpans]:
    tokens = image_id.shape[0]
    spans = [
        RowSpans.full(tokens, tokens, device=image_id.device),
        RowSpans.packed(cu_seqlens, num_queries=tokens),
        RowSpans.packed(cu_seqlens, num_queries=tokens, causal=True, window=3),
        RowSpans.packed(cu_seqlens, cu_seqlens, num_queries=tokens, num_keys=tokens, causal=True, window=3),
        RowSpans.image_text(cu_seqlens, image_id),
        RowSpans.image_text(cu_seqlens, image_id, window=3, window_rule="clamp"),
        RowSpans.image_text(cu_seqlens, image_id, window=3, window_rule="union"),
        RowSpans.prefix_lm(cu_seqlens, prefix_lengths, num_queries=tokens),
    ]
    for attend in ("immediate", "previous", "group"):
        spans.append(RowSpans.media(locations, 4, num_keys=4 * tokens, attend=attend, empty_rows="all"))
        spans.append(RowSpans.media(locations, sizes, num_keys=tokens, cu_seqlens=cu_seqlens, attend=attend))
    return spans


def inputs(rng, documents: int, device: str = "cpu") -> list[torch.Tensor]:
    lengths = [rng.randint(12, 40) for _ in range(documents)]
    tokens = sum(lengths) + documents
    values = (
        int32(offsets(lengths)),
        int32(image_ids(rng, tokens)),
        int32([rng.randint(0, 5) for _ in lengths]),
        torch.tensor(located_images(rng, tokens), dtype=torch.bool),
        int32([rng.randint(0, 3) for _ in range(documents + 1)]),
    )
    return [x.to(device) for x in values]


class NothingIsRead(TorchDispatchMode):
    """Fails where the values of a tensor would have to come to the host, or a shape depends on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        assert not any(tag in func.tags for tag in waits), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_builders_do_not_wait_for_the_device(rng, device):
    arguments = inputs(rng, 4, device)
    with NothingIsRead():
        for spans in build_all(*arguments):
            spans.hulls()
            documents = spans.documents()
            assert documents is None or documents.unseen_keys(spans.num_keys).device.type == device
            assert spans.device.type == device and spans.lo.dtype == torch.int32
    with NothingIsRead(), pytest.raises(AssertionError, match="waits for the device"):
        int(int32([3])[0])


def test_compiles_whole_and_once_whatever_the_lengths(rng):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def build(*arguments):
        return [(spans.lo, spans.hi, spans.hulls()) for spans in build_all(*arguments)]

    compiled = torch.compile(build, backend=counter, fullgraph=True, dynamic=True)
    for documents in (3, 5, 9):
        arguments = inputs(rng, documents)
        for got, want in zip(compiled(*arguments), build(*arguments), strict=True):
            assert all(map(torch.equal, got, want))
    assert counter.frame_count == 1


def test_compiled_functions_take_and_return_spans():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def following(spans):
        return RowSpans(spans.lo + 1, spans.hi + 1, spans.num_keys), spans.hulls()

    for length in (40, 70, 99):
        spans = RowSpans.packed(int32([0, 10, length]), num_keys=2 * length, causal=True)
        after, hulls = following(spans)
        assert after.num_keys == 2 * length and torch.equal(after.lo, spans.lo + 1)
        assert torch.equal(hulls, RowSpans(spans.lo, spans.hi, spans.num_keys).hulls())
    assert counter.frame_count == 1


def test_spans_are_inputs_of_exported_programs():
    class Sees(torch.nn.Module):
        def forward(self, spans):
            return spans.to_dense()

    def causal(length):
        return RowSpans.packed(int32([0, 3, length]), causal=True)

    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(Sees(), (causal(9),), dynamic_shapes=([{0: dynamic}, {0: dynamic}, dynamic],))
    assert torch.equal(exported.module()(causal(20)), causal(20).to_dense())


def test_a_map_over_a_batch_reaches_their_tensors():
    batch = {"spans": RowSpans.full(3, 5), "pixels": torch.zeros(2)}
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), batch)["spans"]
    assert isinstance(moved, RowSpans) and moved.device.type == "meta" and moved.num_keys == 5
    paths = [torch.utils._pytree.keystr(path) for path, _ in torch.utils._pytree.tree_leaves_with_path(batch["spans"])]
    assert paths == [".lo", ".hi", ".num_keys"]


# --- errors -----------------------------------------------------------------------------------------------------------

CU = int32([0, 2, 5])
IDS = int32([-1, 0, 0, -1, 1])
HERE = torch.tensor([True, False, True])
SOME = torch.zeros(5, dtype=torch.int32)
BATCH = torch.zeros(2, 3, dtype=torch.bool)
PACKED, IMAGE_TEXT, PREFIX_LM, MEDIA, FULL = (
    RowSpans.packed,
    RowSpans.image_text,
    RowSpans.prefix_lm,
    RowSpans.media,
    RowSpans.full,
)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "RowSpans: lo must be a torch.Tensor, got list", lambda: RowSpans([0], SOME, 5)),
        (
            TypeError,
            "RowSpans: hi has dtype torch.int64; it must be torch.int32",
            lambda: RowSpans(SOME, SOME.long(), 5),
        ),
        (
            ValueError,
            r"RowSpans: lo has shape \(5,\), hi \(4,\); they must be equal",
            lambda: RowSpans(SOME, SOME[1:], 5),
        ),
        (ValueError, "with at least one run", lambda: RowSpans(SOME.new_empty(0, 5), SOME.new_empty(0, 5), 5)),
        (ValueError, "RowSpans: lo is on cpu, hi on meta", lambda: RowSpans(SOME, SOME.to("meta"), 5)),
        (ValueError, "RowSpans: num_keys is -1; it must be at least 0", lambda: RowSpans(SOME, SOME, -1)),
        (ValueError, "RowSpans.full: num_queries is -3; it must be at least 0", lambda: FULL(-3, 4)),
        (TypeError, "RowSpans.full: num_keys must be an int, got float", lambda: FULL(3, 4.0)),
        (TypeError, "RowSpans.packed: cu_seqlens must be a torch.Tensor, got list", lambda: PACKED([0, 3])),
        (
            TypeError,
            "RowSpans.packed: cu_seqlens has dtype torch.float32; accepted are int32",
            lambda: PACKED(CU.float()),
        ),
        (
            ValueError,
            r"RowSpans.packed: cu_seqlens has shape \(1, 3\); it must have one axis",
            lambda: PACKED(CU[None]),
        ),
        (ValueError, "RowSpans.packed: cu_seqlens is empty; it holds one number more than", lambda: PACKED(CU[:0])),
        (ValueError, "RowSpans.packed: cu_seqlens_k is on meta, cu_seqlens on cpu", lambda: PACKED(CU, CU.to("meta"))),
        (
            ValueError,
            r"RowSpans.packed: cu_seqlens_k has shape \(2,\), cu_seqlens \(3,\); cu_seqlens_k must be \(3,\)",
            lambda: PACKED(CU, CU[1:]),
        ),
        (ValueError, "RowSpans.packed: window is 0; .* must be at least 1", lambda: PACKED(CU, causal=True, window=0)),
        (TypeError, "RowSpans.packed: window must be an int or None", lambda: PACKED(CU, causal=True, window=1.5)),
        (ValueError, "RowSpans.packed: window is 2 and causal False; .* set causal", lambda: PACKED(CU, window=2)),
        (TypeError, "RowSpans.packed: num_queries must be an int, got Tensor", lambda: PACKED(CU, num_queries=CU[-1])),
        (ValueError, "RowSpans.packed: num_keys is -1", lambda: PACKED(CU, num_keys=-1)),
        (
            ValueError,
            r"RowSpans.packed: num_queries is missing: cu_seqlens is on meta, .* wait for the device; "
            r"give num_queries=q.shape\[0\]",
            lambda: PACKED(CU.to("meta")),
        ),
        (
            ValueError,
            r"RowSpans.packed: num_keys is missing: cu_seqlens_k is on meta, .*; give num_keys=k.shape\[0\]",
            lambda: PACKED(CU.to("meta"), CU.to("meta"), num_queries=5),
        ),
        (TypeError, "RowSpans.image_text: image_id has dtype torch.bool", lambda: IMAGE_TEXT(CU, IDS > 0)),
        (ValueError, "RowSpans.image_text: image_id is on meta", lambda: IMAGE_TEXT(CU, IDS.to("meta"))),
        (ValueError, r"RowSpans.image_text: image_id has shape \(1, 5\)", lambda: IMAGE_TEXT(CU, IDS[None])),
        (ValueError, "RowSpans.image_text: window is -1", lambda: IMAGE_TEXT(CU, IDS, window=-1)),
        (
            ValueError,
            "RowSpans.image_text: window_rule is 'cut'; accepted are 'clamp', 'union'",
            lambda: IMAGE_TEXT(CU, IDS, window_rule="cut"),
        ),
        (
            ValueError,
            r"RowSpans.prefix_lm: prefix_lengths has shape \(3,\), cu_seqlens \(3,\); prefix_lengths must be \(2,\)",
            lambda: PREFIX_LM(CU, CU),
        ),
        (TypeError, "RowSpans.prefix_lm: prefix_lengths must be a torch.Tensor", lambda: PREFIX_LM(CU, [1, 2])),
        (
            ValueError,
            "RowSpans.prefix_lm: num_queries is missing",
            lambda: PREFIX_LM(CU.to("meta"), CU[1:].to("meta")),
        ),
        (TypeError, "RowSpans.media: media_locations must be a torch.Tensor", lambda: MEDIA([True], 4)),
        (TypeError, "RowSpans.media: media_locations has dtype torch.int64; it must be", lambda: MEDIA(HERE.long(), 4)),
        (ValueError, r"RowSpans.media: media_locations has shape \(1, 2, 3\)", lambda: MEDIA(BATCH[None], 4)),
        (TypeError, "RowSpans.media: tokens_per_image must be an int, got list", lambda: MEDIA(HERE, [4, 4])),
        (ValueError, "RowSpans.media: tokens_per_image is -4; it must be at least 0", lambda: MEDIA(HERE, -4)),
        (TypeError, "RowSpans.media: tokens_per_image has dtype torch.float32", lambda: MEDIA(HERE, torch.ones(2))),
        (ValueError, "RowSpans.media: tokens_per_image is on meta", lambda: MEDIA(HERE, CU.to("meta"))),
        (
            ValueError,
            r"RowSpans.media: tokens_per_image has shape \(3,\), media_locations \(2, 3\); .* an int or \(2, images\)",
            lambda: MEDIA(BATCH, CU),
        ),
        (ValueError, r"must be an int or \(images,\)", lambda: MEDIA(HERE, CU[None])),
        (
            ValueError,
            r"RowSpans.media: cu_seqlens is given and media_locations has shape \(2, 3\); .* it must be \(tokens,\)",
            lambda: MEDIA(BATCH, 4, cu_seqlens=CU),
        ),
        (ValueError, "RowSpans.media: cu_seqlens is on meta", lambda: MEDIA(HERE, 4, cu_seqlens=CU.to("meta"))),
        (
            ValueError,
            "RowSpans.media: attend is 'last'; accepted are 'immediate', 'previous', 'group'",
            lambda: MEDIA(HERE, 4, attend="last"),
        ),
        (ValueError, "RowSpans.media: empty_rows is 'zero'; accepted", lambda: MEDIA(HERE, 4, empty_rows="zero")),
        (ValueError, "RowSpans.media: num_keys is missing: media_locations is on", lambda: MEDIA(HERE.to("meta"), 4)),
        (
            ValueError,
            "RowSpans.media: num_keys is missing: tokens_per_image is on",
            lambda: MEDIA(HERE.to("meta"), CU.to("meta")),
        ),
        (TypeError, "RowSpans.from_dense: mask has dtype torch.int32; it must be", lambda: RowSpans.from_dense(CU)),
        (ValueError, r"RowSpans.from_dense: mask has shape \(3,\)", lambda: RowSpans.from_dense(HERE)),
        (TypeError, "RowSpans.from_dense: mask must be a torch.Tensor", lambda: RowSpans.from_dense([[True]])),
    ],
)
def test_errors_say_what_was_given_and_what_is_accepted(error, message, make):
    with pytest.raises(error, match=message):
        make()


def test_a_compiled_function_is_told_which_size_it_lacks():
    @torch.compile(backend="eager", fullgraph=True)
    def build(cu_seqlens):
        return RowSpans.packed(cu_seqlens).lo

    with pytest.raises(Exception, match="num_queries is missing: a compiled function cannot read cu_seqlens"):
        build(CU)
