"""Series of sizes: what is fitted, what is marked, and that each point is a case like the others."""

import io
import json

import pytest
import torch
from rich.console import Console

from mmkernels import cli
from mmkernels.bench import GROWTH, Request, run
from mmkernels.bench.growth import behind, by_series, growth
from mmkernels.bench.growth_report import print_growth
from mmkernels.bench.machine import environment
from mmkernels.bench.op import Series
from mmkernels.bench.rotary_embed import RotaryCase
from mmkernels.bench.runner import Report
from mmkernels.check.draw import Draw

SIZES = (64, 128, 256, 512, 1024, 2048)


def series(time, memory=lambda n: 1 << 20, impl="mmkernels:cpu", sizes=SIZES):
    """Results of one series, whose time and memory are these of the size; 10 FLOPs a ms at most."""
    own = {"op": "rotary_embed", "series": "tokens", "dtype": "float32", "pass": "fwd", "impl": impl}
    own |= {"is_ours": impl.startswith("mmkernels"), "error": 1.0, "error_budget": 4.0}
    return [
        own
        | {
            "size": n,
            "ms": time(n),
            "ms_p10": time(n),
            "ms_p90": time(n),
            "peak_bytes": memory(n),
            "peak_fraction": n / time(n),
        }
        for n in sizes
    ]


def test_exponents_are_those_of_the_large_sizes():
    """100 ms a call bend the small sizes of an exact square."""
    ours, other = growth(
        series(lambda n: 100 + 1e-3 * n**2, lambda n: 512 * n) + series(lambda n: 3 * n, lambda n: 0, "eager")
    )
    assert ours.is_ours and 1.75 < ours.time < 2 and ours.memory == pytest.approx(1)
    assert other.time == pytest.approx(1) and other.memory is None


def test_two_sizes_tell_no_exponent():
    (ours,) = growth(series(lambda n: n, sizes=(64, 128)))
    assert ours.time is None and ours.memory is None


def test_a_size_behind_its_neighbours_is_marked():
    """Also where sizes are not evenly spaced; what only rises or falls is no dip."""
    sizes = (64, 96, 128, 129, 512)
    steady = series(lambda n: n / n**0.4, sizes=sizes)
    assert behind(steady) == []
    slow = series(lambda n: (1.3 if n == 129 else 1) * n / n**0.4, sizes=sizes)
    ((size, reached),) = behind(slow)
    assert size == 129 and reached == pytest.approx(1 / 1.3)


def test_the_report_marks_the_size_and_fits_a_terminal():
    slow = series(lambda n: (1.5 if n == 256 else 1) * n) + series(lambda n: 2 * n, impl="transformers' arithmetic")
    peaks = {"float32": 1e9, "copy": 1e9, "source": "a test"}
    console = Console(record=True, width=80, file=io.StringIO())
    print_growth(console, Report({}, peaks, slow))
    text = console.export_text()
    assert "256, only 0.67" in text and "128, only" not in text and "n^1.0" in text
    tables = text.partition("Peak probed")[0]
    assert "…" not in tables and max(map(len, tables.splitlines())) <= 80


@pytest.mark.parametrize("each", GROWTH, ids=lambda each: f"{each.op}-{each.name}")
def test_sizes_rise_and_count_what_they_say(each: Series):
    """Work and traffic rise with the size, or stay (attention to the last image), and fall nowhere else than where
    documents get shorter."""
    sizes, cases = zip(*each.cases.items(), strict=True)
    assert list(sizes) == sorted(sizes) and len({case.name for case in cases}) == len(sizes)
    small = cases[0].make(Draw(0, each.op), torch.float32, "cpu")
    costs = [case.flops("fwd") for case in cases]
    assert costs[-1] >= costs[0] > 0 and cases[0].bytes("fwd", small) > 0


def test_each_point_tells_its_series_and_its_size(tmp_path, monkeypatch, capsys):
    """Through the command, of a series of three sizes."""
    own = Series("rotary_embed", "tokens", "tokens", {n: RotaryCase(f"{n}x2x16", n, 2, 16) for n in (8, 16, 32)})
    monkeypatch.setattr("mmkernels.bench.runner.GROWTH", (own,))
    file = tmp_path / "growth.json"
    arguments = ["bench", "--growth", "--case", "tokens", "--quick", "--dtype", "float32", "--json", str(file)]
    assert cli.main([*arguments, "--device", "cpu"]) == 0
    results = json.loads(file.read_text())["results"]
    assert {(x["series"], x["size"], x["case"]) for x in results} == {("tokens", n, f"{n}x2x16") for n in (8, 16, 32)}
    assert len(list(by_series(results))) == 2 and "grow as" in capsys.readouterr().out


def test_a_single_case_has_no_series():
    request = Request(("rotary_embed",), dtypes=(torch.float32,), passes=("fwd",), quick=True)
    assert not any("series" in x for x in run(request, environment(), lambda *_: None).results)


@pytest.mark.parametrize("more", [["--ranks", "2"], ["--model", "clip-vit-b-16"]])
def test_growth_refuses_what_has_no_series(more, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--growth", *more])
    assert ended.value.code == 2 and "argument --growth" in capsys.readouterr().err


def test_growth_names_the_series_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--growth", "--case", "packed"])
    error = capsys.readouterr().err
    assert "no case is called 'packed'" in error and "keys-of-8" in error
