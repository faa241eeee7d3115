"""Real CT and MRI; skipped where the volumes are not."""

import json

import nibabel
import numpy as np
import pytest

from tests.conftest import metrics, monai_bundle
from tools import datalist


@pytest.fixture(scope="module")
def real_list(real_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "datalist.json"
    brains = [f"{name}={real_data}/brain_mri/images/*_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
    sources = [f"ct={real_data}/ct/images", f"t1={real_data}/abdomen_mri/images", f"t2={real_data}/fetal_mri/images"]
    assert datalist.main([str(path), *sources, *brains, "--validation", "0.2"]) == 0
    return path


def test_all_five_modalities_are_listed(real_list):
    content = json.loads(real_list.read_text())
    assert {entry["modality"] for entry in content["training"]} == {"ct", "t1", "t1ce", "t2", "flair"}
    assert {entry["modality"] for entry in content["validation"]} == {"ct", "t1", "t2"}


def test_an_epoch_on_all_five_modalities_and_inference_in_the_scan_s_geometry(real_list, real_data, tmp_path):
    done = monai_bundle("train", datalist=real_list, max_epochs=1, output_dir=tmp_path, ckpt_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = metrics(tmp_path)
    assert np.isfinite(list(line.values())).all()
    scan = real_data / "ct" / "images" / "abdomen_slab_3mm.nii.gz"
    done = monai_bundle(
        "inference", dataset_dir=scan, ckpt_dir=tmp_path, output_dir=tmp_path, pixdim_mm="[4,4,4]", overlap=0.25
    )
    assert done.returncode == 0, done.stderr
    source, restored = nibabel.load(scan), nibabel.load(tmp_path / "abdomen_slab_3mm_restored.nii.gz")
    assert restored.shape == source.shape and np.allclose(restored.affine, source.affine, atol=1e-4)
