"""The contrastive losses over the images and texts of all ranks of a group. Imports torch only.

Rank r owns the rows of its images, and all ranks' texts come to it. With W ranks of n_r images and m_r texts, N and M
of them in all, and of each rank's rows only:

    CLIP     1 statistics of the n_r x M rectangle: complete for its rows, partial for the columns
             2 all_reduce of the columns' statistics: MAX, then SUM of what is rescaled to it
             3 gradients of the rectangle: dI_r complete, dT partial, and returned to the ranks of the texts
    SigLIP   step 3 alone

The texts come in pieces, each a K-th of every rank's, as soon as all of them at a time would take more than
GATHERED_BYTES with their gradients. CLIP then gathers them twice; SigLIP once, as before, and so in up to FREE_PIECES
earlier. Work a rank: CLIP 8 n_r M D operations, SigLIP 6.
Bytes that a rank hands on: (W - 1) m_r D (b + w), b a feature's and w = 4 or 8 a gradient's, and b more for CLIP in
pieces; 24 M (W - 1) / W for the statistics of columns; ids and scalars.

The loss is the mean over all ranks' pairs, on every rank. "mean" hands each rank W times its part of the gradient, for
a training loop that averages the ranks' gradients afterwards (DDP, FSDP); "sum" its part, for one that adds them up.
The gradients of the scalars are those of the loss, the same on every rank: right after a mean, and where nothing
averages them. What comes to backward must be the same on all ranks, as it is where all scale the loss alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ... import backends
from .. import _checks
from .._comm import Comm, resolve
from .pairing import DIRECTIONS, SAME, Pairing, Shares, label
from .smoothing import FeatureSums
from .weights import no_statistics, weigh

REDUCES = ("mean", "sum")
GATHERED_BYTES = 2**30  # of texts and their gradients at a time
FREE_PIECES, FREE_BYTES = 4, 2**26  # so many at most, of so many bytes, where pieces cost nothing but their start

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HEADER = (
    "the length of the features",
    "the dtype of the features",
    "same",
    "direction",
    "reduce",
    "label_smoothing",
    "backend",
    "local_loss",
    "whether ids are given",
    "whether gradients are wanted",
)


def arguments(
    op: str, group: object, reduce: str, sizes: object, local: bool, image: object, own: Callable[[], tuple]
) -> tuple:
    """What a registered op across ranks takes: the loss's own arguments, checked, and those of the group.

    A problem of this rank alone is raised on all of them, if they compare their arguments at all.
    """
    process_group = resolve(op, group)
    try:
        _checks.one_of(op, "reduce", reduce, REDUCES)
        words, call = _in_words(op, sizes, process_group.size()), own()
        if not torch.compiler.is_compiling():  # what cannot be served is refused before anyone waits for it
            backends.select("contrastive", call[-1], call[0], call[1])
        return *call, process_group.group_name, reduce, words, local
    except (TypeError, ValueError, backends.BackendUnavailable) as problem:
        device = image.device if isinstance(image, Tensor) else torch.device("cpu")
        if exchanges_sizes("" if sizes is None else "exchange" if sizes == "exchange" else "given", device):
            Comm(op, process_group).agree(dict.fromkeys(_HEADER, 0), (0, 0), problem, device)
        raise


def _in_words(op: str, sizes: object, ranks: int) -> str:
    """As text, which a registered op takes: "n m,n m"."""
    if sizes is None or isinstance(sizes, str):
        if sizes not in (None, "exchange"):
            raise ValueError(f"{op}: sizes is {sizes!r}; accepted are None, 'exchange' and a number for each rank")
        return sizes or ""
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    if len(pairs) != ranks or not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        raise ValueError(
            f"{op}: sizes is {sizes}; it must hold a positive number, of images and of texts alike, or a pair of them, "
            f"for each of the {ranks} ranks"
        )
    return ",".join(f"{images} {texts}" for images, texts in pairs)


def exchanges_sizes(sizes: str, device: torch.device) -> bool:
    """Whether the ranks compare their arguments: what that costs on a GPU is a wait for the device."""
    return sizes == "exchange" or (sizes == "" and device.type == "cpu")


@dataclass(frozen=True)
class Options:
    same: str
    direction: str
    label_smoothing: float
    backend: str
    group: str
    reduce: str
    sizes: str  # "": as many as here, "exchange": asked for, else numbers of images and of texts, "n m,n m"
    local: bool = False  # the value is that of this rank's rows and columns, as open_clip's local_loss has it


@dataclass(frozen=True)
class Piece:
    """A K-th of every rank's texts."""

    cuts: list[slice]  # of each rank's
    pairing: Pairing
    text_counts: Tensor  # of how many positives

    @property
    def sizes(self) -> list[int]:
        return [cut.stop - cut.start for cut in self.cuts]


def count_pieces(op: str, texts: int, width: int, most_of_a_rank: int, dtype: torch.dtype) -> int:
    """In how many the texts of all ranks come."""
    needed = texts * width * (dtype.itemsize + 2 * torch.promote_types(dtype, torch.float32).itemsize)
    count = -(-needed // GATHERED_BYTES)
    if op == "siglip_loss":
        count = max(count, min(-(-needed // FREE_BYTES), FREE_PIECES))
    return min(count, most_of_a_rank)


class Problem:
    """What the ranks have to do with each other in one call."""

    def __init__(
        self,
        op: str,
        image: Tensor,
        text: Tensor,
        ids: tuple[Tensor | None, Tensor | None],
        options: Options,
        with_grads: bool,
    ) -> None:
        self.options, self.image, self.text = options, image, text
        self.comm = Comm(op, dist.distributed_c10d._resolve_process_group(options.group))  # as torch's own collectives
        has_ids = ids[0] is not None
        self.images, self.texts = self._sizes(has_ids, with_grads)
        self.num_images, self.num_texts = sum(self.images), sum(self.texts)
        self.kernels = backends.select("contrastive", options.backend, image, text)
        self.labels, self.counts = None, self._counts_of_pairs()
        if has_ids:
            gathered = (self.comm.all_gather(*x, "ids") for x in zip(ids, (self.images, self.texts), strict=True))
            self.labels, counts = label(*gathered)
            self.counts = counts if self.by_ids else self.counts
        self.pieces = self._pieces()
        self._kept: Tensor | None = None

    @property
    def by_ids(self) -> bool:
        return self.labels is not None and self.options.same == "positives"

    @property
    def own_images(self) -> slice:
        return self._rows_of(self.images, self.comm.rank)

    @property
    def own_texts(self) -> slice:
        return self._rows_of(self.texts, self.comm.rank)

    def shares(self) -> Shares:
        if self.by_ids:
            counted = ((x > 0).sum(dtype=torch.float64).clamp(min=1) for x in self.counts)
            return Shares.of_counts(*counted, self.options.direction)
        paired = sum(map(min, self.images, self.texts))
        return Shares.of_counts(paired, paired, self.options.direction)

    def gathered(self) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its texts, while those of the next are on their way. A single piece is kept."""
        if self._kept is not None:
            yield self.pieces[0], self._kept
            return
        rank = self.comm.rank
        waiting = None
        for piece, following in zip(self.pieces, (*self.pieces[1:], None), strict=True):
            waiting = waiting or self.comm.start_all_gather(self.text[piece.cuts[rank]], piece.sizes, "texts")
            texts, waiting = waiting(), None
            if following is not None:
                part = self.text[following.cuts[rank]]
                waiting = self.comm.start_all_gather(part, following.sizes, "texts")
            self._kept = texts if len(self.pieces) == 1 else None
            yield piece, texts

    def gradients(self, rectangle: Callable[[Piece, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Of this rank's features, of those of all pieces: rectangle(piece, texts) gives what one of them adds. The
        gradients of a piece's texts return while the next is computed. Handed on as the training loop wants them."""
        d_image, parts, returning = None, [], None
        for piece, texts in self.gathered():
            part, d_texts = rectangle(piece, texts)
            d_image = part if d_image is None else d_image.add_(part)
            if returning is not None:
                parts.append(returning())
            returning = self.comm.start_sum_of_rows(d_texts, piece.sizes, "gradients of texts")
        return d_image, torch.cat([*parts, returning()])

    def split(self, columns: Tensor, dim: int) -> tuple[Tensor, ...]:
        """What is put together of all pieces, piece by piece."""
        return columns.split([len(piece.text_counts) for piece in self.pieces], dim)

    def own_columns(self, k: int) -> slice:
        """This rank's, among those of piece k."""
        return self._rows_of(self.pieces[k].sizes, self.comm.rank)

    def handed_on(self, *gradients: Tensor) -> tuple[Tensor, ...]:
        """As the training loop wants them."""
        return tuple(x.mul_(self.comm.size) if self.options.reduce == "mean" else x for x in gradients)

    def _sizes(self, has_ids: bool, with_grads: bool) -> tuple[list[int], list[int]]:
        here, options = (len(self.image), len(self.text)), self.options
        if exchanges_sizes(options.sizes, self.image.device):
            sizes = self.comm.agree(self._header(has_ids, with_grads), here, None, self.image.device)
        else:
            sizes = [tuple(map(int, part.split())) for part in options.sizes.split(",") if part]
            sizes = sizes or [here] * self.comm.size
        if tuple(sizes[self.comm.rank]) != here:
            raise ValueError(
                f"{self.comm.op}: sizes says that rank {self.comm.rank} has {sizes[self.comm.rank]} images and texts; "
                f"it has {here}"
            )
        images, texts = map(list, zip(*sizes, strict=True))
        return images, texts

    def _header(self, has_ids: bool, with_grads: bool) -> dict[str, int]:
        options = self.options
        words = SAME.index(options.same), DIRECTIONS.index(options.direction), REDUCES.index(options.reduce)
        numbers = (zlib.crc32(repr(x).encode()) for x in (options.label_smoothing, options.backend))
        features = self.image.shape[1], _DTYPES.index(self.image.dtype)
        return dict(zip(_HEADER, (*features, *words, *numbers, options.local, has_ids, with_grads), strict=True))

    def _counts_of_pairs(self) -> tuple[Tensor, Tensor]:
        """Of all images and all texts, how many positives each has where no ids say it: one, if its rank has both."""
        paired = list(map(min, self.images, self.texts))
        device = self.image.device
        return tuple(
            torch.cat([torch.arange(size, device=device) < count for size, count in zip(sizes, paired, strict=True)])
            for sizes in (self.images, self.texts)
        )

    def _pieces(self) -> list[Piece]:
        size = self.num_texts, self.text.shape[1]
        count = count_pieces(self.comm.op, *size, max(self.texts), self.text.dtype)
        return [self._piece(k, count) for k in range(count)]

    def _piece(self, k: int, count: int) -> Piece:
        rank = self.comm.rank
        cuts = [slice(size * k // count, size * (k + 1) // count) for size in self.texts]
        starts = [self._rows_of(self.texts, r).start for r in range(self.comm.size)]
        columns = [slice(start + cut.start, start + cut.stop) for start, cut in zip(starts, cuts, strict=True)]
        offset = sum(cut.stop - cut.start for cut in cuts[:rank]) - cuts[rank].start
        paired = min(len(self.image), len(self.text))
        own = offset, min(cuts[rank].start, paired), min(cuts[rank].stop, paired)
        text_counts = torch.cat([self.counts[1][part] for part in columns])
        if self.labels is None:
            return Piece(cuts, Pairing(*own), text_counts)
        labels = self.labels[0][self.own_images], torch.cat([self.labels[1][part] for part in columns])
        counts = (self.counts[0][self.own_images], text_counts) if self.by_ids else (None, None)
        return Piece(cuts, Pairing(*own, self.options.same, *labels, *counts), text_counts)

    @staticmethod
    def _rows_of(sizes: list[int], rank: int) -> slice:
        start = sum(sizes[:rank])
        return slice(start, start + sizes[rank])


def clip_loss(image, text, scale, image_ids, text_ids, options: Options, with_grads: bool) -> tuple[Tensor, ...]:
    """The loss; and `with_grads` its gradients by image, text and scale."""
    problem = Problem("clip_loss", image, text, (image_ids, text_ids), options, with_grads)
    shares, smoothing = problem.shares(), options.label_smoothing
    rows, columns = _statistics(problem, scale)
    image_counts = problem.counts[0][problem.own_images]
    row_losses, row_weights = weigh(rows, image_counts, scale, shares.row, smoothing)
    text_counts = torch.cat([piece.text_counts for piece in problem.pieces])
    column_losses, column_weights = weigh(columns, text_counts, scale, shares.column, smoothing)
    if options.local:
        own = torch.cat([x[problem.own_columns(k)] for k, x in enumerate(problem.split(column_losses, 0))])
        loss = (row_losses.sum() / len(image) + own.sum() / len(text)) * problem.num_images / shares.count
    else:
        loss = problem.comm.all_reduce(row_losses.sum(), "the losses of images") + column_losses.sum()
        loss = loss / shares.count
    sums = _feature_sums(problem) if smoothing else None
    if sums is not None:
        loss = loss - sums.loss(scale, shares, smoothing, problem.num_images, problem.num_texts)
    loss = loss.to(torch.promote_types(image.dtype, torch.float32))
    if not with_grads:
        return (loss,)

    weights = iter(problem.split(column_weights, 1))
    d_scale = loss.new_zeros((), dtype=torch.float64)

    def rectangle(piece: Piece, texts: Tensor) -> tuple[Tensor, Tensor]:
        call = image, texts, scale, piece.pairing, row_weights, next(weights).contiguous(), shares.count
        d_image, d_texts, part = problem.kernels.clip_gradients(*call)
        d_scale.add_(part)
        return d_image, d_texts

    d_image, d_text = problem.gradients(rectangle)
    problem.comm.all_reduce(d_scale, "the gradient of logit_scale")
    if sums is not None:
        counted = image_counts > 0, problem.counts[1][problem.own_texts] > 0
        sizes = problem.num_images, problem.num_texts
        d_scale -= sums.take_off(scale, shares, smoothing, sizes, counted, d_image, d_text)
    return loss, *problem.handed_on(d_image, d_text), _like(scale, d_scale)


def siglip_loss(image, text, scale, bias, image_ids, text_ids, options: Options, with_grads: bool):
    """The loss; and `with_grads` its gradients by image, text, scale and bias."""
    problem = Problem("siglip_loss", image, text, (image_ids, text_ids), options, with_grads)
    kernels, count = problem.kernels, problem.num_images
    totals = torch.zeros(3, dtype=torch.float64, device=image.device)  # loss, d_scale, d_bias
    if not with_grads:
        for piece, texts in problem.gathered():
            totals[0] += kernels.siglip_loss(image, texts, scale, bias, piece.pairing, count)
        return (_siglip_value(problem, totals),)

    def rectangle(piece: Piece, texts: Tensor) -> tuple[Tensor, Tensor]:
        call = image, texts, scale, bias, piece.pairing, count
        loss, d_image, d_texts, *scalars = kernels.siglip_loss_with_grads(*call)
        totals.add_(torch.stack([x.double().reshape(()) for x in (loss, *scalars)]))
        return d_image, d_texts

    gradients = problem.handed_on(*problem.gradients(rectangle))
    loss = _siglip_value(problem, totals)
    _, d_scale, d_bias = totals
    return loss, *gradients, _like(scale, d_scale), _like(bias, d_bias)


def _siglip_value(problem: Problem, totals: Tensor) -> Tensor:
    """The loss; adds up the totals of all ranks."""
    own = totals[0] * problem.num_images / len(problem.image)
    problem.comm.all_reduce(totals, "the losses")
    loss = own if problem.options.local else totals[0].clone()
    return loss.to(torch.promote_types(problem.image.dtype, torch.float32))


def _statistics(problem: Problem, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of this rank's images, and of all texts, piece by piece."""
    image, comm, of_pieces = problem.image, problem.comm, []
    rows = no_statistics(len(image), image)
    for piece, texts in problem.gathered():
        columns = no_statistics(len(texts), texts)
        problem.kernels.clip_statistics(image, texts, scale, piece.pairing, rows, columns)
        of_pieces.append(columns)
    columns = torch.cat(of_pieces, 1)
    maximum = comm.all_reduce(columns[0].clone(), "statistics", maximum=True)
    columns[1] *= (scale.detach().abs().to(columns.dtype).reshape(()) * (columns[0] - maximum)).exp()
    comm.all_reduce(columns[1:], "statistics")
    columns[0] = maximum
    return rows, columns


def _feature_sums(problem: Problem) -> FeatureSums:
    features = problem.image, problem.text
    rows = problem.own_images, problem.own_texts
    counted = [x.where(counts[own, None] > 0, 0) for x, counts, own in zip(features, problem.counts, rows, strict=True)]
    sums = torch.stack([x.sum(0, dtype=torch.float64) for x in (*features, *counted)])
    return FeatureSums(*problem.comm.all_reduce(sums, "sums of features"))


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A tensor of its own: torch.compile takes no part of another for what an op returns."""
    return value.to(torch.promote_types(parameter.dtype, torch.float32), copy=True).reshape(parameter.shape)
