"""The table of docs/packing.md: what packing each family needs, and how far its packs are from its documents.

    python scripts/packing_table.py    # half a minute; docs/packing.md, between the two comments

Models and documents are those of tests/packing. Errors are told as powers of ten that they do not pass, so that
another machine, which rounds otherwise, writes the same file. Exits with 1, and writes nothing, if a family is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
# Before the imports below (E402): the tests' models, and the stub without which transformers does not import here.
sys.path[:0] = [str(TESTS), str(TESTS / "integrations"), str(TESTS / "packing")]

from torchvision_stub import make_importable  # noqa: E402

make_importable()

import torch  # noqa: E402
from documents import NAMES, documents_of, model_of  # noqa: E402
from rich.console import Console  # noqa: E402

from mmkernels import accelerate  # noqa: E402
from mmkernels.packing import Collator  # noqa: E402
from mmkernels.packing.families import FAMILIES, Family  # noqa: E402
from mmkernels.packing.prove import Difference, differences, find_leaks  # noqa: E402

MANUAL = ROOT / "docs" / "packing.md"
BEGIN, END = "<!-- by scripts/packing_table.py -->", "<!-- end of the table -->"
HEAD = """| family (`config.model_type`) | what is special | loss | logits | gradients | of the budget | leaks |
|---|---|---|---|---|---|---|
"""
FOOT = """
Small models of each, in float32: the worst relative error of a pack, from its documents one at a time in float64, with
and without a mask of ones. The budget of each of these is twice what the documents alone are off by in float32, and
2e-5. Leaks: documents whose tokens, NaN or pictures reach another.
"""
LEAST = {"loss": 1e-6, "logits": 1e-6, "gradients": 1e-5}  # smaller errors are told as these: they differ by machine
SHARES = {0.25: "≤ 1/4", 0.5: "≤ 1/2", 1.0: "≤ 1"}


@dataclass(frozen=True)
class Row:
    name: str  # of the small model
    family: str
    found: list[Difference]
    leaks: int

    @property
    def right(self) -> bool:
        return not self.leaks and all(one.ok for one in self.found)

    def markdown(self) -> str:
        errors = {kind: [one for one in self.found if _kind(one) == kind] for kind in LEAST}
        bounds = [_bound(kind, ones) for kind, ones in errors.items()]
        worst = max(one.packed / one.budget for one in self.found)
        share = next(text for most, text in SHARES.items() if worst <= most)
        return f"| {' | '.join([self._title(), special(FAMILIES[self.family]), *bounds, share, 'none'])} |\n"

    def _title(self) -> str:
        return self.family if self.name == self.family else f"{self.family} ({self.name})"


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description="Writes the table of families in docs/packing.md.").parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in sorted(NAMES):
        rows.append(measured(name))
        console.print(rows[-1].markdown() if rows[-1].right else f"[bold red]WRONG[/] {name}", end="")
    wrong = [row.name for row in rows if not row.right]
    if wrong:
        console.print(f"nothing is written: {', '.join(wrong)} are wrong")
        return 1
    rows.sort(key=lambda row: (row.family, row.name != row.family))
    MANUAL.write_text(with_table(MANUAL.read_text(), HEAD + "".join(row.markdown() for row in rows) + FOOT))
    console.print(f"written: {MANUAL}")
    return 0


def measured(name: str) -> Row:
    model = model_of(name)
    torch.manual_seed(0)
    documents = documents_of(name)
    accelerate(model, verbose=False)
    collator = Collator.of(model)
    found = [one for way in (collator, guarded(collator)) for one in differences(model, documents, way)[0]]
    return Row(name, model.config.model_type, found, len(find_leaks(model, collator(documents))))


def guarded(collator: Callable) -> Callable:
    """With the mask of ones that every processor hands out."""

    def collate(documents: Sequence[dict]) -> dict:
        pack = collator(documents)
        return pack | {"attention_mask": torch.ones_like(pack["input_ids"])}

    return collate


def special(family: Family) -> str:
    told = []
    if family.images_in_a_row:
        told.append("pictures are (1, pictures, ...)")
    if family.mrope:
        told.append("positions along three axes, by the model's own code: `Collator.of(model)`")
    if family.first_position:
        told.append(f"positions begin with {family.first_position}")
    return "; ".join(told)


def with_table(text: str, table: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"


def _kind(one: Difference) -> str:
    return one.name if one.name in LEAST else "gradients"


def _bound(kind: str, ones: list[Difference]) -> str:
    worst = max(LEAST[kind], *(one.packed for one in ones))
    return f"≤ 1e{math.ceil(math.log10(worst) - 1e-9)}"


if __name__ == "__main__":
    sys.exit(main())
