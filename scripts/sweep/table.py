"""docs/models.md: what was found, a line for all classes of a family of which the same is true."""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from .cases import VERDICTS, WAYS, Case, Row

LIBRARIES = ("mmkernels", "torch", "transformers", "timm", "open_clip")
RUN = ("right", "left", "refused", "WRONG")  # verdicts of models that run plain
HEAD = """# Models

Every model class of transformers, timm and open_clip that can be built tiny, with random weights, was run plain and
accelerated, in two ways: `mmkernels.accelerate(model)`, and `attn_implementation="mmkernels"` with
`mmkernels.integrations.transformers` imported. Outputs and the gradients of all parameters are compared in float32,
against the plain model in float64, with padding on either side where there is an `attention_mask`, and so is greedy
generation with dynamic and static caches: tokens, and their logits. The budget is that of the kernels: twice the plain
model's own error, and 2 ulp for each module that was swapped. Models of mixtures and recurrences amplify what they
round by more in one run than in the next: where the budget is overrun, the median of five draws of weights decides.

- **right**: within the budget. Named is what was swapped, and what was left to the model's own code or fell back to it.
- **left**: computes by the model's own code, and why.
- **refused**: by name, an error says why.
- **WRONG**: numbers off, or an error where the plain model has none.
"""
FOOT_OF_HEADS = """
Classes that add a linear layer to a base model that is listed (ForSequenceClassification and its like) are run with
`--all-heads` only.
"""


def versions() -> dict[str, str]:
    return {name: importlib.import_module(name).__version__ for name in LIBRARIES}


def totals(rows: Iterable[Row]) -> str:
    """A line a way."""
    rows = list(rows)
    lines = []
    for way in WAYS:
        counts = Counter(row.verdict for row in rows if row.way == way)
        if counts:
            lines.append(f"{way}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]))
    return "\n".join(lines)


def markdown(rows: Sequence[Row], classes: int) -> str:
    """classes: how many there are; a sweep that has not come to its end says so."""
    tried = len({row.case.key for row in rows})
    command = "Made by `python scripts/sweep_models.py` with " + ", ".join(f"{k} {x}" for k, x in versions().items())
    unfinished = [f"\n**Unfinished: {tried} of {classes} classes have been tried.**"] if tried < classes else []
    parts = [HEAD, command + ".", *unfinished, FOOT_OF_HEADS, *_totals(rows)]
    for library in ("transformers", "timm", "open_clip"):
        of = [row for row in rows if row.case.library == library]
        if of:
            parts += [f"\n## {library}\n", *_families(of), *_not_run(of)]
    return "\n".join(parts).rstrip() + "\n"


def _totals(rows: Sequence[Row]) -> list[str]:
    lines = ["| library | way | families | classes | " + " | ".join(VERDICTS) + " |"]
    lines.append("|---" * (4 + len(VERDICTS)) + "|")
    for library in sorted({row.case.library for row in rows}, key="transformers timm open_clip".index):
        for way in WAYS:
            of = [row for row in rows if row.case.library == library and row.way == way]
            if of:
                counts = Counter(row.verdict for row in of)
                families = {row.case.family for row in of}
                cells = [library, way, len(families), len(of), *(counts[v] for v in VERDICTS)]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


# ---- families


def _families(rows: Sequence[Row]) -> list[str]:
    cells: dict[Case, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if row.verdict in RUN:
            cells[row.case][row.way] = _cell(row)
    same: dict[tuple[str, ...], list[str]] = defaultdict(list)
    ways = [way for way in WAYS if any(way in found for found in cells.values())]
    for case, found in sorted(cells.items(), key=lambda item: item[0].key):
        same[(case.family, *(found.get(way, "") for way in ways))].append(case.name)
    heads = [f"`{way}`" if way == "accelerate" else way for way in ways]
    lines = ["| family | classes | " + " | ".join(heads) + " |", "|---" * (2 + len(ways)) + "|"]
    before = None
    for (family, *found), names in same.items():
        lines.append("| " + " | ".join(["" if family == before else family, ", ".join(names), *found]) + " |")
        before = family
    return lines if cells else []


def _cell(row: Row) -> str:
    what = row.why if row.verdict != "right" else ", ".join(sorted(row.swapped))
    text = f"**{row.verdict}**" + (f": {_short(what)}" if what else "")
    aside = [note for note in row.notes if note.startswith(("left: ", "fell back: "))] if row.verdict == "right" else []
    return "; ".join([text, *(_short(note) for note in aside)])


def _short(text: str, length: int = 140) -> str:
    text = text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


# ---- what did not run


def _not_run(rows: Sequence[Row]) -> list[str]:
    """Classes that could not be tried, by the reason."""
    lines = []
    for verdict, title in (("cannot be built", "Not built"), ("plain fails", "Built, but given no inputs it takes")):
        why: dict[tuple[str, str], list[str]] = defaultdict(list)
        for row in rows:
            if row.verdict == verdict and row.way == WAYS[0]:
                why[row.case.family, row.why].append(row.case.name)
        if why:
            lines += [f"\n### {title}\n", "| family | classes | why |", "|---|---|---|"]
            lines += [
                f"| {family} | {', '.join(names)} | {_short(reason)} |" for (family, reason), names in why.items()
            ]
    return lines
