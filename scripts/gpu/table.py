"""Numbers in columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(heading: Sequence[str], lines: Sequence[Sequence[object]]) -> list[str]:
    """Columns as wide as they need; words to the left, numbers to the right."""
    columns = [_column(title, values) for title, *values in zip(heading, *lines, strict=True)]
    return ["  " + "  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def _column(title: str, values: Sequence[object]) -> list[str]:
    texts = [title, *map(_text, values)]
    width = max(map(len, texts))
    words = any(isinstance(value, str) for value in values)
    return [text.ljust(width) if words else text.rjust(width) for text in texts]


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
    return str(value)
