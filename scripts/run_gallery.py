"""Trains the systems of examples/systems, plain and accelerated side by side, and writes their table.

    python scripts/run_gallery.py [NAME ...] [--jobs N] [--steps N] [--out FOLDER] [--write]

Each system is trained in float32 to the end, and in bfloat16 for some steps, whose time alone counts. What a run found
stays in the folder as JSON, and is not run again until its file, or what the files share, changes: a run that was
interrupted goes on where it was. --write puts the table into examples/systems/README.md, where all systems were run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[1]
SYSTEMS = ROOT / "examples" / "systems"
TIMED_STEPS = 20  # of a stage in bfloat16
FIRST = 5  # steps at which two curves differ by rounding alone
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
Run = tuple[str, str]  # a system and a dtype


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [(name, dtype) for dtype in ("float32", "bfloat16") for name in options.names]
    left = [run for run in runs if not is_done(run, options.out)]
    failed = train(left, options)
    for name, dtype in failed:
        print(f"{name} in {dtype} failed: see {log_of((name, dtype), options.out)}", file=sys.stderr)
    table = "\n".join(rows([name for name in options.names if name not in dict(failed)], options.out))
    print(table)
    if options.write and not failed and options.names == names():
        write(table)
    sys.exit(bool(failed))


def names() -> list[str]:
    return sorted(file.stem for file in SYSTEMS.glob("*.py"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", metavar="NAME", nargs="*", help="a system (all)")
    parser.add_argument("--jobs", type=int, default=1, help="systems at a time, which share the processors (1)")
    parser.add_argument("--steps", type=int, help="a stage at most (all that it takes to learn)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gallery", help="folder of what was found")
    parser.add_argument("--write", action="store_true", help="write the table into examples/systems/README.md")
    options = parser.parse_args()
    unknown = set(options.names) - set(names())
    if unknown:
        parser.error(f"no system is called {', '.join(sorted(unknown))}; there are: {', '.join(names())}")
    options.names = options.names or names()
    return options


# ---- running


def train(runs: list[Run], options: argparse.Namespace) -> list[Run]:
    """Those that failed."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    failed = []
    with Progress(*columns) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("training", total=len(runs))
        waiting = {pool.submit(run_one, run, options): run for run in runs}
        for done in as_completed(waiting):
            name, dtype = waiting[done]
            progress.update(task, advance=1, description=f"{name}, {dtype}")
            if done.result():
                failed.append((name, dtype))
    return failed


def run_one(run: Run, options: argparse.Namespace) -> int:
    name, dtype = run
    found = found_by(run, options.out)
    steps = options.steps if dtype == "float32" else min(options.steps or TIMED_STEPS, TIMED_STEPS)
    command = [sys.executable, str(SYSTEMS / f"{name}.py"), "--both", "--dtype", dtype, "--json", str(found) + ".part"]
    command += [] if steps is None else ["--steps", str(steps)]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with log_of(run, options.out).open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code == 0:
        Path(str(found) + ".part").replace(found)
    return code


def found_by(run: Run, out: Path) -> Path:
    return out / f"{run[0]}-{run[1]}.json"


def log_of(run: Run, out: Path) -> Path:
    return out / f"{run[0]}-{run[1]}.log"


def is_done(run: Run, out: Path) -> bool:
    found = found_by(run, out)
    sources = [SYSTEMS / f"{run[0]}.py", *(SYSTEMS / "gallery").glob("*.py")]
    return found.exists() and found.stat().st_mtime > max(source.stat().st_mtime for source in sources)


# ---- the table


def rows(of: list[str], out: Path) -> list[str]:
    heads = ["system", "ops", "reaches: plain, accelerated (untrained)", "first losses differ by"]
    heads += ["ms a step, float32", "bfloat16", "MB a step"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in of:
        wide, half = (json.loads(found_by((name, dtype), out).read_text()) for dtype in ("float32", "bfloat16"))
        lines.append("| " + " | ".join(row(name, wide, half)) + " |")
    return lines


def row(name: str, wide: dict, half: dict) -> list[str]:
    head = re.search(r'"""(.*?)"""', (SYSTEMS / f"{name}.py").read_text(), re.DOTALL)
    title, _, text = (head[1] if head else name).partition(":")
    ops = ", ".join(dict.fromkeys(re.findall(r"`(\w+)`", text)))
    plain, ours = wide["plain"], wide["accelerated"]
    reached = "; ".join(
        f"{score}: {value:.2f}, {ours['scores'][score][0]:.2f} ({baseline:.2f})"
        for score, (value, baseline) in plain["scores"].items()
    )
    times = [f"{each['plain']['step_ms']:.0f} / {each['accelerated']['step_ms']:.0f}" for each in (wide, half)]
    memory = " / ".join(f"{way['peak_bytes'] / 2**20:.0f}" for way in (plain, ours))
    return [f"[{title}]({name}.py)", ops, reached, f"{apart(plain, ours):.0e}", *times, memory]


def apart(plain: dict, ours: dict) -> float:
    """The largest difference of the first losses, as a part of them."""
    pairs = (zip(curve[:FIRST], ours["curves"][name][:FIRST], strict=True) for name, curve in plain["curves"].items())
    first = next(iter(pairs))
    return max(abs(a - b) / abs(a) for a, b in first)


def write(table: str) -> None:
    file = SYSTEMS / "README.md"
    before, _, rest = file.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    file.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


if __name__ == "__main__":
    main()
