"""python emulated.py MODULE ARGUMENT...: `python -m mmkernels ARGUMENT...` with MODULE as mmkernels._cuda."""

import importlib.util
import sys

import torch  # noqa: F401  # before any module of ours

spec = importlib.util.spec_from_file_location("mmkernels._cuda", sys.argv[1])
sys.modules["mmkernels._cuda"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["mmkernels._cuda"])

from mmkernels.cli import main  # noqa: E402

sys.exit(main(sys.argv[2:]))
