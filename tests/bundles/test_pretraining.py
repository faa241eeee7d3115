"""The pre-training bundle, run as its documentation says."""

import json
import math
import shutil
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import (
    PRETRAINING,
    SMALL,
    TORCHRUN,
    autoencoder,
    folders,
    metrics,
    monai_bundle,
    overrides,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, phantom_list):
    """Two epochs on phantoms of all five modalities."""
    run = tmp_path_factory.mktemp("run")
    done = monai_bundle(
        "train", datalist=phantom_list, max_epochs=2, warmup_iterations=2, val_pictures=1, **folders(run)
    )
    assert done.returncode == 0, done.stderr
    return run


def test_training_leaves_weights_metrics_and_pictures(trained):
    lines = metrics(trained)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert {"learning_rate", "val_l1", "val_l1_disrupted_input", "val_l1_mean"} <= lines[0].keys()
    for line in lines:
        assert line["loss"] == pytest.approx(line["reconstruction"] + 0.05 * line["contrastive"], rel=1e-4)
    weights = torch.load(trained / "models" / "model.pt", weights_only=True)
    autoencoder().load_state_dict(weights)
    assert list(trained.glob("pictures/*.png"))


def test_validation_disrupts_in_the_same_way_in_every_epoch(trained):
    first, second = metrics(trained)
    for trivial in ("val_l1_disrupted_input", "val_l1_mean"):
        assert first[trivial] == second[trivial]
    assert first["val_l1"] != second["val_l1"]


def test_tensorboard_has_scalars_of_every_iteration_and_pictures(trained):
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    steps = metrics(trained)[-1]["iteration"]
    for name in ("loss", "reconstruction", "contrastive", "learning_rate"):
        assert [event.step for event in events.Scalars(name)] == list(range(1, steps + 1))
    assert len(events.Scalars("val_l1")) == 2, scalars
    assert any(tag.startswith("restoration/") for tag in events.Tags()["images"])


def test_learning_rate_warms_up_and_decays_by_iteration(trained):
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    rates = [event.value for event in events.Scalars("learning_rate")]
    # Logged after the schedule's step: linear over two iterations, then half a cosine over the others.
    others = len(rates) - 2
    cosine = [0.5 * (1 + math.cos(math.pi * step / others)) for step in range(others + 1)]
    assert others >= 2 and rates == pytest.approx([4e-4 * share for share in (0.5, *cosine)], abs=1e-9)


def test_evaluation_reports_each_case(trained, phantom_list):
    done = monai_bundle("train", "evaluate", datalist=phantom_list, val_pictures=2, **folders(trained))
    assert done.returncode == 0, done.stderr
    rows = (trained / "evaluation" / "val_l1_raw.csv").read_text().splitlines()
    assert len(rows) == 1 + len(json.loads(phantom_list.read_text())["validation"])
    assert len(list((trained / "evaluation").glob("*.png"))) == 2


def test_inference_restores_a_volume_in_its_own_geometry(trained, phantoms, tmp_path):
    scan = phantoms / "ct" / "images" / "ct_001.nii.gz"  # its first axis runs to the left
    checkpoint = trained / "models" / "model.pt"
    done = monai_bundle("inference", dataset_dir=scan, modality="ct", checkpoint=checkpoint, output_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    source, restored = nibabel.load(scan), nibabel.load(tmp_path / "ct_001_restored.nii.gz")
    assert restored.shape == source.shape and np.allclose(restored.affine, source.affine)
    assert (tmp_path / "ct_001.png").stat().st_size > 10_000


def test_a_bundle_runs_from_any_folder_without_the_repository(trained, small_list, tmp_path):
    """A copy with its own `custom`, started from elsewhere by absolute paths."""
    bundle = tmp_path / "elsewhere" / "bundle"
    shutil.copytree(PRETRAINING, bundle, symlinks=False, ignore=shutil.ignore_patterns("eval", "*.pt"))
    done = monai_bundle("train", bundle=bundle, cwd=tmp_path, datalist=small_list, max_epochs=1)
    assert done.returncode == 0, done.stderr
    assert (bundle / "models" / "model.pt").is_file() and (bundle / "eval" / "metrics.jsonl").is_file()


def test_a_bundle_runs_from_its_own_folder_by_relative_paths(small_list, tmp_path):
    """As MONAI's documentation writes it: inside the bundle, with no bundle_root."""
    bundle = tmp_path / "bundle"
    shutil.copytree(PRETRAINING, bundle, symlinks=False, ignore=shutil.ignore_patterns("eval", "*.pt"))
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.json"]
    command += overrides(datalist=small_list, max_epochs=1, **SMALL)
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (bundle / "models" / "model.pt").is_file()


def test_two_processes_train_and_write_once(small_list, tmp_path):
    """The second backbone does so in tools.studies.kills."""
    done = monai_bundle(
        "train",
        "multi_gpu_train",
        launcher=TORCHRUN,
        datalist=small_list,
        max_epochs=2,
        batch_size=1,
        **folders(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert [line["iteration"] for line in metrics(tmp_path)] == [1, 2]  # two samples over two processes
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    weights = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    autoencoder().load_state_dict(weights)


@pytest.mark.parametrize(
    "variant",
    [
        {"disruptions": '["noise"]'},
        {"disruptions": '["downsampling"]'},
        {"disruptions": '["local_masking"]'},
        {"disruptions": '["token_masking"]'},
        {"full_resolution_skip": False},
        {"contrastive_weight": 0},
        {"pixdim_mm": "[4,4,4]"},
    ],
    ids=str,
)
def test_each_comparison_is_one_override(variant, small_list, tmp_path):
    done = monai_bundle("train", datalist=small_list, max_epochs=1, **variant, **folders(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path)
    image_disrupted = variant.get("disruptions") != '["local_masking"]'
    assert (line["val_l1_disrupted_input"] > 0) is image_disrupted
    assert (line["contrastive"] > 0) is ("contrastive_weight" not in variant)


def test_a_further_modality_is_one_entry(phantom_list, tmp_path):
    scans = [str(phantom_list.parent / "brain" / "images" / f"brain_00{n}_t1.nii.gz") for n in range(2)]
    path = tmp_path / "list.json"
    entries = [[{"image": scan, "modality": "pd"}] for scan in scans]
    path.write_text(json.dumps(dict(zip(("training", "validation"), entries, strict=True))))
    further = {"modalities__pd": '{"_target_": "NormalizeIntensity", "nonzero": true}'}
    done = monai_bundle("train", datalist=path, max_epochs=1, **further, **folders(tmp_path))
    assert done.returncode == 0, done.stderr
