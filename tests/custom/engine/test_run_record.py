import shutil
import subprocess

import pytest

from custom.engine.run_record import TRACKER, commit, holds_path, overrides, portable, without_tracking
from tests.conftest import ROOT

HANDLERS = [{"_target_": "custom.engine.resume.RunState"}]
BASE = {
    "train": {"handlers": HANDLERS},
    "handlers": HANDLERS,
    "width": 3,
    "network": {"_target_": "torch.nn.Linear", "in_features": "@width"},
    "sizes": [1, 2],
    "seed": 0,
}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {}),
        ({"width": 4, "sizes": [2]}, {"width": 4, "sizes": [2]}),
        ({"network": BASE["network"] | {"in_features": 5, "a": 1}}, {"network#in_features": 5, "network#a": 1}),
        ({"network": {"_target_": "torch.nn.Identity"}}, {"network": {"_target_": "torch.nn.Identity"}}),
        ({"handlers": [*HANDLERS, "$a"], "sizes": [1, 2, 3]}, {"+handlers": ["$a"], "sizes": [1, 2, 3]}),
        ({"train": {"handlers": [*HANDLERS, "$a"]}}, {"+train#handlers": ["$a"]}),
        ({"train": {"handlers": ["$a", *HANDLERS]}}, {"train#handlers": ["$a", *HANDLERS]}),
        ({"_meta_": {"version": "1"}, "new": None}, {"new": None}),
    ],
)
def test_overrides_are_what_differs(change, expected):
    assert overrides({**BASE, **change}, BASE) == expected


def test_tracking_is_no_setting():
    tracker = {"_target_": TRACKER, "run_name": "@run_name"}
    tracked = {**BASE, "handlers": [*HANDLERS, tracker], "train": {"handlers": [*HANDLERS, tracker]}, "run_name": "a"}
    assert without_tracking(tracked) == BASE


def test_what_weights_carry_names_no_folder_of_the_machine():
    changed = {
        "seed": 1,
        "datalist": "/data/l.json",
        "train#dataset#data": [{"image": "/data/a.nii"}],
        "labels": ["a/b"],
    }
    assert portable({"overrides": changed, "seed": 1}) == {"overrides": {"seed": 1, "labels": ["a/b"]}, "seed": 1}
    assert portable({"overrides": None}) == {"overrides": {}}
    assert not holds_path({"a": [1, None, "$@bundle_root + '/models'"]})


def git(folder, *arguments):
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_module_s_own_checkout(tmp_path, monkeypatch):
    copy = tmp_path / "custom" / "engine" / "run_record.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / "custom" / "engine" / "run_record.py", copy)
    monkeypatch.setattr("custom.engine.run_record.__file__", str(copy))
    assert commit() is None
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "another project")
    assert commit() is None  # a bundle that was downloaded into it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "with the module")
    assert commit() == git(tmp_path, "rev-parse", "HEAD").strip()
    copy.write_text("")
    assert commit() == git(tmp_path, "rev-parse", "HEAD").strip() + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() is None
