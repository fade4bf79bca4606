"""A processor's outputs of single documents -> one row of all of them, with its boundaries said. Imports torch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .dataset import weighed_by_tokens
from .families import FAMILIES, Family, RopeIndex, positions

Document = dict[str, Tensor]

IGNORED = -100  # the label of a token that nothing has to predict
_A_TOKEN_EACH = ("input_ids", "labels", "token_type_ids", "mm_token_type_ids")  # (1, L); 0 where a document has none
# (images, ...), or tiles, crops, patches: end to end, and what follows padded to the largest.
_AN_IMAGE_EACH = (
    "pixel_values", "pixel_mask", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes",
    "image_grids", "image_num_crops", "image_merge_sizes", "image_position_ids",
    "batch_num_images",  # how many a document has, which says whether they are cut into tiles
)  # fmt: skip
_PADDING = {"image_position_ids": -1}  # of what has another than 0
_A_ROW_OF_IMAGES = (
    "pixel_attention_mask",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "image_patches",
)  # (1, images, ...)
_TOKENS_BY_IMAGES = ("cross_attention_mask", "image_attention_mask")  # (1, L, images, ...)


@dataclass(frozen=True)
class Collator:
    """Collates documents, each as a processor gives it for one conversation, into a pack: a batch of one row.

    The boundaries are said by cu_seq_lens_q and cu_seq_lens_k, which attention reads in an accelerated model. Plain
    transformers does not: packs are for models after `mmkernels.accelerate(model)`. Positions begin anew in each
    document, and the label of its first token, which the token before it would have to predict, is -100. Padding that
    the processor added is cut off. An attention_mask is not handed on: there is nothing to hide.

    Args:
        family: `config.model_type` of the model.
        rope_index: of models that number tokens along several axes (Qwen2-VL and its kin).
        blank: a document with a picture, such as a black square behind an image token, which is added to packs that
            have none: with it every rank runs the vision tower in every step, as FSDP, and DDP with gradient
            checkpointing, need. Its labels do not count. None: packs are as they come.

    Raises:
        ValueError: family is none that packs, or needs a rope_index.
    """

    family: str
    rope_index: RopeIndex | None = None
    blank: Document | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise ValueError(f"Collator: family is {self.family!r}; those that are known to pack are {known}")
        if self._rules.mrope and self.rope_index is None:
            raise ValueError(
                f"Collator: {self.family} numbers tokens along three axes; give rope_index, or use .of(model)"
            )

    @classmethod
    def of(cls, model: nn.Module, *, blank: Document | None = None) -> Collator:
        """For a model of transformers; what is kept of it is its class and its config.

        Where transformers' Trainer would average over packs and not over tokens, since the model's class has
        `accepts_loss_kwargs = False`, the model's own is set to True, and a warning says so.
        """
        model = weighed_by_tokens(model)
        family = model.config.model_type
        mrope = family in FAMILIES and FAMILIES[family].mrope
        return cls(family, RopeIndex(model) if mrope else None, blank)

    def __call__(self, documents: Sequence[Document]) -> dict[str, Tensor | int]:
        """
        Args:
            documents: of one pack; or a list of one such list, as a DataLoader of a `PackedDataset` gives it.

        Raises:
            ValueError: there is no document, one has no input_ids of shape (1, L), or holds an input that is not known;
                or there are several packs.
        """
        documents = [_checked(document, number) for number, document in enumerate(_of_one_pack(documents))]
        if not documents:
            raise ValueError("Collator: there are no documents")
        if self.blank is not None and not any(_has_picture(document) for document in documents):
            documents.append(_without_labels(_checked(self.blank, "blank")))
        lengths = [document["input_ids"].shape[1] for document in documents]
        names = dict.fromkeys(name for document in documents for name in document)
        pack: dict[str, Tensor | int] = {name: self._joined(name, documents) for name in names}
        pack["labels"] = torch.cat([_labels(document) for document in documents], 1)
        numbered = [positions(document, self._rules, self.rope_index) for document in documents]
        pack["position_ids"] = torch.cat(numbered, -1)
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        return pack | {
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }

    @property
    def _rules(self) -> Family:
        return FAMILIES[self.family]

    def _joined(self, name: str, documents: list[Document]) -> Tensor:
        present = [document[name] for document in documents if name in document]
        if name in _A_TOKEN_EACH:
            return torch.cat([document.get(name, torch.zeros_like(document["input_ids"])) for document in documents], 1)
        if name in _TOKENS_BY_IMAGES:
            return _block_diagonal(name, documents)
        if name == "image_token_pooling":
            return _pooling(documents)
        if name in _A_ROW_OF_IMAGES or (name == "pixel_values" and self._rules.images_in_a_row):
            return torch.cat(_to_the_largest(present, 1), 1)
        if name in _AN_IMAGE_EACH:
            return torch.cat(_to_the_largest(present, 0, _PADDING.get(name, 0)))
        raise ValueError(
            f"Collator: {self.family} documents hold {name}, of shape {tuple(present[0].shape)}; how to pack it is not "
            "known"
        )


def _of_one_pack(documents: Sequence) -> Sequence[Document]:
    if not any(isinstance(document, list) for document in documents):
        return documents
    if len(documents) > 1:
        raise ValueError(
            f"Collator: {len(documents)} packs are given, and a batch is one; set batch_size=1 of the DataLoader, or "
            "per_device_train_batch_size=1 of the Trainer"
        )
    return documents[0]


def _checked(document: Document, number: int | str) -> Document:
    """Without what is padding, and without what says so."""
    ids = document.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        given = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"Collator: input_ids of document {number} are {given}; they must be of shape (1, tokens)")
    document = {name: x for name, x in document.items() if x is not None}
    mask = document.pop("attention_mask", None)
    if mask is None or bool(mask.all()):
        return document
    kept = mask[0].bool()
    cut = (*_A_TOKEN_EACH, *_TOKENS_BY_IMAGES)
    return {name: x[:, kept] if name in cut else x for name, x in document.items()}


def _has_picture(document: Document) -> bool:
    return any(name.startswith("pixel_values") or name == "image_patches" for name in document)


def _without_labels(document: Document) -> Document:
    return document | {"labels": torch.full_like(document["input_ids"], IGNORED)}


def _labels(document: Document) -> Tensor:
    labels = document.get("labels", document["input_ids"]).clone()
    labels[:, :1] = IGNORED
    return labels


def _to_the_largest(tensors: list[Tensor], axis: int, value: int = 0) -> list[Tensor]:
    """All axes but this one padded."""
    shape = [max(x.shape[at] for x in tensors) for at in range(tensors[0].dim())]
    found = []
    for x in tensors:
        missing = [0 if at == axis else most - x.shape[at] for at, most in enumerate(shape)]
        widths = [width for each in reversed(missing) for width in (0, each)]
        found.append(pad(x, widths, value=value) if any(missing) else x)
    return found


def _block_diagonal(name: str, documents: list[Document]) -> Tensor:
    """(1, tokens, images, ...): tokens see pictures of their own document alone."""
    present = [document[name] for document in documents if name in document]
    images, rest = sum(x.shape[2] for x in present), _to_the_largest([x[:, :1, :1] for x in present], 0)[0].shape[3:]
    tokens = sum(document["input_ids"].shape[1] for document in documents)
    found = present[0].new_zeros(1, tokens, images, *rest)
    token = image = 0
    for document in documents:
        if name in document:
            own = document[name]
            place = (0, slice(token, token + own.shape[1]), slice(image, image + own.shape[2]))
            found[(*place, *(slice(size) for size in own.shape[3:]))] = own[0]
            image += own.shape[2]
        token += document["input_ids"].shape[1]
    return found


def _pooling(documents: list[Document]) -> Tensor:
    """Of Molmo 2, which counts patches over all crops; -1 is none."""
    found, before = [], 0
    for document in documents:
        if "image_token_pooling" in document:
            own = document["image_token_pooling"]
            found.append(torch.where(own < 0, own, own + before))
            before += document["pixel_values"].shape[0] * document["pixel_values"].shape[1]
    return torch.cat(found)
