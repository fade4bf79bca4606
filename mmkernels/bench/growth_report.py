"""The figures of series of sizes as tables."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cases import GROWTH
from .growth import behind, by_series, growth
from .report import add_figures, figures_table, plain_table, print_footer
from .runner import Report


def print_growth(console: Console, report: Report) -> None:
    axes = {(series.op, series.name): series.axis for series in GROWTH}
    for (op, series), named in groupby(by_series(report.results), key=lambda x: x[0][:2]):
        groups = [group for _, group in named]
        console.print(_table(op, axes[op, series], groups))
        console.print(_exponents(op, series, groups))
    print_footer(console, report)


def _table(op: str, axis: str, groups: list[list[dict]]) -> Table:
    table = figures_table(f"{op}, by {axis}: times faster than", "dtype, pass and size", "best\npeer")
    table.caption = "only: of the fraction of the peak that the sizes beside it let expect"
    for group in groups:
        table.add_row(_pass(group))
        dips = dict(behind(group))
        for size, results in groupby(group, key=lambda x: x["size"]):
            note = f", only {dips[size]:.2f}" if size in dips else ""
            add_figures(table, f"{size}{note}", list(results))
    return table


def _exponents(op: str, series: str, groups: list[list[dict]]) -> Table:
    table = plain_table(f"{op}: with {series} n, the larger half of them, grow as", "dtype, pass and implementation")
    for heading in ("time", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        table.add_row(_pass(group))
        for found in growth(group):
            style = "bold" if found.is_ours else None
            table.add_row(f"  {escape(found.impl)}", _power(found.time), _power(found.memory), style=style)
    return table


def _pass(group: list[dict]) -> str:
    return f"{group[0]['dtype']}, {group[0]['pass'].replace('_', ' + ')}"


def _power(exponent: float | None) -> str:
    return "-" if exponent is None else f"n^{exponent:.2f}"
