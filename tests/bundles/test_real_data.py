"""Real CT and MRI; skipped where the volumes are not."""

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks import one_hot

from tests.conftest import SEGMENTATION, folders, metrics, monai_bundle
from tools import datalist


@pytest.fixture(scope="module")
def real_list(real_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "datalist.json"
    brains = [f"{name}={real_data}/brain_mri/images/*_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
    sources = [f"ct={real_data}/ct/images", f"t1={real_data}/abdomen_mri/images", f"t2={real_data}/fetal_mri/images"]
    assert datalist.main([str(path), *sources, *brains, "--validation", "0.2"]) == 0
    content = json.loads(path.read_text())
    for side in ("training", "validation"):  # one scan of each modality
        content[side] = list({entry["modality"]: entry for entry in content[side]}.values())
    path.write_text(json.dumps(content))
    return path


def test_all_five_modalities_are_listed(real_list):
    content = json.loads(real_list.read_text())
    assert {entry["modality"] for entry in content["training"]} == {"ct", "t1", "t1ce", "t2", "flair"}
    assert {entry["modality"] for entry in content["validation"]} == {"ct", "t1", "t2"}


def test_an_epoch_on_all_five_modalities_and_inference_in_the_scan_s_geometry(real_list, real_data, tmp_path):
    coarse = {"pixdim_mm": [4, 4, 4], "output_dir": tmp_path, "ckpt_dir": tmp_path}
    done = monai_bundle("train", datalist=real_list, max_epochs=1, **coarse)
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path)
    assert np.isfinite(list(line.values())).all()
    scan = real_data / "ct" / "images" / "abdomen_slab_3mm.nii.gz"
    done = monai_bundle("inference", dataset_dir=scan, overlap=0.25, **coarse)
    assert done.returncode == 0, done.stderr
    source, restored = nibabel.load(scan), nibabel.load(tmp_path / "abdomen_slab_3mm_restored.nii.gz")
    assert restored.shape == source.shape and np.allclose(restored.affine, source.affine, atol=1e-4)


BTCV, FETA = SEGMENTATION


@pytest.mark.parametrize(
    "bundle, folder, name", [(BTCV, "ct", "abdomen_slab_3mm"), (FETA, "fetal_mri", "fetal_SB_atlas_GA28_operated")]
)
def test_a_perfect_network_gives_back_the_labels(bundle, folder, name, real_data):
    """Through orientation, spacing, cropping and their inverses: the ids, and where they are, survive."""
    train, inference = ConfigParser(), ConfigParser()
    train.read_config(str(bundle / "configs/train.json"))
    inference.read_config(str(bundle / "configs/inference.json"))
    labels = inference["labels"]
    image, label = (str(real_data / folder / kind / f"{name}.nii.gz") for kind in ("images", "labels"))
    # What training cuts its crops from, and what inference makes of its answer.
    shown = train.get_parsed_content("train#preprocessing").transforms[0]({"image": image, "label": label})
    given = inference.get_parsed_content("preprocessing")({"image": image})["image"]
    # To the rounding of single precision, in which inference finds the places to resample at.
    torch.testing.assert_close(shown["image"].as_tensor(), given.as_tensor(), rtol=0, atol=1e-3)
    logits = given.new_tensor(10 * one_hot(torch.as_tensor(shown["label"])[None], len(labels))[0])
    logits.copy_meta_from(given)
    back = inference.get_parsed_content("postprocessing")({"pred": logits, "image": given})["pred"]
    truth, back = np.asarray(nibabel.load(label).dataobj), np.asarray(back[0])
    assert back.shape == truth.shape
    for number in range(1, len(labels)):
        if (truth == number).sum() > 200:
            mine, true = back == number, truth == number
            assert 2 * (mine & true).sum() / (mine.sum() + true.sum()) > 0.9, labels[number]


def test_a_labelled_ct_trains_and_a_torso_is_segmented_in_its_own_geometry(real_data, tmp_path):
    entry = {"image": "images/abdomen_slab_3mm.nii.gz", "label": "labels/abdomen_slab_3mm.nii.gz"}
    other = {key: str(tmp_path / f"{key}.nii.gz") for key in entry}  # some slices fewer: one scan is no validation
    for key, file in entry.items():
        nibabel.load(real_data / "ct" / file).slicer[:, :, 3:].to_filename(other[key])
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry], "validation": [other]}))
    coarse = {"bundle": BTCV, "pixdim_mm": [4, 4, 4], "dataset_dir": real_data / "ct"}
    done = monai_bundle("train", datalist=tmp_path / "list.json", max_epochs=1, **coarse, **folders(tmp_path))
    assert done.returncode == 0, done.stderr
    scan = real_data / "ct" / "images" / "torso_3mm.nii.gz"
    out = {"ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "out", "overlap": 0.25}
    done = monai_bundle("inference", **{**coarse, "dataset_dir": scan}, **out)
    assert done.returncode == 0, done.stderr
    source, predicted = nibabel.load(scan), nibabel.load(tmp_path / "out" / "torso_3mm_seg.nii.gz")
    assert predicted.shape == source.shape and np.allclose(predicted.affine, source.affine, atol=1e-4)
    assert set(np.unique(predicted.dataobj)) <= set(range(14))
