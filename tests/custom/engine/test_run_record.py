import json
import shutil
import subprocess

import monai
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow

from custom.engine.run_record import RunRecord, commit, overrides
from tests.conftest import ROOT

BASE = {"width": 3, "network": {"_target_": "torch.nn.Linear", "in_features": "@width"}, "sizes": [1, 2], "seed": 0}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {}),
        ({"width": 4, "sizes": [2]}, {"width": 4, "sizes": [2]}),
        ({"network": BASE["network"] | {"in_features": 5, "a": 1}}, {"network#in_features": 5, "network#a": 1}),
        ({"network": {"_target_": "torch.nn.Identity"}}, {"network": {"_target_": "torch.nn.Identity"}}),
        ({"_meta_": {"version": "1"}, "new": None}, {"new": None}),
    ],
)
def test_overrides_are_what_differs(change, expected):
    assert overrides({**BASE, **change}, BASE) == expected


@pytest.fixture
def bundle(tmp_path):
    """A bundle that trains nothing."""
    configs = tmp_path / "some_bundle" / "configs"
    configs.mkdir(parents=True)
    record = {"_target_": "custom.engine.run_record.RunRecord", "resume": True}
    train = {
        "imports": ["$from ignite.engine import Engine"],
        "output_dir": str(tmp_path / "run"),
        "datalist": str(tmp_path / "list.json"),
        "seed": 0,
        "device": "cpu",
        "train": {"dataset": {"data": "@datalist"}},
        "record": record | {name: f"@{name}" for name in ("output_dir", "datalist", "seed")},
        "engine": "$Engine(lambda engine, batch: None)",
        "run": ["$@record.attach(@engine)", "$@engine.run([0])"],
    }
    (configs / "train.json").write_text(json.dumps(train))
    (configs / "metadata.json").write_text(json.dumps({"version": "1.2.3"}))
    (tmp_path / "list.json").write_text("{}")
    return configs


def run(configs, **values) -> list[dict]:
    """Run it with overrides and return the starts that were recorded."""
    workflow = ConfigWorkflow(str(configs / "train.json"), workflow_type=None, logging_file=False, **values)
    workflow.initialize()
    workflow.run()
    return json.loads((configs.parents[1] / "run" / "run.json").read_text())


def test_a_start_is_recorded(bundle):
    (start,) = run(bundle, seed=7)
    # sha256sum of a file with the two characters {}
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert (start["bundle"], start["version"], start["seed"]) == ("some_bundle", "1.2.3", 7)
    assert (start["overrides"], start["datalist_sha256"]) == ({"seed": 7}, digest)
    assert start["versions"]["torch"] == torch.__version__ and start["versions"]["monai"] == monai.__version__
    assert start["started"].endswith("+00:00")


def test_a_resumed_run_adds_a_start_and_another_begins_anew(bundle):
    run(bundle, seed=1)
    assert [start["overrides"] for start in run(bundle, seed=2)] == [{"seed": 1}, {"seed": 2}]
    (start,) = run(bundle, **{"record#resume": False})
    assert start["overrides"] == {"record#resume": False}


def test_cases_that_are_given_without_a_list_as_by_a_server(bundle):
    """MONAI Label puts the cases and a device into the config."""
    cases = [{"image": "a.nii.gz", "label": "b.nii.gz"}]
    (start,) = run(bundle, **{"train#dataset#data": cases, "device": torch.device("cpu")})
    assert start["overrides"] == {"train#dataset#data": cases, "device": "cpu"} and start["datalist_sha256"] is None


def test_without_a_workflow_the_config_is_not_known(tmp_path):
    engine = Engine(lambda engine, batch: None)
    RunRecord(tmp_path, tmp_path / "missing.json", seed=0).attach(engine)
    engine.run([0])
    (start,) = json.loads((tmp_path / "run.json").read_text())
    assert start["bundle"] is start["overrides"] is start["datalist_sha256"] is None


def git(folder, *arguments):
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", "-C", folder, *who, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_module_s_own_checkout(tmp_path, monkeypatch):
    copy = tmp_path / "custom" / "engine" / "run_record.py"
    copy.parent.mkdir()
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
