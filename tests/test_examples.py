"""The examples run, and show what they claim."""

import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_clip_ends_with_equal_curves(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_clip.py", "--steps", "6", "--batch", "96"])
    runpy.run_path(str(EXAMPLES / "train_clip.py"), run_name="__main__")
    printed = capsys.readouterr().out
    difference = float(re.search(r"largest difference between the curves: (\S+)", printed)[1])
    assert difference <= 64 * 2**-23 * 4.6  # float32 rounding of a loss of log(96), over a few steps
    for name in ("plain", "mmkernels"):
        assert re.search(rf"{name} +\S+ ms a step, peak memory \d+ MiB", printed)


def test_padded_and_packed_documents_are_one_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["packed_documents.py", "--documents", "3", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / "packed_documents.py"), run_name="__main__")
    printed = capsys.readouterr().out
    apart, largest = map(float, re.search(r"between the outputs: (\S+), the largest is (\S+)", printed).groups())
    assert apart <= 64 * 2**-23 * largest  # float32 rounding through four layers
    assert float(re.search(r"at most (\S+) apart", printed)[1]) <= 64 * 2**-23 * 4
    for name in ("padded", "packed"):
        assert re.search(rf"{name} .* ms .* MiB .* ms .* MiB", printed)


def test_compare_finds_a_clip_right(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_your_model.py"])
    runpy.run_path(str(EXAMPLES / "compare_your_model.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "swapped: 1 x Conv2d: patch embedding" in printed and "times as fast" in printed
    assert printed.rstrip().endswith("ok: every output and gradient is within its error budget")
