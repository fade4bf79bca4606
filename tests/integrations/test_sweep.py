"""Tiny models of the field's families, built and fed by scripts/sweep, plain against accelerated: none is WRONG, and
none of them cannot be tried. `python scripts/sweep_models.py` does the same with every model class there is."""

import sys
import warnings
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from sweep import choice, libraries
from sweep.work import rows_of

FAMILIES = [(library, family) for library in libraries.NAMES for family in choice.OF[library]]


@pytest.mark.parametrize(("library", "family"), FAMILIES, ids=lambda x: x)
def test_family(library, family):
    libraries.named(library).cases([family])  # reads the family's files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [row for case in choice.cases(library, [family]) for row in rows_of(case)]
    bad = [row for row in rows if row.verdict in ("WRONG", "plain fails", "cannot be built")]
    assert rows and not bad, "\n".join(f"{row.case.name}, {row.way}: {row.verdict}: {row.why}" for row in bad)
