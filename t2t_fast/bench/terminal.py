"""Tables and progress on the terminal: rich, or the plain text below where rich is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

__all__ = [
    "SIMPLE_HEAD",
    "BarColumn",
    "Console",
    "Progress",
    "Table",
    "TextColumn",
    "TimeRemainingColumn",
    "track",
    "wide_console",
]

if TYPE_CHECKING or importlib.util.find_spec("rich") is not None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
    from rich.table import Table
else:
    SIMPLE_HEAD = None

    class Table:
        """Columns of text, each as wide as its widest cell."""

        def __init__(self, *headings: str, **style: Any) -> None:
            self._headings, self._rows = list(headings), list[list[str]]()

        def add_column(self, heading: str, **style: Any) -> None:
            self._headings.append(heading.replace("\n", " "))

        def add_row(self, *cells: str) -> None:
            self._rows.append(list(cells))

        def __str__(self) -> str:
            lines = [self._headings, *self._rows]
            widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
            return "\n".join(
                "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
            )

    class Console:
        """Prints text."""

        is_terminal, width = False, 80

        def __init__(self, **options: Any) -> None:
            pass

        def print(self, text: Any = "", **style: Any) -> None:
            print(text)

    class Progress:
        """Shows nothing."""

        def __init__(self, *columns: Any, **options: Any) -> None:
            pass

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def add_task(self, *args: Any, **options: Any) -> int:
            return 0

        def update(self, *args: Any, **options: Any) -> None:
            pass

        advance = update

    def _column(*args: Any) -> None:
        return None

    BarColumn = TextColumn = TimeRemainingColumn = _column

    def track(items: Iterable[Any], *args: Any, **options: Any) -> Iterable[Any]:
        return items


def wide_console(width: int) -> Console:
    """Standard output, at least ``width`` columns wide: a narrow terminal then wraps lines, and cuts no figures off."""
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, width)
    return console
