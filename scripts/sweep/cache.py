"""Rows on disk, a line each, so that a sweep goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .cases import Row


class Cache:
    """Rows of one set of versions; those of others stay in the file and are not read."""

    def __init__(self, path: Path, versions: dict[str, str]):
        self.path, self.versions = path, versions
        self.rows: dict[tuple[str, str], Row] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            data = json.loads(line)
        except json.JSONDecodeError:  # the last line of a sweep that was killed
            return
        if data.pop("versions") == self.versions:
            row = Row.from_dict(data)
            self.rows[row.case.key, row.way] = row

    def has(self, key: str, ways: Iterable[str], again: Iterable[str] = ()) -> bool:
        rows = [self.rows.get((key, way)) for way in ways]
        return all(row is not None and row.verdict not in again for row in rows)

    def add(self, rows: Iterable[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            for row in rows:
                self.rows[row.case.key, row.way] = row
                file.write(json.dumps({**row.as_dict(), "versions": self.versions}) + "\n")
