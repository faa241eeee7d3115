"""Files that are written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from custom.errors import BadInput

LINE = 119  # characters
NAMES: dict[type, str] = {dict: "object", list: "list"}


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """Yield a path beside a file; what is written there takes the file's place when the block ends without an error.

    A kill leaves the old file, or the new one, and at most one file that ends in ".part".
    """
    file = Path(file)
    part = file.with_name(f"{file.name}.part")
    try:
        yield part
        os.replace(part, file)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(file: str | Path, text: str) -> None:
    """Write a text file whole or not at all, and its folder if that is missing.

    File names that are no UTF-8 keep their bytes.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def write_json(file: str | Path, content: Any) -> None:
    """Write JSON whole or not at all, as the bundles' configs are written; what JSON does not know becomes its text."""
    write_text(file, dumps(content) + "\n")


def dumps(content: Any, indent: int = 0) -> str:
    """Return JSON in which lists of plain values, and short objects inside others, take one line each."""
    if not isinstance(content, dict | list) or not content:
        return json.dumps(content, default=str)
    values = content.values() if isinstance(content, dict) else content
    inside = [part for value in values for part in (value if isinstance(value, list) else [value])]
    flat = not any(isinstance(part, dict | list) for part in inside)
    line = json.dumps(content, default=str)
    if flat and len(line) + indent <= LINE and (isinstance(content, list) or indent > 4):
        return line
    inner = [dumps(value, indent + 4) for value in values]
    if isinstance(content, dict):
        inner = [f"{json.dumps(str(key))}: {value}" for key, value in zip(content, inner, strict=True)]
    begin, end = "{}" if isinstance(content, dict) else "[]"
    space = " " * indent
    return f"{begin}\n{space}    " + f",\n{space}    ".join(inner) + f"\n{space}{end}"


def read_json(file: str | Path, kind: type = dict) -> Any:
    """Read a JSON object, or a list where `kind` says so; a byte order mark does no harm.

    Raises:
        BadInput: for a file that can't be read, or holds something else.
    """
    try:
        content = json.loads(Path(file).read_bytes())  # of UTF-8 or UTF-16
    except OSError as error:
        raise BadInput(f"{file} can't be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, kind):
        raise BadInput(f"{file} should hold a JSON {NAMES[kind]}, it holds {json.dumps(content)[:60]}.")
    return content
