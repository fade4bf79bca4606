"""Every model of transformers, timm and open_clip, plain against accelerated: is each number right?

    python scripts/sweep_models.py                          # everything; writes docs/models.md
    python scripts/sweep_models.py --choice                 # the families that CI runs
    python scripts/sweep_models.py --family clip --family llava
    python scripts/sweep_models.py --match 'Llava.*Generation' --fresh

Models are built tiny, with random weights. Outputs, gradients and greedy generation of the accelerated model are
compared with the plain one's, within the error budget of tests/integrations/agreement.py. Exits with 1 if a row is
WRONG.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT / "tests" / "integrations")]

from torchvision_stub import make_importable  # noqa: E402

make_importable()

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from sweep import choice, libraries, pool, table  # noqa: E402
from sweep.cache import Cache  # noqa: E402
from sweep.cases import VERDICTS, Case, Row  # noqa: E402
from sweep.work import rows_of, warming_up  # noqa: E402

STYLES = {"right": "green", "left": "yellow", "refused": "yellow", "WRONG": "bold red"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = _cases(options)
    cache = Cache(options.cache, table.versions())
    todo = [
        case for case in cases if options.fresh or not cache.has(case.key, libraries.ways(case.library), options.again)
    ]
    console.print(f"{len(cases)} classes, {len(cases) - len(todo)} of them in {options.cache}")
    if not options.table_only:
        _sweep(todo, cache, options, console)
    rows = [row for case in cases for way in libraries.ways(case.library) if (row := cache.rows.get((case.key, way)))]
    console.print(table.totals(rows))
    output = options.output or (None if _is_a_part(options) else ROOT / "docs" / "models.md")
    if output is not None:
        output.write_text(table.markdown(rows, len(cases)))
        console.print(f"written: {output}")
    return 1 if any(row.verdict == "WRONG" for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Every model of the libraries, plain against accelerated.")
    parser.add_argument("--library", action="append", choices=libraries.NAMES, help="this one only; may be repeated")
    parser.add_argument("--family", action="append", metavar="NAME", help="this one only; may be repeated")
    parser.add_argument("--choice", action="store_true", help="the families that CI runs")
    parser.add_argument("--match", metavar="REGEX", help="classes whose name matches")
    parser.add_argument("--all-heads", action="store_true", help="also classes that add a linear layer to a base model")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N classes")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="models at once (2)")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds a model may take (120)")
    parser.add_argument("--memory", type=float, default=12, metavar="GB", help="address space of a model (12)")
    default = Path(tempfile.gettempdir()) / "mmkernels-sweep.jsonl"
    parser.add_argument("--cache", type=Path, default=default, help=f"raw results, read and added to ({default})")
    parser.add_argument("--fresh", action="store_true", help="run what is in the cache too")
    parser.add_argument("--again", action="append", default=[], choices=VERDICTS, help="run rows of this verdict again")
    parser.add_argument("--table-only", action="store_true", help="run nothing: the table of what is in the cache")
    parser.add_argument("--output", type=Path, help="the table; docs/models.md when everything is swept")
    return parser


def _is_a_part(options: argparse.Namespace) -> bool:
    return bool(options.library or options.family or options.choice or options.match or options.limit)


def _cases(options: argparse.Namespace) -> list[Case]:
    found = []
    for name in options.library or libraries.NAMES:
        library, families = libraries.named(name), options.family or ()
        if options.choice:
            found += choice.cases(name, families)
        else:
            more = {"plain_heads": True} if options.all_heads and name == "transformers" else {}
            found += library.cases(families, **more)
    if options.match:
        found = [case for case in found if re.search(options.match, case.name)]
    return found[: options.limit]


def _sweep(cases: list[Case], cache: Cache, options: argparse.Namespace, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for case in warming_up({case.library for case in cases}):
        list(rows_of(case))
    limits = pool.Limits(options.workers, options.timeout, options.memory)
    # No thread of the display's own: processes are forked while it runs.
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("sweep", total=len(cases))
        for case, rows in pool.run(cases, rows_of, limits):
            cache.add(rows)
            for row in rows:
                _say(row, progress.console)
            progress.update(task, advance=1, description=case.name)
            progress.refresh()


def _say(row: Row, console: Console) -> None:
    style = STYLES.get(row.verdict, "dim")
    what = row.why or ", ".join(f"{cls} {count}" for cls, count in row.swapped.items())
    text = f"[{style}]{row.verdict:>8}[/] {row.case.key}, {row.way}"
    console.print(text, highlight=False)
    if what:
        console.print(f"         {what[:300]}", markup=False, highlight=False, style="dim")


if __name__ == "__main__":
    sys.exit(main())
