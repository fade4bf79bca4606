"""Measures steps, and keeps summary.txt up to date.

    python -m gpu --device cuda --out DIR --seconds 400 check losses     # goes on where an earlier call stopped
    python -m gpu --device cuda --out DIR --seconds 460 --anew info check-clip_loss
    python -m gpu --out DIR summary                                      # prints it

A row that has a result is not measured again, unless --anew says so or the package's sources are others. Steps that
no earlier call came to the end of are first; then come the rows of others that were not reached, that failed, or that
were skipped since something was missing. Exits with 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from . import BEGUN
from .pool import Pool
from .records import Records, sources
from .steps import module_of, rows_of
from .summary import ENDS, page

REHEARSED_SECONDS = 40.0  # a step on a CPU at most, which is enough to see that it runs


def main() -> int:
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started is ended
    until = BEGUN + options.seconds
    records = Records(options.out, sources())
    summary = options.out / "summary.txt"
    right = True
    with Pool(options.out / "log.txt") as pool:
        for step in options.steps if options.anew else in_order(options.steps, records):
            if step == "summary":
                print("\n".join(page(options.out, records)), flush=True)
            else:
                try:
                    right &= measure(step, records, pool, until, options)
                except Exception:  # the next step is worth its time all the same
                    traceback.print_exc()
                    right = False
                summary.write_text("\n".join(page(options.out, records)) + "\n")
                if any("stop" in result for result in records.steps.get(step, {}).values()):
                    print("nothing else can be measured here", flush=True)
                    return 1
    return 0 if right else 1


def in_order(steps: list[str], records: Records) -> list[str]:
    """First those that no earlier call came to the end of; then what was left of the others, and what failed; then the
    summary."""
    return sorted(steps, key=lambda step: (step == "summary", step in records.steps.get(ENDS, {})))


def measure(step: str, records: Records, pool: Pool, until: float, options: argparse.Namespace) -> bool:
    """Whether no row of it failed."""
    start, module = time.monotonic(), module_of(step)
    earlier = 0.0 if options.anew else records.steps.get(ENDS, {}).get(step, {"seconds": 0.0})["seconds"]
    if options.anew:
        records.add(step, None)
    rows = rows_of(step, options.device)
    waiting = [row for row in rows if not records.settled(step, row.name)]
    waiting.sort(key=lambda row: row.name in records.steps.get(step, {}))  # what failed comes after what is new
    if not options.anew:
        until = min(until, start + (module.SECONDS if options.device == "cuda" else REHEARSED_SECONDS))
    print(f"{step}: {len(waiting)} of {len(rows)} rows to measure, in {until - start:.0f} s at most", flush=True)
    reached, row_seconds = 0, module.ROW_SECONDS * (4 if options.anew else 1)  # then nobody waits for what comes next
    for row, result in pool.run(waiting, module.WORKERS, row_seconds, until):
        records.add(step, row, result)
        reached += 1
        if "failure" in result:
            print(f"  FAILED {row}: {result['failure'][:400]}", flush=True)
    seconds = time.monotonic() - start
    failed = sum("failure" in result for result in records.steps.get(step, {}).values())
    left = len(waiting) - reached
    records.add(ENDS, step, {"left": left, "seconds": earlier + seconds})
    print(f"{step}: {reached} measured, {left} not reached, {failed} failed, {seconds:.0f} s", flush=True)
    return not failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the folder of records.jsonl and summary.txt")
    parser.add_argument("--seconds", type=float, default=540.0, help="that all of it takes at most")
    parser.add_argument("--anew", action="store_true", help="what earlier calls left is measured again")
    parser.add_argument("steps", nargs="+", metavar="STEP")
    return parser


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # else Python would wait for a process that the GPU does not let go
