"""What packing would give on lengths of one's own, beside padded batches. Imports neither torch nor transformers.

Equal for all ways is the memory: a step has room for `limits.tokens` on each rank. A padded batch computes its number
of documents times its longest, and takes the next document where that fits the room. A pack computes its real tokens.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from .plan import Limits, _least, plan, shard, stream

BUFFER = 512  # documents that a stream holds back
SQUARE = 4096  # tokens at which a document's attention is taken to cost as much as all else
ACCEPTED = (
    "accepted is a number of tokens, such as 512, or an object with `tokens`, `length` or a flat list `input_ids`, "
    "and `patches` and `images` as numbers (`images` may be a flat list, too) on every line or on none"
)

Step = Callable[[str, int, int], None]
Row = tuple[int, int | None, int | None]  # of a line: tokens, patches and images; None: not said
Sizes = tuple[int, ...]  # of a document: tokens, then what else is limited
Batches = list[list[int]]  # documents' numbers, of each batch or pack
STAGES = 4


def _silent(_: str, __: int, ___: int) -> None:
    """Tells nobody how far the work is."""


# ---- reading


@dataclass(frozen=True)
class Documents:
    """The sizes of documents, a number for each.

    name: of their file. tokens: (documents,), from 1 on. patches, images: (documents,), from 0 on; None where the file
    says nothing of them. lines: (documents,), where each stands in the file, from 1 on.
    """

    name: str
    tokens: list[int]
    patches: list[int] | None
    images: list[int] | None
    lines: list[int]


def read(path: str, step: Step = _silent) -> Documents:
    """The documents of a JSONL file, one a line; blank lines hold none.

    Args:
        path: of the file, compressed by gzip where it ends in .gz; "-" is standard input.
        step: told how far it is: (what is done, stages done, stages).

    Raises:
        ValueError: the file cannot be read or has no documents, or a line is not one; the message names the file, the
            line, what was found and what is accepted.
    """
    name = "standard input" if path == "-" else path
    rows: list[Row] = []
    lines: list[int] = []
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    rows.append(_document(line))
                    _check_alike(rows[0], rows[-1], lines[:1])
                except ValueError as error:
                    raise ValueError(f"{name}, line {number}: {error}; {ACCEPTED}") from None
                lines.append(number)
                if len(lines) % 1000 == 0:
                    step(f"reading: {len(lines):,} documents", 0, STAGES)
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a gzip file that is cut short or damaged
        raise ValueError(f"{name} cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{name} has no documents; {ACCEPTED}")
    patches = [row[1] for row in rows if row[1] is not None]  # of every document or of none
    images = [row[2] for row in rows if row[2] is not None]
    return Documents(name, [row[0] for row in rows], patches or None, images or None, lines)


def _opened(path: str) -> AbstractContextManager[Iterable[bytes]]:
    if path == "-":
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _document(line: bytes) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"found no JSON: {_cut(line[:80].decode(errors='replace').strip())}") from None
    if not isinstance(found, dict):
        return _number("the number of tokens", found, 1), None, None
    counts = {}
    for key in ("tokens", "length", "input_ids"):
        if key in found:
            counts[key] = _listed(key, found[key]) if key == "input_ids" else found[key]
            _number(key, counts[key], 1)
    if not counts:
        raise ValueError(f"found an object of {_shown(list(found))}, no number of tokens")
    if len(set(counts.values())) > 1:
        raise ValueError(f"found numbers of tokens that differ: {_shown(counts)}")
    patches, images = found.get("patches"), found.get("images")
    if "patches" in found:
        _number("patches", patches, 0)
    if "images" in found:
        images = _number("images", _listed("images", images) if isinstance(images, list) else images, 0)
    return next(iter(counts.values())), patches, images


def _number(key: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} is {_shown(value)}, and must be a whole number from {least} on")
    return value


def _listed(key: str, value: object) -> int:
    """Of a nested list the length is no number of tokens: a processor gives (1, tokens)."""
    if not isinstance(value, list) or any(isinstance(x, list) for x in value[:1]):
        raise ValueError(f"{key} is {_shown(value)}, and must be a flat list")
    return len(value)


def _check_alike(first: Row, row: Row, line: list[int]) -> None:
    """A document that does not say how many pictures it has may have some: none is taken to have none."""
    for key, there, here in zip(("patches", "images"), first[1:], row[1:], strict=True):
        if there is not None and here is None:
            raise ValueError(f"found no `{key}`, which line {line[0]} has; 0 says that there are none")
        if there is None and here is not None:
            raise ValueError(f"found `{key}`, which line {line[0]} has not; 0 says that there are none")


def _shown(value: object) -> str:
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- computing


@dataclass(frozen=True)
class TooLarge:
    """Documents that fit no pack by themselves. documents: how many. tokens: of all of them. line: where the first
    stands. size, most: of the first, what is over its limit, and the limit. what: "tokens", "patches" or "images"."""

    documents: int
    tokens: int
    line: int
    what: str
    size: int
    most: int


@dataclass(frozen=True)
class Way:
    """A way to make steps of documents. steps: of all ranks together. filled: real tokens over the room of all steps.
    padding: the share of what is computed that is padding. imbalance: the cost of the slowest rank of each step over
    the mean of its ranks, summed over the steps; None on one rank. batches: or packs, of all ranks. ended_early: those
    of them that the next document would have fit, had they not been full by number."""

    name: str
    steps: int
    filled: float
    padding: float
    imbalance: float | None
    batches: int
    ended_early: int


@dataclass(frozen=True)
class Preview:
    """What packing would give.

    documents, tokens, longest: of the whole file; the longest in tokens. too_large: what no pack can hold; all that
    follows is without it. ways: padded as they come, padded by length, the plan, a stream. packs, least: of the plan,
    and what no plan is below. without_picture: of the plan's packs, as ranks get them; None: unknown. not_dealt: why
    `shard` refuses the plan's packs, which go to ranks as they come then.
    """

    limits: Limits
    ranks: int
    batch: int
    documents: int
    tokens: int
    longest: int
    too_large: TooLarge | None
    ways: tuple[Way, ...]
    packs: int
    least: int
    without_picture: int | None
    not_dealt: str | None


def preview(documents: Documents, limits: Limits, *, ranks: int = 1, batch: int = 8, step: Step = _silent) -> Preview:
    """Four ways to make steps of the documents, beside each other; 100,000 documents take a few seconds.

    Args:
        documents: as `read` gives them.
        limits: what a rank has room for in a step, and a padded batch or a pack holds.
        ranks: that share the work, with a batch or a pack each in every step.
        batch: documents that a padded batch holds at most.
        step: told how far it is: (what is done, stages done, stages).

    Raises:
        ValueError: ranks or batch is less than 1, patches or images are limited and the documents do not say them, or
            each of them is too large for a pack.
    """
    for name, value in (("ranks", ranks), ("batch", batch)):
        if value < 1:
            raise ValueError(f"preview: {name} is {value}; it must be at least 1")
    kept, too_large = _kept(documents, _rows(documents, limits), limits)
    rows = [row for _, row in kept]
    tokens = [row[0] for row in rows]

    step(f"padding {len(rows):,} documents", 1, STAGES)
    come, come_early = _padded(range(len(rows)), rows, limits, batch)
    by_length, by_length_early = _padded(sorted(range(len(rows)), key=lambda at: -tokens[at]), rows, limits, batch)
    step(f"planning {len(rows):,} documents", 2, STAGES)
    columns = dict(zip(_limited(limits), zip(*rows, strict=True), strict=True))
    packs = plan(columns.pop("tokens"), limits, **columns)
    dealt, not_dealt = _dealt(packs, tokens, ranks)
    streamed = _streamed(rows, limits, step)
    way = partial(_way, tokens=tokens, room=limits.tokens, ranks=ranks)
    ways = (
        way("padded, as they come", _rounds(come, ranks), ended_early=come_early),
        way("padded, sorted by length", _rounds(by_length, ranks), ended_early=by_length_early),
        way("packed (plan)", dealt),
        way(f"packed from a stream (buffer {BUFFER})", _rounds(streamed, ranks)),
    )
    return Preview(
        limits=limits,
        ranks=ranks,
        batch=batch,
        documents=len(documents.tokens),
        tokens=sum(documents.tokens),
        longest=max(documents.tokens),
        too_large=too_large,
        ways=ways,
        packs=len(packs),
        least=_least(rows, limits),
        without_picture=_without_picture(dealt, documents.images, [at for at, _ in kept]),
        not_dealt=not_dealt,
    )


def _limited(limits: Limits) -> list[str]:
    return [name for name, most in vars(limits).items() if most is not None]


def _rows(documents: Documents, limits: Limits) -> list[Sizes]:
    columns = []
    for name in _limited(limits):
        column = getattr(documents, name)
        if column is None:
            raise ValueError(f"{name} are limited, and {documents.name} says none; give `{name}` on every line")
        columns.append(column)
    return list(zip(*columns, strict=True))


def _kept(documents: Documents, rows: list[Sizes], limits: Limits) -> tuple[list[tuple[int, Sizes]], TooLarge | None]:
    """The documents that fit a pack, each with its number in the file, and what is known of the others."""
    kept: list[tuple[int, Sizes]] = []
    others: list[tuple[int, Sizes]] = []
    for at, row in enumerate(rows):
        fits = all(x <= most for x, most in zip(row, limits.given, strict=True))
        (kept if fits else others).append((at, row))
    if not others:
        return kept, None
    first, row = others[0]
    sizes = zip(_limited(limits), row, limits.given, strict=True)
    what, size, most = next((what, size, most) for what, size, most in sizes if size > most)
    line = documents.lines[first]
    if not kept:
        first_has = f"line {line} has {size:,} {what}, and a pack holds {most:,}"
        raise ValueError(f"no document of {documents.name} fits a pack: {first_has}")
    tokens = sum(documents.tokens[at] for at, _ in others)
    return kept, TooLarge(len(others), tokens, line, what, size, most)


def _padded(order: Iterable[int], rows: Sequence[Sizes], limits: Limits, batch: int) -> tuple[Batches, int]:
    """Batches that take documents in this order, and how many of them ended early: full by number, and not by size."""
    batches: Batches = []
    others: list[int] = []  # of the batch, what is limited beside tokens
    ended_early, longest = 0, 0
    for at in order:
        tokens, *sizes = rows[at]
        longer = max(longest, tokens)
        more = [x + y for x, y in zip(others, sizes, strict=True)] if batches else sizes
        count = len(batches[-1]) + 1 if batches else 1
        fits = all(x <= most for x, most in zip((count * longer, *more), limits.given, strict=True))
        if batches and fits and count <= batch:
            batches[-1].append(at)
            longest, others = longer, more
        else:
            ended_early += bool(batches) and fits
            batches.append([at])
            longest, others = tokens, sizes
    return batches, ended_early


def _streamed(rows: list[Sizes], limits: Limits, step: Step) -> Batches:
    packs, done = [], 0
    for pack in stream(range(len(rows)), limits, rows.__getitem__, buffer=BUFFER):
        packs.append(pack)
        done += len(pack)
        if len(packs) % 100 == 0:
            step(f"streaming: {done:,} of {len(rows):,} documents", 3, STAGES)
    return packs


def _rounds(batches: Batches, ranks: int) -> list[Batches]:
    """Steps of the batches as they come, one a rank; the last ranks have none in the last step."""
    return [batches[at : at + ranks] for at in range(0, len(batches), ranks)]


def _dealt(packs: Batches, tokens: list[int], ranks: int) -> tuple[list[Batches], str | None]:
    """Steps as `shard` deals them, or as packs come and why it does not."""
    costs = [_cost(x) for x in tokens]

    def cost(pack: Sequence[int]) -> float:
        return sum(map(costs.__getitem__, pack))

    try:
        parts = [shard(packs, rank, ranks, cost=cost) for rank in range(ranks)]
    except ValueError as error:
        return _rounds(packs, ranks), str(error)
    return [list(packs_of_step) for packs_of_step in zip(*parts, strict=True)], None


def _without_picture(dealt: list[Batches], images: list[int] | None, kept: list[int]) -> int | None:
    if images is None:
        return None
    return sum(not any(images[kept[at]] for at in pack) for packs in dealt for pack in packs)


def _cost(tokens: int) -> float:
    return tokens + tokens**2 / SQUARE


def _way(
    name: str, steps: list[Batches], tokens: list[int], room: int, ranks: int, ended_early: int | None = None
) -> Way:
    """room: of a rank in a step, in tokens. ended_early: of padded batches, in which each document is as long as the
    longest."""
    computed, slowest, total = 0, 0.0, 0.0
    for batches in steps:
        lengths = [[tokens[at] for at in batch] for batch in batches]
        if ended_early is not None:
            lengths = [[max(each)] * len(each) for each in lengths]
        costs = [sum(map(_cost, each)) for each in lengths]
        computed += sum(map(sum, lengths))
        slowest += max(costs)
        total += sum(costs)
    real = sum(tokens)
    imbalance = slowest / (total / ranks) if ranks > 1 else None
    filled = real / (len(steps) * ranks * room)
    return Way(name, len(steps), filled, 1 - real / computed, imbalance, sum(map(len, steps)), ended_early or 0)
