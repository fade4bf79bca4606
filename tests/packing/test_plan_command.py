"""`mmkernels plan`: what it prints, writes and refuses."""

import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mmkernels import cli
from mmkernels.packing import Limits
from mmkernels.packing.preview import Documents, TooLarge, preview, read
from mmkernels.packing.preview_report import print_preview


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    """A terminal's default, whatever the tests run in."""
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def data(tmp_path) -> str:
    """Twelve documents, of which the last is longer than 600 tokens."""
    lines = [{"tokens": 100 + 40 * at, "images": at % 2} for at in range(11)]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"tokens": 601, "images": 1}])))
    return str(file)


def printed(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *arguments])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    return " ".join(err.split())


def figures(out: str) -> dict[str, list[str]]:
    """The rows of the table, by the name of the way."""
    rows = [line for line in out.splitlines() if line.startswith(("padded, ", "packed ")) and "batches had" not in line]
    return {line[:33].strip(): line[33:].split() for line in rows}


def test_the_table_shows_what_was_computed(capsys, data):
    out = printed(capsys, data, "--tokens", "1000")
    assert f"{data}: 12 documents, 3,901 tokens; mean 325, longest 601" in out
    rows = figures(out)
    assert list(rows) == [way.name for way in preview(read(data), Limits(1000)).ways]
    computed = 880 + 600 + 760 + 920 + 500 + 601  # 100 140 180 220 | 260 300 | 340 380 | 420 460 | 500 | 601
    assert rows["padded, as they come"] == ["6", "2.0", "65.0%", f"{1 - 3901 / computed:.1%}"]
    assert rows["packed (plan)"] == ["4", "33.3%", "3.0", "97.5%", "0.0%"]
    assert "packs: 4 by the plan; no plan has fewer than 4." in out
    assert "left out" not in out and "--batch" in out


def test_ranks_add_the_slowest(capsys, data):
    found = preview(read(data), Limits(1000), ranks=3)
    out = printed(capsys, data, "--tokens", "1000", "--ranks", "3")
    assert "on each of 3 ranks" in out and "Slowest rank: its cost over the mean" in out
    assert [row[-1] for row in figures(out).values()] == [f"{way.imbalance:.3f}" for way in found.ways]
    assert "`shard` cuts some, to 6: as many on each rank." in out
    out = printed(capsys, data, "--tokens", "1000")
    assert "lowest" not in out.splitlines()[2] and "Slowest rank" not in out and "on each of" not in out


def test_documents_too_large_are_told_loudly(capsys, data):
    out = printed(capsys, data, "--tokens", "600")
    assert "left out: 1 of 12 documents fits no pack (8.3% of them, 15.4% of the tokens)" in out
    assert "The first: line 12 has 601 tokens, and a pack holds 600." in out
    assert figures(out)["packed (plan)"][2] == "1.8"  # 11 documents in 6 steps
    assert "fit no pack (16.7% of them" in printed(capsys, data, "--tokens", "499")
    assert "no document of" in refused(capsys, data, "--tokens", "99")


def test_packs_without_a_picture_are_told(capsys, data, monkeypatch):
    out = printed(capsys, data, "--tokens", "601", "--images", "1")
    assert "of 7 packs have no picture." in out and "`Collator.of(model, blank=document)`" in out
    assert "packs: 6 by the plan" in printed(capsys, data, "--tokens", "4000", "--images", "1")
    assert "Every pack of the plan has a picture." in printed(capsys, data, "--tokens", "4000")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"5\n6\n")))
    out = printed(capsys, "-", "--tokens", "8")
    assert out.startswith("standard input: 2 documents, 11 tokens") and "picture" not in out


def test_a_comparison_that_the_batch_size_decides_says_so(capsys, data):
    out = printed(capsys, data, "--tokens", "1000", "--batch", "2")
    assert "padded, as they come: 2 of 7 batches had room for the next document and ended at 2." in out
    assert "had room for the next" not in printed(capsys, data, "--tokens", "1000", "--batch", "50")


def test_what_shard_refuses_is_told(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"5\n5\n5\n")))
    out = printed(capsys, "-", "--tokens", "8", "--ranks", "2")
    assert "not dealt: shard: 3 packs of one document each cannot be dealt evenly to 2 ranks" in out


@pytest.mark.parametrize("terminal", [True, False])
def test_large_figures_fit_eighty_columns(terminal):
    found = preview(Documents("data", [4, 2, 3, 1], None, [1, 0, 0, 0], [1, 2, 3, 4]), Limits(8), ranks=2)
    ways = [replace(way, steps=1_234_567 + at, imbalance=12.345, filled=1) for at, way in enumerate(found.ways)]
    large = TooLarge(1, 1, 1_000_000, "tokens", 2_000_000, 1_000_000)
    found = replace(found, documents=987_654_321, ranks=1024, too_large=large, ways=tuple(ways))
    out = io.StringIO()
    print_preview(Console(file=out, width=80, force_terminal=terminal, color_system=None), "data", found)
    table = out.getvalue().split("Steps with room")[1].split("The room is the same")[0]
    assert max(map(len, table.splitlines())) <= 80
    for at, padding in enumerate(f"{way.padding:.1%}" for way in ways):
        assert f"{1_234_567 + at:,}" in table and padding in table
    assert table.count("12.345") == table.count("100.0%") == table.count("800.0") == 4
    assert (max(map(len, out.getvalue().splitlines())) <= 80) == terminal


def test_json_holds_what_the_table_shows(capsys, data, tmp_path):
    file = tmp_path / "found.json"
    rows = figures(printed(capsys, data, "--tokens", "600", "--ranks", "2", "--json", str(file)))
    content = json.loads(file.read_text())
    assert (content["schema"], content["data"]) == (1, data)
    assert content["limits"] == {"tokens": 600, "patches": None, "images": None}
    assert content["too_large"]["line"] == 12 and content["documents"] == 12
    for way in content["ways"]:
        shown = [str(way["steps"]), f"{way['filled']:.1%}", f"{way['padding']:.1%}", f"{way['imbalance']:.3f}"]
        assert [rows[way["name"]][at] for at in (0, -3, -2, -1)] == shown


def test_what_is_wrong_is_refused(capsys, data, monkeypatch, tmp_path):
    assert "the following arguments are required: --tokens" in refused(capsys, data)
    for number in ("0", "-3", "many", "1.5"):
        assert f"'{number}' is no whole number from 1 on" in refused(capsys, data, f"--tokens={number}")
    assert "cannot be read" in refused(capsys, str(tmp_path), "--tokens", "8")
    assert "patches are limited" in refused(capsys, data, "--tokens", "8000", "--patches", "8")
    Path(data).write_text("5\nsix\n")
    error = refused(capsys, data, "--tokens", "8")
    assert f"{data}, line 2: found no JSON: six; accepted is a number of tokens" in error
    assert "there is no folder" in refused(capsys, data, "--tokens", "8", "--json", str(tmp_path / "none" / "x.json"))


def test_a_plot_needs_matplotlib_and_a_picture_file(capsys, data, monkeypatch, tmp_path):
    assert "must end in .png or .svg" in refused(capsys, data, "--tokens", "8", "--plot", str(tmp_path / "x.pdf"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    error = refused(capsys, data, "--tokens", "8", "--plot", str(tmp_path / "x.png"))
    assert "argument --plot: needs matplotlib: pip install matplotlib" in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: real("json") if name == "matplotlib" else real(name))
    assert "there is no folder" in refused(capsys, data, "--tokens", "8", "--plot", str(tmp_path / "no" / "x.png"))


def test_a_plot_is_drawn(capsys, data, tmp_path):
    pytest.importorskip("matplotlib")
    png, svg = tmp_path / "x.png", tmp_path / "x.svg"
    printed(capsys, data, "--tokens", "1000", "--plot", str(png))
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    rows = figures(printed(capsys, data, "--tokens", "600", "--plot", str(svg)))
    drawn = svg.read_text()  # matplotlib writes each text as a comment, too
    for text in ("tokens of a document (logarithmic)", "documents", "room filled (%)", "the room, 600 tokens"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- longer: 1 left out -->" in drawn
    for figures_of_way in rows.values():
        assert f"<!-- {figures_of_way[-2]}, {figures_of_way[0]} steps -->" in drawn


def test_lengths_that_are_all_equal_are_drawn(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1\n1\n")))
    printed(capsys, "-", "--tokens", "1", "--plot", str(tmp_path / "x.svg"))
    assert "<!-- 2 -->" in (tmp_path / "x.svg").read_text()  # the height of the one bar
