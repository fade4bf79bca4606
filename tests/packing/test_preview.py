"""What packing would give: counted by hand on a few documents, and against plain loops on drawn ones."""

import gzip
import io
import math
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import lengths_of

from mmkernels.packing import Limits
from mmkernels.packing.preview import Documents, TooLarge, preview, read


def documents(tokens, images=None, patches=None) -> Documents:
    return Documents("data", list(tokens), patches, images, list(range(1, len(tokens) + 1)))


def ways(tokens, room, **options):
    return preview(documents(tokens), Limits(room), **options).ways


# ---- reading


def written(tmp_path, text: str, name: str = "data.jsonl") -> str:
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(file)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_number_or_an_object_a_line(tmp_path, name):
    objects = '{"length": 8}\r\n{"input_ids": [4, 5, 6]}\n{"length": 2, "input_ids": [1, 2]}'
    path = written(tmp_path, '5\n\n{"tokens": 7, "id": "x"}\n  \n' + objects, name)
    assert read(path) == Documents(path, [5, 7, 8, 3, 2], None, None, [1, 3, 5, 6, 7])


def test_pictures_are_numbers_and_images_may_be_a_list(tmp_path):
    path = written(tmp_path, '{"tokens": 7, "patches": 0, "images": 2}\n{"tokens": 3, "patches": 9, "images": ["a"]}\n')
    assert read(path) == Documents(path, [7, 3], [0, 9], [2, 1], [1, 2])


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"5\n6\n")))
    assert read("-") == Documents("standard input", [5, 6], None, None, [1, 2])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("seven", "found no JSON: seven"),
        ("[" * 100_000, r"found no JSON: \[\[\["),
        ("0", "the number of tokens is 0, and must be a whole number from 1 on"),
        ("true", "the number of tokens is true"),
        ("1.5", "the number of tokens is 1.5"),
        ("NaN", "the number of tokens is NaN"),
        ('"512"', 'the number of tokens is "512"'),
        ("[1, 2]", r"the number of tokens is \[1, 2\]"),
        ('{"text": "a"}', r'found an object of \["text"\], no number of tokens'),
        ('{"tokens": [1, 2]}', r"tokens is \[1, 2\], and must be a whole number"),
        ('{"input_ids": 3}', "input_ids is 3, and must be a flat list"),
        ('{"input_ids": []}', "input_ids is 0, and must be a whole number from 1 on"),
        ('{"input_ids": [[1, 2]]}', r"input_ids is \[\[1, 2\]\], and must be a flat list"),
        ('{"tokens": 3, "input_ids": [1, 2]}', 'numbers of tokens that differ: {"tokens": 3, "input_ids": 2}'),
        ('{"tokens": 3, "images": -1}', "images is -1, and must be a whole number from 0 on"),
        ('{"tokens": 3, "images": null}', "images is null"),
        ('{"tokens": 3, "patches": [1]}', r"patches is \[1\]"),
        ('{"tokens": 3, "images": 1}', "found `images`, which line 1 has not; 0 says that there are none"),
    ],
)
def test_other_lines_are_refused_by_file_and_number(line, found, tmp_path):
    path = written(tmp_path, f"5\n\n{line}\n")
    with pytest.raises(ValueError, match=f"^{path}, line 3: .*{found}.*; accepted is a number of tokens") as refusal:
        read(path)
    assert len(str(refusal.value)) < 600


def test_pictures_of_some_lines_only_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2: found no `images`, which line 1 has; 0 says that there are none"):
        read(written(tmp_path, '{"tokens": 3, "images": 1}\n4\n'))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere cannot be read: .*No such file"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"x\.gz cannot be read: Not a gzipped file"):
        (tmp_path / "x.gz").write_text("5\n")
        read(str(tmp_path / "x.gz"))
    with pytest.raises(ValueError, match=r"cut\.gz cannot be read: Compressed file ended"):
        (tmp_path / "cut.gz").write_bytes(gzip.compress(b"5\n" * 1000)[:-12])
        read(str(tmp_path / "cut.gz"))
    with pytest.raises(ValueError, match=r"data\.jsonl has no documents; accepted is"):
        read(written(tmp_path, "\n\n"))


# ---- computing


def test_padded_batches_and_packs_by_hand():
    come, by_length, planned, streamed = ways([4, 2, 3, 1], 8)
    assert [way.name for way in (come, by_length, planned, streamed)] == [
        "padded, as they come", "padded, sorted by length", "packed (plan)", "packed from a stream (buffer 512)",
    ]  # fmt: skip
    assert (come.steps, come.filled, come.padding) == (2, 10 / 16, pytest.approx(4 / 14))  # 4 2 | 3 1
    assert (by_length.steps, by_length.filled, by_length.padding) == (2, 10 / 16, pytest.approx(2 / 12))  # 4 3 | 2 1
    assert (planned.steps, planned.filled, planned.padding) == (2, 10 / 16, 0)
    assert (streamed.steps, streamed.filled, streamed.padding) == (2, 10 / 16, 0)
    come, by_length, planned, streamed = ways([6, 2, 6, 2, 6, 2], 8)
    assert [way.steps for way in (come, by_length, planned, streamed)] == [6, 4, 3, 3]  # by length: 6 | 6 | 6 | 2 2 2


def test_a_longer_document_lengthens_those_before_it():
    come, *_ = ways([2, 2, 2, 4], 8)
    assert come.steps == 2 and come.padding == 0  # 2 2 2 | 4, for 4 x 4 is more than the room
    come, *_ = ways([1, 4], 8)
    assert come.steps == 1 and come.padding == pytest.approx(3 / 8)


def test_what_ended_for_its_number_of_documents_is_told():
    come, by_length, planned, streamed = ways([1] * 10, 8, batch=3)
    assert (come.steps, come.ended_early) == (by_length.steps, by_length.ended_early) == (4, 3)
    assert (planned.steps, planned.ended_early, streamed.ended_early) == (2, 0, 0)
    come, *_ = ways([4, 4, 4], 8, batch=2)
    assert (come.steps, come.ended_early) == (2, 0)  # full, as the room is


def test_pictures_count_in_all_ways():
    found = preview(documents([1] * 4, images=[2, 2, 2, 1], patches=[5, 5, 5, 5]), Limits(8, images=4))
    assert [way.steps for way in found.ways] == [2] * 4 and found.packs == found.least == 2
    assert found.ways[0].ended_early == 0
    found = preview(documents([1] * 4, images=[2, 2, 2, 1], patches=[5, 5, 5, 5]), Limits(8, images=4, patches=5))
    assert [way.steps for way in found.ways] == [4] * 4


def test_documents_too_large_are_counted_named_and_left_out():
    data = Documents("data", [9, 8, 10, 8], None, [0, 1, 0, 1], [1, 3, 4, 7])
    found = preview(data, Limits(8))
    assert found.too_large == TooLarge(documents=2, tokens=19, line=1, what="tokens", size=9, most=8)
    assert (found.documents, found.tokens, found.longest, found.packs) == (4, 35, 10, 2)
    assert all((way.steps, way.filled) == (2, 1) for way in found.ways)
    assert found.without_picture == 0  # the images are those of the documents that are left
    found = preview(documents([1, 1, 1], images=[1, 7, 0]), Limits(8, images=5))
    assert found.too_large == TooLarge(documents=1, tokens=1, line=2, what="images", size=7, most=5)
    assert preview(documents([8]), Limits(8)).too_large is None


def test_packs_without_a_picture():
    def without(tokens, images, ranks=1):
        return preview(documents(tokens, images), Limits(8), ranks=ranks).without_picture

    assert without([8, 8, 8], [0, 2, 0]) == 2
    assert without([4, 4], [0, 2]) == 0
    assert without([4, 4], None) is None
    assert without([4, 4], [0, 2], ranks=2) == 1  # as ranks get them: cut in two


def cost(*tokens: int) -> float:
    return sum(n + n**2 / 4096 for n in tokens)


def test_the_slowest_rank_by_hand():
    come, by_length, planned, streamed = ways([6000, 2000, 1000, 1000, 5000, 5000], 6000, ranks=2, batch=9)
    assert [way.steps for way in (come, by_length, planned, streamed)] == [2, 2, 2, 2]
    large, padded, packed, lone = cost(6000), cost(2000, 2000, 2000), cost(2000), cost(5000)
    assert come.imbalance == pytest.approx((large + lone) / ((large + padded + 2 * lone) / 2))
    assert by_length.imbalance == pytest.approx((large + lone) / ((large + 2 * lone + padded) / 2))
    pair = cost(5000, 1000)
    assert planned.imbalance == pytest.approx((large + pair) / ((large + pair + pair + packed) / 2))
    assert all(way.imbalance is None for way in ways([6000, 2000], 6000))


def test_a_rank_without_a_batch_waits_and_its_room_is_empty():
    come, _, planned, streamed = ways([4, 4], 8, ranks=2)
    assert (come.imbalance, come.filled, streamed.imbalance) == (2, 0.5, 2)
    assert (planned.imbalance, planned.batches) == (1, 2)  # `shard` cuts the pack


def test_packs_that_cannot_be_dealt_are_told():
    found = preview(documents([5, 5, 5]), Limits(8), ranks=2)
    assert "3 packs of one document each cannot be dealt evenly to 2 ranks" in found.not_dealt
    assert found.ways[2].steps == 2
    assert preview(documents([5, 5]), Limits(8), ranks=2).not_dealt is None


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=60),
    st.integers(30, 60),
    st.none() | st.integers(4, 9),
    st.integers(1, 5),
    st.integers(1, 9),
)
@settings(max_examples=200, deadline=None)
def test_steps_and_shares_of_drawn_documents(rows, room, most_images, ranks, batch):
    tokens, images = map(list, zip(*rows, strict=True))
    found = preview(documents(tokens, images), Limits(room, images=most_images), ranks=ranks, batch=batch)
    come, by_length, planned, streamed = found.ways
    for way, order in ((come, rows), (by_length, sorted(rows, key=lambda row: -row[0]))):
        batches = padded(order, room, most_images or math.inf, batch)
        computed = sum(len(each) * max(n for n, _ in each) for each in batches)
        assert way.steps == math.ceil(len(batches) / ranks) and way.batches == len(batches)
        assert way.padding == pytest.approx(1 - sum(tokens) / computed)
    for way in found.ways:
        assert way.filled * way.steps * ranks * room == pytest.approx(sum(tokens)) and way.filled <= 1
        assert way.steps >= math.ceil(found.least / ranks)
        assert way.imbalance is None if ranks == 1 else 1 - 1e-9 <= way.imbalance <= ranks + 1e-9
    assert planned.padding == streamed.padding == 0 and found.least <= found.packs <= planned.batches


def padded(rows, room, most_images, batch) -> list[list[tuple[int, int]]]:
    batches = [[]]
    for row in rows:
        longer = [*batches[-1], row]
        fits = len(longer) * max(n for n, _ in longer) <= room and sum(n for _, n in longer) <= most_images
        if fits and len(longer) <= batch:
            batches[-1] = longer
        else:
            batches.append([row])
    return batches


def test_many_documents_take_a_moment_and_tell_how_far_they_are(tmp_path):
    """20,000 take a second and a half on one core, of which CI gets four times."""
    told = []
    path = written(tmp_path, "\n".join(map(str, lengths_of("llava", 20_000))))
    start = time.process_time()
    found = preview(read(path, lambda *x: told.append(x)), Limits(8192), ranks=8, step=lambda *x: told.append(x))
    assert time.process_time() - start < 6.0
    come, by_length, planned, _ = (way.steps for way in found.ways)
    assert found.packs == found.least == 1995 and planned == 250 < by_length < come
    assert told[0] == ("reading: 1,000 documents", 0, 4)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told) and told[-1][1:] == (3, 4)
    assert len({text for text, done, _ in told if done == 3}) > 5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: preview(documents([3]), Limits(8), ranks=0), "ranks is 0"),
        (lambda: preview(documents([3]), Limits(8), batch=0), "batch is 0"),
        (lambda: preview(documents([3]), Limits(8, images=2)), "images are limited, and data says none; give `images`"),
        (lambda: preview(documents([9, 9]), Limits(8)), "no document of data fits a pack: line 1 has 9 tokens, and a "),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
