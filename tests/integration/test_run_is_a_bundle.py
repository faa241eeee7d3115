"""One training, and all that comes after it from its folder: no setting is repeated, a contradicting one is refused."""

import subprocess
import sys

import nibabel
import pytest

from custom.files import read_json
from tests.conftest import BACKBONES, ROOT, SMALL, folders, monai_bundle, overrides
from tests.integration.conftest import FETA
from tools import cka, package, verify

CONTRADICTION = {"pixdim_mm": [5, 5, 5]}


@pytest.fixture(scope="module", params=BACKBONES)
def trained(request, labelled_lists, tmp_path_factory):
    """The folder of a fine-tuning with another spacing, size and fold than the bundle's, and the fetal scans."""
    folder = tmp_path_factory.mktemp("run")
    more = {"datalist": labelled_lists["fetal"], "fold": 1, "pixdim_mm": [4, 4, 4], "max_epochs": 1, "val_interval": 1}
    done = monai_bundle("train", *BACKBONES[request.param][0], bundle=FETA, **more, **folders(folder))
    assert done.returncode == 0, done.stderr
    return folder, labelled_lists["fetal"].parent / "images" / "fetal_001.nii.gz"


def run(folder, *configs, cwd, **values) -> subprocess.CompletedProcess:
    """Run configs of the folder from anywhere, with nothing but what is given here."""
    files = [str(folder / "configs" / f"{name}.json") for name in configs]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    command += overrides(bundle_root=folder, **values)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


STEPS = {
    "evaluation": (("train", "evaluate"), {}),
    "inference": (("inference",), {"dataset_dir": "SCAN"}),
    "ensemble": (
        ("inference", "ensemble"),
        {"dataset_dir": "SCAN", "checkpoints": ["RUN", "RUN"], "test_time_examples": 0},
    ),
    "going on": (("train",), {"max_epochs": 2}),
}


@pytest.mark.parametrize("step", STEPS)
def test_what_comes_after_needs_the_folder_alone(step, trained, tmp_path):
    folder, scan = trained
    configs, values = STEPS[step]
    places = {"SCAN": str(scan), "RUN": str(folder)}
    values = {
        name: [places[part] for part in value] if isinstance(value, list) else places.get(value, value)
        for name, value in values.items()
    }
    refused = run(
        folder, *configs, cwd=tmp_path, output_dir=folder if step == "going on" else tmp_path, **values, **CONTRADICTION
    )
    assert refused.returncode != 0
    said = next(line for line in refused.stderr.splitlines() if line.startswith("error: "))
    assert "pixdim_mm" in said and "4" in said and "5" in said, said
    done = run(folder, *configs, cwd=tmp_path, **values)
    assert done.returncode == 0, done.stderr
    if "inference" in configs:
        assert nibabel.load(folder / "eval" / "fetal_001_seg.nii.gz").shape == nibabel.load(scan).shape
    if step == "evaluation":
        assert (folder / "evaluation" / "summary.md").is_file()


def test_comparing_packaging_and_verifying_need_the_folder_alone(trained, tmp_path, capsys):
    folder, _ = trained
    crop = [str(part) for part in ("--patch_size", *SMALL["patch_size"])]
    arguments = [str(tmp_path / "cka"), str(folder), str(folder), *crop]
    assert cka.main(arguments) == 0 and "1.000" in capsys.readouterr().out
    assert cka.main([*arguments, "--pixdim_mm", "[5,5,5]"]) == 2 and "[4, 4, 4]" in capsys.readouterr().err
    assert package.main([str(folder), "--output", str(tmp_path)]) == 0
    assert verify.main([str(next(tmp_path.glob("*.zip")))]) == 0
    packed = verify.unpack(next(tmp_path.glob("*.zip")), tmp_path)
    assert read_json(packed / "configs/train.json")["pixdim_mm"] == [4, 4, 4]
    assert str(ROOT) not in (packed / "configs/train.json").read_text()


def test_the_folder_itself_is_verified(trained):
    verify.verify(trained[0])
