import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from custom.data.datalist import find_scans, read_datalist
from custom.data.loading import ByModalityd, LoadLabeld, LoadScand
from custom.data.nifti import corner_distance_mm
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


@pytest.fixture
def folds(tmp_path):
    """A list of ten labelled cases in five folds, eight to train and two to validate."""
    entries = [{"image": f"{n}.nii", "label": f"label{n}.nii", "fold": n % 5} for n in range(10)]
    for entry in entries:
        (tmp_path / entry["image"]).touch()
        (tmp_path / entry["label"]).touch()
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": entries[:8], "validation": entries[8:]}))
    return path


def cases(path, section, **kwargs) -> list[str]:
    return [item["case"] for item in read_datalist(path, section, path.parent, labelled=True, **kwargs)]


def test_a_fold_is_validated_and_the_others_are_trained_on(folds):
    everything = {f"{n}.nii" for n in range(10)}
    for fold in range(5):
        held_out = cases(folds, "validation", fold=fold)
        assert set(held_out) == {f"{fold}.nii", f"{fold + 5}.nii"}
        assert set(cases(folds, "training", fold=fold)) == everything - set(held_out)
    assert cases(folds, "validation") == ["8.nii", "9.nii"]
    with pytest.raises(BadInput, match=r"list.json has the folds \[0, 1, 2, 3, 4\], not 5; give --fold"):
        cases(folds, "training", fold=5)


def test_a_smaller_share_of_the_labels_is_part_of_a_larger_one(folds):
    shares = [set(cases(folds, "training", fraction=fraction, seed=3)) for fraction in (0.01, 0.2, 0.5, 1)]
    assert [len(share) for share in shares] == [1, 2, 4, 8]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert len({frozenset(cases(folds, "training", fraction=0.5, seed=seed)) for seed in range(9)}) > 1
    for fraction in (0, 1.5):
        with pytest.raises(BadInput, match="--label_fraction"):
            cases(folds, "training", fraction=fraction)


def test_a_missing_label_is_named(folds):
    (folds.parent / "label3.nii").unlink()
    with pytest.raises(BadInput, match="label3.nii of the data list .* does not exist"):
        cases(folds, "training")


def test_a_scan_may_have_several_channels(tmp_path):
    paths = [write(tmp_path / f"{n}.nii", np.random.default_rng(n).normal(size=(4, 5, 6))) for n in range(2)]
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"training": [{"image": ["0.nii", "1.nii"]}]}))
    (item,) = read_datalist(listed, "training", tmp_path)
    assert item == {"image": paths, "case": "0.nii"}
    assert find_scans([paths])[0]["image"] == paths
    image = LoadScand("image", channels=2)(item)["image"]
    nameless = {"image": paths}
    assert [LoadScand("image", channels=2)(given)["case"] for given in (item, nameless)] == ["0.nii", paths[0]]
    assert image.shape == (2, 4, 5, 6) and not torch.equal(image[0], image[1])
    with pytest.raises(BadInput, match="0.nii and .*1.nii is not a 3D volume but has 2 channels.*--in_channels"):
        LoadScand("image")(item)


def write(path, array, affine=None) -> str:
    nibabel.Nifti1Image(np.asarray(array, np.float32), np.eye(4) if affine is None else affine).to_filename(path)
    return str(path)


def shifted(mm):
    affine = np.eye(4)
    affine[0, 3] = mm
    return affine


LABELS = ["background", "liver", "spleen"]
BAD_LABELS = {
    "unknown id": (np.full((4, 5, 6), 3), 0, "holds 3, but the ids go from 0 to 2 .*liver.*--labels"),
    "fraction": (np.full((4, 5, 6), 0.5), 0, "holds 0.5, but the ids"),
    "negative": (np.full((4, 5, 6), -1), 0, "holds -1, but the ids"),
    "shape": (np.zeros((4, 5, 7)), 0, r"has the shape \(4, 5, 7\), its scan .*image.nii has \(4, 5, 6\)"),
    "4D": (np.zeros((4, 5, 6, 2)), 0, "is not a 3D label map but"),
    "affine": (np.zeros((4, 5, 6)), 1, "lies elsewhere than its scan .*image.nii: .* 1 mm apart"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_a_label_map_that_does_not_belong_to_its_scan_is_refused(kind, tmp_path):
    array, shift_mm, sentence = BAD_LABELS[kind]
    scan = LoadScand("image")({"image": write(tmp_path / "image.nii", np.random.default_rng(0).normal(size=(4, 5, 6)))})
    with pytest.raises(BadInput, match=f"label.nii {sentence}"):
        LoadLabeld("label", LABELS)({**scan, "label": write(tmp_path / "label.nii", array, shifted(shift_mm))})


def test_a_label_map_is_loaded_as_it_is(tmp_path):
    array = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    scan = LoadScand("image")({"image": write(tmp_path / "image.nii", np.random.default_rng(0).normal(size=(4, 5, 6)))})
    label = LoadLabeld("label", LABELS)({**scan, "label": write(tmp_path / "label.nii", array, shifted(0.1))})["label"]
    assert label.dtype is torch.uint8 and np.array_equal(label[0], array)


def test_misalignment_is_that_of_the_farthest_corner():
    turned = np.eye(4)
    turned[0, 1] = 0.01  # 0.01 mm for each voxel of the second axis
    assert corner_distance_mm(np.eye(4), turned, (10, 500, 10)) == pytest.approx(5)
