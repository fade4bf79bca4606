"""The page that says what is known."""

from __future__ import annotations

import json
from pathlib import Path

from .bench import tables
from .records import Records
from .steps import module_of

ENDS = "ends"  # where the records say how each step ended
SHOWN = 8  # reasons of a step that are told in full


def page(folder: Path, records: Records) -> list[str]:
    log = folder / "log.txt"
    printed = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [f"sources {records.sources}", *[line for line in printed if line.startswith("== install")][-1:]]
    for step, results in records.steps.items():
        if step == ENDS:
            continue
        lines += ["", f"{step}: {counted(results, records.steps.get(ENDS, {}).get(step))}"]
        try:
            lines += module_of(step).told(results)
        except Exception as error:  # what was measured is in records.jsonl, and what follows is told all the same
            lines.append(f"  cannot be told: {type(error).__name__}: {error}")
        lines += unsettled(results)
    for path in sorted(folder.glob("bench-*.json")):
        content = json.loads(path.read_text())
        unmeasured = content["env"]["unmeasured"]
        lines += ["", path.stem, *tables(content["env"], content["peaks"], content["results"], unmeasured)]
    return lines


def counted(results: dict[str, dict], end: dict | None) -> str:
    failed = sum("failure" in result for result in results.values())
    skipped = sum("skipped" in result for result in results.values() if "failure" not in result)
    counts = {"measured": len(results) - failed - skipped, "FAILED": failed, "skipped": skipped}
    if end is None:
        return f"{_told(counts)}, and did not come to its end"
    return f"{_told(counts | {'not reached': end['left']})}; {end['seconds']:.0f} s"


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"


def unsettled(results: dict[str, dict]) -> list[str]:
    """What failed, and what was skipped, and why."""
    lines = [f"  FAILED {result.get('reproduce', row)}: {result['failure']}" for row, result in results.items()
             if "failure" in result]  # fmt: skip
    lines += [f"  skipped {row}: {result['skipped']}" for row, result in results.items()
              if "skipped" in result and "failure" not in result]  # fmt: skip
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"  and {len(lines) - SHOWN} more: records.jsonl holds them all"]
    return lines
