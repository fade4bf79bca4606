"""Proof, on a user's own model and documents, that a pack computes each of its documents as if it were alone.

Two proofs, since neither sees what the other does. A leak is looked for on a pack by itself: it shows whether any
document changes another, but not a mask that is wrong inside one. Equality is with the documents one at a time.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .collate import IGNORED, Document

_PICTURES = ("pixel_values", "image_patches", "pixel_values_videos")
ROUNDING = 1e-4  # of the largest logit: by how much experts and products of other shapes may round otherwise


@dataclass(frozen=True)
class Leak:
    """By what a document reached another: `how` is "other tokens", "NaN" or "picture"."""

    source: int
    reached: int
    how: str
    largest: float  # change of a logit, or gradient of a pixel

    def __str__(self) -> str:
        return f"document {self.source} reaches document {self.reached} ({self.how}, by {self.largest:.2g})"


def assert_no_leak(model: nn.Module, batch: dict, *, console: Console | None = None) -> None:
    """No document of the pack has any effect on another's logits, and no picture on two documents.

    Each document in turn gets other tokens, and then NaN for its embeddings: all other logits have to keep their bits,
    or to differ by rounding alone (experts, whose rows move). Then each document's logits are differentiated by the
    pixels. It takes 1 + 3 documents passes, in eval mode, and leaves the model as it was. Works
    on plain models too; there attention by a dense mask hands NaN on to everyone (0 x NaN), so that NaN is only asked
    where other tokens reached nobody and is then no proof of a leak by itself.

    Args:
        model: takes the batch by keywords and returns `logits`, (1, tokens, vocabulary).
        batch: one row, with cu_seq_lens_q, as `Collator` makes it.
        console: where the table goes; None: standard output.

    Raises:
        AssertionError: there are leaks; the message names the first of them, and the table all.
    """
    leaks = find_leaks(model, batch)
    documents = len(batch["cu_seq_lens_q"]) - 1
    table = _table("leaks between the documents of a pack", "source", "reached", "how", "by")
    for leak in leaks:
        table.add_row(str(leak.source), str(leak.reached), leak.how, f"{leak.largest:.2g}")
    table.caption = f"{documents} documents, {len(leaks)} leaks"
    (console or Console()).print(table)
    if leaks:
        raise AssertionError(f"{len(leaks)} leaks: " + "; ".join(map(str, leaks[:6])))


def find_leaks(model: nn.Module, batch: dict) -> list[Leak]:
    """What `assert_no_leak` asserts there is none of."""
    ends = batch["cu_seq_lens_q"].tolist()
    documents = [slice(*pair) for pair in itertools.pairwise(ends)]
    with _evaluated(model):
        run = _Run(model, batch)
        with torch.no_grad():
            leaks = list(_through_tokens(run, documents))
        return leaks + list(_through_pictures(run, documents))


class _Run:
    """The logits of a pack, (tokens, vocabulary), as it is or with something of it changed."""

    def __init__(self, model: nn.Module, batch: dict) -> None:
        self.model, self.ids = model, batch["input_ids"]
        self.inputs = {name: x for name, x in batch.items() if name not in ("labels", "input_ids")}
        self.embeddings = model.get_input_embeddings()

    def __call__(self, ids: Tensor | None = None, poisoned: slice | None = None, **changed: Tensor) -> Tensor:
        def poison(_, args, out: Tensor) -> Tensor:
            if out.shape[:2] != self.ids.shape:  # something else that the same table embeds
                return out
            out = out.clone()
            out[:, poisoned] = torch.nan
            return out

        hook = None if poisoned is None else self.embeddings.register_forward_hook(poison)
        try:
            ids = self.ids if ids is None else ids
            return self.model(**{**self.inputs, **changed, "input_ids": ids, "use_cache": False}).logits[0]
        finally:
            if hook is not None:
                hook.remove()


def _through_tokens(run: _Run, documents: list[slice]) -> Iterator[Leak]:
    kept = torch.tensor(sorted(_named_tokens(run.model.config)), device=run.ids.device)
    common = run.ids.unique()
    common = common[~torch.isin(common, kept)]
    generator, base = torch.Generator().manual_seed(0), run()
    small = ROUNDING * base[base.abs() < 1e30].abs().max().item()
    for source, own in enumerate(documents):
        if own.start == own.stop or not len(common):
            continue
        drawn = torch.randint(len(common), (own.stop - own.start,), generator=generator).to(run.ids.device)
        changed = run.ids.clone()
        changed[0, own] = torch.where(torch.isin(run.ids[0, own], kept), run.ids[0, own], common[drawn])
        by_tokens = dict(_reached(base, run(changed), documents, source))
        poisoned = run(poisoned=own)
        dense = _passes_nan(base, poisoned, documents, source, by_tokens)
        by_nan = {} if dense else dict(_reached(base, poisoned, documents, source))
        by_nan = {reached: x for reached, x in by_nan.items() if x == float("inf")}  # else it moved rows, and rounds
        for reached, largest in by_tokens.items():
            if largest > small or reached in by_nan:
                yield Leak(source, reached, "other tokens", largest)
        for reached, largest in by_nan.items():
            if reached not in by_tokens:
                yield Leak(source, reached, "NaN", largest)


def _passes_nan(base: Tensor, poisoned: Tensor, documents: list[slice], source: int, by_tokens: dict) -> bool:
    """Whether NaN goes everywhere, though tokens do not: attention by a dense mask, whose zeros do not stop it."""
    others = [own for at, own in enumerate(documents) if at != source and own.start < own.stop]
    return not by_tokens and bool(others) and all(bool(poisoned[own].isnan().any()) for own in others[-1:])


def _reached(base: Tensor, found: Tensor, documents: list[slice], source: int) -> Iterator[tuple[int, float]]:
    same = (found == base) | (found.isnan() & base.isnan())
    for reached, own in enumerate(documents):
        if reached != source and not bool(same[own].all()):
            change = (found[own] - base[own]).abs()
            yield reached, float("inf") if bool(change.isnan().any()) else change.max().item()


def _through_pictures(run: _Run, documents: list[slice]) -> Iterator[Leak]:
    pixels = {name: run.inputs[name] for name in _PICTURES if name in run.inputs}
    pixels = {name: x.detach().clone().requires_grad_() for name, x in pixels.items() if x.is_floating_point()}
    logits = run(**pixels) if pixels else run.inputs["cu_seq_lens_q"]
    if not logits.requires_grad:  # no picture, or tokens that were chosen by a codebook
        return
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(1)).to(logits)
    scores, first = logits.clamp(min=-1e4) @ weights, {}
    for document, own in enumerate(documents):
        grads = torch.autograd.grad(scores[own].sum(), list(pixels.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(pixels, grads, strict=True):
            if grad is None:
                continue
            grad = grad[0] if len(grad) == 1 and grad.dim() in (3, 5, 6) else grad  # (1, pictures, ...)
            for at in (grad != 0).flatten(1).any(1).nonzero()[:, 0].tolist():
                owner = first.setdefault((name, at), document)
                if owner != document:
                    yield Leak(owner, document, "picture", grad[at].abs().max().item())


def _named_tokens(config: object) -> Iterator[int]:
    """Those that stand for something, such as a picture, and whose number has to fit it."""
    for name, value in vars(config).items():
        if isinstance(value, int) and name.endswith(("_id", "_index")):
            yield value
        elif hasattr(value, "model_type"):
            yield from _named_tokens(value)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


# ---- equality


@dataclass(frozen=True)
class Difference:
    """In norm, relative: of the pack, and of the documents alone in the same dtype, from these in float64."""

    name: str
    packed: float
    alone: float

    @property
    def budget(self) -> float:
        return 2 * self.alone + SLACK

    @property
    def ok(self) -> bool:
        return self.packed <= self.budget


SLACK = 2e-5  # of the norm: roundings that luck may have kept from the documents alone


def assert_equal_to_separate(
    model: nn.Module,
    documents: Sequence[Document],
    collator: Callable[[Sequence[Document]], dict],
    *,
    console: Console | None = None,
) -> None:
    """The pack of these documents has the loss, the logits and the gradients of the documents one at a time, weighted
    by tokens.

    The truth is a copy of the model in float64, or in its own dtype where it does not run in that. What a pack may be
    off by is twice what the documents alone are off by in the model's dtype, and a little. In eval mode; gradients that
    the model has are left alone.

    Args:
        model: takes a document, and the pack with cu_seq_lens_q, by keywords, and num_items_in_batch; returns loss and
            logits. Accelerated, or one whose attention reads cu_seq_lens_q by itself.
        documents: as a processor gives them.
        collator: of documents into a pack, such as `Collator.of(model)`.
        console: where the table goes; None: standard output.

    Raises:
        AssertionError: something differs by more; the message names the worst, and the table tells of it.
    """
    found, dtype = differences(model, documents, collator)
    table = _table("a pack against its documents alone", "", "packed", "alone", "budget")
    for one in found[:8]:
        table.add_row(one.name, f"{one.packed:.1e}", f"{one.alone:.1e}", f"{one.budget:.1e}")
    table.caption = f"errors from the documents alone in {dtype}, relative, in norm; the worst first"
    (console or Console()).print(table)
    wrong = [one for one in found if not one.ok]
    if wrong:
        raise AssertionError(
            f"{len(wrong)} of {len(found)} differ; {wrong[0].name} is off by {wrong[0].packed:.2g} of itself, where "
            f"{wrong[0].budget:.2g} is rounding"
        )


def differences(
    model: nn.Module, documents: Sequence[Document], collator: Callable
) -> tuple[list[Difference], torch.dtype]:
    """What `assert_equal_to_separate` judges, the worst first; and the dtype of the truth."""
    model = copy.deepcopy(model).eval()  # whose gradients are nobody's
    exact = copy.deepcopy(model).double()
    try:
        truth, dtype = _alone(exact, documents), torch.float64
    except (RuntimeError, TypeError, NotImplementedError):  # a layer that knows no float64: the table says so. What is
        truth, dtype = _alone(model, documents), next(model.parameters()).dtype  # wrong otherwise is raised again here
    alone, packed = _alone(model, documents), _packed(model, collator(documents))
    largest = max(x.norm() for name, x in truth.items() if name not in ("loss", "logits"))

    def error(found: dict[str, Tensor], name: str) -> float:
        value, floor = found.get(name, torch.zeros(())), 0.0 if name in ("loss", "logits") else 1e-3 * largest
        return ((value - truth[name]).norm() / truth[name].norm().clamp(min=max(float(floor), 1e-30))).item()

    found = [Difference(name, error(packed, name), error(alone, name)) for name in truth]
    return sorted(found, key=lambda one: one.budget - one.packed if one.packed == one.packed else -torch.inf), dtype


def _alone(model: nn.Module, documents: Sequence[Document]) -> dict[str, Tensor]:
    labels = [document.get("labels", document["input_ids"]) for document in documents]
    counted = [int((x[:, 1:] != IGNORED).sum()) for x in labels]
    model.zero_grad()
    loss, logits = 0.0, []
    for document, own, count in zip(documents, labels, counted, strict=True):
        inputs = {name: x for name, x in document.items() if name not in ("attention_mask", "labels")}
        out = _called(model, inputs | {"labels": own}, sum(counted))
        if count:
            out.loss.backward()
            loss = loss + out.loss.detach()
        logits.append(out.logits[0].detach())
    return _values(model, loss, torch.cat(logits))


def _packed(model: nn.Module, batch: dict) -> dict[str, Tensor]:
    model.zero_grad()
    out = _called(model, batch, int((batch["labels"][..., 1:] != IGNORED).sum()))
    out.loss.backward()
    return _values(model, out.loss.detach(), out.logits[0].detach())


def _called(model: nn.Module, inputs: dict, counted: int):
    dtype = next(model.parameters()).dtype
    inputs = {k: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    return model(**inputs, num_items_in_batch=counted, use_cache=False)


def _values(model: nn.Module, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
    logits = logits.double().masked_fill(logits < -1e30, 0.0)  # of tokens that a model forbids
    grads = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.double(), "logits": logits} | grads


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, show_edge=False)
    table.title_justify = table.caption_justify = "left"
    return table
