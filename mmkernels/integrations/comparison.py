"""What compare found, and how it is shown."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._console import say
from .agreement import Quantity
from .report import Report

OUTPUTS, OTHERS, WRONG = 20, 5, 20  # shown at most, of those that pass and of those that do not
WIDTH = 120  # where there is no terminal to ask


@dataclass(frozen=True)
class Cost:
    """Of one run, forward and (where there is one) backward. Milliseconds: the median, and where the middle 80 % lie.
    Bytes: the most it held beyond what was there before; None where the system does not tell."""

    ms: float
    ms_p10: float
    ms_p90: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """An accelerated model against the plain one. Printing it gives a table; `str()` gives the same as text."""

    model: str  # its class
    backward: bool  # whether there was a backward pass
    truth: str  # what the errors are measured against
    outputs: list[Quantity] = field(repr=False)
    gradients: list[Quantity] = field(repr=False)
    modules: list[Quantity] = field(repr=False)  # what those that were swapped return, by path
    report: Report = field(repr=False)  # what was swapped, what was left, which calls fell back in this run
    exception: str | None = None  # of the accelerated model
    first_wrong: str | None = None  # the path of the module where it goes wrong; "" is the model itself
    why: str | None = None  # what is wrong there
    other_draws: bool = False  # the accelerated model drew other random numbers, in number, than the plain one
    plain: Cost | None = None  # None: the result was wrong
    accelerated: Cost | None = None

    @property
    def ok(self) -> bool:
        """Whether every output, gradient and swapped module is within its budget."""
        return self.exception is None and not self.wrong

    @property
    def wrong(self) -> list[Quantity]:
        """What is beyond its budget."""
        return [x for x in (*self.outputs, *self.gradients, *self.modules) if not x.ok]

    def print(self, console: Console | None = None) -> None:
        console = console or _console()
        if self.outputs or self.gradients:
            console.print(self._table())
        for line in (escape(str(self.report)), *self._cost_lines(), *self._verdict_lines()):
            say(console, line)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH)
        self.print(console)
        return console.file.getvalue().rstrip("\n")

    def _table(self) -> Table:
        what = "forward and backward" if self.backward else "forward"
        table = Table(title=f"{self.model}: accelerated against plain, {what}", box=box.SIMPLE_HEAD, padding=0)
        table.show_edge = False  # 80 columns hold paths of some 45 characters, and the figures
        table.title_justify = table.caption_justify = "left"
        table.title_style, table.header_style = "bold", "bold"
        table.caption = (
            f"truth: {escape(self.truth)}; errors relative to the output, or to the largest gradient, in norm"
        )
        table.add_column("", overflow="fold")
        for heading in ("error", "plain's", "budget", "error /\nbudget"):
            table.add_column(heading, justify="right", no_wrap=True)
        groups = {"outputs": self.outputs, "gradients": self.gradients, "swapped modules": self.modules}
        for kind, quantities in groups.items():
            most = OUTPUTS if kind == "outputs" else OTHERS
            shown = _shown(quantities, most)
            if shown:
                table.add_row(_heading(kind, quantities, len(shown)))
                for x in shown:
                    table.add_row(*_row(x))
                table.add_section()
        return table

    def _cost_lines(self) -> Iterator[str]:
        if self.plain is None or self.accelerated is None:
            yield "[dim]time and memory: measured of right results only[/]"
            return
        plain, ours = self.plain, self.accelerated
        yield (
            f"time: plain {plain.ms:.1f} ms ({plain.ms_p10:.1f} to {plain.ms_p90:.1f}), accelerated {ours.ms:.1f} ms "
            f"({ours.ms_p10:.1f} to {ours.ms_p90:.1f}), {_times(plain.ms / ours.ms)} times as fast"
        )
        if plain.peak_bytes is not None and ours.peak_bytes is not None:
            yield f"peak memory: plain {_megabytes(plain.peak_bytes)}, accelerated {_megabytes(ours.peak_bytes)}"

    def _verdict_lines(self) -> Iterator[str]:
        if self.ok:
            yield "[bold green]ok:[/] every output and gradient is within its error budget"
            return
        if self.exception is not None:
            yield f"[bold red]WRONG:[/] the accelerated model raises {escape(self.exception)}"
        else:
            count = len(self.outputs) + len(self.gradients) + len(self.modules)
            kinds = "outputs, gradients and modules"
            yield f"[bold red]WRONG:[/] {len(self.wrong)} of {count} {kinds} are beyond their budget"
        if self.other_draws:
            yield (
                "[yellow]It drew other random numbers than the plain model, as dropout does over another shape: "
                "the two cannot agree. Compare without dropout, or in evaluation mode.[/]"
            )
        if self.first_wrong is not None:
            where = escape(self.first_wrong or "the model itself")
            yield f"[bold red]first wrong:[/] {where}: {escape(self.why or '')}"


def _heading(kind: str, quantities: list[Quantity], shown: int) -> str:
    wrong = sum(not x.ok for x in quantities)
    which = f": the {shown} worst of {len(quantities)}" if shown < len(quantities) else ""
    return f"[bold]{kind}[/]{which}" + (f", {wrong} wrong" if wrong else "")


def _shown(quantities: list[Quantity], most: int) -> list[Quantity]:
    """The worst of those that pass and of those that fail, in their order."""
    worst = sorted(quantities, key=lambda x: -x.ratio)
    keep = [x for x in worst if not x.ok][:WRONG] + [x for x in worst if x.ok][:most]
    return [x for x in quantities if any(x is other for other in keep)]


def _console() -> Console:
    console = Console()
    return console if console.is_terminal or console.is_jupyter else Console(width=WIDTH)


def _row(x: Quantity) -> tuple[str, ...]:
    name = "  " + escape(x.name)
    if x.complaint is not None:
        return f"{name} [red]{escape(x.complaint)}[/]", "", "", "", "[bold red]WRONG[/]"
    if x.counts:
        numbers = (f"{n:.0f} of {x.size:.0f}" for n in (x.error, x.plain_error, x.budget))
    else:
        numbers = (f"{n / x.size if x.size else n:.1e}" for n in (x.error, x.plain_error, x.budget))
    verdict = f"[green]{x.ratio:.2f}[/]" if x.ok else f"[bold red]{x.ratio:.3g} WRONG[/]"
    return name, *numbers, verdict


def _times(ratio: float) -> str:
    return f"[{'green' if ratio >= 1 else 'red'}]{ratio:.2f}[/]"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
