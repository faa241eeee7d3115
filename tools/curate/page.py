"""The page to look at (to come)."""

from pathlib import Path


def write_page(rows, out: Path) -> Path:
    return out / "page.html"
