"""Hopper's products alone (wgmma_rates.cu): how many cycles does one take, and how much does shared memory give?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch

from .pool import Row
from .records import ROOT
from .table import table

SECONDS, ROW_SECONDS, WORKERS = 75, 70, 1
PROGRAM = Path(__file__).with_name("wgmma_rates.cu")


def rows(device: str) -> list[Row]:
    return [Row("rates", partial(measure, device))]


def measure(device: str) -> dict:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], toolkit]))
    if nvcc is None:
        return {"skipped": "no nvcc here"}
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/wgmma_rates"
        options = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-gencode=arch=compute_90a,code=sm_90a"]
        made = subprocess.run([nvcc, *options, PROGRAM, "-o", program], capture_output=True, text=True)
        if made.returncode:
            return {"failure": f"nvcc: {made.stderr.strip()[-500:]}"}
        if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
            return {"skipped": "it compiles; to run, it needs a Hopper GPU"}
        ran = subprocess.run([program], capture_output=True, text=True)
    rates = [json.loads(line) for line in ran.stdout.splitlines()]
    return {"rates": rates} | ({"failure": ran.stderr.strip()} if ran.returncode else {})


def told(results: dict[str, dict]) -> list[str]:
    rates = results.get("rates", {}).get("rates", [])
    if not rates:
        return []
    names = ("columns", "a_from", "warpgroups", "cycles", "cycles_most", "expected", "clock_mhz", "tflops")
    heading = ["N", "a from", "warpgroups", "cycles", "at most", "expected", "MHz", "TFLOP/s"]
    said = "wgmma m64 N k16, bfloat16: cycles of a multiprocessor for a product, with what was expected"
    return [said, *table(heading, [[rate[name] for name in names] for rate in rates])]
