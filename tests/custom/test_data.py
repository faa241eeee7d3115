import json

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from custom.data import ByModalityd, find_scans, read_datalist
from custom.errors import BadInput
from tests.conftest import PRETRAINING


@pytest.fixture
def modalities() -> dict:
    """The normalisations that the bundle declares."""
    return ConfigParser(ConfigParser.load_config_file(PRETRAINING / "configs" / "train.json")).get_parsed_content(
        "modalities"
    )


def test_a_modality_is_no_path_even_beside_a_folder_of_its_name(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "a.nii.gz").touch()
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [{"image": "ct/a.nii.gz", "modality": "ct"}]}))
    (item,) = read_datalist(path, "training", tmp_path, ["ct"])
    assert item == {"image": str(tmp_path / "ct" / "a.nii.gz"), "modality": "ct", "case": "ct/a.nii.gz"}
    assert read_datalist(path, "training", tmp_path, ["ct"], repeat=3) == [item] * 3


@pytest.mark.parametrize("content", ["{", "[]", '{"training": [3]}'])
def test_what_is_no_data_list_is_refused(content, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(BadInput, match="list.json"):
        read_datalist(path, "training", tmp_path, ["ct"])


def test_scans_are_found_in_a_folder_and_by_name(tmp_path):
    for name in ("b.nii", "a.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert [scan["case"] for scan in find_scans(str(tmp_path), "ct", ["ct"])] == ["a.nii.gz", "b.nii"]
    assert [scan["case"] for scan in find_scans(str(tmp_path / "b.nii"), "ct", ["ct"])] == ["b.nii"]
    with pytest.raises(BadInput, match="--modality"):
        find_scans(str(tmp_path), "mr", ["ct"])


def test_ct_is_clipped_to_hounsfield_units_and_scaled(modalities):
    hounsfield = torch.tensor([-3000.0, -1000, 0, 500, 1000, 3000]).reshape(1, 1, 1, 6)
    image = ByModalityd("image", modalities)({"image": hounsfield, "modality": "ct"})["image"]
    assert image.flatten().tolist() == pytest.approx([0, 0, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("modality", ["t1", "t1ce", "t2", "flair"])
def test_mri_is_the_z_score_of_its_non_zero_voxels(modality, modalities):
    image = torch.as_tensor(np.random.default_rng(0).normal(400, 90, (1, 8, 8, 8)), dtype=torch.float32)
    image[:, :4] = 0
    result = ByModalityd("image", modalities)({"image": image, "modality": modality})["image"]
    assert (result[:, :4] == 0).all()
    assert abs(result[:, 4:].mean()) < 1e-5 and abs(result[:, 4:].std(correction=0) - 1) < 1e-5


def test_an_unknown_modality_names_the_case(modalities):
    with pytest.raises(BadInput, match="x.nii has the modality 't3'"):
        ByModalityd("image", modalities)({"image": torch.ones(1, 2, 2, 2), "modality": "t3", "case": "x.nii"})
