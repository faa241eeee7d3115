"""What a run changes in its process, and takes back at its end: a notebook goes on afterwards."""

import contextlib
import logging
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from custom.errors import report_errors, tell
from custom.speed.malloc import keep_freed_memory

_changes = contextlib.ExitStack()  # undoes them, the last one first


def change_process(output_dir: str, search_path: Sequence[str] = ()) -> None:
    """Tell errors of a user in one sentence; on a CPU, keep memory and make algorithms deterministic.

    All but the memory is undone by `take_back`: the last step of a run that ends well, and in a notebook of one that
    fails too.

    Args:
        output_dir: folder of the run, where the traceback of an error is kept.
        search_path: folders that this run has put on Python's path.
    """
    take_back()
    for folder in search_path:
        _changes.callback(_forget, folder)
    _changes.callback(setattr, sys, "excepthook", sys.excepthook)
    report_errors(output_dir)
    for handler in logging.getLogger().handlers:
        # Ignite logs a worker's whole traceback before it passes the error on.
        handler.addFilter(_is_not_the_user_s)
        _changes.callback(handler.removeFilter, _is_not_the_user_s)
    if not torch.cuda.is_available():
        keep_freed_memory()
        _changes.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        filled: Any = torch.utils.deterministic  # type: ignore[attr-defined]  # made at import
        _changes.callback(setattr, filled, "fill_uninitialized_memory", filled.fill_uninitialized_memory)
        # Else threads add the gradient of the relative positions in the order in which they come.
        torch.use_deterministic_algorithms(True)
        filled.fill_uninitialized_memory = False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        _change_notebook(shell, output_dir)


def take_back() -> None:
    """Undo what the last `change_process` has done."""
    _changes.close()


def _change_notebook(shell: Any, output_dir: str) -> None:
    """Let an error of this cell be told as on a command line, and take all back at the cell's end."""

    def show(shell: Any, kind: type, error: Exception, trace: TracebackType, tb_offset: int | None = None) -> None:
        tell(error, output_dir, lambda: shell.showtraceback((kind, error, trace), tb_offset=tb_offset))

    def after_cell(result: Any) -> None:
        take_back()

    shell.set_custom_exc((Exception,), show)
    _changes.callback(shell.set_custom_exc, (), None)
    shell.events.register("post_run_cell", after_cell)
    _changes.callback(shell.events.unregister, "post_run_cell", after_cell)


def _forget(folder: str) -> None:
    with contextlib.suppress(ValueError):
        sys.path.remove(folder)


def _is_not_the_user_s(record: logging.LogRecord) -> bool:
    return "BadInput: " not in record.getMessage()
