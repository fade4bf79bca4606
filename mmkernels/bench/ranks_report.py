"""The figures of losses across processes as a table."""

from __future__ import annotations

from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .report import print_footer
from .runner import Report

_FIGURES = {  # heading -> a figure, in the table's unit
    "ms": lambda x: x["ms"],
    "CPU s": lambda x: x["cpu_seconds"],
    "MB": lambda x: _in_mb(x["peak_bytes"]),
    "sent\nMB": lambda x: _in_mb(x["sent_bytes"]),
    "seen\nMB": lambda x: _in_mb(x["wire_bytes"]),
}


def print_ranks(console: Console, report: Report) -> None:
    for op, results in groupby(report.results, key=lambda result: result["op"]):
        console.print(_table(op, list(results)))
    print_footer(console, report)


def _table(op: str, results: list[dict]) -> Table:
    """Fits 80 columns."""
    title = f"{op} across processes, forward and backward: of the slowest rank"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.title_justify = table.caption_justify = "left"
    table.title_style, table.header_style = "bold", "bold"
    table.add_column("case, dtype, ranks", min_width=28)
    for heading in (*_FIGURES, "error /\nbudget"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = (
        "MB: the most memory beyond what was held before. Sent: of features, their gradients and statistics, on paper, "
        "by each rank; seen: by the counter of a loopback that the ranks had to themselves"
    )
    for (case, dtype, ranks), group in groupby(results, key=lambda x: (x["case"], x["dtype"], x["ranks"])):
        table.add_row(f"{escape(case)}, {dtype}, {ranks} ranks")
        _add_rows(table, list(group))
    return table


def _add_rows(table: Table, group: list[dict]) -> None:
    for result in group:
        figures = [_number(figure(result)) for figure in _FIGURES.values()]
        table.add_row(f"  {escape(result['impl'])}", *figures, f"{result['error'] / result['error_budget']:.2f}")
    ours = next((x for x in group if x["is_ours"]), None)
    others = [x for x in group if not x["is_ours"]]
    if ours is None or not others:
        return
    best = min(others, key=lambda x: x["ms"])
    ratios = [_ratio(figure(ours), figure(best)) for figure in _FIGURES.values()]
    table.add_row(f"  ours / {best['impl']}", *ratios)


def _in_mb(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _ratio(ours: float | None, other: float | None) -> str:
    if not ours or not other:
        return "-"
    colour = "green" if ours <= other else "red"
    return f"[{colour}]{ours / other:.2f}[/]"
