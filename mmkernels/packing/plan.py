"""Which documents share a pack: lengths in, lists of indices out. Imports neither torch nor transformers.

First fit decreasing (Johnson 1973): documents by size, largest first, each into the first pack with room, found in a
tree over the packs in O(log n). Where that takes more packs than some plan might, those that it did not fill are packed
again by subset sums: the largest document left opens a pack, and those whose tokens sum up highest within its room fill
it. The sums that can be reached are the bits of an integer, so that a document is a shift and an or. That fills packs
to the last token where documents are large against them, but is blind to limits other than tokens: the plan with fewer
packs is taken. All is a function of the arguments: the same plan on every machine.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

Document = TypeVar("Document")


@dataclass(frozen=True)
class Limits:
    """What a pack holds at most. patches: of all its pictures, what the vision tower computes; images: pictures. None:
    as many as come.

    Raises:
        ValueError: a limit is less than 1.
    """

    tokens: int
    patches: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and limit < 1:
                raise ValueError(f"Limits: {field.name} is {limit}; it must be at least 1")

    @property
    def given(self) -> list[int]:
        return [x for x in (self.tokens, self.patches, self.images) if x is not None]


def plan(
    lengths: Sequence[int],
    limits: Limits,
    *,
    patches: Sequence[int] | None = None,
    images: Sequence[int] | None = None,
) -> list[list[int]]:
    """Packs of documents, each a list of their indices, every index once; the fewer the better, within the limits.

    20,000 documents take a fraction of a second. Packs come with the largest documents first: shuffle them, or deal
    them to ranks with `shard`; and plan shuffled chunks of a very large data set, since documents of like length meet
    in a pack.

    Args:
        lengths: (documents,) tokens of each.
        limits: what a pack holds.
        patches, images: (documents,) of each; needed where they are limited.

    Raises:
        ValueError: a document fits no pack by itself (cutting it is the caller's to decide), a size is negative, or the
            sequences do not go together; the message names it.
    """
    sizes = _sizes("plan", lengths, limits, patches, images)
    if not sizes:
        return []
    found, least = _first_fit(sizes, limits), _least(sizes, limits)
    full = [pack for pack in found if sum(sizes[at][0] for at in pack) == limits.tokens]
    rest = [pack for pack in found if sum(sizes[at][0] for at in pack) < limits.tokens]
    for opened in (0, len(rest), 2 * len(rest)):  # full packs that are packed again, too: the last, of small documents
        if len(found) == least or opened > len(full):
            break
        kept = full[: len(full) - opened]
        documents = [at for pack in (*full[len(full) - opened :], *rest) for at in pack]
        found = min(found, kept + _subset_sums(sizes, documents, limits), key=len)
    return found


def stream(
    documents: Iterable[Document],
    limits: Limits,
    size: Callable[[Document], int | tuple[int, ...]],
    *,
    buffer: int = 512,
) -> Iterator[list[Document]]:
    """Packs of an iterable, as they fill. The oldest of the last `buffer` documents opens a pack, so that none waits
    for ever, and subset sums fill it; packs hold documents in the order in which they came.

    Args:
        documents: the iterable, endless or not.
        limits: what a pack holds.
        size: of a document, its tokens, or (tokens, patches, images) as far as these are limited.
        buffer: documents that are held back; the more, the fuller the packs.

    Raises:
        ValueError: a document fits no pack, or buffer is less than 1.
    """
    if buffer < 1:
        raise ValueError(f"stream: buffer is {buffer}; it must be at least 1")
    held: list[tuple[tuple[int, ...], Document]] = []
    for number, document in enumerate(documents):
        own = size(document)
        sizes = _of_document("stream", number, (own,) if isinstance(own, int) else tuple(own), limits)
        held.append((sizes, document))
        if len(held) >= buffer:
            yield _taken(held, limits)
    while held:
        yield _taken(held, limits)


def shard(
    packs: Sequence[Sequence[int]],
    rank: int,
    world_size: int,
    *,
    cost: Callable[[Sequence[int]], float] = len,
    seed: int = 0,
) -> list[list[int]]:
    """The packs of one rank: as many on each, packs of one step alike in cost, and every document on one rank.

    Where packs are too few for a whole last round, those with the most documents are cut in two.

    Args:
        packs: as `plan` gives them, the same on all ranks.
        rank, world_size: of torch.distributed.
        cost: of a pack, such as tokens plus the sum of squared lengths over 4096; by default its documents.
        seed: of the order of the steps, the same on all ranks; another in each epoch.

    Raises:
        ValueError: rank is none of world_size, or packs of single documents cannot be dealt evenly.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"shard: rank is {rank} of world_size {world_size}; it must be from 0 to {world_size - 1}")
    dealt = _divisible([list(pack) for pack in packs], world_size)
    order = sorted(range(len(dealt)), key=lambda at: (-cost(dealt[at]), at))
    steps = [order[at : at + world_size] for at in range(0, len(order), world_size)]
    random.Random(seed).shuffle(steps)
    return [dealt[step[rank]] for step in steps]


def _divisible(packs: list[list[int]], by: int) -> list[list[int]]:
    while len(packs) % by:
        at = max(range(len(packs)), key=lambda at: (len(packs[at]), -at))
        pack = packs[at]
        if len(pack) < 2:
            raise ValueError(f"shard: {len(packs)} packs of one document each cannot be dealt evenly to {by} ranks")
        packs[at], rest = pack[: len(pack) // 2], pack[len(pack) // 2 :]
        packs.append(rest)
    return packs


# ---- sizes


def _sizes(name: str, lengths, limits: Limits, patches, images) -> list[tuple[int, ...]]:
    """Of each document, what is limited."""
    columns = [lengths]
    for label, limit, given in (("patches", limits.patches, patches), ("images", limits.images, images)):
        if limit is None:
            continue
        if given is None:
            raise ValueError(f"{name}: limits has {label}={limit}; give {label} too, a number for each document")
        if len(given) != len(lengths):
            raise ValueError(f"{name}: {label} has {len(given)} numbers for {len(lengths)} documents")
        columns.append(given)
    rows = zip(*([int(x) for x in column] for column in columns), strict=True)
    return [_of_document(name, number, row, limits) for number, row in enumerate(rows)]


def _of_document(name: str, number: int, sizes: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    if len(sizes) != len(limits.given):
        raise ValueError(f"{name}: document {number} has {len(sizes)} sizes for {len(limits.given)} limits: {limits}")
    if sizes[0] < 1 or min(sizes) < 0 or any(x > most for x, most in zip(sizes, limits.given, strict=True)):
        raise ValueError(f"{name}: document {number} has sizes {sizes}; a pack is {limits}")
    return sizes


def _least(sizes: list[tuple[int, ...]], limits: Limits) -> int:
    """No plan has fewer packs: by the sums, and by documents that exclude each other (Martello and Toth's L2)."""
    return max(_least_by(column, most) for column, most in zip(zip(*sizes, strict=True), limits.given, strict=True))


def _least_by(sizes: Sequence[int], most: int) -> int:
    ascending, sums = sorted(sizes), [0]
    for size in ascending:
        sums.append(sums[-1] + size)
    best = -(-sums[-1] // most)
    half = bisect.bisect_right(ascending, most // 2)  # from there on one to a pack
    for small in sorted({0, *ascending[:half]}):  # those that do not fit beside the largest are left out
        large = bisect.bisect_right(ascending, most - small)
        least = bisect.bisect_left(ascending, small)
        room = (large - half) * most - (sums[large] - sums[half])
        rest = -(-max(0, sums[half] - sums[least] - room) // most)
        best = max(best, len(ascending) - half + rest)
    return best


# ---- first fit decreasing


def _first_fit(sizes: list[tuple[int, ...]], limits: Limits) -> list[list[int]]:
    shares = [max(x / most for x, most in zip(own, limits.given, strict=True)) for own in sizes]
    order = sorted(range(len(sizes)), key=lambda at: (-shares[at], at))
    leaves = 1 << (len(order) - 1).bit_length()
    trees = [[most] * (2 * leaves) for most in limits.given]  # the most room below a node, of each limit
    packs: list[list[int]] = []
    for at in order:
        pack = _first_with_room(trees, leaves, sizes[at])
        if pack == len(packs):
            packs.append([])
        packs[pack].append(at)
        for tree, size in zip(trees, sizes[at], strict=True):
            _take_room(tree, pack + leaves, size)
    return packs


def _first_with_room(trees: list[list[int]], leaves: int, size: tuple[int, ...]) -> int:
    if len(trees) == 1:
        tree, tokens, node = trees[0], size[0], 1
        while node < leaves:
            node = 2 * node if tree[2 * node] >= tokens else 2 * node + 1
        return node - leaves
    waiting = [1]  # with several limits a node's rooms may be of different packs: look, and come back
    while True:
        node = waiting.pop()
        if any(tree[node] < x for tree, x in zip(trees, size, strict=True)):
            continue
        if node >= leaves:
            return node - leaves
        waiting += [2 * node + 1, 2 * node]


def _take_room(tree: list[int], node: int, size: int) -> None:
    tree[node] -= size
    while node > 1:
        node //= 2
        most = max(tree[2 * node], tree[2 * node + 1])
        if tree[node] == most:
            return
        tree[node] = most


# ---- subset sums


class _ByLength:
    """Documents that wait, by their tokens; of equal ones those with the least of the other sizes first."""

    def __init__(self, sizes: list[tuple[int, ...]], order: Iterable[int]) -> None:
        self.sizes, self.waiting = sizes, {}
        for at in order:
            self.waiting.setdefault(sizes[at][0], []).append(at)
        self.lengths = sorted(self.waiting)

    def take(self, length: int, room: list[int]) -> int | None:
        """One of this length that fits into the room, of which it takes its part."""
        waiting = self.waiting[length]
        for place in range(len(waiting) - 1, -1, -1):
            size = self.sizes[waiting[place]]
            if all(x <= left for x, left in zip(size, room, strict=True)):
                room[:] = [left - x for x, left in zip(size, room, strict=True)]
                at = waiting.pop(place)
                if not waiting:
                    self.lengths.remove(length)
                return at
        return None

    def fill(self, room: list[int]) -> list[int]:
        """Those whose tokens sum up highest within the room, larger ones first, so that small ones are left for later
        packs."""
        whole, sums, steps = (1 << room[0] + 1) - 1, 1, []
        for length in reversed(self.lengths[: bisect.bisect_right(self.lengths, room[0])]):
            count, part = min(len(self.waiting[length]), room[0] // length), 1
            while count > 0:  # 0 to count of them, by powers of two
                taken = min(part, count)
                more = (sums | sums << length * taken) & whole
                if more != sums:
                    steps.append((length, taken, sums))
                    sums = more
                count, part = count - taken, 2 * part
            if sums >> room[0] & 1:
                break
        total, members = sums.bit_length() - 1, []
        for length, taken, before in reversed(steps):
            if not before >> total & 1:
                total -= length * taken
                members += [self.take(length, room) for _ in range(taken)]
        return [at for at in members if at is not None]


def _subset_sums(sizes: list[tuple[int, ...]], documents: list[int], limits: Limits) -> list[list[int]]:
    order = sorted(documents, key=lambda at: (sizes[at][1:], at), reverse=True)
    waiting, packs = _ByLength(sizes, order), []
    while waiting.lengths:
        room = list(limits.given)
        packs.append([waiting.take(waiting.lengths[-1], room), *waiting.fill(room)])
    return packs


def _taken(held: list[tuple[tuple[int, ...], Document]], limits: Limits) -> list[Document]:
    """The oldest and those that fill its pack; no longer held."""
    sizes = [size for size, _ in held]
    room = [most - x for x, most in zip(sizes[0], limits.given, strict=True)]
    others = _ByLength(sizes, range(len(held) - 1, 0, -1))  # the oldest of a length last, which is taken first
    chosen = {0, *others.fill(room)}
    pack = [document for at, (_, document) in enumerate(held) if at in chosen]
    held[:] = [x for at, x in enumerate(held) if at not in chosen]
    return pack
