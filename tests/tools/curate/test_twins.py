"""Twins: copies of real scans are found, other patients' scans are not; and what a test set shares with a list."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.tools.curate.series import body
from tools.curate.__main__ import main
from tools.curate.audit import audit
from tools.curate.rules import Rules
from tools.curate.twins import LENGTH, Fingerprint, fingerprint, joined, near_twins
from tools.studies.twins import mirrored, resampled, window

SCANS = (
    "ct/images/torso_3mm",
    "ct/images/chest_b_1p5mm",
    "brain_mri/images/pgbm003_flair",
    "abdomen_mri/images/slab_3mm_t1",
)
RULES = Rules()


@pytest.fixture(scope="module")
def scans(real_data) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Voxels and affines of a few scans of different patients."""
    images = {name: nibabel.load(real_data / f"{name}.nii.gz") for name in SCANS}
    return {name: (np.asanyarray(image.dataobj), image.affine) for name, image in images.items()}


@pytest.fixture(scope="module")
def prints(scans) -> list[Fingerprint]:
    return [fingerprint(*scan) for scan in scans.values()]


COPIES = {
    "mirrored": mirrored,
    "window": window,
    "type": lambda scan: (scan[0] * np.float32(3.7) + 11, scan[1]),
    "resampled": lambda scan: resampled(scan, 2.0),
    "cropped": lambda scan: (scan[0][tuple(slice(n // 8, -n // 8) for n in scan[0].shape[:2])], scan[1]),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_each_scan_is_found_and_nothing_else(scans, prints, copy):
    copies = [fingerprint(*COPIES[copy](scan)) for scan in scans.values()]
    assert {(one, two) for one, two, _ in near_twins(prints, RULES, copies)} == {(n, n) for n in range(len(scans))}


def test_other_patients_are_no_twins(real_data, prints):
    """Of 60 hippocampi, which look alike, and four other scans no pair is one."""
    files = sorted((real_data / "hippocampus_mri" / "images").glob("*.nii.gz"))[:60]
    images = [nibabel.load(file) for file in files]
    alike = near_twins([*prints, *(fingerprint(np.asanyarray(i.dataobj), i.affine) for i in images)], RULES)
    assert len(alike) <= 1


def test_the_same_voxels_have_one_digest_in_all_orders_of_axes():
    voxels, affine = body().transpose(2, 1, 0), np.diag([3.0, 3, 3, 1])
    image = nibabel.Nifti1Image(voxels, affine)
    digests = set()
    for codes in ("RAS", "LPS", "SRP", "ALI"):
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
        )
        turned = image.as_reoriented(turn)
        digests.add(fingerprint(np.asanyarray(turned.dataobj), turned.affine).digest)
    digests.add(fingerprint(voxels.astype(np.float64), affine).digest)
    assert len(digests) == 1
    changed = voxels.copy()
    changed[5, 5, 5] += 1
    assert fingerprint(changed, affine).digest not in digests


def test_a_fingerprint_survives_being_written(prints):
    for one in prints:
        other = Fingerprint.from_text(one.to_text())
        assert other.digest == one.digest
        assert np.abs(other.places_mm - one.places_mm).max() <= 0.051
        assert (np.sum(other.descriptors * one.descriptors, axis=1) > 0.995).all()


def test_joined_takes_the_lowest_number_of_a_chain():
    assert joined(6, [(4, 3), (3, 1), (5, 2)]) == [0, 1, 2, 1, 1, 2]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (40, 40, 2), (30, 30, 30)])
@pytest.mark.parametrize("value", ["constant", "noise"])
def test_any_volume_has_a_fingerprint(shape, value):
    voxels = np.zeros(shape) if value == "constant" else np.random.default_rng(0).normal(size=shape)
    one = fingerprint(voxels, np.diag([3.0, 3, 3, 1]))
    assert near_twins([one, one], RULES) in ([], [(0, 1, len(one.descriptors))])


def test_volumes_whose_landmarks_are_unlike_are_no_twins():
    descriptors = np.eye(LENGTH, dtype=np.float32)
    places = np.zeros((30, 3), np.float32)
    one, two = (Fingerprint(str(start), places, descriptors[start : start + 30]) for start in (0, 30))
    assert near_twins([one, two], RULES) == []
    assert near_twins([one], RULES, [two]) == []


def write_list(folder: Path, entries: list[tuple[str, np.ndarray, np.ndarray, str]]) -> Path:
    folder.mkdir()
    listed = []
    for name, voxels, affine, patient in entries:
        nibabel.Nifti1Image(voxels, affine).to_filename(folder / name)
        listed.append({"image": name, **({"patient": patient} if patient else {})})
    (folder / "list.json").write_text(json.dumps({"training": listed[:-1], "test": listed[-1:]}))
    return folder / "list.json"


def test_an_audit_says_what_was_seen_and_how(tmp_path, scans, capsys):
    torso, chest, flair, slab = scans.values()
    own = [("case_0001_ct.nii.gz", *torso, "p1"), ("b.nii.gz", *chest, "p2"), ("c.nii.gz", *flair, "")]
    voxels, affine = torso
    test = [
        ("x.nii.gz", *chest, ""),
        ("y.nii.gz", window(torso)[0][::-1, :90], affine, ""),
        ("z.nii.gz", body(7).astype(np.int16), np.eye(4) * 3, "p1"),
        ("case_0001_t1.nii.gz", body(8).astype(np.int16), np.eye(4) * 3, ""),
        ("other_0002.nii.gz", *slab, "p9"),
    ]
    lists = [str(write_list(tmp_path / name, entries)) for name, entries in (("own", own), ("test", test))]
    seen, cases, unread = audit(lists[0], lists[1:], 1, RULES, progress=False)
    assert {(one.case, one.how, one.by) for one in seen} == {
        ("x.nii.gz", "exact", "b.nii.gz"),
        ("y.nii.gz", "near", "case_0001_ct.nii.gz"),
        ("z.nii.gz", "patient", "case_0001_ct.nii.gz"),
        ("case_0001_t1.nii.gz", "name", "case_0001_ct.nii.gz"),
    }
    assert (cases, unread) == (5, [])
    (tmp_path / "test" / "x.nii.gz").write_bytes(b"no NIfTI")
    assert main(["audit", *lists, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "x.nii.gz: can't be read, so that it was not compared" in said
    assert "3 of 5 test scans were seen in pre-training." in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[]", "should hold a JSON object"), ("{}", "names no scan"), ('{"test": [{}]}', 'has no "image"'),
     ('{"test": ["gone.nii"]}', "does not exist"), ("{", "is not JSON")],
)  # fmt: skip
def test_a_list_that_cannot_be_audited(tmp_path, capsys, content, sentence):
    (tmp_path / "list.json").write_text(content)
    assert main(["audit", str(tmp_path / "list.json"), str(tmp_path / "list.json")]) == 2
    assert sentence in capsys.readouterr().err
