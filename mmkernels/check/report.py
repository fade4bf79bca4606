"""The outcomes of a check as a table and as JSON."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .session import Place, interpreting

SHOWN = 10  # failures told in full
KEYS = ("op", "backend", "device", "dtype")


def print_report(console: Console, records: list[dict], found: list[Place], seed: int) -> None:
    _print_table(console, records, found, seed)
    for place in found:
        if place.missing:
            console.print(f"[yellow]{place.label}[/] is not checked: {escape(place.missing)}")
    for reason in sorted({record["unsupported"] for record in records if record["unsupported"]}):
        console.print(f"[yellow]not served:[/] {escape(reason)}")
    failed = [record for record in records if record["failures"]]
    for record in failed[:SHOWN]:
        title = f"{record['op']}, {record['case']}, {record['backend']}, {record['dtype']}, {record['device']}"
        console.print(f"[bold red]{escape(title)}[/]", soft_wrap=True)
        for line in (*record["failures"], record["reproduce"]):
            console.print(f"  {escape(line)}", soft_wrap=True)
    if len(failed) > SHOWN:
        console.print(f"[bold red]and {len(failed) - SHOWN} more[/]; --json FILE holds them all")


def write_json(path: str, records: list[dict], found: list[Place], env: dict) -> None:
    missing = {place.label: place.missing for place in found if place.missing}
    Path(path).write_text(
        json.dumps({"schema": 1, "env": env, "missing": missing, "outcomes": records}, indent=1) + "\n"
    )


def _print_table(console: Console, records: list[dict], found: list[Place], seed: int) -> None:
    table = Table(title=f"Every kernel against its reference, seed {seed}", title_justify="left", header_style="bold")
    for heading in ("op", "backend", "device", "dtype"):
        table.add_column(heading)
    for heading in ("passed", "worst error / budget"):
        table.add_column(heading, justify="right")
    table.add_column("where")
    ordered = sorted(records, key=lambda record: [record[key] for key in KEYS])
    for key, group in groupby(ordered, key=lambda record: [record[name] for name in KEYS]):
        table.add_row(*_row(key, list(group)))
    console.print(table)


def _row(key: list[str], group: list[dict]) -> tuple[str, ...]:
    op, backend, device, dtype = key
    if interpreting(Place(backend, device)):
        backend = "triton, interpreted"
    asked = [record for record in group if not record["unsupported"]]
    passed = sum(not record["failures"] for record in asked)
    colour = "green" if passed == len(asked) and asked else "red" if passed < len(asked) else "yellow"
    count = f"[{colour}]{passed} of {len(asked)}[/]"
    if len(asked) < len(group):
        count += f" [yellow](+{len(group) - len(asked)} not served)[/]"
    measured = [(_ratio(x), f"{x['name']} of {record['case']}") for record in asked for x in record["quantities"]]
    worst, where = max(measured, default=(math.nan, ""))
    return op, backend, device, dtype, count, f"{worst:.2f}", escape(where)


def _ratio(quantity: dict) -> float:
    return math.inf if quantity["error"] is None else quantity["error"] / quantity["budget"]
