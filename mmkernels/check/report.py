"""The outcomes of a check as a table and as JSON."""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._console import say
from .session import Place, interpreting

SHOWN = 10  # failures told in full
KEYS = ("op", "backend", "device", "dtype")


def print_report(console: Console, records: list[dict], found: list[Place], seed: int) -> None:
    _print_table(console, records, seed)
    for place in found:
        if place.missing:
            say(console, f"[yellow]{place.label}[/] is not checked: {escape(place.missing)}")
        elif interpreting(place):
            say(console, f"[yellow]{place.backend}:[/] {escape(place.state)}")
    for reason in sorted({record["unsupported"] for record in records if record["unsupported"]}):
        say(console, f"[yellow]not served:[/] {escape(reason)}")
    failed = [record for record in records if record["failures"]]
    for record in failed[:SHOWN]:
        title = f"{record['op']}, {record['case']}, {record['backend']}, {record['dtype']}, {record['device']}"
        say(console, f"[bold red]{escape(title)}[/]")
        for line in (*record["failures"], record["reproduce"]):
            say(console, f"  {escape(line)}")
    if len(failed) > SHOWN:
        say(console, f"[bold red]and {len(failed) - SHOWN} more[/]; --json FILE holds them all")


def write_json(path: str, records: list[dict], found: list[Place], env: dict) -> None:
    missing = {place.label: place.missing for place in found if place.missing}
    Path(path).write_text(
        json.dumps({"schema": 1, "env": env, "missing": missing, "outcomes": records}, indent=1) + "\n"
    )


def _print_table(console: Console, records: list[dict], seed: int) -> None:
    """Fits 80 columns: only where the worst error lies is folded."""
    table = Table(title=f"Every kernel against its reference, seed {seed}", box=box.SIMPLE_HEAD, show_edge=False)
    table.title_justify, table.title_style, table.header_style, table.padding = "left", "bold", "bold", 0
    table.add_column("op and backend", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for heading in ("passed", "not\nserved", "error /\nbudget"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("at worst")
    ordered = sorted(records, key=lambda record: [record[key] for key in KEYS])
    for op, of_op in groupby(ordered, key=lambda record: record["op"]):
        table.add_row(op)
        for key, group in groupby(of_op, key=lambda record: [record[name] for name in KEYS[1:]]):
            table.add_row(*_row(key, list(group)))
    console.print(table)


def _row(key: list[str], group: list[dict]) -> tuple[str, ...]:
    backend, device, dtype = key
    if interpreting(Place(backend, device)):
        where = "triton, interpreted"
    else:
        where = backend if device == backend else f"{backend}, {device}"
    asked = [record for record in group if not record["unsupported"]]
    passed = sum(not record["failures"] for record in asked)
    colour = "green" if passed == len(asked) and asked else "red" if passed < len(asked) else "yellow"
    left = len(group) - len(asked)
    measured = [(_ratio(x), f"{x['name']} of {record['case']}") for record in asked for x in record["quantities"]]
    worst, at = max(measured, default=(math.nan, ""))
    return (
        f"  {where}",
        dtype,
        f"[{colour}]{passed} of {len(asked)}[/]",
        f"[yellow]{left}[/]" if left else "",
        f"{worst:.2f}",
        escape(at),
    )


def _ratio(quantity: dict) -> float:
    return math.inf if quantity["error"] is None else quantity["error"] / quantity["budget"]
