"""A run changes its process as long as it lasts, and in a notebook no longer than its cell."""

import sys

import pytest
import torch

from custom.engine.process import change_process, take_back
from custom.errors import BadInput


def state() -> tuple:
    deterministic = torch.utils.deterministic.fill_uninitialized_memory
    return sys.excepthook, list(sys.path), torch.are_deterministic_algorithms_enabled(), deterministic


@pytest.fixture
def before():
    sys.path.insert(0, "another's")
    found = state()
    yield found
    take_back()
    sys.path.remove("another's")


def test_all_is_taken_back(before, tmp_path):
    """The bundle's folder once, since MONAI Label puts it there too and takes its own away."""
    for _ in range(2):  # the first as of a run that failed, whose end was never reached
        sys.path.insert(0, str(tmp_path))
        change_process(str(tmp_path), [str(tmp_path), "not there"])
        assert sys.excepthook is not before[0]
        assert torch.are_deterministic_algorithms_enabled() or torch.cuda.is_available()
    take_back()
    assert state() == before
    take_back()
    assert state() == before


class Shell:
    """What IPython's shell has of it: https://ipython.readthedocs.io, set_custom_exc and events."""

    def __init__(self) -> None:
        self.events, self.registered, self.custom, self.shown = self, [], ((), None), []

    def set_custom_exc(self, kinds, handler):
        self.custom = (kinds, handler)

    def register(self, event, function):
        self.registered.append((event, function))

    def unregister(self, event, function):
        self.registered.remove((event, function))

    def showtraceback(self, error, tb_offset=None):
        self.shown.append(error)


def test_in_a_notebook_the_end_of_the_cell_takes_all_back(before, tmp_path, monkeypatch, capsys):
    shell = Shell()
    shell.get_ipython = lambda: shell
    monkeypatch.setitem(sys.modules, "IPython", shell)
    change_process(str(tmp_path))
    (kind,), show = shell.custom
    for error in (BadInput("a.nii is no scan."), RuntimeError("ours")):
        assert isinstance(error, kind)
        show(shell, type(error), error, None)
    said = capsys.readouterr().err
    assert f"error: a.nii is no scan. (The traceback is kept in {tmp_path}/error.txt.)" in said
    assert "a fault of the program" in said and [str(error) for _, error, _ in shell.shown] == ["ours"]
    ((event, end),) = shell.registered
    assert event == "post_run_cell"
    end(None)
    assert state() == before and shell.custom == ((), None) and not shell.registered
