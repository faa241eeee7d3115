"""Pre-trained here, fine-tuned and applied by the real nnU-Net v2, as docs/howto/nnunet.md says; and back."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from tests.conftest import PRETRAINING, folders, monai_bundle
from tests.integration.conftest import python_of
from tools import resenc, weights

SHORT = Path(__file__).with_name("short_nnunet.py")
SIZES = {"patch_size": [32, 64, 32], "network_def__network__n_blocks_per_stage": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory):
    """Run a program of nnU-Net in its environment; returns what it printed."""
    bin, folder = python_of("nnunet").parent, tmp_path_factory.mktemp("nnunet")
    places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    quick = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}

    def run(program, *arguments, **more):
        command = [bin / "python", program] if isinstance(program, Path) else [bin / f"nnUNetv2_{program}"]
        environment = {**os.environ, **places, **quick, **more}
        done = subprocess.run(
            [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run, folder


@pytest.fixture(scope="module")
def raw(nnunet, real_data):
    """A raw data set of nnU-Net's: three hippocampi to train on, one to predict."""
    source, folder = real_data / "hippocampus_mri", nnunet[1] / "raw" / "Dataset001_Hippocampus"
    names = sorted(path.name.removesuffix(".nii.gz") for path in (source / "images").iterdir())[:4]
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for number, name in enumerate(names):
        images = folder / ("imagesTr" if number < 3 else "imagesTs")
        shutil.copyfile(source / f"images/{name}.nii.gz", images / f"{name}_0000.nii.gz")
        if number < 3:
            shutil.copyfile(source / f"labels/{name}.nii.gz", folder / f"labelsTr/{name}.nii.gz")
    content = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "anterior": 1, "posterior": 2}}
    content |= {"numTraining": 3, "file_ending": ".nii.gz", "overwrite_image_reader_writer": resenc.READER}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def pretrained(raw, tmp_path_factory):
    """A short pre-training on the same scans, without their labels."""
    run = tmp_path_factory.mktemp("pretraining")
    scans = [{"image": str(path), "modality": "t1"} for path in sorted((raw / "imagesTr").iterdir())]
    (run / "scans.json").write_text(json.dumps({"training": scans[:2], "validation": scans[2:]}))
    more = {"datalist": run / "scans.json", "pixdim_mm": [1, 1, 1], "max_epochs": 1, **SIZES}
    done = monai_bundle("train", "resenc", bundle=PRETRAINING, **more, **folders(run / "run"))
    assert done.returncode == 0, done.stderr
    return run / "run" / "models" / "model.pt"


@pytest.mark.timeout(1800)
def test_weights_go_to_nnunet_are_taken_and_come_back(nnunet, raw, pretrained, tmp_path):
    run, folder = nnunet
    run("extract_fingerprint", "-d", 1, "-np", 1)
    run("plan_experiment", "-d", 1, "-pl", "nnUNetPlannerResEncM")
    planned = folder / "preprocessed" / raw.name / "nnUNetResEncUNetMPlans.json"
    assert weights.main([str(pretrained), str(tmp_path / "dae.pth"), "--to", "nnunet", "--plans", str(planned)]) == 0
    run("preprocess", "-d", 1, "-c", "3d_fullres", "-plans_name", "dae", "-np", 1)
    # At a learning rate of zero the weights that nnU-Net saves are those that it started from.
    options = ("1", "3d_fullres", "all", "-p", "dae", "-device", "cpu", "-pretrained_weights", tmp_path / "dae.pth")
    told = run(SHORT, *options, nnUNet_n_proc_DA="0")  # the planner refuses 0
    assert f"Loading pretrained weights from file  {tmp_path}/dae.pth" in told
    trained = folder / "results" / raw.name / "nnUNetTrainer__dae__3d_fullres" / "fold_all" / "checkpoint_final.pth"
    assert weights.main([str(trained), str(tmp_path / "back.pt")]) == 0
    before = torch.load(pretrained, weights_only=True)
    after = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert before.keys() == after.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    assert differ and all(".seg_layers." in name for name in differ)
    output = folder / "predictions"
    options = ("-d", 1, "-c", "3d_fullres", "-p", "dae", "-f", "all", "-npp", 1, "-nps", 1, "-device", "cpu")
    run("predict", "-i", raw / "imagesTs", "-o", output, "--disable_tta", *options)
    (scan,) = (raw / "imagesTs").iterdir()
    predicted = nibabel.load(output / scan.name.replace("_0000", ""))
    assert predicted.shape == nibabel.load(scan).shape and set(np.unique(predicted.dataobj)) <= {0, 1, 2}
