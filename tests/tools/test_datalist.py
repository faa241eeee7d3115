"""Tests of tools.datalist: what is refused, what is split how, and what the command line answers."""

from __future__ import annotations

import csv
import gzip
import json
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.data.datalist import read_datalist
from custom.data.loading import LoadLabeld, LoadScand
from custom.errors import BadInput
from tools import datalist, datalist_check
from tools.datalist import Scan, fold_groups, group_keys, inspect_file, main, split
from tools.studies import damaged

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("DAE_TEST_DATA", ROOT.parent / "shared" / "data"))
REAL = pytest.mark.skipif(not DATA.is_dir(), reason=f"real volumes are not at {DATA} (set DAE_TEST_DATA)")
CALM = settings(deadline=None, database=None)  # no time limit on a busy machine, no folder left behind
VOXELS = np.random.default_rng(0).integers(-200, 1000, (8, 9, 10)).astype(np.int16)  # of a CT or MRI
LABEL = (VOXELS % 4).astype(np.uint8)
BTCV = ("--labels", "imagesTr=labelsTr", "img=label")


def nifti(array: np.ndarray = VOXELS, affine: np.ndarray | None = None, edit=None, image=nib.Nifti1Image) -> bytes:
    """Bytes of an uncompressed NIfTI file; `edit` may break its header or voxels."""
    raw = bytearray(image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine).to_bytes())
    if edit:
        edit(raw)
    return bytes(raw)


def scan(path: Path, raw: bytes | None = None) -> Path:
    """Write a scan, compressed when its name says so."""
    raw = nifti(np.random.default_rng(zlib.crc32(os.fsencode(path))).permuted(VOXELS)) if raw is None else raw
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw, 1) if path.name.endswith(".gz") else raw)
    return path


def patch(layout: str, place: int, *values):
    """An edit that overwrites a header field."""
    return lambda raw: struct.pack_into(layout, raw, place, *values)


def no_form(raw: bytearray) -> None:
    struct.pack_into("<2h", raw, 252, 0, 0)


def run(tmp_path: Path, *arguments: object, out: str = "out.json") -> dict:
    """Run the command line successfully and return the list it wrote."""
    assert main([str(tmp_path / out), *map(str, arguments), "--workers", "1"]) == 0
    return json.loads((tmp_path / out).read_text())


def fails(capsys, tmp_path: Path, *arguments: object) -> str:
    """Run the command line, expect exit code 2 and no file, and return the sentence."""
    assert main([str(tmp_path / "out.json"), *map(str, arguments), "--workers", "1"]) == 2
    assert not list(tmp_path.glob("*out*"))
    sentence = capsys.readouterr().err
    assert sentence.startswith("datalist: ") and sentence.count("\n") == 1 and "Traceback" not in sentence
    return sentence


def btcv(folder: Path, cases: int = 4, raw: bytes | None = None) -> Path:
    """Scans in imagesTr, labels in labelsTr; returns the folder of the scans."""
    for n in range(cases):
        scan(folder / "imagesTr" / f"img{n + 10:04}.nii.gz")
        scan(folder / "labelsTr" / f"label{n + 10:04}.nii.gz", nifti(LABEL) if raw is None else raw)
    return folder / "imagesTr"


def bare(entry: dict) -> dict:
    """An entry without its patient."""
    return {key: value for key, value in entry.items() if key != "patient"}


def names(entries: list[dict]) -> set[str]:
    return {Path(entry["image"]).name for entry in entries}


# --- one file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("image", [nib.Nifti1Image, nib.Nifti2Image])
def test_good_file(tmp_path, name, image):
    path = tmp_path / name
    raw = nifti(image=image)
    path.write_bytes(gzip.compress(raw) if name.lower().endswith("gz") else raw)
    report = inspect_file(path)
    assert (report.reason, report.shape, report.spacing) == ("", (8, 9, 10), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "array",
    [VOXELS[..., None], VOXELS.astype(np.float32), VOXELS.astype(np.float64), VOXELS.astype(">i2"), VOXELS > 500],
    ids=["one volume in 4D", "float32", "float64", "big-endian", "mask"],
)
def test_good_voxels(tmp_path, array):
    array = array.astype(np.uint8) if array.dtype == bool else array
    assert inspect_file(scan(tmp_path / "a.nii.gz", nifti(array))).reason == ""


def test_spacing_is_that_of_an_oblique_affine(tmp_path):
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [0.5, 1.5, 4]
    report = inspect_file(scan(tmp_path / "a.nii", nifti(affine=affine)))
    assert report.spacing == pytest.approx((0.5, 1.5, 4)) and not report.reason


def with_value(value: float) -> np.ndarray:
    array = VOXELS.astype(np.float32)
    array[3, 4, 5] = value
    return array


# Of `tools.studies.damaged`: name of the file, and how the reason begins.
REFUSED = {
    "complex.nii": "voxel type: complex",
    "colour.nii": "voxel type: colour",
    "plane.nii": "not a 3D volume: 2",
    "series.nii": "not a 3D volume: 4",
    "slice.nii": "not a 3D volume: an axis",
    "dims_1.nii": "not a 3D volume: an axis",
    "spacing_3.nii": "bad spacing: 0 x",
    "spacing_4.nii": "bad spacing: -1 x",
    "spacing_0.nii": "bad spacing: nan",
    "affine_0.nii": "bad affine",
    "affine_1.nii": "bad affine",
    "affine_5.nii": "bad affine",
    "value_0_one.nii.gz": "NaN or infinite voxels",
    "value_2_one.nii.gz": "NaN or infinite voxels",
    "slope_3.nii": "NaN or infinite voxels",
    "constant.nii": "constant voxels: all are -1024",
    "magic_0.nii": "not a NIfTI file",
    "magic_1.nii": "not a NIfTI file",
    "text.nii": "not a NIfTI file",
    "type_2.nii": "bad header",
    "offset_0.nii": "bad header",
    "offset_3.nii": "unreadable",
    "offset_2.nii": "truncated or corrupted",
    "dims_3.nii": "truncated or corrupted",
    "not_packed.nii.gz": "not a NIfTI file: Not a gzipped",
}


@pytest.fixture(scope="module")
def broken() -> dict[str, bytes]:
    return {name: content for _, name, content in damaged.contents()}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, broken, name):
    (tmp_path / name).write_bytes(broken[name])
    started = time.monotonic()
    assert inspect_file(tmp_path / name).reason.startswith(REFUSED[name])
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(broken[name], 1))
    if name.endswith(".nii"):
        assert inspect_file(tmp_path / f"{name}.gz").reason.startswith(REFUSED[name])
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", ["spacing_3.nii", "affine_1.nii", "dims_3.nii", "series.nii", "complex.nii"])
def test_headers_alone_show_it(tmp_path, broken, name):
    (tmp_path / name).write_bytes(broken[name])
    assert inspect_file(tmp_path / name, headers_only=True).reason.startswith(REFUSED[name])


def test_headers_only_does_not_read_voxels(tmp_path):
    assert inspect_file(scan(tmp_path / "a.nii.gz", nifti(with_value(np.nan))), headers_only=True).reason == ""


def test_scaled_voxels(tmp_path):
    scaled = inspect_file(scan(tmp_path / "a.nii", nifti(edit=patch("<2f", 112, 0.5, -1024))))
    overflow = inspect_file(scan(tmp_path / "b.nii", nifti(edit=patch("<2f", 112, 3e38, 0))))
    vanishing = inspect_file(scan(tmp_path / "c.nii", nifti(edit=patch("<2f", 112, 1e-30, 5))))
    assert scaled.reason == ""
    assert overflow.reason == "NaN or infinite voxels"
    assert vanishing.reason == "constant voxels: all are 5"


@pytest.mark.parametrize("cut", [20, 400, -9, -1], ids=["header", "voxels", "end", "checksum"])
def test_cut_gzip(tmp_path, cut):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti())[:cut])
    assert re.match("truncated|bad header", inspect_file(tmp_path / "a.nii.gz").reason)


def test_damaged_gzip(tmp_path):
    raw = bytearray(gzip.compress(nifti()))
    raw[-8:-4] = b"\0\0\0\0"  # checksum of the content
    (tmp_path / "a.nii.gz").write_bytes(raw)
    assert inspect_file(tmp_path / "a.nii.gz").reason.startswith("truncated or corrupted: CRC")
    (tmp_path / "a.nii.gz").write_bytes(bytes(raw[:1000]) + bytes(100) + bytes(raw[1100:]))
    assert inspect_file(tmp_path / "a.nii.gz").reason.startswith("truncated or corrupted")


def test_claim_within_what_gzip_could_hold_ends_at_the_end_of_the_file(tmp_path):
    raw = nifti(edit=patch("<3h", 42, 90, 90, 40))
    assert inspect_file(scan(tmp_path / "a.nii.gz", raw)).reason.startswith("truncated or corrupted: ")


def test_slabs_see_every_voxel(tmp_path, monkeypatch):
    monkeypatch.setattr(datalist_check, "SLAB_BYTES", 64)  # 2880 bytes of voxels
    path = scan(tmp_path / "a.nii.gz", nifti(VOXELS.astype(np.float32)))
    assert inspect_file(path).reason == ""
    for place in ((0, 0, 0), (7, 8, 9), (3, 3, 3)):
        array = VOXELS.astype(np.float32)
        array[place] = np.nan
        assert inspect_file(scan(path, nifti(array))).reason == "NaN or infinite voxels"


def test_no_regular_file(tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "link.nii.gz").symlink_to("nowhere.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii")
    assert inspect_file(tmp_path / "folder.nii.gz").reason == "a folder, not a file"
    assert inspect_file(tmp_path / "empty.nii.gz").reason == "empty file"
    assert inspect_file(tmp_path / "link.nii.gz").reason == "missing file or dangling link"
    assert inspect_file(tmp_path / "pipe.nii").reason == "not a regular file"


def test_permission_denied(tmp_path, monkeypatch):
    path = scan(tmp_path / "a.nii.gz")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(datalist_check.gzip, "open", refuse)
    assert inspect_file(path).reason == "permission denied"


def test_out_of_memory_concerns_one_file(tmp_path, monkeypatch):
    def exhaust(*_):
        raise MemoryError

    monkeypatch.setattr(datalist_check.nib, "load", exhaust)
    assert inspect_file(scan(tmp_path / "a.nii")).reason == "unreadable: MemoryError"


@settings(CALM, max_examples=150)
@given(place=st.integers(0, 351), value=st.binary(min_size=1, max_size=8))
def test_any_header_gets_an_answer(tmp_path_factory, place, value):
    raw = bytearray(nifti())
    raw[place : place + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.nii"
    path.write_bytes(raw)
    assert isinstance(inspect_file(path).reason, str)


# --- split ------------------------------------------------------------------------------------------------------

GROUPS = st.dictionaries(
    st.text("abcdef0123/_", min_size=1, max_size=8),
    st.frozensets(st.sampled_from(datalist.MODALITIES), min_size=1, max_size=2),
    max_size=60,
)
FRACTION = st.floats(0, 0.95)


def strata(groups: dict) -> dict:
    return {kind: [key for key in groups if groups[key] == kind] for kind in set(groups.values())}


@CALM
@given(GROUPS, FRACTION, st.integers())
def test_split_counts(groups, fraction, seed):
    chosen = split(groups, fraction, seed)
    assert chosen <= set(groups)
    for keys in strata(groups).values():
        held_out = len(chosen.intersection(keys))
        assert held_out < len(keys)
        assert abs(held_out - round(fraction * len(keys))) <= 1
        assert held_out > 0 or fraction == 0 or len(keys) == 1
        assert held_out == 0 or fraction > 0


@CALM
@given(GROUPS, FRACTION, st.randoms())
def test_split_ignores_order(groups, fraction, random):
    shuffled = list(groups.items())
    random.shuffle(shuffled)
    assert split(dict(shuffled), fraction, 0) == split(groups, fraction, 0)


@CALM
@given(GROUPS, FRACTION, st.sampled_from(datalist.MODALITIES))
def test_a_further_group_moves_at_most_one_other(groups, fraction, modality):
    before = split(groups, fraction, 0)
    after = split({**groups, "new": frozenset([modality])}, fraction, 0)
    assert len(before.symmetric_difference(after) - {"new"}) <= 1


@CALM
@given(GROUPS, st.integers(2, 8), st.integers(), st.randoms())
def test_folds(groups, count, seed, random):
    folds = fold_groups(groups, count, seed)
    assert set(folds) == set(groups) and set(folds.values()) <= set(range(count))
    for keys in [list(groups), *strata(groups).values()]:
        sizes = [sum(folds[key] == fold for key in keys) for fold in range(count)]
        assert max(sizes) - min(sizes) <= 1
    shuffled = list(groups.items())
    random.shuffle(shuffled)
    assert fold_groups(dict(shuffled), count, seed) == folds


def test_seed_matters():
    groups = {f"p{n}": ["ct"] for n in range(100)}
    assert fold_groups(groups, 5, 0) != fold_groups(groups, 5, 1)
    assert split(groups, 0.2, 0) != split(groups, 0.2, 1)
    assert len(split(groups, 0.2, 0)) == 20


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("p1/p1_t1ce.nii.gz", "p1"),
        ("p1/p1_T2.nii", "p1"),
        ("p1/flair.nii.gz", "p1"),
        ("BraTS-7-t1c.nii.gz", "BraTS-7"),
        ("t1/p1.nii.gz", "p1"),
        ("case_0003.nii.gz", "case"),
        ("case_0123.nii.gz", "case_0123"),
        ("at1.nii.gz", "at1"),
        ("t1.nii.gz", "folder"),
    ],
)
def test_default_group(place, key):
    one = Scan(f"/data/folder/{Path(place).name}", "t1", place)
    assert group_keys([one]) == {one: key}


def test_channel_numbers_are_told_from_patient_numbers():
    channels = [Scan(f"/d/a_{m}", m, f"a_000{n}.nii.gz") for n, m in enumerate(("t1", "t2", "flair"))]
    assert set(group_keys(channels).values()) == {"a"}
    patients = [Scan(f"/d/{n}{m}", m, f"a_000{n}.nii.gz") for n in (1, 2) for m in ("t1", "t2")]
    assert set(group_keys(patients).values()) == {"a_0001", "a_0002"}


def brats(folder: Path, patients: int = 12) -> list[str]:
    """Four contrasts per patient; returns the sources that list them."""
    for patient in range(patients):
        for name in ("t1", "t1ce", "t2", "flair"):
            scan(folder / f"p{patient}" / f"p{patient}_{name}.nii.gz")
    return [f"{name}={folder}/**/*_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]


def test_one_patient_one_side(tmp_path):
    sources = brats(tmp_path / "data")
    found = run(tmp_path, *sources, "--validation", "0.25")
    patients = [{Path(e["image"]).parent.name for e in found[side]} for side in ("training", "validation")]
    assert not patients[0] & patients[1] and len(patients[1]) == 3
    assert len(found["training"]) == 36 and len(found["validation"]) == 12
    assert all(e["image"].endswith(f"_{e['modality']}.nii.gz") for e in found["training"] + found["validation"])


def test_one_patient_one_fold(tmp_path):
    sources = brats(tmp_path / "data", patients=7)
    found = run(tmp_path, *sources, "--folds", "3")
    assert found["description"].endswith("for self-supervised pre-training, 3 folds, fold 0 held out")
    assert {e["fold"] for e in found["training"]} == {1, 2} and {e["fold"] for e in found["validation"]} == {0}
    patients: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for entry in found["training"] + found["validation"]:
        patients[entry["fold"]].append(Path(entry["image"]).parent.name)
    assert all(own.count(patient) == 4 for own in patients.values() for patient in own)
    assert sorted(len(set(own)) for own in patients.values()) == [2, 2, 3]
    assert run(tmp_path, *sources[::-1], "--folds", "3") == found


def test_wrong_folds(tmp_path, capsys):
    sources = brats(tmp_path / "data", patients=3)
    assert "--folds must be at least 2" in fails(capsys, tmp_path, *sources, "--folds", "1")
    assert "--folds must be at least 2" in fails(capsys, tmp_path, *sources, "--folds", "0")
    assert "without --validation" in fails(capsys, tmp_path, *sources, "--folds", "3", "--validation", "0.05")
    assert "more than the 3 patients" in fails(capsys, tmp_path, *sources, "--folds", "4")
    assert len(run(tmp_path, *sources, "--folds", "3")["validation"]) == 4


def test_order_of_sources_and_place_of_data_do_not_matter(tmp_path):
    sources = brats(tmp_path / "data")
    first = run(tmp_path, *sources)
    raw = (tmp_path / "out.json").read_bytes(), (tmp_path / "out_report.csv").read_bytes()
    assert run(tmp_path, *sources[::-1]) == first
    assert raw == ((tmp_path / "out.json").read_bytes(), (tmp_path / "out_report.csv").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").rename(tmp_path / "elsewhere" / "moved")
    moved = run(tmp_path, *brats(tmp_path / "elsewhere" / "moved"))
    for side in ("training", "validation"):
        assert names(moved[side]) == names(first[side])


def test_further_file_hardly_changes_the_split(tmp_path):
    for n in range(40):
        scan(tmp_path / "data" / f"c{n}x.nii")
    before = run(tmp_path, f"ct={tmp_path}/data", "--validation", "0.2")
    scan(tmp_path / "data" / "new.nii")
    after = run(tmp_path, f"ct={tmp_path}/data", "--validation", "0.2")
    assert len((names(before["validation"]) ^ names(after["validation"])) - {"new.nii"}) <= 1


def test_group_pattern(tmp_path, capsys):
    for n in range(12):
        scan(tmp_path / "data" / f"site{n % 3}-{n}x.nii")
    found = run(tmp_path, f"ct={tmp_path}/data", "--patient", r"(site\d)-", "--validation", "0.34")
    assert len({name[:5] for name in names(found["validation"])}) == 1 and len(found["validation"]) == 4
    for side in (tmp_path / "out.json", tmp_path / "out_report.csv"):
        side.unlink()
    assert "does not match" in fails(capsys, tmp_path, f"ct={tmp_path}/data", "--patient", "site0")
    assert "site1-10x.nii" in fails(capsys, tmp_path, f"ct={tmp_path}/data", "--patient", "site[02]")
    assert "does not match" in fails(capsys, tmp_path, f"ct={tmp_path}/data", "--patient", "site.|(never)")
    assert "not a regular expression" in fails(capsys, tmp_path, f"ct={tmp_path}/data", "--patient", "(")


# --- sources ----------------------------------------------------------------------------------------------------


def test_kinds_of_sources(tmp_path):
    for name in (
        "f/deep/er/a.nii",
        "f/b.nii.gz",
        "f/._b.nii.gz",
        "f/.hidden/c.nii",
        "f/notes.txt",
        "g1/c.nii",
        "d.nii",
    ):
        scan(tmp_path / name)
    (tmp_path / "f" / "loop").symlink_to(tmp_path / "f")
    sources = [f"ct={tmp_path}/f", f"t1={tmp_path}/g[0-9]", f"t2={tmp_path}/d.nii"]
    found = run(tmp_path, *sources)
    assert [(e["image"], e["modality"]) for e in found["training"]] == [
        ("d.nii", "t2"), ("f/b.nii.gz", "ct"), ("g1/c.nii", "t1")]  # fmt: skip
    assert list(map(bare, found["validation"])) == [{"image": "f/deep/er/a.nii", "modality": "ct"}]
    (tmp_path / "lists").mkdir()
    outside = run(tmp_path, *sources, out="lists/out.json")
    assert outside["training"][0]["image"] == str(tmp_path / "d.nii")


def test_brackets_in_a_folder_name_and_equals_in_a_path(tmp_path):
    scan(tmp_path / "a[1]=b" / "x.nii")
    assert names(run(tmp_path, f"ct={tmp_path}/a[1]=b")["training"]) == {"x.nii"}


def test_folder_named_like_a_scan(tmp_path):
    scan(tmp_path / "f" / "x.nii" / "x.nii")
    (tmp_path / "f" / "y.nii").mkdir()
    assert names(run(tmp_path, f"ct={tmp_path}/f")["training"]) == {"x.nii"}
    rows = list(csv.DictReader((tmp_path / "out_report.csv").open()))
    assert [(row["status"], row["reason"]) for row in rows] == [("accepted", ""), ("refused", "a folder, not a file")]


def decathlon(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "set" / "dataset.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_decathlon_json(tmp_path, capsys):
    for name in ("a", "b", "c", "d"):
        scan(tmp_path / "set" / "images" / f"{name}.nii.gz")
    scan(tmp_path / "set" / "l.nii.gz", nifti(LABEL))
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver"},
        "training": [{"image": "./images/a.nii.gz", "label": "l.nii.gz", "modality": "t1"}],
        "validation": [{"image": str(tmp_path / "set/images/b.nii.gz"), "modality": "t2"}],
        "test": ["images/c.nii.gz", {"image": "images/d.nii.gz"}],
    }
    path = decathlon(tmp_path, content)
    assert "'test' entry 0 has no 'modality'" in fails(capsys, tmp_path, path)
    found = run(tmp_path, f"ct={path}", "--validation", "0")
    assert [e["image"] for e in found["training"]] == [f"set/images/{n}.nii.gz" for n in "abcd"]
    assert {e["modality"] for e in found["training"]} == {"ct"}
    assert all("label" not in e for e in found["training"]) and "labels" not in found  # pre-training needs none
    found = run(tmp_path, f"ct={path}", "--validation", "0", "--labels")
    assert [e.get("label") for e in found["training"]] == ["set/l.nii.gz", None]
    assert f"Note: 2 'test' entries of {path} have no label and are left out." in capsys.readouterr().out
    assert found["labels"] == content["labels"]
    del content["test"]
    found = run(tmp_path, decathlon(tmp_path, content))
    assert [e["modality"] for e in found["training"]] == ["t1", "t2"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON"),
        ("[]", "should hold a JSON object"),
        ({"training": {"0": "a"}}, "'training' is not a list"),
        ({"training": [{"label": "a"}]}, "has no 'image'"),
        ({"training": [{"image": ["a", 1], "modality": "ct"}]}, "has no 'image' that is a file name, or a list"),
        ({"training": [{"image": ["a", "a"], "modality": "ct"}]}, "a would have one file as two channels by its JSON"),
        ({"training": [{"image": "a\0b", "modality": "ct"}]}, "has no 'image'"),
        ({"training": [{"image": "a.nii", "modality": "CT"}]}, "did you mean `ct`?"),
        ({"training": [{"image": "a.nii", "modality": "ct", "label": 1}]}, "has a 'label' that is not one file name"),
        ({"training": [{"image": "a.nii", "modality": "ct", "label": "a\0b"}]}, "has a 'label' that is not one file"),
        ({"training": [{"image": "a.nii", "modality": "ct", "label": "a.nii"}]}, "be its own label by its JSON entry"),
        ({"training": []}, "has no .nii or .nii.gz file"),
    ],
)
def test_bad_json(tmp_path, capsys, content, sentence):
    assert sentence in fails(capsys, tmp_path, decathlon(tmp_path, content), "--labels")


def test_missing_file_of_a_json_is_refused(tmp_path, capsys):
    scan(tmp_path / "set" / "a.nii")
    run(tmp_path, f"ct={decathlon(tmp_path, {'training': ['a.nii', 'gone.nii']})}")
    assert "Refused, missing file or dangling link: 1" in capsys.readouterr().out


def test_same_file_twice(tmp_path, capsys):
    path = scan(tmp_path / "f" / "a.nii")
    (tmp_path / "f" / "b.nii").symlink_to(path)
    found = run(tmp_path, f"ct={tmp_path}/f", f"ct={tmp_path}/f/../f/a.nii")
    assert list(map(bare, found["training"])) == [{"image": "f/a.nii", "modality": "ct"}]
    assert "listed once: 2" in capsys.readouterr().out
    for file in tmp_path.glob("out*"):
        file.unlink()
    assert "given both as ct and as t1" in fails(capsys, tmp_path, f"ct={path}", f"t1={tmp_path}/f/b.nii")


def test_modality_names(tmp_path, capsys):
    scan(tmp_path / "f" / "a.nii")
    assert "did you mean `flair`?" in fails(capsys, tmp_path, f"flare={tmp_path}/f")
    assert "Known are ct, t1, t1ce, t2, flair" in fails(capsys, tmp_path, f"xyzzy={tmp_path}/f")
    assert run(tmp_path, f"pet={tmp_path}/f", "--modalities", "ct", "pet")["training"][0]["modality"] == "pet"


def test_wrong_arguments(tmp_path, capsys):
    scan(tmp_path / "f" / "a.nii")
    (tmp_path / "f" / "notes.txt").touch()
    (tmp_path / "none").mkdir()
    good = f"ct={tmp_path}/f"
    assert "needs a modality" in fails(capsys, tmp_path, tmp_path / "f")
    assert "names no path" in fails(capsys, tmp_path, "ct=")
    assert "does not exist" in fails(capsys, tmp_path, good, f"ct={tmp_path}/g")
    assert "has no .nii" in fails(capsys, tmp_path, good, f"ct={tmp_path}/none")
    assert "has no .nii" in fails(capsys, tmp_path, good, f"ct={tmp_path}/f/*.gz")
    assert "neither a folder" in fails(capsys, tmp_path, f"ct={tmp_path}/f/notes.txt")
    for share in ("1", "-0.1", "nan"):
        assert "--validation" in fails(capsys, tmp_path, good, f"--validation={share}")
    assert main([str(tmp_path / "out.json"), good, "--workers", "0"]) == 2
    assert main([str(tmp_path / "out.txt"), good]) == 2
    assert main([str(tmp_path / "absent" / "out.json"), good]) == 2
    path = decathlon(tmp_path, {"training": [str(tmp_path / "f" / "a.nii")]})
    assert main([str(path), f"ct={path}"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "out.json")])


# --- labels -----------------------------------------------------------------------------------------------------


def test_labels(tmp_path, capsys):
    images = btcv(tmp_path / "img")  # the last "img" of a path is replaced, not this one
    found = run(tmp_path, f"ct={images}", *BTCV, "--validation", "0.25")
    assert len(found["training"]) == 3 and len(found["validation"]) == 1
    for entry in found["training"] + found["validation"]:
        number = entry["image"][-11:]
        assert bare(entry) == {
            "image": f"img/imagesTr/img{number}", "label": f"img/labelsTr/label{number}", "modality": "ct"}  # fmt: skip
    assert "for segmentation, 0.25 held out" in found["description"] and "self-supervised" not in found["description"]
    printed = capsys.readouterr().out
    assert "labels found: 0 1 2 3 (in 4 scans)" in printed and "Note" not in printed
    assert printed.endswith(f"python -m tools.adapt {tmp_path}/out.json adapted\n")
    rows = list(csv.DictReader((tmp_path / "out_report.csv").open()))
    assert [row["label"] for row in rows] == [f"img/labelsTr/label00{n}.nii.gz" for n in range(10, 14)]


@pytest.mark.parametrize("workers", [1, 2])
def test_labels_below_the_source_are_no_scans(tmp_path, capsys, workers):
    for n in range(3):
        scan(tmp_path / "feta" / f"sub-{n}" / f"sub-{n}_T2w.nii.gz")
        scan(tmp_path / "feta" / f"sub-{n}" / f"sub-{n}_dseg.nii.gz", nifti(LABEL))
    command = [str(tmp_path / "out.json"), f"t2={tmp_path}/feta", "--workers", str(workers), "--folds", "3"]
    for pair in ("_T2w=_dseg", "T2w.nii=dseg.nii"):
        assert main([*command, "--labels", pair]) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        entries = found["training"] + found["validation"]
        assert {e["label"]: e["image"] for e in entries} == {
            f"feta/sub-{n}/sub-{n}_dseg.nii.gz": f"feta/sub-{n}/sub-{n}_T2w.nii.gz" for n in range(3)
        }
        assert sorted(e["fold"] for e in entries) == [0, 1, 2]
        assert len((tmp_path / "out_report.csv").read_text().splitlines()) == 4
        printed = capsys.readouterr().out
        assert "labels found: 0 1 2 3 (in 3 scans)" in printed and "tools.adapt" in printed
    scan(tmp_path / "feta" / "sub-0" / "notes.nii.gz")
    assert main([*command, "--labels", "_T2w=_dseg"]) == 2
    assert "no '_T2w' to replace in" in (sentence := capsys.readouterr().err) and "sub-0/notes.nii.gz" in sentence


def test_labels_whose_name_holds_from_are_no_scans(tmp_path):
    scan(tmp_path / "f" / "a.nii")
    scan(tmp_path / "f" / "a_seg.nii", nifti(LABEL))
    (tmp_path / "g").symlink_to("f")
    found = run(tmp_path, f"ct={tmp_path}/f", f"ct={tmp_path}/g", "--labels", ".nii=_seg.nii")
    assert list(map(bare, found["training"])) == [{"image": "f/a.nii", "label": "f/a_seg.nii", "modality": "ct"}]


def test_wrong_pairs(tmp_path, capsys):
    source = f"ct={btcv(tmp_path / 'd', 1)}"
    sentence = fails(capsys, tmp_path, source, "--labels", "imagesTr=labelsTr", "scan=label")
    assert "--labels 'scan=label': no 'scan' to replace in " in sentence and "imagesTr/img0010.nii.gz" in sentence
    sentence = fails(capsys, tmp_path, source, "--labels", "imagesTr=labelsTr", "labelsTr=imagesTr")
    assert "imagesTr/img0010.nii.gz would be its own label by --labels 'imagesTr=labelsTr labelsTr=" in sentence
    for pair in ("img", "=label", ""):
        assert f"'{pair}' is not of the form FROM=TO" in fails(capsys, tmp_path, source, "--labels", pair)


LABELS_REFUSED = {
    "shape": ("shape (8, 9, 9) is not that of its scan, (8, 9, 10)", nifti(LABEL[..., 1:])),
    "order of axes": ("shape (10, 9, 8) is not", nifti(LABEL.T)),
    "origin": ("its affine puts a corner 0.6 mm from its scan's", nifti(LABEL, edit=patch("<f", 292, 0.6))),
    "direction": ("its affine puts a corner 7 mm", nifti(LABEL, np.diag([-1.0, 2.0, 3.0, 1.0]))),
    "fraction": ("a voxel is 0.5, not a whole number", nifti(LABEL.astype(np.float32) / 2)),
    "negative": ("a voxel is -1, not a whole number", nifti(LABEL.astype(np.int16) - 1)),
    "scaled": ("a voxel is 1.5, not a whole number", nifti(LABEL, edit=patch("<2f", 112, 1.5, 0))),
    "NaN": ("a voxel is nan, not a whole number", nifti(abs(with_value(np.nan)))),
    "infinite": ("a voxel is inf, not a whole number", nifti(abs(with_value(np.inf)))),
    "4D": ("not a 3D volume: 4", nifti(np.stack([LABEL, LABEL], -1))),
    "cut": ("truncated or corrupted", nifti(LABEL)[:-1]),
    "text": ("not a NIfTI file", b"no label at all\n" * 100),
}


@pytest.mark.parametrize("kind", LABELS_REFUSED)
def test_refused_label(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(datalist_check, "SLAB_BYTES", 64)
    expected, raw = LABELS_REFUSED[kind]
    path, label = scan(tmp_path / "a.nii.gz"), scan(tmp_path / "two  spaces.nii.gz", raw)
    report = inspect_file(path, label=str(label))
    assert report.reason.startswith(f"label: {label}: {expected}") and report.ids == ()
    assert (report.shape, report.spacing) == ((8, 9, 10), (1, 2, 3))
    in_header = kind in ("shape", "order of axes", "origin", "direction", "4D", "text")
    assert inspect_file(path, headers_only=True, label=str(label)).reason == (report.reason if in_header else "")


@pytest.mark.parametrize("axes", ["LPS", "SRA", "PIR"])
def test_a_label_in_another_order_of_the_axes_is_taken_as_in_training(tmp_path, axes):
    turn = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), nib.orientations.axcodes2ornt(axes))
    label = nib.Nifti1Image(LABEL, np.diag([1.0, 2.0, 3.0, 1.0])).as_reoriented(turn)
    files = {"image": str(scan(tmp_path / "a.nii")), "label": str(scan(tmp_path / "b.nii", label.to_bytes()))}
    assert inspect_file(files["image"], label=files["label"]).reason == ""
    loaded = LoadLabeld("label", "abcd")(LoadScand("image")(files))["label"]
    assert np.array_equal(loaded[0].numpy(), LABEL)


def test_origin_far_away_gets_no_further_tolerance(tmp_path):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = 500
    path = scan(tmp_path / "a.nii", nifti(affine=affine))
    for shift, fits in ((0.4, True), (0.6, False)):  # half a voxel is 0.5 mm
        label = scan(tmp_path / "b.nii", nifti(LABEL, affine + shift * np.eye(4, k=3)))
        assert (inspect_file(path, label=str(label)).reason == "") == fits


def test_missing_label(tmp_path, capsys):
    images = btcv(tmp_path / "d")
    gone = tmp_path / "d" / "labelsTr" / "label0012.nii.gz"
    gone.unlink()
    assert inspect_file(images / "img0012.nii.gz", label=str(gone)).reason == f"no label: {gone}"
    assert inspect_file(images / "gone.nii.gz", label=str(gone)).reason == "missing file or dangling link"
    found = run(tmp_path, f"ct={images}", *BTCV)
    assert names(found["training"] + found["validation"]) == {f"img00{n}.nii.gz" for n in (10, 11, 13)}
    printed = capsys.readouterr().out
    assert f"Refused, no label: 1\n    {images}/img0012.nii.gz ({gone})" in printed and "(in 3 scans)" in printed
    row = list(csv.DictReader((tmp_path / "out_report.csv").open()))[2]
    assert (row["label"], row["reason"]) == ("d/labelsTr/label0012.nii.gz", f"no label: {gone}")


@pytest.mark.parametrize(
    ("raw", "ids"),
    [
        (nifti(np.zeros_like(LABEL)), (0,)),
        (nifti(LABEL.astype(np.float64) * 5), (0, 5, 10, 15)),
        (nifti(LABEL.astype(">i2")), (0, 1, 2, 3)),
        (nifti(LABEL * 10, edit=patch("<2f", 112, 0.1, 0)), (0, 1, 2, 3)),  # 0.1 is inexact as float32
        (nifti(LABEL, edit=patch("<2f", 112, -1, 3)), (0, 1, 2, 3)),
        (nifti(LABEL[..., None]), (0, 1, 2, 3)),
    ],
    ids=["background only", "float64", "big-endian", "scaled", "negated", "one volume in 4D"],
)
def test_good_label(tmp_path, raw, ids, monkeypatch):
    monkeypatch.setattr(datalist_check, "SLAB_BYTES", 64)
    path, label = scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz", raw)
    report = inspect_file(path, label=str(label))
    assert (report.reason, report.ids) == ("", ids)


def test_headers_only_tells_no_ids(tmp_path, capsys):
    source = f"ct={btcv(tmp_path / 'd', raw=nifti(with_value(np.nan)))}"
    assert run(tmp_path, source, *BTCV, "--headers-only")["training"][0]["label"]
    assert "labels found" not in capsys.readouterr().out


def test_scans_taken_for_labels_do_not_flood_the_report(tmp_path, capsys):
    run(tmp_path, f"ct={btcv(tmp_path / 'd', raw=nifti(abs(VOXELS)))}", *BTCV)
    line = re.search("labels found: .*", capsys.readouterr().out)[0]
    assert len(line) < 250 and line.endswith(f" ... {abs(VOXELS).max()} (in 4 scans)")


def test_labels_of_a_json(tmp_path, capsys):
    images = btcv(tmp_path / "set", 3)
    entry = {"image": "imagesTr/img0010.nii.gz", "label": "./labelsTr/../own.nii.gz", "modality": "ct"}
    scan(tmp_path / "set" / "own.nii.gz", nifti(LABEL))
    path = decathlon(tmp_path, {"training": [entry, {"image": "imagesTr/img0011.nii.gz", "modality": "ct"}]})
    found = run(tmp_path, path, *BTCV, "--folds", "2")
    labels = {Path(e["image"]).name: e["label"] for e in found["training"] + found["validation"]}
    assert labels == {"img0010.nii.gz": "set/own.nii.gz", "img0011.nii.gz": "set/labelsTr/label0011.nii.gz"}

    capsys.readouterr()
    again = f"ct={images.parent}/*/img*.nii.gz"  # img0010 is now given with and without a label
    mixed = run(tmp_path, path, again, "--validation", "0", "--labels")
    assert [e.get("label") for e in mixed["training"]] == ["set/own.nii.gz", None, None]
    printed = capsys.readouterr().out
    assert "Note: 2 of 3 scans have no label" in printed and "bundles/dae_pretraining" in printed
    assert "self-supervised pre-training" in mixed["description"] and "listed once: 2" in printed
    for file in tmp_path.glob("out*"):
        file.unlink()
    assert "two labels" in fails(capsys, tmp_path, path, again, *BTCV)


# --- several channels ---------------------------------------------------------------------------------------------

CONTRASTS = np.stack([np.roll(VOXELS, shift, 0).clip(0) for shift in range(3)], -1)


def one_file(tmp_path: Path) -> list:
    """As the Medical Segmentation Decathlon has them: 4D, and a test without labels."""
    for n in range(4):
        scan(tmp_path / "set" / "imagesTr" / f"BRATS_{n}.nii.gz", nifti(np.roll(CONTRASTS, n, 1)))
        scan(tmp_path / "set" / "labelsTr" / f"BRATS_{n}.nii.gz", nifti(LABEL))
    cases = [{"image": f"./imagesTr/BRATS_{n}.nii.gz", "label": f"./labelsTr/BRATS_{n}.nii.gz"} for n in range(4)]
    return [f"t1={decathlon(tmp_path, {'training': cases, 'test': ['./imagesTs/BRATS_9.nii.gz']})}", "--labels"]


def files_in_folders(tmp_path: Path) -> list:
    """As BraTS has them; with a contrast in another order of its axes."""
    for n in range(4):
        for number, contrast in enumerate(("t1", "t1ce", "flair")):
            image = nib.Nifti1Image(np.roll(CONTRASTS[..., number], n, 1), np.diag([1.0, 2.0, 3.0, 1.0]))
            image = image.as_reoriented([[1, -1], [0, 1], [2, 1]]) if number == 2 else image
            scan(tmp_path / "set" / f"case_{n:02}" / f"case_{n:02}_{contrast}.nii.gz", image.to_bytes())
        scan(tmp_path / "set" / f"case_{n:02}" / f"case_{n:02}_seg.nii.gz", nifti(LABEL))
    return [f"t1={tmp_path}/set", "--channels", "_t1.=_t1ce.", "_t1.=_flair.", "--labels", "_t1.=_seg."]


def files_in_a_list(tmp_path: Path) -> list:
    files_in_folders(tmp_path)
    cases = [
        {name: [f"case_{n:02}/case_{n:02}_{part}.nii.gz" for part in parts] for name, parts in
         {"image": ("t1", "t1ce", "flair")}.items()} | {"label": f"case_{n:02}/case_{n:02}_seg.nii.gz"}
        for n in range(4)
    ]  # fmt: skip
    return [f"t1={decathlon(tmp_path, {'training': cases})}", "--labels"]


@pytest.mark.parametrize("kind", [one_file, files_in_folders, files_in_a_list])
def test_several_channels_are_listed_as_training_reads_them(tmp_path, capsys, kind):
    arguments = kind(tmp_path)
    given = [] if kind is files_in_folders else ["--in_channels", "3"]
    found = run(tmp_path, *arguments, *given, "--folds", "2")
    printed = capsys.readouterr().out
    assert "in 4 scans" in printed and printed.rstrip().endswith("out.json adapted")
    assert len(found["training"]) == len(found["validation"]) == 2
    for section, fold in (("training", 0), ("validation", 0)):
        for item in read_datalist(tmp_path / "out.json", section, tmp_path, labelled=True, fold=fold):
            number = int(re.search(r"(\d+)(_t1)?\.nii", item["case"])[1])
            image = LoadLabeld("label", "abcd")(LoadScand("image", 3)(item))["image"]
            assert np.array_equal(image.numpy(), np.moveaxis(np.roll(CONTRASTS, number, 1), -1, 0))
    rows = list(csv.DictReader((tmp_path / "out_report.csv").open()))
    assert [row["shape"] for row in rows] == ["8x9x10x3"] * 4
    for file in tmp_path.glob("out*"):
        file.unlink()
    wrong = fails(capsys, tmp_path, *arguments, "--in_channels", "2")
    assert "do not agree" in wrong or "None of the 4 files can be used" in wrong


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file.unlink(), "no channel 2: "),
        (lambda file: scan(file, nifti(CONTRASTS[:4, ..., 1])), "shape (4, 9, 10) is not that of its first channel"),
        (lambda file: scan(file, nifti(CONTRASTS[..., 1], np.diag([1, 2, 4.0, 1]))), "affine puts a corner 10 mm"),
        (lambda file: scan(file, nifti(CONTRASTS[..., 1] * 0)), "constant voxels: all are 0"),
        (lambda file: scan(file, nifti(CONTRASTS)), "not a 3D volume: 4 dimensions, 3 volumes"),
        (lambda file: scan(file, nifti(with_value(np.nan))), "NaN or infinite voxels"),
    ],
    ids=["missing", "shape", "place", "constant", "4D", "NaN"],
)
def test_a_channel_that_does_not_fit_refuses_the_scan_as_training_does(tmp_path, change, told):
    arguments = files_in_folders(tmp_path)
    file = tmp_path / "set/case_01/case_01_t1ce.nii.gz"
    change(file)
    found = run(tmp_path, *arguments)
    assert len(found["training"] + found["validation"]) == 3
    (reason,) = (row["reason"] for row in csv.DictReader((tmp_path / "out_report.csv").open()) if row["reason"])
    assert told in reason and str(file) in reason
    files = [str(file).replace("t1ce", name) for name in ("t1", "t1ce", "flair")]
    with pytest.raises(BadInput, match="case_01_t1ce"):
        LoadScand("image", 3)({"image": files})


def test_a_volume_of_4d_that_is_constant_is_refused(tmp_path):
    path = scan(tmp_path / "a.nii.gz", nifti(CONTRASTS * np.array([1, 0, 1], np.int16)))
    assert inspect_file(path, channels=3).reason == "constant voxels: all of channel 2 are 0"
    with pytest.raises(BadInput, match="same value 0 everywhere in one channel"):
        LoadScand("image", 3)({"image": str(path)})


def test_channels_that_do_not_agree(tmp_path, capsys):
    arguments = files_in_folders(tmp_path)
    assert "--in_channels 2 and the 3 files" in fails(capsys, tmp_path, *arguments, "--in_channels", "2")
    assert "Pre-training takes one channel" in fails(capsys, tmp_path, *arguments[:-2])
    arguments[0] += "/*/*_t1.nii.gz"
    assert "no '_T1.' to replace" in fails(capsys, tmp_path, *arguments, "--channels", "_T1.=_t2.")
    same = fails(capsys, tmp_path, *arguments, "--channels", "case_=case_")
    assert "would have one file as two channels by --channels" in same


# --- whose scans, and what is in them ----------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [("--folds", "3"), ("--validation", "0.3")])
def test_the_list_keeps_patients_together_and_is_read_as_it_is(tmp_path, folds):
    """In layouts of several data sets at once; `read_datalist` checks the list by the same rule."""
    for patient in range(1, 7):
        for visit in ("1", "2"):
            name = f"sub-m{patient}_ses-{visit}_T1w.nii.gz"
            scan(tmp_path / "bids" / f"sub-m{patient}" / f"ses-{visit}" / "anat" / name)
            scan(tmp_path / "glioma" / f"X-MEN-{patient:05}-00{visit}" / "t2w.nii.gz")
            scan(tmp_path / "clinic" / f"{patient:02}" / f"scan_{visit}.nii")
    sources = [f"t1={tmp_path}/bids", f"t2={tmp_path}/glioma", f"ct={tmp_path}/clinic"]
    found = run(tmp_path, *sources, *folds)
    whose = {"bids": r"sub-m\d", "glioma": r"MEN-\d+", "clinic": r"clinic/\d+"}
    for kind, pattern in whose.items():
        held = [
            {re.search(pattern, entry["image"])[0] for entry in found[side] if entry["image"].startswith(kind)}
            for side in ("training", "validation")
        ]
        assert not held[0] & held[1] and len(held[0] | held[1]) == 6
    assert len({entry["patient"] for entry in found["training"] + found["validation"]}) == 18
    fold = 0 if folds[0] == "--folds" else None
    for section in ("training", "validation"):
        items = read_datalist(tmp_path / "out.json", section, tmp_path, fold=fold)
        assert len(items) == len(found[section]) and all(set(item) == {"image", "case"} for item in items)


def test_the_patient_of_a_json_wins_and_stays(tmp_path):
    images = [scan(tmp_path / "set" / f"{n}x.nii") for n in range(8)]
    entries = [{"image": image.name, "patient": n % 2, "modality": "ct"} for n, image in enumerate(images)]
    path = decathlon(tmp_path, {"training": entries})
    for _ in range(2):
        found = run(tmp_path, path, "--validation", "0.5")
        assert [{entry["patient"] for entry in found[side]} for side in ("training", "validation")] in (
            [{"0"}, {"1"}], [{"1"}, {"0"}])  # fmt: skip
        path = tmp_path / "again.json"
        path.write_text((tmp_path / "out.json").read_text())
    with_pattern = run(tmp_path, path, "--validation", "0.5", "--patient", r"(\d)x")
    assert {entry["patient"] for entry in with_pattern["training"]} < set("01234567")


def test_scans_with_the_same_voxels_are_on_one_side_and_told(tmp_path, capsys):
    for number in range(12):
        path = scan(tmp_path / "f" / f"c{number}x.nii")
    scan(tmp_path / "f" / "copy.nii.gz", nifti(np.asarray(nib.load(path).dataobj).astype(np.float32), np.eye(4)))
    for seed in range(5):
        found = run(tmp_path, f"ct={tmp_path}/f", "--validation", "0.4", "--seed", str(seed))
        assert {"copy.nii.gz", "c11x.nii"} & names(found["training"]) in (set(), {"copy.nii.gz", "c11x.nii"})
        assert f"Note: the same voxels, so on one side:\n    {tmp_path}/f/c11x.nii\n" in capsys.readouterr().out


def test_values_that_cannot_be_are_noted_and_refused_if_strict(tmp_path, capsys):
    good = scan(tmp_path / "ct" / "good.nii")
    scan(tmp_path / "ct" / "unit.nii.gz", nifti(((VOXELS + 200) / 1200).astype(np.float32)))
    scan(tmp_path / "ct" / "stored.nii", nifti((VOXELS + 1024).astype(np.uint16)))
    scan(tmp_path / "ct" / "slope.nii", nifti((VOXELS + 1024).astype(np.uint16), edit=patch("<2f", 112, 1, -1024)))
    few = np.full(VOXELS.shape, -1000, np.int16)
    few[0, 0, :4] = VOXELS[0, 0, :4]
    scan(tmp_path / "ct" / "few.nii", nifti(few))
    scan(tmp_path / "t1" / "ct.nii", nifti(VOXELS - 500))
    sources = [f"ct={tmp_path}/ct", f"t1={tmp_path}/t1"]
    run(tmp_path, *sources)
    told = capsys.readouterr().out.partition("Note: values that can't be, which --strict refuses: 4")[2]
    assert "few.nii (ct: 99.4% of the voxels are -1000)" in told
    assert (
        re.search(r"stored.nii \(ct: values from 824 to 202\d, not HU", told)
        and "unit.nii.gz (ct: values from 0 to" in told
    )
    assert re.search(r"t1/ct.nii \(t1: values from -700 to 49\d, as of a CT in HU\)", told) and "slope.nii" not in told
    rows = {Path(row["path"]).name: row for row in csv.DictReader((tmp_path / "out_report.csv").open())}
    assert rows["good.nii"]["values"] == "" and rows["few.nii"]["values"].startswith("99.4%")
    found = run(tmp_path, *sources, "--strict")
    assert names(found["training"] + found["validation"]) == {good.name, "slope.nii"}
    assert "Refused, values: 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "told"),
    [(2.0005, ""), (1.9991, ""), (-0.0004, ""), (2.002, "2.002"), (-0.02, "-0.02"), (1.0015, "1.0015")],
)
def test_ids_of_floats_are_whole_within_a_thousandth(tmp_path, value, told):
    label = np.where(LABEL == 2, value, LABEL).astype(np.float32)
    report = inspect_file(scan(tmp_path / "a.nii"), label=str(scan(tmp_path / "b.nii", nifti(label))))
    assert (f"a voxel is {told}, not a whole number" in report.reason) if told else (not report.reason)
    assert told or report.ids == ((0, 1, 3) if value < 1 else (0, 1, 2, 3))


# --- the whole command ------------------------------------------------------------------------------------------


def test_report(tmp_path, capsys):
    for n in range(20):
        scan(tmp_path / "f" / f"c{n:02}x.nii.gz")
    scan(tmp_path / "f" / "labels" / "small.nii", nifti(VOXELS[:4]))
    for n in range(7):
        scan(tmp_path / "f" / f"bad{n}.nii", nifti(with_value(np.nan)))
    run(tmp_path, f"ct={tmp_path}/f")
    printed = capsys.readouterr().out
    assert re.search(r"ct +20 +1 +4-8 x 9 x 10 +1 x 2 x 3 +14,760", printed)
    assert "Refused, NaN or infinite voxels: 7" in printed and "... and 2 more" in printed
    assert "1 files lie in folders named like labels" in printed
    assert printed.endswith(
        "python -m monai.bundle run --config_file bundles/dae_pretraining/configs/train.json "
        "--bundle_root bundles/dae_pretraining "
        f"--datalist {tmp_path}/out.json\n"
    )
    rows = list(csv.DictReader((tmp_path / "out_report.csv").open()))
    assert len(rows) == 28 and [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert rows[0]["reason"] == "NaN or infinite voxels" and rows[0]["split"] == ""
    assert (
        rows[-1]["path"] == "f/labels/small.nii" and rows[-1]["shape"] == "4x9x10" and rows[-1]["spacing_mm"] == "1x2x3"
    )
    assert sorted(os.listdir(tmp_path)) == ["f", "out.json", "out_report.csv"]


def test_nothing_accepted(tmp_path, capsys):
    scan(tmp_path / "f" / "a.nii", b"")
    assert "None of the 1 files can be used" in fails(capsys, tmp_path, f"ct={tmp_path}/f")


def test_file_names_of_any_bytes(tmp_path):
    name = os.fsdecode(b"\xff caf\xc3\xa9\n.nii")
    try:
        scan(tmp_path / "f" / name)
    except OSError:
        pytest.skip("this file system refuses such names")
    assert names(run(tmp_path, f"ct={tmp_path}/f")["training"]) == {name}
    (tmp_path / "f" / name).write_bytes(b"")
    scan(tmp_path / "f" / "good.nii")
    assert names(run(tmp_path, f"ct={tmp_path}/f")["training"]) == {"good.nii"}


def test_two_thousand_files_in_parallel(tmp_path):
    (tmp_path / "f").mkdir()
    for n in range(2000):
        raw = gzip.compress(nifti(edit=patch("<2h", 352, n // 1000, n % 1000)), 1)
        (tmp_path / "f" / f"c{n}x.nii.gz").write_bytes(raw if n % 100 else raw[:-20])
    started = time.monotonic()
    assert main([str(tmp_path / "out.json"), f"ct={tmp_path}/f", "--workers", "2"]) == 0
    assert time.monotonic() - started < 20
    found = json.loads((tmp_path / "out.json").read_text())
    assert (len(found["training"]), len(found["validation"])) == (1881, 99)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="workers do not inherit the patch")
def test_killed_worker(tmp_path, monkeypatch, capsys):
    for n in range(4):
        scan(tmp_path / "f" / f"{n}x.nii")
    monkeypatch.setattr(datalist, "inspect_file", lambda *_: os._exit(1))
    assert main([str(tmp_path / "out.json"), f"ct={tmp_path}/f", "--workers", "2"]) == 2
    assert "fewer --workers" in capsys.readouterr().err and os.listdir(tmp_path) == ["f"]


def test_ctrl_c(tmp_path):
    raw = gzip.compress(nifti(), 1)
    (tmp_path / "f").mkdir()
    for n in range(3000):
        (tmp_path / "f" / f"{n}x.nii.gz").write_bytes(raw)
    patient = (
        "import sys, time; from tools import datalist as d; found = d.unique\n"
        "def unique(scans):\n    print('ready', flush=True)\n    return found(scans)\n"
        "d.unique = unique; sys.exit(d.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", patient, str(tmp_path / "out.json"), f"ct={tmp_path}/f", "--workers", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # A shell starts what runs in its background with SIGINT ignored; a terminal does not.
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.4)
        os.killpg(process.pid, signal.SIGINT)  # a terminal signals the workers, too
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "datalist: stopped; nothing was written.\n"
    assert os.listdir(tmp_path) == ["f"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datalist.os, "replace", full)
    scan(tmp_path / "f" / "a.nii")
    assert main([str(path), f"ct={tmp_path}/f", "--workers", "1"]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["f", "out.json"]


@REAL
def test_real_labels(tmp_path, capsys):
    command = [str(tmp_path / "out.json"), f"t2={DATA}/fetal_mri", "--labels", "images=labels", "--folds", "5"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Refused" not in printed and "labels found: 0 1 2 3 4 5 6 7 (in 11 scans)" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["validation"]) in (2, 3) and len(found["training"]) + len(found["validation"]) == 11


@REAL
def test_real_volumes(tmp_path, capsys):
    brain = DATA / "brain_mri" / "images"
    sources = [f"{name}={brain}/*_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
    sources += [f"ct={DATA}/ct/images", f"t1={DATA}/abdomen_mri/images", f"t2={DATA}/fetal_mri/images"]
    assert main([str(tmp_path / "out.json"), *sources, "--validation", "0.2"]) == 0
    assert "Refused" not in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["training"]) + len(found["validation"]) == 21
    assert {entry["modality"] for entry in found["training"]} == set(datalist.MODALITIES)
    sides = [{n for n in names(found[side]) if n.startswith("pgbm003")} for side in ("training", "validation")]
    assert sorted(map(len, sides)) == [0, 4]
