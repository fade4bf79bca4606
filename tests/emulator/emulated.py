"""python emulated.py MODULE PROGRAM ARGUMENT...: `python -m PROGRAM ARGUMENT...` with MODULE as mmkernels._cuda."""

import importlib.util
import runpy
import sys

import torch  # noqa: F401  # before any module of ours

spec = importlib.util.spec_from_file_location("mmkernels._cuda", sys.argv[1])
sys.modules["mmkernels._cuda"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["mmkernels._cuda"])

sys.argv[:] = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
