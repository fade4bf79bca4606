"""Where the time of the CPU kernels goes: the tables of docs/cpu.md, for this machine.

    python scripts/cpu_phases.py [--cases packed full-2048] [--dtypes float32] [--passes fwd] [--threads 1]

writes a table in Markdown.

Builds the core once more, with the lines it was compiled from, and samples a bench case by `perf record -e cpu-clock`,
which needs no counters of the processor and so runs in virtual machines. A sample counts for the innermost of the
functions inlined at its address whose name says what it does (PHASES). Needs perf and llvm-symbolizer: Debian's
linux-perf and llvm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pybind11
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
CASES = ("packed", "packed-gqa", "packed-images", "full-2048", "cross-immediate", "clip-texts", "vision-windows")
PHASES = {  # by the name of a function; of several that are inlined the innermost, and of these lines the first
    "softmax": r"exp2|weight|weigh|exponentiate|log2|log_of|tanh|refine|to_bfloat16|pairs_of_rows",
    "products": r"micro_kernel|multiply|sum_chains|score_tile|output_tile|add_products|splat_bits",
    "packing": r"pack|transpose|prefetch_row|load_units|PanelPacker|PackedRows|copy|finish_block|find_rows|lane_rows",
}
REST = "rest"

# In a process of its own: the bench case again and again, and then how fast it was and where the core lies.
SAMPLED = """
import sys, time
import torch
from mmkernels import _core
from mmkernels.bench import CASES
from mmkernels.bench.span_attention import attend
from mmkernels.check.draw import Draw

name, dtype, direction, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
case = next(case for case in CASES if case.op == "span_attention" and case.name == name)
call = case.make(Draw(0, name), getattr(torch, dtype), "cpu")
inputs = list(call.tensors.values())
if direction == "fwd_bwd":
    upstream = case.upstream(Draw(1, name), call)
    for x in inputs:
        x.requires_grad_()

def step():
    out = attend(*inputs, **call.options, backend="cpu")
    if direction == "fwd_bwd":
        torch.autograd.grad(out, inputs, upstream)

seconds, end = [], time.perf_counter() + 4
while time.perf_counter() < end:
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
peak = max(_core.fma_peak(dtype, int(threads)) for _ in range(20))
start = min(int(line.split("-")[0], 16) for line in open("/proc/self/maps") if "_core." in line)
print("sampled", case.flops(direction) / sorted(seconds)[len(seconds) // 2], peak, start)
"""


@dataclass(frozen=True)
class Sampled:
    rate: float  # FLOP/s
    peak: float  # in the same process, which something may have disturbed
    samples: Counter[str]  # by phase

    def share(self, phase: str) -> float:
        return self.samples[phase] / self.samples.total()


def build(folder: Path) -> Path:
    """A copy of the package with a core that knows its lines; the core."""
    package, objects = folder / "mmkernels", folder / "build"
    shutil.copytree(ROOT / "mmkernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = ["cmake", "-S", ROOT, "-B", objects, "-GNinja", "-DCMAKE_CXX_FLAGS=-g1"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["ninja", "-C", objects, "_core"], check=True, capture_output=True)
    return Path(shutil.copy(next(objects.glob("_core.*.so")), package))


def sample(core: Path, *case: str) -> Sampled:
    recorded = core.parent.parent / "perf.data"
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "5000", "-o", recorded]
    environment = os.environ | {"PYTHONPATH": str(core.parent.parent)}
    ran = subprocess.run(
        [*command, "--", sys.executable, "-c", SAMPLED, *case], env=environment, capture_output=True, text=True
    )
    said = re.search(r"^sampled (\S+) (\S+) (\d+)$", ran.stdout, re.M)
    if said is None:
        raise SystemExit(f"{' '.join(case)} did not run:\n{ran.stderr}")
    script = ["perf", "script", "-i", recorded, "-F", "ip,dso"]
    lines = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    addresses = Counter(int(line.split()[0], 16) - int(said[3]) for line in lines if core.name in line)
    return Sampled(float(said[1]), float(said[2]), by_phase(core, addresses))


def by_phase(core: Path, addresses: Counter[int]) -> Counter[str]:
    symbolizer = shutil.which("llvm-symbolizer") or shutil.which("llvm-symbolizer-19") or "llvm-symbolizer-14"
    command = [symbolizer, f"--obj={core}", "--inlines", "--output-style=JSON"]
    asked = "\n".join(map(hex, addresses))
    told = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout.splitlines()
    found: Counter[str] = Counter()
    for (_, count), line in zip(addresses.items(), told, strict=True):
        functions = [each["FunctionName"] for each in json.loads(line).get("Symbol", [])]
        if not any("fma" in name or "probe" in name for name in functions):  # the measurement of the peak
            found[phase_of(functions)] += count
    return found


def phase_of(functions: list[str]) -> str:
    """functions: inlined into one another, the innermost first."""
    for name in functions:
        own = re.sub(r"<.*|\(.*", "", name.replace("(anonymous namespace)::", "")).rpartition("::")[2]
        for phase, pattern in PHASES.items():
            if re.match(pattern, own):
                return phase
    return REST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=CASES, help="of `mmkernels bench --op span_attention`")
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    parser.add_argument("--passes", nargs="+", default=("fwd", "fwd_bwd"))
    parser.add_argument("--threads", default="1", help="several disturb each other, and wait at the end")
    options = parser.parse_args()
    console = Console()
    jobs = [(case, dtype, each) for case in options.cases for dtype in options.dtypes for each in options.passes]
    with tempfile.TemporaryDirectory() as folder:
        with console.status("building the core with its lines"):
            core = build(Path(folder))
        found = {job: sample(core, *job, options.threads) for job in track(jobs, "sampling", console=console)}
    print("\n".join(table(found)))


def table(found: dict[tuple[str, str, str], Sampled]) -> Iterator[str]:
    """The peak of a dtype is the highest of all processes."""
    phases = [*PHASES, REST]
    peaks = {dtype: max(x.peak for job, x in found.items() if job[1] == dtype) for _, dtype, _ in found}
    for cells in (("case", "dtype", "pass", "of peak", *phases, "of peak while in products"), ["---"] * 9):
        yield f"| {' | '.join(cells)} |"
    for job, x in found.items():
        of_peak = x.rate / peaks[job[1]]
        shares = [of_peak, *(x.share(phase) for phase in phases), of_peak / x.share("products")]
        yield f"| {' | '.join([*job, *(f'{share:.0%}' for share in shares)])} |"


if __name__ == "__main__":
    main()
