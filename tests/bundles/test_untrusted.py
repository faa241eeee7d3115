"""Files from elsewhere run nothing: a checkpoint that would write a file is refused wherever a checkpoint is given."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine

from custom.engine.resume import RunState
from custom.engine.run_bundle import apply, copy_bundle
from custom.errors import BadInput
from tests.bundles.test_bad_input import spoken
from tests.conftest import PRETRAINING, SEGMENTATION, SMALL, monai_bundle
from tools import cka, package, verify, weights


class WriteFile:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "written by a checkpoint")


def save(path: Path, content, zipped: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture
def written(tmp_path):
    """What must not have been written when the test is over."""
    path = tmp_path / "written"
    yield path
    assert not path.exists()


@pytest.fixture(params=[True, False], ids=["zip", "pickle"])
def malicious(request, tmp_path, written) -> Path:
    """A checkpoint in torch's present or former format, which does write the file when it is loaded without care."""
    path = save(tmp_path / "from_the_internet" / "model.pt", {"model": WriteFile(written)}, request.param)
    torch.load(path, weights_only=False)
    written.unlink()
    return path


@pytest.mark.parametrize(
    "bundle, configs, argument",
    [
        (SEGMENTATION[1], ("train",), "pretrained"),
        (SEGMENTATION[1], ("inference",), "checkpoint"),
        (SEGMENTATION[1], ("inference", "ensemble"), "checkpoints"),
        (PRETRAINING, ("train", "evaluate"), "checkpoint"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else " ".join(value) if isinstance(value, tuple) else value,
)
def test_bundles(bundle, configs, argument, tmp_path, written, phantoms, phantom_list, labelled_lists):
    path = save(tmp_path / "model.pt", {"model": WriteFile(written)})
    more = {argument: [str(path)] if argument == "checkpoints" else path, "output_dir": tmp_path / "out"}
    if "train" in configs:
        more["datalist"] = phantom_list if bundle == PRETRAINING else labelled_lists["fetal"]
        more |= {"ckpt_dir": tmp_path / "models"}
    else:
        more["dataset_dir"] = phantoms / "fetal/images/fetal_000.nii.gz"
    assert f"{path} can't be loaded" in spoken(monai_bundle(*configs, bundle=bundle, **more))


def test_resume(tmp_path, malicious):
    run = Engine(lambda engine, batch: None)
    run.state.max_epochs = 2
    shutil.copy(malicious, tmp_path / "checkpoint_iteration=1.pt")
    RunState(tmp_path, {"model": torch.nn.Linear(1, 1)}).attach(run)
    with pytest.raises(BadInput, match=r"checkpoint_iteration=1\.pt (can't be loaded|is damaged)"):
        run.run([0], max_epochs=2)


def test_weights(tmp_path, malicious, capsys):
    assert weights.main([str(malicious), str(tmp_path / "out.pt")]) == 2
    assert str(malicious) in capsys.readouterr().err and not (tmp_path / "out.pt").exists()


def test_cka(tmp_path, malicious, phantom_list, capsys):
    arguments = ["--bundle", str(PRETRAINING), "--checkpoint", str(malicious), "--other", str(malicious)]
    assert cka.main([str(tmp_path / "out"), *arguments, "--datalist", str(phantom_list)]) == 2
    assert f"{malicious} can't be loaded" in capsys.readouterr().err


one_format = pytest.mark.parametrize("malicious", [True], ids=["zip"], indirect=True)


@one_format
def test_package_of_a_run(tmp_path, malicious, capsys):
    run = tmp_path / "run"
    copy_bundle(PRETRAINING, run, PRETRAINING / "custom")
    apply(SMALL, run)
    (run / "models").mkdir()
    shutil.copy(malicious, run / "models")
    (run / "run.json").write_text(json.dumps([{"bundle": PRETRAINING.name, "overrides": SMALL, "defaults": {}}]))
    (run / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert package.main([str(run), "--output", str(tmp_path / "dist")]) == 2
    assert f"{run}/models/model.pt can't be" in capsys.readouterr().err


@one_format
def test_verify_of_a_package(tmp_path, malicious, capsys):
    """One that is right but for the weights, sums included."""
    folder = verify.unpack(package.build(PRETRAINING, tmp_path / "dist"), tmp_path)
    (folder / "models").mkdir(exist_ok=True)
    shutil.copy(malicious, folder / "models")
    package.write_sums(folder, {name: path for name, path in verify.files(folder).items() if name != verify.SUMS})
    assert verify.main([str(folder)]) == 1
    assert "weights_only" in capsys.readouterr().out
