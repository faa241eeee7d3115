"""Who is who: names of public data sets and of users, and properties that any names have to have."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.data.cases import is_nifti, output_names, patients, standard_patient


def grouped(paths, modalities=()) -> set[frozenset[str]]:
    found = patients(paths, modalities)
    return {frozenset(path for path, own in zip(paths, found, strict=True) if own == one) for one in found}


# Two patients or more, a line each, with scans that are told apart by more than their contrast.
LAYOUTS = {
    "BIDS sessions": [[f"sub-{p}/ses-{s}/anat/sub-{p}_ses-{s}_T2w.nii.gz" for s in ("pre", "post")] for p in "AB"],
    "BIDS runs in derivatives": [
        [f"sub-{p}/anat/sub-{p}_run-1_T1w.nii.gz", f"derivatives/prep/sub-{p}/anat/sub-{p}_run-2_T1w.nii.gz"]
        for p in ("c01", "c02")
    ],
    "BIDS, flat": [[f"images/sub-{p:03}_rec-{r}_T2w.nii.gz" for r in ("mial", "irtk")] for p in (7, 70)],
    "BraTS 2024": [[f"BraTS-GLI-{p:05}-10{t}/BraTS-GLI-{p:05}-10{t}-t2f.nii.gz" for t in (0, 1, 2)] for p in (5, 6)],
    "BraTS 2021": [[f"BraTS2021_{p:05}/BraTS2021_{p:05}_{m}.nii.gz" for m in ("t1", "flair")] for p in (0, 2, 3)],
    "BraTS 2019": [[f"BraTS19_2013_{p}_1/BraTS19_2013_{p}_1_{m}.nii.gz" for m in ("t1", "t2")] for p in (2, 3, 27)],
    "ISBI 2015": [[f"training{p:02}_{t:02}_flair.nii.gz" for t in (1, 2, 3, 4)] for p in range(1, 6)],
    "MSSEG-2": [[f"{p:03}/flair_time{t:02}_on_middle_space.nii.gz" for t in (1, 2)] for p in (13, 15, 16)],
    "LIDC": [[f"LIDC-IDRI-{p:04}/01-01-2000-{s}/{s}.nii.gz" for s in (30178, 35511)] for p in (1, 2)],
    "HNSCC": [[f"HNSCC-01-{p:04}_{d}_CT.nii.gz" for d in ("1998-12-05", "1999-08-21")] for p in (1, 2)],
    "TCGA": [[f"TCGA-CS-{p}_{d}/{d}_t1.nii.gz" for d in (19960909, 19980101)] for p in (4941, 4942)],
    "ADNI": [[f"{p}/{p}_{v}_t1.nii" for v in ("bl", "m06", "m12")] for p in ("002_S_0295", "002_S_0413")],
    "OASIS-2": [[f"OAS2_{p:04}_MR{s}.nii.gz" for s in (1, 2)] for p in (1, 2, 4)],
    "UPENN": [[f"UPENN-GBM-{p:05}_{s}_T1.nii.gz" for s in (11, 21)] for p in (1, 2)],
    "COVID-19": [[f"volume-covid19-A-{p:04}{d}.nii.gz" for d in ("", "_day003")] for p in (1, 2, 16)],
    "LUMIERE": [[f"Patient-{p:03}/week-{w:03}/CT1.nii.gz" for w in (0, 44)] for p in (1, 2)],
    "ACDC": [[f"patient{p:03}/patient{p:03}_frame{f:02}.nii.gz" for f in (1, 12)] for p in (1, 2)],
    "visits as folders": [[f"{v}/H{p}.nii.gz" for v in ("baseline", "visit2")] for p in (71, 72)],
    "people": [[f"{p}/{s}.nii.gz" for s in ("first", "second")] for p in ("ada", "grace", "mary")],
    "words with blanks": [[f"Subject {p}/Scan {s}.nii" for s in (1, 2)] for p in (1, 2)],
    "LUNA16": [[f"subset{p % 2}/1.3.6.1.4.1.14519.5.2.1.6279.6001.{p}77.nii.gz"] for p in range(9)],
    "OASIS-3": [[f"OAS3000{p}_MR_d0{d}/anat{d}/sub-OAS3000{p}_ses-d0{d}_T1w.nii.gz" for d in (1, 2)] for p in (1, 2)],
    "autoPET": [
        [f"PETCT_{p}/{d}-NA-PET/CTres.nii.gz" for d in ("02-09-2003", "05-02-2004")]
        for p in ("0011f3deaf", "01140d52d8", "a83bb1e2f7", "dead34beef")
    ],
    "pseudonyms": [[f"{p}_{s}.nii.gz" for s in (1, 2)] for p in ("x7k2", "b1q9z", "40c2")],
    "PI-CAI": [[f"{p}/{p}_{s}_t2w.nii.gz" for s in (1000000, 1000001)] for p in (10000, 10001)],
    "UK Biobank": [[f"{p}_20252_{visit}_0.nii.gz" for visit in (2, 3)] for p in (1000012, 1000025, 1000031)],
    "two sides": [[f"knee_{p:03}_{side}.nii.gz" for side in ("left", "right")] for p in (1, 2, 3)],
    "sites": [[f"site{s}/{p:02}.nii.gz"] for s in (1, 2) for p in range(9)],
    "MSD": [[f"imagesTr/hippocampus_{p:03}.nii.gz"] for p in (1, 3, 204)],
    "BTCV": [[f"imagesTr/img{p:04}.nii.gz"] for p in (1, 2, 35)],
    "KiTS": [[f"case_{p:05}/imaging.nii.gz"] for p in (0, 1, 210)],
    "IXI": [[f"IXI{p:03}-{s}-0828-T1.nii.gz"] for p, s in ((2, "Guys"), (12, "HH"), (13, "HH"))],
    "scans of one folder": [[f"scan{p}.nii.gz"] for p in range(5)],
    "numbers begin anew": [[f"{f}/{p:03}.nii.gz"] for f in ("train", "val") for p in (1, 2, 3)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    assert grouped(sum(LAYOUTS[layout], [])) == set(map(frozenset, LAYOUTS[layout]))


def test_only_standard_names_leave_no_doubt():
    sure = ["BIDS sessions", "BraTS 2024", "LIDC", "TCGA", "ADNI", "ACDC", "words with blanks"]
    assert all(standard_patient(path) for name in sure for path in sum(LAYOUTS[name], []))
    open_ = ["ISBI 2015", "MSSEG-2", "sites", "people", "BTCV", "numbers begin anew", "visits as folders"]
    assert not any(standard_patient(path) for name in open_ for path in sum(LAYOUTS[name], []))


NAME = st.text("abkz019", min_size=1, max_size=5)
PATH = st.builds("/".join, st.lists(NAME, min_size=1, max_size=4))


@settings(deadline=None, database=None)
@given(st.lists(PATH, min_size=1, max_size=12, unique=True), st.sampled_from(["t1", "flair", "T2w"]))
def test_a_further_contrast_is_no_further_patient(paths, contrast):
    both = [f"{path}_{name}.nii.gz" for path in paths for name in ("ct", contrast)]
    found = patients(both)
    assert found[::2] == found[1::2] and all(found)


@settings(deadline=None, database=None)
@given(st.lists(PATH, min_size=1, max_size=12, unique=True), st.randoms())
def test_the_order_of_the_names_does_not_matter(paths, random):
    shuffled = random.sample(paths, len(paths))
    assert dict(zip(paths, patients(paths), strict=True)) == dict(zip(shuffled, patients(shuffled), strict=True))


@settings(deadline=None, database=None)
@given(
    st.sets(st.integers(0, 9999), min_size=2, max_size=20), st.integers(1, 3), st.sampled_from(["ses", "acq", "run"])
)
def test_entities_of_bids_never_part_a_patient(subjects, scans, entity):
    paths = [f"sub-{p:04}/anat/sub-{p:04}_{entity}-{s}_T1w.nii.gz" for p in subjects for s in range(scans)]
    assert len(set(patients(paths))) == len(subjects)


@settings(deadline=None, database=None)
@given(st.lists(st.tuples(PATH, st.sampled_from([".nii", ".nii.gz", ".NII.GZ"])), min_size=1, max_size=12, unique=True))
def test_outputs_of_different_files_differ_and_stay_in_their_folder(files):
    files = [f"/data/{path}{suffix}" for path, suffix in files]
    names = output_names(files)
    assert len(set(names)) == len(files)
    for file, name in zip(files, names, strict=True):
        assert not os.path.isabs(name) and ".." not in name.split("/")
        stems = [os.path.basename(other).lower().partition(".nii")[0] for other in files]
        if stems.count(os.path.basename(file).lower().partition(".nii")[0]) == 1:
            assert name == os.path.basename(file)[: len(name)] and "." not in name  # a file of its own name keeps it


def test_outputs_keep_as_much_of_the_path_as_tells_them_apart():
    files = [
        "/d/p1/t2.nii.gz",
        "/d/p2/t2.nii.gz",
        "/d/p2/x.nii",
        "/d/a/1/y.nii",
        "/d/b/1/y.nii",
        "/d/z.nii",
        "/d/z.nii.gz",
    ]
    assert output_names(files) == ["p1/t2", "p2/t2", "x", "a/1/y", "b/1/y", "z.nii", "z.nii.gz"]
    assert output_names(["/d/x.nii", "/d/x.nii"]) == ["x", "x"]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ", "b/a.Nii"])
def test_scans_by_name(name):
    assert is_nifti(name)


@pytest.mark.parametrize("name", ["a.nii.gz.md5", "._a.nii", "a.nii.gz.part", "nii", "a.nii.zip", "a.json", "a.gz"])
def test_other_files_by_name(name):
    assert not is_nifti(name)
