"""How text is printed."""

from rich.console import Console


def say(console: Console, line: str) -> None:
    """A terminal breaks the line between words; in a file it stays whole, for who searches there."""
    console.print(line, soft_wrap=not console.is_terminal)
