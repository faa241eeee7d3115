"""Lists as pandas, editors, hands and other programs leave them: taken rightly, or refused in a sentence."""

import gzip
import json
import os

import nibabel
import numpy as np
import pytest

from custom.data.datalist import find_scans, read_datalist
from custom.data.twins import twins
from custom.errors import BadInput

VOXELS = np.random.default_rng(0).integers(-900, 900, (9, 10, 11)).astype(np.int16)


def scan(path, seed=0, **kind) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).permuted(VOXELS)
    nibabel.Nifti1Image(voxels.astype(kind.get("dtype", np.int16)), kind.get("affine", np.eye(4))).to_filename(path)
    return str(path)


def written(folder, content, encoding="utf-8"):
    path = folder / "list.json"
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode(encoding))
    return path


@pytest.fixture
def cases(tmp_path) -> list[dict]:
    """Four cases with labels; a list of them is written by `written`."""
    for number in range(4):
        scan(tmp_path / f"case{number}.nii", number)
        scan(tmp_path / f"label{number}.nii", 9)
    return [{"image": f"case{n}.nii", "label": f"label{n}.nii", "fold": n % 2} for n in range(4)]


ODD = {
    "a number as label": ({"label": 7.5}, "has the label 7.5, which should be text"),
    "NaN as image": ({"image": float("nan")}, "has the image NaN, which should be a file name, or a list of them"),
    "an empty list": ({"image": []}, r"has the image \[\]"),
    "a list of numbers": ({"image": ["case0.nii", 1]}, "has the image"),
    "two labels": ({"label": ["label0.nii", "label1.nii"]}, "has the label .* should be text"),
    "empty text": ({"label": ""}, 'has the label ""'),
    "a zero byte": ({"image": "a\0b"}, "has the image"),
    "a modality as list": ({"modality": ["ct"]}, "has the modality"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_text_is_refused_with_its_entry(kind, tmp_path, cases):
    change, sentence = ODD[kind]
    cases[0]["modality"] = "ct"
    listed = written(tmp_path, {"training": [cases[0], {"modality": "ct", **cases[1], **change}]})
    with pytest.raises(BadInput, match=f'list.json: entry 1 of "training" {sentence}'):
        read_datalist(listed, "training", tmp_path, ["ct"], labelled=True)


@pytest.mark.parametrize("content", ['{"training": "case0.nii"}', '{"training": {"0": {}}}', '{"training": 3.5}', "3",
                                     '{"training": ["case0.nii"]}', '{"training": [null]}', "{", ""])  # fmt: skip
def test_what_is_no_list_is_refused(content, tmp_path):
    with pytest.raises(BadInput, match="list.json"):
        read_datalist(written(tmp_path, content), "training", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings_of_editors_are_read(encoding, tmp_path):
    scan(tmp_path / "ödem.nii")
    listed = written(
        tmp_path, json.dumps({"training": [{"image": "ödem.nii"}], "validation": None}, ensure_ascii=False), encoding
    )
    assert [item["case"] for item in read_datalist(listed, "training", tmp_path)] == ["ödem.nii"]


def test_an_entry_that_lacks_what_others_have_is_not_dropped(tmp_path, cases):
    for change in ({"flod": 1}, {"Fold": 1}, {"fold": None}, {}):
        odd = {**{key: value for key, value in cases[3].items() if key != "fold"}, **change}
        listed = written(tmp_path, {"training": [*cases[:3], odd]})
        with pytest.raises(BadInput, match='entry 3 of "training" has no "fold", which 3 others have'):
            read_datalist(listed, "training", tmp_path, fold=0)
    named = [{**case, "patient": str(number)} for number, case in enumerate(cases)]
    named[1]["pateint"] = named[1].pop("patient")
    with pytest.raises(BadInput, match='entry 1 .* has no "patient", which 3 others have; did you mean `pateint`'):
        read_datalist(written(tmp_path, {"training": named}), "training", tmp_path)
    with pytest.raises(BadInput, match='needs "image" and "label", found .*did you mean `labl`'):
        cases[2]["labl"] = cases[2].pop("label")
        read_datalist(written(tmp_path, {"training": cases}), "training", tmp_path, labelled=True)


def test_a_case_to_validate_counts_once(tmp_path, cases):
    listed = written(tmp_path, {"training": [cases[0], cases[0]], "validation": [*cases[1:], cases[1]]})
    assert len(read_datalist(listed, "training", tmp_path)) == 2  # as one weighs a case
    with pytest.raises(BadInput, match='entry 3 of "validation" is listed twice'):
        read_datalist(listed, "validation", tmp_path)


def test_a_section_without_folds_is_told(tmp_path, cases, caplog):
    del cases[3]["fold"]
    listed = written(tmp_path, {"training": cases[:3], "validation": cases[3:]})
    assert len(read_datalist(listed, "training", tmp_path, fold=0)) == 1
    assert 'the 1 entries of "validation" have no "fold"' in caplog.text


def test_folds_as_text_and_as_pandas_leaves_them(tmp_path, cases):
    for kind in (str, float, lambda n: f" {n} "):
        listed = written(tmp_path, {"training": [{**case, "fold": kind(case["fold"])} for case in cases]})
        for fold in (1, "1", 1.0):
            found = [item["case"] for item in read_datalist(listed, "validation", tmp_path, fold=fold)]
            assert found == ["case1.nii", "case3.nii"]
    for wrong in ("first", 0.5, True, [0]):
        listed = written(tmp_path, {"training": [*cases[:3], {**cases[3], "fold": wrong}]})
        with pytest.raises(BadInput, match='entry 3 of "training" has the fold .* should be a whole number'):
            read_datalist(listed, "training", tmp_path, fold=0)
    with pytest.raises(BadInput, match=r"has the folds \[0, 1\], not last"):
        read_datalist(written(tmp_path, {"training": cases}), "training", tmp_path, fold="last")


@pytest.mark.parametrize("value", ["half", None, [0.5], float("nan"), 2])
def test_a_share_that_is_none(value, tmp_path, cases):
    with pytest.raises(BadInput, match="--label_fraction"):
        read_datalist(written(tmp_path, {"training": cases}), "training", tmp_path, fraction=value)


# --- both sides -------------------------------------------------------------------------------------------------


def both(folder, one: str, two: str, **more) -> None:
    """Read each side of a list with a case on either side, which comes with further ones."""
    others = [scan(folder / f"other{n}.nii", 50 + n) for n in range(2)]
    sides = [[{"image": others[0]}, {"image": one, **more}], [{"image": two}, {"image": others[1]}]]
    if "patient" in more:
        sides[1][0]["patient"], sides[0][0]["patient"], sides[1][1]["patient"] = more["patient"], "x", "y"
    listed = written(folder, dict(zip(("training", "validation"), sides, strict=True)))
    for section in ("training", "validation"):
        read_datalist(listed, section, folder)


def same_path(folder):
    return scan(folder / "a.nii"), "sub/../a.nii"


def link(folder):
    (folder / "b.nii").symlink_to(scan(folder / "a.nii"))
    return "a.nii", "b.nii"


def hard_link(folder):
    os.link(scan(folder / "a.nii"), folder / "b.nii")
    return "a.nii", "b.nii"


def packed(folder):
    with open(scan(folder / "a.nii"), "rb") as whole:
        (folder / "b.nii.gz").write_bytes(gzip.compress(whole.read(), 9))
    return "a.nii", "b.nii.gz"


def other_header(folder):
    return scan(folder / "a.nii.gz"), scan(folder / "b.nii.gz", affine=np.diag([2, 1, 1, 1]))


def other_type(folder):
    return scan(folder / "a.nii.gz"), scan(folder / "b.nii", dtype=np.float64)


@pytest.mark.parametrize("kind", [same_path, link, hard_link, packed, other_header, other_type])
def test_a_scan_on_both_sides_is_found(kind, tmp_path):
    said = "are one file" if kind in (same_path, link) else "hold the same voxels"
    with pytest.raises(BadInput, match=f'a.nii.* of "training" and .*"validation" {said}'):
        both(tmp_path, *kind(tmp_path))


@pytest.mark.parametrize("training, validation", [((0, 1, 2, 3), (2, 3)), ((0, 1, 2), (2, 3)), ((0, 1), (0, 1))])
def test_a_validation_on_what_is_trained_on_is_refused_unless_it_is_meant(training, validation, tmp_path, cases):
    sides = [[cases[number] for number in numbers] for numbers in (training, validation)]
    listed = written(tmp_path, dict(zip(("training", "validation"), sides, strict=True)))
    for section, entries in zip(("training", "validation"), sides, strict=True):
        with pytest.raises(BadInput, match=r'case\d.nii of "\w+" and case\d.nii of "\w+" are one file'):
            read_datalist(listed, section, tmp_path)
        assert len(read_datalist(listed, section, tmp_path, apart=False)) == len(entries)


def test_scans_that_differ_in_their_last_voxel_are_two(tmp_path):
    one, two = (scan(tmp_path / name, 3) for name in ("a.nii.gz", "b.nii.gz"))
    voxels = np.asarray(nibabel.load(one).dataobj).copy(order="F")
    voxels[-1, -1, -1] += 1
    nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(two)
    assert twins([one], [two]) == []
    both(tmp_path, one, two)


def test_files_that_cannot_be_read_are_no_twins(tmp_path):
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).write_bytes(b"no scan")
    assert twins([str(tmp_path / "a.nii.gz")], [str(tmp_path / "b.nii.gz"), str(tmp_path / "none.nii")]) == []


@pytest.mark.parametrize(
    "one, two",
    [("sub-x1/ses-a/anat/sub-x1_ses-a_T2w.nii", "sub-x1/ses-b/anat/sub-x1_ses-b_T2w.nii"),
     ("images/PGBM-017_t1.nii", "images/PGBM-017_2004_t1.nii"),
     ("patient7/before.nii", "patient7/after.nii")],
)  # fmt: skip
@pytest.mark.parametrize("absolute", [False, True])
def test_a_patient_on_both_sides_is_refused_where_names_leave_no_doubt(one, two, absolute, tmp_path):
    paths = [scan(tmp_path / one, 1), scan(tmp_path / two, 2)] if absolute else [one, two]
    scan(tmp_path / one, 1), scan(tmp_path / two, 2)
    with pytest.raises(BadInput, match='of "training" and .* of "validation" are of one patient, '):
        both(tmp_path, *paths)


def test_a_patient_whom_names_suggest_is_noted_once(tmp_path, caplog):
    sides = [[f"{n:02}/{name}.nii" for n in range(3)] for name in ("one", "two")]
    for seed, path in enumerate(sum(sides, [])):
        scan(tmp_path / path, seed)
    entries = [[{"image": path} for path in side] for side in sides]
    listed = written(tmp_path, dict(zip(("training", "validation"), entries, strict=True)))
    for section in ("training", "training", "validation"):
        assert len(read_datalist(listed, section, tmp_path)) == 3
    assert caplog.text.count('"training" and') == 1 and "are of one patient, 00, if their names tell it" in caplog.text


def test_the_list_s_own_patient_wins_over_the_names(tmp_path):
    one, two = scan(tmp_path / "q1.nii", 1), scan(tmp_path / "q2.nii", 2)
    with pytest.raises(BadInput, match="are of one patient, 0815"):
        both(tmp_path, one, two, patient="0815")
    names = [scan(tmp_path / f"sub-1/{name}.nii", seed) for seed, name in enumerate("ab")]
    listed = {"training": [{"image": names[0], "patient": 1}], "validation": [{"image": names[1], "patient": 2}]}
    (item,) = read_datalist(written(tmp_path, listed), "training", tmp_path)
    assert item == {"image": names[0], "case": names[0]}  # nothing that a store would see


# --- scans to infer ---------------------------------------------------------------------------------------------


def test_a_folder_is_searched_by_the_rule_of_all_tools(tmp_path):
    folder = tmp_path / "all [of] them"
    for name in ("b.NII.GZ", "a.nii", "a.nii.md5", "._a.nii", "c.nii.gz.part", "n.txt"):
        scan(tmp_path / "x.nii")
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes((tmp_path / "x.nii").read_bytes())
    (folder / "d.nii").mkdir()
    found = find_scans(str(folder))
    assert [item["case"] for item in found] == ["a.nii", "b.nii.gz"]
    assert [item["image"] for item in found] == [str(folder / "a.nii"), str(folder / "b.NII.GZ")]


def test_outputs_beside_their_scans_are_no_scans(tmp_path, caplog):
    for name in ("a.nii.gz", "a_seg.nii.gz", "a_restored.nii", "b_seg.nii", "c.nii"):
        scan(tmp_path / name)
    assert [item["case"] for item in find_scans(str(tmp_path))] == ["a.nii.gz", "b_seg.nii", "c.nii"]
    assert "a_restored.nii and 1 more are named as outputs, and left out" in caplog.text
    assert len(find_scans([str(tmp_path / "a.nii.gz"), str(tmp_path / "a_seg.nii.gz")])) == 2  # as they were named


def test_scans_of_one_name_are_told_apart(tmp_path):
    files = [scan(tmp_path / name) for name in ("p1/anat/t1.nii.gz", "p2/anat/t1.nii.gz", "p2/anat/u.nii")]
    assert [item["case"] for item in find_scans(files)] == ["p1/anat/t1.nii.gz", "p2/anat/t1.nii.gz", "u.nii"]
    assert [item["case"] for item in find_scans([files[:2], [files[2], files[1]]])] == ["t1.nii.gz", "u.nii"]
    with pytest.raises(BadInput, match=r"x\.nii and .*x\.nii\.gz would both be written as x; leave one of them out"):
        find_scans([scan(tmp_path / "x.nii"), scan(tmp_path / "x.nii.gz")])
    with pytest.raises(BadInput, match="would both be written"):
        find_scans([files[0], files[0]])


@pytest.mark.parametrize("images", [3.5, None, [3.5], [[]], {"a": 1}])
def test_what_is_no_path_is_refused(images):
    with pytest.raises(BadInput, match="--dataset_dir"):
        find_scans(images)


def test_a_folder_named_by_a_number(tmp_path, monkeypatch):
    scan(tmp_path / "2026" / "x.nii")
    monkeypatch.chdir(tmp_path)
    assert [item["case"] for item in find_scans(2026)] == ["x.nii"]
