"""The gallery: every system trains a few steps, plain and accelerated side by side, with equal losses."""

import ast
import importlib.util
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import mmkernels

ROOT = Path(__file__).parents[1]
SYSTEMS = ROOT / "examples" / "systems"
NAMES = sorted(file.stem for file in SYSTEMS.glob("*.py"))
SCRIPT = ROOT / "scripts" / "run_gallery.py"


@pytest.fixture(autouse=True)
def own_imports(monkeypatch):
    """A system imports what lies beside it."""
    monkeypatch.syspath_prepend(str(SYSTEMS))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "gallery"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
def test_first_losses_are_equal(name, monkeypatch, tmp_path, capsys):
    """To rounding; all that is said to be swapped is, and nothing falls back to the model's own code."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--both", "--steps", "3", "--json", str(tmp_path / "told.json")])
    runpy.run_path(str(SYSTEMS / f"{name}.py"), run_name="__main__")
    told = json.loads((tmp_path / "told.json").read_text())
    plain, ours = told["plain"], told["accelerated"]
    assert plain["curves"].keys() == ours["curves"].keys()
    for stage, curve in plain["curves"].items():
        torch.testing.assert_close(torch.tensor(ours["curves"][stage]), torch.tensor(curve), rtol=1e-3, atol=1e-4)
    assert plain["scores"].keys() == ours["scores"].keys() and plain["scores"]
    assert ours["swapped"] and not plain["swapped"] and ours["fell_back"] == []
    assert "ms a step" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_is_one_readable_file(name):
    """Its head names the paper, and ops that there are; it fits three screens."""
    text = (SYSTEMS / f"{name}.py").read_text()
    head = ast.get_docstring(ast.parse(text))
    assert re.search(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|www\.adept\.ai/)", head) and ":" in head.splitlines()[0]
    assert set(re.findall(r"`(\w+)`", head)) & set(mmkernels.__all__)
    assert len(text.splitlines()) <= 150


def script():
    spec = importlib.util.spec_from_file_location("run_gallery", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(scores=0.9, ms=100.0):
    way = {"curves": {"one": [2.0, 1.0]}, "scores": {"right": [scores, 0.1]}, "step_ms": ms, "peak_bytes": 5 << 20}
    return {"plain": way, "accelerated": way | {"curves": {"one": [2.0, 1.00001]}, "step_ms": ms / 2}}


def test_the_table_tells_what_the_runs_found(tmp_path):
    gallery = script()
    for dtype, ms in (("float32", 100.0), ("bfloat16", 60.0)):
        gallery.found_by(("llava", dtype), tmp_path).write_text(json.dumps(told(ms=ms)))
    *_, line = gallery.rows(["llava"], tmp_path)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "[LLaVA](llava.py)" and "`" not in cells[1] and "span_attention" in cells[1]
    assert cells[2:] == ["right: 0.90, 0.90 (0.10)", "1e-05", "100 / 50", "60 / 30", "5 / 5"]


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    gallery = script()
    found = gallery.found_by(("llava", "float32"), tmp_path)
    assert not gallery.is_done(("llava", "float32"), tmp_path)
    found.write_text("{}")
    assert gallery.is_done(("llava", "float32"), tmp_path)
    os.utime(found, (0, 0))  # older than its sources
    assert not gallery.is_done(("llava", "float32"), tmp_path)


def test_the_committed_table_has_every_system():
    table = (SYSTEMS / "README.md").read_text()
    assert [name for name in NAMES if f"]({name}.py)" not in table] == []
