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
