"""Random layouts of every builder of RowSpans, and who sees whom in them, asked pair by pair.

The oracles know of a layout what the builder's docstring says and nothing of offsets, searches or running counts: a
document is a list of tokens, an image is a list of neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor

from mmkernels import RowSpans

SMALL = (1, 3, 12)  # the longest document of a layout; oracles take a while on larger ones


@dataclass(frozen=True)
class Layout:
    spans: RowSpans
    oracle: Callable[[], Tensor]  # the mask, from plain loops


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def integers(rng: Random, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=rng.choice([torch.int32, torch.int64]))


def offsets(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths) + 1)]


def lengths_of(rng: Random, documents: int, longest: tuple[int, ...]) -> list[int]:
    """Lengths with zeros among them, and more documents than tokens now and then."""
    most = rng.choice(longest)
    return [rng.choice([0, 0, rng.randint(0, most), most]) for _ in range(documents)]


def documents_of(rng: Random, longest: tuple[int, ...]) -> tuple[list[int], int]:
    """Lengths of documents, and tokens in all: the rest is padding."""
    lengths = lengths_of(rng, rng.randint(0, 6), longest)
    return lengths, sum(lengths) + rng.choice([0, 0, 1, 5])


def owners(lengths: list[int], total: int) -> list[int | None]:
    """The document of each token; None for those after all documents."""
    inside = [d for d, length in enumerate(lengths) for _ in range(length)]
    return inside + [None] * (total - len(inside))


def dense(sees: Callable[[int, int], bool], num_queries: int, num_keys: int) -> Tensor:
    rows = [[bool(sees(i, j)) for j in range(num_keys)] for i in range(num_queries)]
    return torch.tensor(rows, dtype=torch.bool).reshape(num_queries, num_keys)


# ---- documents of text


def packed(rng: Random, longest: tuple[int, ...] = SMALL, *, causal: bool, windowed: bool = False) -> Layout:
    lengths, tokens = documents_of(rng, longest)
    window = rng.randint(1, 1 + max(longest) // 2) if windowed else None
    of = owners(lengths, tokens)

    def sees(i: int, j: int) -> bool:
        alike = of[i] is not None and of[i] == of[j]
        return alike and (not causal or j <= i) and (window is None or i - j < window)

    cu_seqlens = integers(rng, offsets(lengths))
    spans = RowSpans.packed(cu_seqlens, num_queries=tokens, causal=causal, window=window)
    return Layout(spans, lambda: dense(sees, tokens, tokens))


def packed_keys(rng: Random, longest: tuple[int, ...] = SMALL, *, causal: bool, windowed: bool = False) -> Layout:
    """Keys of their own."""
    lengths, num_queries = documents_of(rng, longest)
    lengths_k = lengths_of(rng, len(lengths), longest)
    num_keys = sum(lengths_k) + rng.choice([0, 4])
    window = rng.randint(1, 1 + max(longest) // 2) if windowed else None
    of, of_k = owners(lengths, num_queries), owners(lengths_k, num_keys)

    def sees(i: int, j: int) -> bool:
        if of[i] is None or of[i] != of_k[j]:
            return False
        queries_after = sum(d == of[i] for d in of[i + 1 :])
        keys_after = sum(d == of[i] for d in of_k[j + 1 :])
        back = keys_after - queries_after  # the last query and the last key stand at one place
        return not causal or (back >= 0 and (window is None or back < window))

    cu_seqlens, cu_seqlens_k = int32(offsets(lengths)), int32(offsets(lengths_k))
    sizes = {"num_queries": num_queries, "num_keys": num_keys}
    spans = RowSpans.packed(cu_seqlens, cu_seqlens_k, **sizes, causal=causal, window=window)
    return Layout(spans, lambda: dense(sees, num_queries, num_keys))


def prefix_lm(rng: Random, longest: tuple[int, ...] = SMALL) -> Layout:
    lengths, tokens = documents_of(rng, longest)
    of = owners(lengths, tokens)
    prefixes = [rng.choice([0, rng.randint(0, length + 2)]) for length in lengths]

    def sees(i: int, j: int) -> bool:
        if of[i] is None or of[i] != of[j]:
            return False
        begin = of.index(of[i])
        return j <= i or j - begin < prefixes[of[i]] > i - begin

    spans = RowSpans.prefix_lm(int32(offsets(lengths)), int32(prefixes), num_queries=tokens)
    return Layout(spans, lambda: dense(sees, tokens, tokens))


# ---- images inside text


def image_ids(rng: Random, tokens: int, longest: int = 7) -> list[int]:
    """Runs of text and of images of random lengths, of the same number side by side and again, and across documents."""
    ids: list[int] = []
    while len(ids) < tokens:
        ids += [rng.choice([-1, -1, 0, 1, len(ids)])] * rng.randint(1, longest)
    return ids[:tokens]


def image_text(rng: Random, longest: tuple[int, ...] = SMALL, *, window_rule: str | None = None) -> Layout:
    lengths, tokens = documents_of(rng, longest)
    of, ids = owners(lengths, tokens), image_ids(rng, tokens, 1 + max(longest) // 2)
    window = rng.randint(1, 1 + max(longest) // 2) if window_rule else None

    def sees(i: int, j: int) -> bool:
        if of[i] is None or of[i] != of[j]:
            return False
        between = range(min(i, j), max(i, j) + 1)
        same_image = ids[i] >= 0 and all(ids[t] == ids[i] for t in between)
        near = window is None or i - j < window
        return (j <= i and near) or (same_image and (near or window_rule == "union"))

    rule = {"window_rule": window_rule} if window_rule else {}
    spans = RowSpans.image_text(int32(offsets(lengths)), integers(rng, ids), window=window, **rule)
    return Layout(spans, lambda: dense(sees, tokens, tokens))


# ---- text that looks at images


def located_images(rng: Random, tokens: int) -> list[bool]:
    often = rng.choice([0.0, 0.2, 0.7, 1.0])
    return [rng.random() < often for _ in range(tokens)]


def images_seen(i: int, located: list[bool], of: list[int | None], attend: str) -> list[int]:
    """The images that token i sees by their numbers in the whole row, found by walking back from it."""
    if of[i] is None:
        return []
    seen = []
    for t in range(i, -1, -1):
        if of[t] != of[i]:
            break
        if located[t]:
            seen.append(sum(located[:t]))
            opens_group = t == 0 or not located[t - 1] or of[t - 1] != of[t]
            if attend == "immediate" or (attend == "group" and opens_group):
                break
    return seen


def media_mask(
    located: list[bool],
    of: list[int | None],
    sizes: list[int],
    num_keys: int,
    attend: str,
    all_keys: bool,
    packed: bool,
) -> Tensor:
    """`sizes`: keys of each image; `all_keys`: for a query that sees no image, those of its document or row."""
    owner = owners(sizes, num_keys)  # the image of each key
    image_document = [d for d, image in zip(of, located, strict=True) if image]

    def row(i: int) -> list[bool]:
        seen = images_seen(i, located, of, attend)
        keys = [image is not None and image in seen for image in owner]
        if not all_keys or any(keys):
            return keys
        if not packed:
            return [True] * num_keys
        mine = [n for n, d in enumerate(image_document) if d is not None and d == of[i]]
        return [image in mine for image in owner]

    return torch.tensor([row(i) for i in range(len(located))], dtype=torch.bool).reshape(len(located), num_keys)


def media(
    rng: Random, longest: tuple[int, ...] = SMALL, *, attend: str, empty_rows: str = "none", packed: bool = True
) -> Layout:
    lengths, tokens = documents_of(rng, longest)
    of = owners(lengths, tokens) if packed else [0] * tokens
    located = located_images(rng, tokens)
    images = max(0, sum(located) + rng.choice([0, 0, 2, -1]))  # more or fewer than the text has places for
    if rng.random() < 0.7:
        sizes = [rng.choice([0, 1, 3, max(longest) // 4]) for _ in range(images)]
        tokens_per_image = int32(sizes)
    else:
        tokens_per_image = rng.randint(0, 3)
        sizes = [tokens_per_image] * sum(located)
    num_keys = sum(sizes) + rng.choice([0, 3])
    spans = RowSpans.media(
        torch.tensor(located, dtype=torch.bool),
        tokens_per_image,
        num_keys=num_keys,
        cu_seqlens=int32(offsets(lengths)) if packed else None,
        attend=attend,
        empty_rows=empty_rows,
    )
    return Layout(spans, lambda: media_mask(located, of, sizes, num_keys, attend, empty_rows == "all", packed))


def media_batch(rng: Random, longest: tuple[int, ...] = SMALL, *, attend: str) -> Layout:
    batch, tokens, images = rng.randint(1, 3), rng.randint(0, max(longest)), rng.randint(0, 4)
    located = [located_images(rng, tokens) for _ in range(batch)]
    sizes = [[rng.choice([0, 1, 3, max(longest) // 4]) for _ in range(images)] for _ in range(batch)]
    num_keys = max(map(sum, sizes)) + rng.choice([0, 3])
    locations = torch.tensor(located, dtype=torch.bool).reshape(batch, tokens)
    lengths = int32(sizes).reshape(batch, images)
    spans = RowSpans.media(locations, lengths, num_keys=num_keys, attend=attend, empty_rows="all")

    def oracle() -> Tensor:
        rows = zip(located, sizes, strict=True)
        return torch.stack([media_mask(row, [0] * tokens, size, num_keys, attend, True, False) for row, size in rows])

    return Layout(spans, oracle)


# ---- anything


def scattered(rng: Random, longest: tuple[int, ...] = SMALL) -> Layout:
    """Any mask, by as many runs as it takes."""
    num_queries, num_keys = rng.randint(0, max(longest)), rng.randint(0, max(longest))
    often, stays = rng.choice([0.0, 0.3, 0.8, 1.0]), rng.choice([0.0, 0.8])
    shape = [rng.randint(1, 3)] if rng.random() < 0.4 else []
    mask = torch.rand(*shape, num_queries, num_keys) < often
    for j in range(1, num_keys):  # longer runs
        mask[..., j] = torch.where(torch.rand(*shape, num_queries) < stays, mask[..., j - 1], mask[..., j])
    return Layout(RowSpans.from_dense(mask), lambda: mask)


BUILDERS: dict[str, Callable[..., Layout]] = {
    "packed": partial(packed, causal=False),
    "causal": partial(packed, causal=True),
    "causal, window": partial(packed, causal=True, windowed=True),
    "keys of their own": partial(packed_keys, causal=False),
    "keys of their own, causal": partial(packed_keys, causal=True),
    "keys of their own, window": partial(packed_keys, causal=True, windowed=True),
    "prefix_lm": prefix_lm,
    "image_text": image_text,
    "image_text, clamp": partial(image_text, window_rule="clamp"),
    "image_text, union": partial(image_text, window_rule="union"),
    **{
        f"media, {attend}, {empty_rows} in empty rows, {'packed' if of_documents else 'one row'}": partial(
            media, attend=attend, empty_rows=empty_rows, packed=of_documents
        )
        for attend in ("immediate", "previous", "group")
        for empty_rows in ("none", "all")
        for of_documents in (False, True)
    },
    **{
        f"media of a batch, {attend}": partial(media_batch, attend=attend)
        for attend in ("immediate", "previous", "group")
    },
    "scattered": scattered,
}
