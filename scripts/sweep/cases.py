"""What is swept, and what comes of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

WAYS = ("accelerate", "by name")
VERDICTS = ("right", "left", "refused", "WRONG", "plain fails", "cannot be built")


@dataclass(frozen=True)
class Case:
    """One class or architecture of a library."""

    library: str
    family: str
    name: str

    @property
    def key(self) -> str:
        return f"{self.library}/{self.family}/{self.name}"


@dataclass
class Row:
    """What one way of accelerating made of one case."""

    case: Case
    way: str
    verdict: str
    why: str = ""
    swapped: dict[str, int] = field(default_factory=dict)  # class -> how many of its modules
    notes: list[str] = field(default_factory=list)  # what was run, and what fell back
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Row:
        return Row(Case(**data.pop("case")), **data)
