"""What packing would give as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._console import say
from .preview import SQUARE, Documents, Preview, TooLarge, Way

GREY, BLUE, RED = "#9aa5b1", "#2f6fb0", "#c0392b"  # padded, packed, left out


def write_json(path: str, name: str, found: Preview) -> None:
    Path(path).write_text(json.dumps({"schema": 1, "data": name, **asdict(found)}, indent=1) + "\n")


# ---- as text


def print_preview(console: Console, name: str, found: Preview) -> None:
    mean = found.tokens / found.documents
    facts = f"{found.documents:,} documents, {found.tokens:,} tokens; mean {mean:,.0f}, longest {found.longest:,}"
    say(console, f"[bold]{escape(name)}[/]: {facts}")
    if found.too_large:
        _print_too_large(console, found.too_large, found)
    console.print(_table(found))
    say(console, f"[dim]{_definitions(found)}[/]")
    _print_packs(console, found)


def _print_too_large(console: Console, large: TooLarge, found: Preview) -> None:
    count = f"{large.documents:,} of {found.documents:,} documents {'fits' if large.documents == 1 else 'fit'} no pack"
    shares = f"{_share(large.documents, found.documents)} of them, {_share(large.tokens, found.tokens)} of the tokens"
    first = f"line {large.line:,} has {large.size:,} {large.what}, and a pack holds {large.most:,}"
    say(
        console,
        f"[bold red]left out: {count}[/] ({shares}). The first: {first}. `plan` refuses such documents: cut or drop "
        "them, or raise the limit. All figures below are without them.",
    )


def _share(part: int, whole: int) -> str:
    return "less than 0.1%" if part < whole / 1000 else f"{part / whole:.1%}"


def _table(found: Preview) -> Table:
    """Fits 80 columns: only the names are folded."""
    each = f", on each of {found.ranks} ranks" if found.ranks > 1 else ""
    title = f"Steps with room for {found.limits.tokens:,} tokens{each}"
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.title_justify, table.title_style, table.header_style = "left", "bold", "bold"
    table.add_column("batches", min_width=20)
    headings = ["steps", "steps\nsaved", "documents\na step", "room\nfilled", "padding"]
    for heading in [*headings, *(["slowest\nrank"] if found.ranks > 1 else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    first = found.ways[0]
    documents = found.documents - (found.too_large.documents if found.too_large else 0)
    for way in found.ways:
        table.add_row(way.name, *_figures(way, first, documents))
    return table


def _figures(way: Way, first: Way, documents: int) -> list[str]:
    figures = [
        f"{way.steps:,}",
        "" if way is first else f"{1 - way.steps / first.steps:.1%}",
        f"{documents / way.steps:,.1f}",
        f"{way.filled:.1%}",
        f"{way.padding:.1%}",
    ]
    return figures if way.imbalance is None else [*figures, f"{way.imbalance:.3f}"]


def _definitions(found: Preview) -> str:
    said = (
        "The room is the same for all. A padded batch computes as many tokens as its documents times its longest. It "
        f"takes the next document where that fits the room, up to {found.batch:,} (--batch). Room filled: with real "
        "tokens. Padding: of the tokens computed. A step that computes less is faster: steps saved are not yet time."
    )
    if found.ranks > 1:
        said += (
            " Slowest rank: its cost over the mean of all, over all steps. A document costs n + n² / "
            f"{SQUARE}, n being its tokens with padding. `shard` deals the plan's packs; other batches go to ranks as "
            "they come."
        )
    return said


def _print_packs(console: Console, found: Preview) -> None:
    _, _, planned, _ = found.ways
    cut = f" `shard` cuts some, to {planned.batches:,}: as many on each rank." if planned.batches > found.packs else ""
    say(console, f"packs: {found.packs:,} by the plan; no plan has fewer than {found.least:,}.{cut}")
    if found.not_dealt:
        say(console, f"[bold red]not dealt:[/] {escape(found.not_dealt)}; they go to ranks as they come here.")
    if found.without_picture is not None:
        _print_pictures(console, found.without_picture, planned.batches)
    for way in found.ways:
        if way.ended_early:
            say(
                console,
                f"[yellow]{way.name}:[/] {way.ended_early:,} of {way.batches:,} batches had room for the next "
                f"document and ended at {found.batch:,}. With a larger --batch there are fewer.",
            )


def _print_pictures(console: Console, without: int, packs: int) -> None:
    if not without:
        say(console, "Every pack of the plan has a picture.")
        return
    say(
        console,
        f"[yellow]{without:,} of {packs:,} packs have no picture.[/] FSDP, and DDP with gradient checkpointing, need "
        "one on every rank: make the collator with `Collator.of(model, blank=document)`.",
    )


# ---- as a picture


def write_plot(path: str, documents: Documents, found: Preview) -> None:
    """Needs matplotlib. path: ends in .png or .svg."""
    from matplotlib.figure import Figure  # without pyplot: no window system, and no state of the process

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    lengths, shares = figure.subplots(1, 2)
    _plot_lengths(lengths, documents.tokens, found.limits.tokens)
    _plot_shares(shares, found)
    for axes in (lengths, shares):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _plot_lengths(axes, tokens: Sequence[int], room: int) -> None:
    low, high = min(tokens), max(tokens) + 1
    # Whole numbers of tokens, so that no bin lies between two of them and stays empty.
    edges = sorted({round(low * (high / low) ** (part / 50)) for part in range(51)})
    longer = [x for x in tokens if x > room]
    axes.hist([x for x in tokens if x <= room], edges, color=BLUE)
    if longer:
        axes.hist(longer, edges, color=RED, label=f"longer: {len(longer):,} left out")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}" if high < 10 * low else "")  # 20, 30, ... where 10 and 100 are too few
    axes.margins(y=0.3)  # the legend's place
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(room, color="black", linewidth=1, linestyle="--", label=f"the room, {room:,} tokens")
    axes.set(title="Lengths", xlabel="tokens of a document (logarithmic)", ylabel="documents")
    axes.legend(frameon=False)


def _plot_shares(axes, found: Preview) -> None:
    names = [way.name.replace(" (buffer", "\n(buffer") for way in found.ways]
    bars = axes.barh(names, [100 * way.filled for way in found.ways], color=[GREY, GREY, BLUE, BLUE])
    axes.bar_label(bars, [f"{way.filled:.1%}, {way.steps:,} steps" for way in found.ways], padding=4)
    axes.invert_yaxis()
    axes.set(title="Room filled with real tokens", xlabel="room filled (%)", xlim=(0, 150), xticks=range(0, 101, 20))
