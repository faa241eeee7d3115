"""Tests of the synthetic data set: the same every time, complete, and right about anatomy."""

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tools import phantom

# Mean HU of each BTCV organ. Wide, because thin organs share their voxels with fat and the stomach holds gas.
ORGAN_HU = {
    1: (60, 120),
    2: (80, 160),
    3: (80, 160),
    4: (-20, 30),
    5: (-40, 50),
    6: (75, 120),
    7: (-450, 60),
    8: (100, 195),
    9: (80, 160),
    10: (65, 160),
    11: (0, 95),
    12: (0, 75),
    13: (0, 75),
}


def hu_of(image: np.ndarray, label: np.ndarray, organ: int) -> float:
    return float(image[label == organ].mean())


def centre_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ np.argwhere(mask).mean(axis=0) + affine[:3, 3]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scans() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [phantom.abdomen_ct(subject, shape=64) for subject in range(4)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    phantom.write(folder, subjects=3, shape=32, seed=5)
    return folder


@pytest.mark.parametrize("draw", [phantom.abdomen_ct, phantom.fetal_head])
def test_same_arguments_give_the_same_subject(draw):
    first, again, other_seed = draw(1, 40, 3), draw(1, 40, 3), draw(1, 40, 4)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first[0], other_seed[0])
    assert not np.array_equal(first[1], other_seed[1])


def test_brain_is_repeatable():
    first, again = phantom.brain(2, 40, 3), phantom.brain(2, 40, 3)
    np.testing.assert_array_equal(first[1], again[1])
    for contrast in phantom.CONTRASTS:
        np.testing.assert_array_equal(first[0][contrast], again[0][contrast])


@pytest.mark.parametrize("draw", [phantom.abdomen_ct, phantom.fetal_head])
def test_subjects_differ_in_shape_and_not_only_in_noise(draw):
    labels = [nib.as_closest_canonical(nib.Nifti1Image(*draw(subject, 40)[1:])).get_fdata() for subject in range(3)]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        either = (labels[one] > 0) | (labels[two] > 0)
        assert np.mean((labels[one] != labels[two])[either]) > 0.1


@pytest.mark.parametrize("shape", [64, 96])
@pytest.mark.parametrize(("draw", "count"), [(phantom.abdomen_ct, 13), (phantom.fetal_head, 7)])
def test_every_label_is_present(draw, count, shape):
    for subject, seed in ((0, 0), (1, 0), (7, 2), (19, 4)):
        image, label, affine = draw(subject, shape, seed)
        assert image.dtype == np.int16 and label.dtype == np.uint8 and affine.dtype == np.float64
        assert image.shape == label.shape == (shape,) * 3 and affine.shape == (4, 4)
        sizes = np.bincount(label.ravel(), minlength=count + 1)
        assert len(sizes) == count + 1
        assert sizes.min() >= 20, f"subject {subject}, seed {seed}: {sizes}"


def test_hounsfield_units_are_plausible(scans):
    for image, label, _ in scans:
        for organ, (low, high) in ORGAN_HU.items():
            assert low < hu_of(image, label, organ) < high, f"organ {organ}"
        assert image[0].mean() == pytest.approx(-1000, abs=5)
        assert image.min() >= -1024
        assert 400 < np.percentile(image, 99.9) < 900  # bone
        assert np.mean((image > -950) & (image < -750)) > 0.03  # lung
        assert hu_of(image, label, 8) > hu_of(image, label, 6) > hu_of(image, label, 4)


def test_tissue_intensities_follow_fetal_t2():
    for subject in range(3):
        image, label, _ = phantom.fetal_head(subject, 64)
        csf, grey, white, ventricles = (hu_of(image, label, tissue) for tissue in (1, 2, 3, 4))
        assert min(csf, ventricles) > white > grey


@pytest.mark.parametrize("subject", range(4))
def test_sides_are_right_through_the_affine(scans, subject):
    image, label, affine = scans[subject]
    assert nib.aff2axcodes(affine) == (("L", "P", "S") if subject % 2 else ("R", "A", "S"))
    spleen, right_kidney, left_kidney, _, _, liver, stomach = (centre_mm(label == i, affine) for i in range(1, 8))
    aorta, cava = centre_mm(label == 8, affine), centre_mm(label == 9, affine)
    right_adrenal, left_adrenal = centre_mm(label == 12, affine), centre_mm(label == 13, affine)
    for on_right, on_left in ((liver, spleen), (liver, stomach), (right_kidney, left_kidney)):
        assert on_right[0] > 20 and on_left[0] < -20
    assert right_adrenal[0] > left_adrenal[0] and cava[0] > aorta[0]
    assert stomach[1] > right_kidney[1]  # the stomach lies in front
    bone, lung = centre_mm(image > 350, affine), centre_mm((image > -900) & (image < -820), affine)
    assert bone[1] < aorta[1]  # the spine lies behind
    assert lung[2] > liver[2]
    canonical = nib.as_closest_canonical(nib.Nifti1Image(label, affine))
    assert np.all(np.diag(canonical.affine) > 0)
    assert (
        np.argwhere(canonical.get_fdata() == 6)[:, 0].mean() > 32 > np.argwhere(canonical.get_fdata() == 1)[:, 0].mean()
    )


def test_background_of_mri_is_exactly_zero():
    image, label, _ = phantom.fetal_head(0, 48)
    np.testing.assert_array_equal(image == 0, label == 0)
    for part in (image == 0, image > 0):
        assert part.mean() > 0.1
    assert image.min() == 0


def test_contrasts_are_registered_but_different():
    images, affine = phantom.brain(1, 48)
    assert tuple(images) == phantom.CONTRASTS
    assert affine.shape == (4, 4)
    head = images["t1"] > 0
    for image in images.values():
        assert image.dtype == np.int16
        np.testing.assert_array_equal(image > 0, head)
    correlation = np.corrcoef([image[head] for image in images.values()])
    assert correlation[np.triu_indices(4, 1)].max() < 0.99
    assert correlation[0, 2] < -0.3  # fluid: dark in T1, bright in T2
    enhanced = images["t1ce"].astype(int) - images["t1"]
    assert (enhanced > 200).sum() > 20  # the rim of the tumour


def test_blurring_loses_detail():
    for image in (phantom.abdomen_ct(0, 64)[0], phantom.fetal_head(0, 64)[0]):
        coarse = image.reshape(32, 2, 32, 2, 32, 2).mean((1, 3, 5))
        blurred = coarse.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        assert np.abs(image - blurred).mean() > 0.02 * image.std()


def test_written_files_form_a_decathlon_data_set(written):
    for kind, count in (("ct", 13), ("fetal", 7)):
        listing = json.loads((written / kind / "dataset.json").read_text(encoding="utf-8"))
        assert set(listing) == {"name", "modality", "labels", "training", "validation"}
        assert list(listing["labels"]) == [str(number) for number in range(count + 1)]
        assert (len(listing["training"]), len(listing["validation"])) == (2, 1)
        for pair in listing["training"] + listing["validation"]:
            image, label = (nib.load(written / kind / pair[key]) for key in ("image", "label"))
            assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
            assert image.shape == label.shape == (32, 32, 32)
            assert image.header.get_xyzt_units()[0] == "mm"
            np.testing.assert_array_equal(image.affine, label.affine)
    names = sorted(path.name for path in (written / "brain" / "images").iterdir())
    assert names == [f"brain_{s:03d}_{c}.nii.gz" for s in range(3) for c in sorted(phantom.CONTRASTS)]


def test_files_hold_what_the_functions_draw(written):
    image, _, affine = phantom.abdomen_ct(1, 32, 5)
    stored = nib.load(written / "ct" / "images" / "ct_001.nii.gz")
    np.testing.assert_array_equal(np.asarray(stored.dataobj), image)
    np.testing.assert_allclose(stored.affine, affine, rtol=1e-6)


def test_second_writing_is_byte_identical(written, tmp_path):
    phantom.write(tmp_path, subjects=3, shape=32, seed=5)
    assert tree(tmp_path) == tree(written)
    header = (written / "ct" / "images" / "ct_000.nii.gz").read_bytes()[:8]
    assert header[4:8] == bytes(4)  # gzip time stamp
    assert gzip.decompress((written / "ct" / "images" / "ct_000.nii.gz").read_bytes())


def test_subject_does_not_depend_on_how_many_there_are(written, tmp_path):
    phantom.write(tmp_path, subjects=1, shape=32, seed=5)
    whole = tree(written)
    alone = {name: content for name, content in tree(tmp_path).items() if name.endswith(".nii.gz")}
    assert len(alone) == 8
    assert all(whole[name] == content for name, content in alone.items())
    listing = json.loads((tmp_path / "ct" / "dataset.json").read_text(encoding="utf-8"))
    assert (len(listing["training"]), len(listing["validation"])) == (1, 0)


def test_last_fifth_is_for_validation(tmp_path):
    phantom.write(tmp_path, subjects=10, shape=32, kinds=["fetal"])
    listing = json.loads((tmp_path / "fetal" / "dataset.json").read_text(encoding="utf-8"))
    assert [pair["image"] for pair in listing["validation"]] == [f"images/fetal_{s:03d}.nii.gz" for s in (8, 9)]
    assert [path.name for path in tmp_path.iterdir()] == ["fetal"]


def test_command_line_names_the_next_step(tmp_path, capsys):
    phantom.main([str(tmp_path / "out"), "--subjects", "1", "--shape", "32", "--kinds", "ct", "brain"])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"  python -m tools.datalist {tmp_path}/out/datalist.json ct={tmp_path}/out/ct/images")
    assert f"'t1ce={tmp_path}/out/brain/images/*_t1ce.nii.gz'" in last
    assert "fetal" not in last


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--subjects", "0"], "subjects must be at least 1, got 0."),
        (["--shape", "31"], "shape must be at least 32, got 31."),
        (["--seed", "-1"], "seed must be at least 0, got -1."),
    ],
)
def test_bad_numbers_end_with_one_sentence(tmp_path, capsys, arguments, sentence):
    assert phantom.main([str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err == f"phantom: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_output_path_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    assert phantom.main([str(file)]) == 2
    assert capsys.readouterr().err.endswith("is a file; give a folder to write to.\n")
    assert file.read_text() == "kept"


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="kinds must be among ct, fetal, brain, got heart"):
        phantom.write(tmp_path, kinds=["heart"])
