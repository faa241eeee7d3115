"""The entry that the tools share: their help, their errors, their exit status."""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a disk or its owner refuses is no fault of a tool.
DISK = {errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS}


def bundles() -> list[Path]:
    """Return the folders of all bundles."""
    return sorted(path.parents[1] for path in ROOT.glob("bundles/*/configs/metadata.json"))


def tool(
    name: str,
    doc: str,
    arguments: Callable[[Callable[..., Any]], None],
    run: Callable[[argparse.Namespace], int | None],
    stopped: str = "nothing was written",
    takes_ids: bool = False,
) -> Callable[..., int]:
    """Return a tool's `main`.

    Args:
        name: of the module in `tools`.
        doc: its docstring; the first line says what the tool does, the rest is shown below the help.
        arguments: called with `ArgumentParser.add_argument`.
        run: called with the options; returns an exit status other than 0, if any.
        stopped: what Ctrl-C leaves.
        takes_ids: whether arguments that are not known are ids of a config with their values, for `options.ids`.

    Returns:
        a function of the command line that returns the exit status: 0, what `run` gives, 2 for a mistake of the user,
        which one sentence tells, or 130 after Ctrl-C. Any other error is raised.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        about, _, usage = doc.partition("\n")
        parser = argparse.ArgumentParser(
            prog=f"python -m tools.{name}",
            description=about,
            epilog=usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        arguments(parser.add_argument)
        options, unknown = parser.parse_known_args(argv)
        if unknown and not takes_ids:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if takes_ids:
            options.ids = pairs(parser, unknown)
        try:
            return run(options) or 0
        except KeyboardInterrupt:
            say(f"{name}: stopped; {stopped}.", sys.stderr)
            return 130
        except Exception as error:
            from custom.errors import user_message  # verify needs none of the repository but this folder

            message = user_message(error)
            if message is None and isinstance(error, OSError) and error.errno in DISK:
                message = f"{error.filename or 'The disk'}: {error.strerror}."
            if message is None:
                raise
            say(f"{name}: {message}", sys.stderr)
            return 2

    return main


def near(path: Path) -> str:
    """Return a path as it is told from the working directory: relative where it lies below, else whole."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def say(text: str, to: Any = None) -> None:
    """Print, whatever characters a file name has and whatever the terminal can show."""
    to = to or sys.stdout
    print(text.encode(to.encoding or "ascii", "backslashreplace").decode(to.encoding or "ascii"), file=to)


def pairs(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Return the ids and values of `--id value ...` or `--id=value ...`; anything else ends the process."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        parser.error(f"ids come with their values, such as --pixdim_mm '[2,2,2]', got {' '.join(words)}.")
    return {name[2:]: value_of(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def value_of(text: str) -> Any:
    """Evaluate a literal, as `monai.bundle` does on its command line; anything else is text."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text
