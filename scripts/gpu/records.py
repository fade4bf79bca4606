"""What is known so far: a line of JSON for each row, in records.jsonl, on the disk before the next row begins.
`python -m gpu.records` prints what a build made now would be, as `build` says it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("mmkernels", "csrc", "CMakeLists.txt", "setup.py")  # of the package that is measured
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".txt"}


def sources() -> str:
    """Twelve digits that are others as soon as a line of the package is: where there is no git, and where there is, but
    with changes."""
    every = (file for name in SOURCES for file in (ROOT / name, *(ROOT / name).rglob("*")))
    digest = hashlib.sha256()
    for file in sorted(file for file in every if file.is_file() and file.suffix in SUFFIXES):
        digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def build() -> str:
    """What a build is made of and for: the sources, and the version of Python."""
    return f"{sources()} {sys.implementation.cache_tag}"


class Records:
    """The results of one state of the sources; those of others stay in the file and count for nothing.

    A result is a dict. With a "failure" in it, or a reason why the row was "skipped", the row is not settled.
    """

    def __init__(self, folder: Path, made_of: str):
        self._file, self.sources = folder / "records.jsonl", made_of
        self.steps: dict[str, dict[str, dict]] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            self._take(line)

    def add(self, step: str, row: str | None, result: dict | None = None) -> None:
        """Row None: the step begins anew, and what was known of it is forgotten."""
        line = json.dumps({"sources": self.sources, "step": step, "row": row, "result": result})
        with self._file.open("a+b") as file:
            if file.tell() and self._ends_in_a_line_cut_short():
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def settled(self, step: str, row: str) -> bool:
        result = self.steps.get(step, {}).get(row)
        return result is not None and not result.keys() & {"failure", "skipped"}

    def _take(self, line: str) -> None:
        try:
            record = json.loads(line)
        except ValueError:  # the machine went while it was written
            return
        if record["sources"] != self.sources:
            return
        if record["row"] is None:
            self.steps.pop(record["step"], None)
        else:
            self.steps.setdefault(record["step"], {})[record["row"]] = record["result"]

    def _ends_in_a_line_cut_short(self) -> bool:
        with self._file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"


if __name__ == "__main__":
    print(build())
