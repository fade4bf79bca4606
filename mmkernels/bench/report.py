"""The figures as a table of ratios and as JSON. Ratios are worked out here and stored nowhere."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._console import say
from .cases import OPS
from .runner import Report

GROUP = ("op", "case", "dtype", "pass")


def write_json(path: str, report: Report) -> None:
    """The schema of the project's measurements, 1; what could not be measured is told in the environment."""
    env = report.env | {"unmeasured": report.unmeasured}
    content = {"schema": 1, "env": env, "peaks": report.peaks, "results": report.results}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def print_report(console: Console, report: Report) -> None:
    groups = [list(group) for _, group in groupby(report.results, key=lambda result: [result[key] for key in GROUP])]
    for op in dict.fromkeys(group[0]["op"] for group in groups):
        console.print(_table(op, [group for group in groups if group[0]["op"] == op], report.env.get("ceilings", ())))
    print_footer(console, report)


def _table(op: str, groups: list[list[dict]], ceilings: Iterable[dict]) -> Table:
    """ceilings: of whole models, what would be gained if our ops took no time."""
    most = {tuple(x[key] for key in GROUP[1:]): f"{x['times']:.2f}" for x in ceilings if op == "model"}
    eager = next((result["impl"] for group in groups for result in group if not result["is_ours"]), "eager")
    table = figures_table(f"{op}: times faster than", "case, dtype and pass", "at\nmost" if most else "best\npeer")
    if op == "model":
        table.caption = "eager is transformers' model, with sdpa; at most: if our ops took no time"
    else:
        table.caption = f"eager is {OPS[op].eager or eager}"
    for name, same in groupby(groups, key=lambda group: group[0]["case"]):
        table.add_row(escape(name))
        for group in same:
            first = group[0]
            label = f"{first['dtype']}, {first['pass'].replace('_', ' + ')}"
            add_figures(table, label, group, most.get(tuple(first[key] for key in GROUP[1:])))
    return table


def figures_table(title: str, rows: str, best: str) -> Table:
    """Fits 80 columns: only the name of the best peer is folded."""
    table = plain_table(title, rows)
    for heading in ("eager", best):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("which is", min_width=13)
    for heading in ("of\npeak", "MB", "eager's\nMB", "error /\nbudget"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def plain_table(title: str, rows: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.title_justify = table.caption_justify = "left"
    table.title_style, table.header_style = "bold", "bold"
    table.add_column(rows, no_wrap=True)
    return table


def add_figures(table: Table, label: str, group: list[dict], most: str | None = None) -> None:
    """A row of what all implementations measured of one case, dtype and pass, if ours has a figure."""
    ours = next((result for result in group if result["is_ours"]), None)
    if ours:
        others = [result for result in group if not result["is_ours"]]
        table.add_row(f"  {label}", *_row(ours, others, most))


def _row(ours: dict, others: list[dict], most: str | None) -> tuple[str, ...]:
    first, best = (others[0], min(others, key=lambda result: result["ms"])) if others else (None, None)
    return (
        _times(ours, first),
        most or _times(ours, best),
        escape(_named(best["impl"], first["impl"])) if best else "none could run",
        f"{ours['peak_fraction']:.0%}",
        _megabytes(ours),
        _megabytes(first) if first else "-",
        f"{ours['error'] / ours['error_budget']:.2f}",
    )


def _named(name: str, eager: str) -> str:
    return {eager: "eager", f"compiled {eager}": "compiled eager"}.get(name, name)


def _times(ours: dict, other: dict | None) -> str:
    if other is None:
        return "-"
    ratio = other["ms"] / ours["ms"]
    colour = "green" if ratio >= 1 else "red"
    return f"[{colour}]{ratio:.2f}[/]"


def _megabytes(result: dict) -> str:
    return "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**20:.0f}"


def print_footer(console: Console, report: Report) -> None:
    peaks = report.peaks
    rates = ", ".join(
        f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items() if name not in ("copy", "source")
    )
    say(
        console,
        f"[dim]Peak probed in this run: {rates} ({peaks['source']}), copy {peaks['copy'] / 1e9:.1f} GB/s. Medians of "
        "alternating runs with cold caches, and the most memory held; every figure is of a result within its error "
        "budget.[/]",
    )
    if report.interrupted:
        say(console, "[bold red]interrupted:[/] there would have been more")
    wobbling = sum(result["ms_p90"] > 1.5 * result["ms_p10"] for result in report.results)
    if wobbling:
        count = f"{wobbling} of {len(report.results)} timings"
        say(console, f"[yellow]{count} spread by more than half:[/] this machine was busy")
    for record in report.unmeasured:
        colour = "bold red" if record["is_ours"] else "yellow"
        what = " ".join(str(record[key]) for key in (*GROUP, "ranks", "impl") if key in record)
        say(console, f"[{colour}]no figure:[/] {escape(what)}: {escape(record['reason'])}")
