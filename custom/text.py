"""Text that is printed: tables and suggestions."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def markdown_table(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows, the first of which is the header, as a Markdown table that reads well as it is."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in cells)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return "; did you mean `x`?" for the known name that is most like a name, "" if none is."""
    close = get_close_matches(str(name), list(known), n=1) or get_close_matches(str(name).lower(), list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
