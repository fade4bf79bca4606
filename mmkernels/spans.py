"""Row spans: which keys each query of an attention call sees.

In packed documents, causal text, bidirectional images inside it, sliding windows, prefix language models,
cross-attention to the last image, and one-row decoding alike, a query i sees one contiguous run of keys,
lo[i] <= j < hi[i]. Two int32 numbers a query say it all: O(T) memory, made on the device without waiting for it,
changed from batch to batch without a recompile. Layouts with gaps take several runs a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _layouts
from ._flashmask import FlashMask, flash_mask
from ._intervals import intervals

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

HULL_ROWS = 32  # queries that share an entry of `RowSpans.hulls`


class Documents(NamedTuple):
    """Spans that are documents laid one after the other, in the words of `RowSpans.packed`: what flash-attn asks for.

    cu_seqlens and cu_seqlens_k are int32 (documents + 1,); a token after the last document is padding. cu_seqlens_k is
    None where the keys are the queries, since a compiled function takes no tensor twice.
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor | None
    causal: bool = False
    window: int | None = None

    @property
    def key_offsets(self) -> Tensor:
        return self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k

    def to(self, device: torch.device | str) -> Documents:
        keys = None if self.cu_seqlens_k is None else self.cu_seqlens_k.to(device)
        return Documents(self.cu_seqlens.to(device), keys, self.causal, self.window)

    def unseen_keys(self, num_keys: int) -> Tensor:
        """(num_keys,) bool: the keys that no query sees."""
        back = None if self.window is None else self.window - 1
        return _layouts.unseen_keys(self.cu_seqlens, self.key_offsets, num_keys, back)


class RowSpans:
    """The runs of keys that each query sees: query i sees key j if lo[r, i] <= j < hi[r, i] for one of the runs r.

    Of the layouts that models use, the builders make them: `full`, `packed`, `image_text`, `prefix_lm`, `media`; and
    `from_dense` takes any mask. All but the last run on the device of their tensors without waiting for it and compile
    whole, once for all lengths. Sizes that only the values of a tensor tell are therefore ints that the caller gives
    (num_queries = q.shape[0], num_keys = k.shape[0]); they may be left out where the tensor is on the CPU.

    The builders describe documents by cu_seqlens (documents + 1,), int32 or int64: document d is tokens cu_seqlens[d]
    to cu_seqlens[d + 1] - 1. It begins with 0 and never falls, which is not checked: that would wait for the device.
    Documents may be empty. Queries after the last document are padding and see nothing; no query sees keys after it.

    Args:
        lo, hi: int32 tensors on one device, of shape (num_queries,), (runs, num_queries), or, for tensors with a batch
            axis, (batch, runs, num_queries). The runs of a query are disjoint and ascending; a run with lo >= hi is
            empty, and a query whose runs are all empty sees nothing. Values beyond [0, num_keys] count as the nearer
            end. Neither is checked, since that would wait for the device; kernels read nothing out of bounds.
        num_keys: number of keys (of one row of the batch, where there is a batch axis).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
    """

    def __init__(self, lo: Tensor, hi: Tensor, num_keys: int):
        for name, value in (("lo", lo), ("hi", hi)):
            if not isinstance(value, Tensor):
                raise TypeError(f"RowSpans: {name} must be a torch.Tensor, got {type(value).__name__}")
            if value.dtype != torch.int32:
                raise TypeError(f"RowSpans: {name} has dtype {value.dtype}; it must be torch.int32")
        if lo.shape != hi.shape or not 1 <= lo.dim() <= 3 or (lo.dim() > 1 and lo.shape[-2] == 0):
            raise ValueError(
                f"RowSpans: lo has shape {tuple(lo.shape)}, hi {tuple(hi.shape)}; they must be equal, (num_queries,), "
                "(runs, num_queries) or (batch, runs, num_queries) with at least one run"
            )
        if lo.device != hi.device:
            raise ValueError(f"RowSpans: lo is on {lo.device}, hi on {hi.device}; move one to the other's")
        if num_keys < 0:
            raise ValueError(f"RowSpans: num_keys is {num_keys}; it must be at least 0")
        self.lo, self.hi, self.num_keys = lo, hi, num_keys
        self._hulls: tuple[_Written, Tensor] | None = None
        self._views: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None
        self._documents: Documents | None = None
        self._full = False  # one document of all queries and keys, whose offsets are made when they are asked for
        self._built = self._written()  # lo and hi as a builder left them

    @property
    def num_queries(self) -> int:
        return self.lo.shape[-1]

    @property
    def runs(self) -> int:
        return self.lo.shape[-2] if self.lo.dim() > 1 else 1

    @property
    def batch(self) -> int | None:
        """Length of the batch axis; None for spans that have none."""
        return self.lo.shape[0] if self.lo.dim() == 3 else None

    @property
    def device(self) -> torch.device:
        return self.lo.device

    def __repr__(self) -> str:
        return (
            f"RowSpans(num_queries={self.num_queries}, num_keys={self.num_keys}, runs={self.runs}, "
            f"batch={self.batch}, device={self.device})"
        )

    def to(self, device: torch.device | str) -> RowSpans:
        """The same spans on another device; these themselves if they are there already."""
        lo = self.lo.to(device)
        if lo is self.lo:
            return self
        return self.held_by(lo, self.hi.to(device))

    def held_by(self, lo: Tensor, hi: Tensor) -> RowSpans:
        """The same spans in other tensors of the same values."""
        spans, documents = RowSpans(lo, hi, self.num_keys), self.documents()
        spans._documents = None if documents is None else documents.to(lo.device)
        return spans

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_documents": self.documents(), "_full": False, "_hulls": None, "_views": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._built = self._written()

    @classmethod
    def full(cls, num_queries: int, num_keys: int, *, device: torch.device | str | None = None) -> RowSpans:
        """Every query sees every key."""
        for label, size in (("num_queries", num_queries), ("num_keys", num_keys)):
            _check_size("RowSpans.full", label, size)
        lo = torch.zeros(num_queries, dtype=torch.int32, device=device)
        spans = cls(lo, torch.full_like(lo, num_keys), num_keys)
        spans._full = True
        return spans

    @classmethod
    def packed(
        cls,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor | None = None,
        *,
        num_queries: int | None = None,
        num_keys: int | None = None,
        causal: bool = False,
        window: int | None = None,
    ) -> RowSpans:
        """Documents laid one after the other, each of which sees itself only: the layout of flash-attn's varlen calls.

        The spans remember the documents, so that the backend "flash-attn" can serve them; a map over a pytree, which
        rebuilds spans from lo and hi, forgets them, `to` does not.

        Args:
            cu_seqlens: where each document's queries start, (documents + 1,).
            cu_seqlens_k: where its keys do, if they are not its queries; of the same shape.
            num_queries, num_keys: tokens in all, padding included. num_keys is num_queries where the keys are the
                queries. None: cu_seqlens[-1] and cu_seqlens_k[-1], which must then be on the CPU.
            causal: queries do not see what follows them. The last query of a document stands at its last key
                (bottom-right alignment, as in flash-attn), so that of 2 queries and 5 keys the first sees 4; queries
                before the first key see nothing.
            window: keys that a causal query sees at most, itself included: sliding-window attention (Mistral 7B,
                https://arxiv.org/abs/2310.06825).

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device, a size is missing, or a
                window is given without causal; the message names it.
        """
        name = "RowSpans.packed"
        cu_seqlens = _offsets(name, "cu_seqlens", cu_seqlens)
        if window is not None:
            _check_window(name, window)
            if not causal:
                raise ValueError(f"{name}: window is {window} and causal False; a window counts keys back: set causal")
        num_queries = _size(name, "num_queries", num_queries, "cu_seqlens", cu_seqlens, _last)
        if cu_seqlens_k is not None:
            cu_seqlens_k = _offsets(name, "cu_seqlens_k", cu_seqlens_k)
            _check_beside(name, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), "cu_seqlens", cu_seqlens)
        elif num_keys is None:
            num_keys = num_queries
        keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        num_keys = _size(name, "num_keys", num_keys, "cu_seqlens_k", keys, _last)
        spans = cls(*_layouts.packed(cu_seqlens, cu_seqlens_k, num_queries, causal, window), num_keys)
        # Copies: lo and hi stay what they are when the caller writes the next batch's offsets into the same tensor.
        own_keys = None if cu_seqlens_k is None else cu_seqlens_k.clone()
        spans._documents = Documents(cu_seqlens.clone(), own_keys, causal, window)
        return spans

    @classmethod
    def image_text(
        cls, cu_seqlens: Tensor, image_id: Tensor, *, window: int | None = None, window_rule: str = "clamp"
    ) -> RowSpans:
        """Packed documents, causal but for their images, whose tokens see each other both ways (Gemma 3,
        https://arxiv.org/abs/2503.19786).

        Args:
            cu_seqlens: where each document starts, (documents + 1,).
            image_id: (tokens,) int32 or int64, -1 for text, else the number of an image. Neighbours in a document
                that have the same number are one image; the same number further on is another image.
            window: keys back, the query included, of a sliding-window layer.
            window_rule: what it cuts. "clamp": all, so that late tokens of a long image do not see its early ones (the
                sliding layers of Gemma 3 in transformers). "union": only the causal part, an image sees the whole of
                itself (FlashInfer's bidirectional ranges, PaliGemma 2's sliding layers).

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device; the message names it.
        """
        name = "RowSpans.image_text"
        cu_seqlens = _offsets(name, "cu_seqlens", cu_seqlens)
        image_id = _integers(name, "image_id", image_id)
        _check_beside(name, "image_id", image_id, None, "cu_seqlens", cu_seqlens)
        if window is not None:
            _check_window(name, window)
        _check_choice(name, "window_rule", window_rule, ("clamp", "union"))
        return cls(*_layouts.image_text(cu_seqlens, image_id, window, window_rule), image_id.shape[0])

    @classmethod
    def prefix_lm(cls, cu_seqlens: Tensor, prefix_lengths: Tensor, *, num_queries: int | None = None) -> RowSpans:
        """Packed documents, causal but for their beginnings, whose tokens see each other both ways: image and prompt
        of PaliGemma (https://arxiv.org/abs/2407.07726).

        Args:
            cu_seqlens: where each document starts, (documents + 1,).
            prefix_lengths: (documents,) int32 or int64, tokens of each document's beginning; more than it has: all.
            num_queries: tokens in all, padding included. None: cu_seqlens[-1], which must then be on the CPU.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device, or num_queries is missing;
                the message names it.
        """
        name = "RowSpans.prefix_lm"
        cu_seqlens = _offsets(name, "cu_seqlens", cu_seqlens)
        prefix_lengths = _integers(name, "prefix_lengths", prefix_lengths)
        _check_beside(name, "prefix_lengths", prefix_lengths, (cu_seqlens.shape[0] - 1,), "cu_seqlens", cu_seqlens)
        num_queries = _size(name, "num_queries", num_queries, "cu_seqlens", cu_seqlens, _last)
        return cls(*_layouts.prefix_lm(cu_seqlens, prefix_lengths, num_queries), num_queries)

    @classmethod
    def media(
        cls,
        media_locations: Tensor,
        tokens_per_image: int | Tensor,
        *,
        num_keys: int | None = None,
        cu_seqlens: Tensor | None = None,
        attend: str = "immediate",
        empty_rows: str = "none",
    ) -> RowSpans:
        """Cross-attention from text to the images in it: a token sees images that stand before it, or at it.

        The keys are the tokens of all images, in the order of the images in the text.

        Args:
            media_locations: bool, True where the text has an image: (tokens,), or for tensors with a batch axis
                (batch, tokens), where the keys count within a row.
            tokens_per_image: keys of an image: an int, or if they differ, int32 or int64 (images,), or with a batch
                axis (batch, images). 0 for an image without any; a location beyond the last image shows nothing.
            num_keys: keys in all (of a row), padding included. None: those of the images, if the tensors are on the
                CPU.
            cu_seqlens: where each document starts, (documents + 1,): documents see their own images only.
            attend: "immediate": the last image (Flamingo, https://arxiv.org/abs/2204.14198; idefics); "previous": all
                so far (Flamingo without only_attend_immediate_media); "group": the last image and those that stand
                directly before it, with no token between them (Llama 3.2 Vision, https://arxiv.org/abs/2407.21783).
            empty_rows: what a token sees that would see no key: "none", or "all" the keys, with cu_seqlens those of its
                document's images (transformers' mllama).

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, dtype, shape or device, or num_keys is missing; the
                message names it.
        """
        name = "RowSpans.media"
        _check_media(name, media_locations, tokens_per_image)
        if isinstance(tokens_per_image, Tensor):
            tokens_per_image = tokens_per_image.to(torch.int32)
        if cu_seqlens is not None:
            cu_seqlens = _offsets(name, "cu_seqlens", cu_seqlens)
            _check_beside(name, "cu_seqlens", cu_seqlens, None, "media_locations", media_locations)
            if media_locations.dim() == 2:
                raise ValueError(
                    f"{name}: cu_seqlens is given and media_locations has shape {tuple(media_locations.shape)}; "
                    "documents are packed into one row: it must be (tokens,)"
                )
        _check_choice(name, "attend", attend, ("immediate", "previous", "group"))
        _check_choice(name, "empty_rows", empty_rows, ("none", "all"))
        seen = media_locations.cumsum(-1, dtype=torch.int32)
        if isinstance(tokens_per_image, Tensor):
            keys = ("tokens_per_image", tokens_per_image, lambda x: x.sum(-1))
        else:
            keys = ("media_locations", seen, lambda x: x[..., -1:] * tokens_per_image)
        num_keys = _size(name, "num_keys", num_keys, *keys)
        lo, hi = _layouts.media(media_locations, seen, tokens_per_image, num_keys, cu_seqlens, attend, empty_rows)
        return cls(lo, hi, num_keys) if lo.dim() == 1 else cls(lo[:, None], hi[:, None], num_keys)

    @classmethod
    def from_dense(cls, mask: Tensor, *, max_runs: int | None = None) -> RowSpans:
        """The spans of a mask, as many runs as its rows need. Waits for the device.

        Args:
            mask: bool, True where a query sees a key: (num_queries, num_keys), or with a batch axis before.
            max_runs: most runs a row may have: more would be slower than the caller wants, or are a mistake.

        Raises:
            TypeError, ValueError: mask is of the wrong kind, dtype or shape, or has a row with more than max_runs runs;
                the message names the first such row.
        """
        name = "RowSpans.from_dense"
        _check_bool(name, "mask", mask, (2, 3), "(num_queries, num_keys) or (batch, num_queries, num_keys)")
        counts = _layouts.run_starts(mask).sum(-1)
        if max_runs is not None and (counts > max_runs).any():
            row = tuple((counts > max_runs).nonzero()[0].tolist())
            raise ValueError(
                f"{name}: row {', '.join(map(str, row))} of mask has {int(counts[row])} runs of keys; "
                f"max_runs is {max_runs}"
            )
        runs = max(1, int(counts.max())) if counts.numel() else 1
        return cls(*_layouts.runs_of(mask, runs), mask.shape[-1])

    def to_dense(self) -> Tensor:
        """The mask, bool, True where a query sees a key: (num_queries, num_keys), or with a batch axis before."""
        keys = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        lo, hi = (x if x.dim() > 1 else x[None] for x in (self.lo, self.hi))
        return ((lo[..., None] <= keys) & (keys < hi[..., None])).any(-3)

    def to_block_mask(self, block_size: int | tuple[int, int] = 128) -> BlockMask:
        """The mask for torch's `flex_attention` (https://arxiv.org/abs/2412.05496): what is seen, in its words.

        Made on the device of the spans without waiting for it, and without the mask itself; its `mask_mod` reads copies
        of lo and hi, of which later writes are not seen.

        Args:
            block_size: of queries and keys, one for both or (queries, keys); `flex_attention` is fastest with its own
                default.

        Returns:
            For any number of heads, and for every row of the batch, or with a batch axis for its rows.

        Raises:
            TypeError, ValueError: block_size is not of ints of at least 1.
            ValueError: there are no queries or no keys, of which FlexAttention knows no mask.
        """
        name = "RowSpans.to_block_mask"
        sizes = block_size if isinstance(block_size, tuple) else (block_size, block_size)
        for size in sizes:
            _check_size(name, "block_size", size)
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"{name}: block_size is {block_size}; it must be one int or two, of at least 1")
        if not self.num_queries or not self.num_keys:
            raise ValueError(f"{name}: there are {self.num_queries} queries and {self.num_keys} keys; none is no mask")
        from ._block_mask import block_mask  # whose import takes what most users never need

        return block_mask(*self.with_axes(), self.num_keys, sizes)

    def to_flashmask(self) -> FlashMask:
        """The mask for FlashMask (https://arxiv.org/abs/2410.01359), which says of each key the queries that do not see
        it: `flashmask_attention(q, k, v, **spans.to_flashmask()._asdict())`.

        Made without the mask itself, in O(queries x runs + keys) memory. Waits for the device.

        Returns:
            startend_row_indices, int32 (batch or 1, 1, num_keys, n), one for all heads, and causal, a bool: the first
            that can say these spans of the forms that PaddlePaddle documents
            (https://www.paddlepaddle.org.cn/documentation/docs/en/api/paddle/nn/functional/flashmask_attention_en.html).
            A key is hidden, if causal, from the queries before it; and by its n numbers from queries

            - n = 1, causal: [0] and later;
            - n = 2, causal: [0] to before [1];
            - n = 2, not causal: [0] and later, and those before [1];
            - n = 4, not causal: [0] to before [1], and [2] to before [3].

            Only spans of as many queries as keys are called causal: of others, FlashMask's versions refuse that word or
            align the last query to the last key. Not every version takes every form. For several rows that have one
            mask, expand the first axis.

        Raises:
            ValueError: a key is hidden from more than two runs of queries, which no form can say; the message names the
                key and the queries.
        """
        return flash_mask(*self.with_axes(), self.num_keys)

    def to_intervals(self) -> Tensor:
        """The mask for cuDNN's flex attention (https://docs.nvidia.com/cudnn/fe-oss-apis/attention/flex_attention), in
        which F, a query's numbers, show it the keys [0, F[0]), [F[1], F[2]), [F[3], F[4]) and so on:
        `cudnn.flex_attention.create_mask_plan(spans.to_intervals(), q, k, v)`.

        Made on the device of the spans without waiting for it.

        Returns:
            int32 (1, 2 * runs + 1, (batch or 1) * num_queries), contiguous, for any number of heads, the queries of a
            row of the batch beside each other. A query's numbers never fall and lie in 0 to num_keys. They count keys
            within a row of the batch: give q, k and v as (batch, tokens, heads, D), without cu_seqlens. For several
            rows that have one mask, repeat the last axis.
        """
        return intervals(*self.with_axes(), self.num_keys)

    def with_axes(self) -> tuple[Tensor, Tensor]:
        """lo and hi as (batch or 1, runs, num_queries), neighbouring queries next to each other. Views are kept, which
        see what is written; copies are not."""
        lo, hi = self.lo, self.hi
        if self._views is not None and self._views[0] is lo and self._views[1] is hi:
            return self._views[2]
        shape = (self.batch or 1, self.runs, self.num_queries)
        views = lo.contiguous().view(shape), hi.contiguous().view(shape)
        if lo.is_contiguous() and hi.is_contiguous() and _is_lasting(views[0]):
            self._views = lo, hi, views
        return views

    def documents(self) -> Documents | None:
        """The documents that these spans are, where `packed` or `full` made them; None where nobody said so, or lo or
        hi were written to since, as far as torch counts it: not of tensors made in inference mode."""
        if _differ(self._built, self._written()):
            return None
        if self._documents is None and self._full:
            one = torch.arange(2, dtype=torch.int32, device=self.device)
            documents = Documents(one * self.num_queries, one * self.num_keys)
            if not _is_lasting(one):
                return documents
            self._documents = documents
        return self._documents

    def hulls(self) -> Tensor:
        """What HULL_ROWS neighbouring queries have in common: int32 (batch or 1, runs, num_queries / HULL_ROWS up, 4).

        The four numbers are min lo, max hi over the queries that see anything (num_keys, 0 if none does): outside, no
        query sees a key; and max lo, min hi over all of them (with an empty query num_keys, 0): inside, every one does.
        Kernels that work by blocks of queries find in it what to skip and what needs no mask. Computed once and kept,
        until lo or hi are written to; where torch does not count what is written, at every call.
        """
        written = self._written()
        if written is not None and self._hulls is not None and self._hulls[0] == written:
            return self._hulls[1]
        hulls = self._make_hulls()
        if written is not None and _is_lasting(hulls):
            self._hulls = written, hulls
        return hulls

    def _written(self) -> _Written | None:
        """What changes when lo or hi do; None: nobody can tell. Of tensors made in inference mode torch does not count
        it, and where a CUDA graph is captured, every replay may find others."""
        if torch.compiler.is_compiling() or self.lo.is_inference() or self.hi.is_inference():
            return None
        if self.lo.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return id(self.lo), self.lo._version, id(self.hi), self.hi._version

    def _make_hulls(self) -> Tensor:
        blocks = -(-self.num_queries // HULL_ROWS)
        # The last block is filled up with the last query, which changes neither a minimum nor a maximum.
        rows = torch.arange(blocks * HULL_ROWS, device=self.device).clamp(max=self.num_queries - 1)
        shape = (self.batch or 1, self.runs, self.num_queries)
        lo, hi = (x.reshape(shape).clamp(0, self.num_keys).index_select(-1, rows) for x in (self.lo, self.hi))
        empty = lo >= hi
        lo, hi = lo.masked_fill(empty, self.num_keys), hi.masked_fill(empty, 0)
        (min_lo, max_lo), (min_hi, max_hi) = (x.unflatten(-1, (blocks, HULL_ROWS)).aminmax(dim=-1) for x in (lo, hi))
        return torch.stack([min_lo, max_hi, max_lo, min_hi], -1)


_Written = tuple[int, int, int, int]


def _is_lasting(x: Tensor) -> bool:
    """Not a tensor of a tracer or of a transform, which ends with it: of those nothing is kept."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return not torch._C._are_functorch_transforms_active()


def _differ(one: _Written | None, other: _Written | None) -> bool:
    return one is not None and other is not None and one != other


_LEAVES = ("lo", "hi", "num_keys")  # num_keys too: what is no leaf is a constant of an exported graph


def _flatten(spans: RowSpans) -> tuple[list[object], None]:
    return [getattr(spans, name) for name in _LEAVES], None


def _flatten_with_keys(spans: RowSpans) -> tuple[list[tuple[pytree.KeyEntry, object]], None]:
    return [(pytree.GetAttrKey(name), getattr(spans, name)) for name in _LEAVES], None


def _unflatten(leaves: Iterable[object], _: None) -> RowSpans:
    spans = RowSpans.__new__(RowSpans)  # unchecked: a map over a tree may put anything in the place of its leaves
    spans.lo, spans.hi, spans.num_keys = leaves
    spans._hulls = spans._views = spans._documents = spans._built = None
    spans._full = False
    return spans


# A node of pytrees, so that torch.export takes spans as inputs and a map over a batch reaches their tensors.
pytree.register_pytree_node(
    RowSpans,
    _flatten,
    _unflatten,
    serialized_type_name="mmkernels.RowSpans",
    flatten_with_keys_fn=_flatten_with_keys,
)


def _size(
    name: str, label: str, given: int | None, source: str, tensor: Tensor, total: Callable[[Tensor], Tensor]
) -> int:
    """The size that the caller gave; if none, what `tensor` says, where reading it neither waits nor breaks a graph."""
    if given is None:
        if tensor.device.type != "cpu":
            why = f"{source} is on {tensor.device}, and reading it would wait for the device"
        elif torch.compiler.is_compiling():
            why = f"a compiled function cannot read {source}"
        else:
            return int(total(tensor).max()) if tensor.numel() else 0
        tokens = "q" if label == "num_queries" else "k"
        raise ValueError(f"{name}: {label} is missing: {why}; give {label}={tokens}.shape[0]")
    _check_size(name, label, given)
    return given


def _last(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens[-1]


def _check_size(name: str, label: str, value: object) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: {label} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: {label} is {value}; it must be at least 0")


def _check_window(name: str, window: object) -> None:
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(f"{name}: window must be an int or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"{name}: window is {window}; it counts the query too and must be at least 1")


def _check_choice(name: str, label: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: {label} is {value!r}; accepted are {', '.join(map(repr, accepted))}")


def _integers(name: str, label: str, value: Tensor) -> Tensor:
    """`value` as int32, if it is a vector of integers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {label} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {label} has dtype {value.dtype}; accepted are int32, int64")
    if value.dim() != 1:
        raise ValueError(f"{name}: {label} has shape {tuple(value.shape)}; it must have one axis")
    return value.to(torch.int32)


def _offsets(name: str, label: str, value: Tensor) -> Tensor:
    value = _integers(name, label, value)
    if value.shape[0] == 0:
        raise ValueError(f"{name}: {label} is empty; it holds one number more than there are documents, the first 0")
    return value.contiguous()


def _check_beside(
    name: str, label: str, value: Tensor, shape: tuple[int, ...] | None, other_label: str, other: Tensor
) -> None:
    """`value` is on the device of `other` and, unless None, of `shape`, which follows from that of `other`."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: {label} is on {value.device}, {other_label} on {other.device}; move one to the other's"
        )
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(
            f"{name}: {label} has shape {tuple(value.shape)}, {other_label} {tuple(other.shape)}; "
            f"{label} must be {shape}"
        )


def _check_bool(name: str, label: str, value: Tensor, dims: tuple[int, ...], axes: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {label} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: {label} has dtype {value.dtype}; it must be torch.bool")
    if value.dim() not in dims:
        raise ValueError(f"{name}: {label} has shape {tuple(value.shape)}; it must be {axes}")


def _check_media(name: str, media_locations: Tensor, tokens_per_image: int | Tensor) -> None:
    _check_bool(name, "media_locations", media_locations, (1, 2), "(tokens,) or (batch, tokens)")
    label = "tokens_per_image"
    if not isinstance(tokens_per_image, Tensor):
        _check_size(name, label, tokens_per_image)
        return
    if tokens_per_image.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: {label} has dtype {tokens_per_image.dtype}; accepted are int32, int64")
    _check_beside(name, label, tokens_per_image, None, "media_locations", media_locations)
    if tokens_per_image.dim() != media_locations.dim() or tokens_per_image.shape[:-1] != media_locations.shape[:-1]:
        axes = "(images,)" if media_locations.dim() == 1 else f"({media_locations.shape[0]}, images)"
        raise ValueError(
            f"{name}: {label} has shape {tuple(tokens_per_image.shape)}, media_locations "
            f"{tuple(media_locations.shape)}; {label} must be an int or {axes}"
        )
