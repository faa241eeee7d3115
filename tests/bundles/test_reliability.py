"""Bad cases, full disks and seeds, met by the bundles; kills are those of tests/integration/test_kills.py."""

import json

import pytest
import torch

from custom.engine.checkpoint import is_whole
from tests.bundles.test_bad_input import noise, spoken, write
from tests.conftest import PRETRAINING, SEGMENTATION, autoencoder, folders, metrics, monai_bundle
from tools import prepare


def weights(run) -> dict[str, torch.Tensor]:
    return torch.load(run / "models" / "model.pt", weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def scans(tmp_path):
    """Write a data list of three scans to train on and one to validate, of which one in a section is bad."""

    def make(bad: str) -> dict:
        sections = {"training": 3, "validation": 1}
        entries = {
            section: [
                {
                    "image": write(tmp_path / f"{section}_{n}.nii.gz", noise(64, 32, 32) + 10 * len(section) + n),
                    "modality": "ct",
                }
                for n in range(count)
            ]
            for section, count in sections.items()
        }
        voxels = noise(64, 32, 32)
        voxels[3, 4, 5] = float("nan")
        write(tmp_path / f"{bad}_0.nii.gz", voxels)
        (tmp_path / "list.json").write_text(json.dumps(entries))
        return {"datalist": tmp_path / "list.json", "bad_cases": "skip", "max_bad_share": 0.4, **folders(tmp_path)}

    return make


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "cache_rate": 0}], ids=["cached", "by workers"])
def test_bad_cases_are_left_out_of_training_told_once_and_counted(options, scans, tmp_path):
    done = monai_bundle("train", max_epochs=3, **scans("training"), **options)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("training_0.nii.gz holds NaN") == 1
    assert "Left out: 1 of 3 cases" in done.stdout
    assert len(metrics(tmp_path)) == 3


def test_a_bad_case_is_never_left_out_of_validation_evaluation_or_inference(scans, tmp_path):
    more = scans("validation")
    (tmp_path / "models").mkdir()
    torch.save(autoencoder().state_dict(), tmp_path / "models" / "model.pt")
    folder = {"dataset_dir": tmp_path, "modality": "ct", **folders(tmp_path)}
    for done in (
        monai_bundle("train", max_epochs=1, **more),
        monai_bundle("train", max_epochs=1, cache_rate=0, **more),
        monai_bundle("train", "evaluate", **more),
        monai_bundle("inference", **folder),
    ):
        assert "validation_0.nii.gz holds NaN" in spoken(done)


def test_a_disk_that_is_full_is_told_and_the_run_goes_on_when_there_is_room(small_disk, small_list, tmp_path):
    disk, resize = small_disk
    arguments = {"datalist": small_list, "max_epochs": 3, "warmup_iterations": 1}
    done = monai_bundle("train", **arguments, **folders(tmp_path / "whole"))
    assert done.returncode == 0, done.stderr
    state, model = (
        (tmp_path / "whole" / name).stat().st_size for name in ("checkpoint_iteration=3.pt", "models/model.pt")
    )
    resize(int(1.5 * state + 2 * model))  # the second checkpoint has no room
    run = disk / "run"
    message = spoken(monai_bundle("train", **arguments, **folders(run)))
    assert f"{run}/checkpoint_iteration=2.pt could not be saved" in message and "No space left on device" in message
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint_iteration=1.pt"]
    assert is_whole(run / "checkpoint_iteration=1.pt") and is_whole(run / "models" / "model.pt")
    resize(4 * state + 2 * model)
    done = monai_bundle("train", **arguments, **folders(run))
    assert done.returncode == 0 and "Resuming from" in done.stdout, done.stderr
    assert metrics(run) == metrics(tmp_path / "whole") and same(weights(run), weights(tmp_path / "whole"))


@pytest.mark.parametrize("bundle", [PRETRAINING, SEGMENTATION[1]], ids=lambda bundle: bundle.name)
def test_the_seed_decides_and_not_the_number_of_workers_or_a_store(bundle, small_list, labelled_lists, tmp_path):
    datalist = small_list if bundle == PRETRAINING else labelled_lists["fetal"]
    arguments = {"datalist": datalist, "max_epochs": 2, "val_interval": 1, "learning_rate": 0.01}
    store = {"num_workers": 2, "store": tmp_path / "store"}
    assert prepare.main([str(datalist), str(store["store"]), "--bundle", str(bundle)]) == 0
    for name, more in {"a": {}, "b": store, "c": {"seed": 1}}.items():
        done = monai_bundle("train", bundle=bundle, **arguments, **more, **folders(tmp_path / name))
        assert done.returncode == 0, done.stderr
    a, b, c = (tmp_path / name for name in "abc")
    assert metrics(a) == metrics(b) != metrics(c)
    assert same(weights(a), weights(b)) and not same(weights(a), weights(c))
