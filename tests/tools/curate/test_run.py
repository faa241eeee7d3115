"""A run as a whole: it resumes, leaks nothing of a patient, joins patients, and keeps its sources as they are."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from tests.conftest import ROOT
from tests.tools.curate.series import T1, T2, body, write_series
from tools.curate.__main__ import main

PLANTED = ("Planted", "P-0001", "19330417", "ACC4711", "20190304", "MEIER", "1931-05-05", "Secret free text")


def image(path: Path, seed: int = 0, mm: float = 3.0, ct: bool = True, **header) -> None:
    """Write a NIfTI file with texts in its header."""
    voxels = body(seed, ct=ct).transpose(2, 1, 0).astype(np.int16) - (1024 if ct else 0)
    file = nibabel.Nifti1Image(voxels, np.diag([mm, mm, mm, 1]))
    file.header["descrip"], file.header["aux_file"] = b"Secret free text", b"MEIER"
    path.parent.mkdir(parents=True, exist_ok=True)
    file.to_filename(path)


def tree(folder: Path) -> dict[str, tuple]:
    """Return content, mode and time of all that a folder holds."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.is_file() and hashlib.md5(path.read_bytes()).digest(),
        )
        for path in folder.rglob("*")
    }


def rows(out: Path) -> list[dict]:
    with open(out / "report.csv", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_nothing_of_a_patient_gets_out(tmp_path, capfd):
    """Names are planted in headers of DICOM and NIfTI, in paths, and in an archive; all that is written is searched."""
    source = tmp_path / "MEIER^HANS 1931-05-05"
    write_series(
        source / "Planted^Name" / "19330417", each=lambda image, n: setattr(image, "ImageComments", "Secret free text")
    )
    write_series(source / "t", tags={**T1, "SeriesDescription": "t1 MEIER"}, pixels=body(3, ct=False))
    image(source / "ct MEIER 1931-05-05.nii.gz", seed=5)
    (source / "MEIER.pdf").write_bytes(b"%PDF Planted")
    (source / "scan.MEIER").write_bytes(b"Planted")
    import zipfile

    with zipfile.ZipFile(source / "MEIER.zip", "w") as archive:
        for file in write_series(tmp_path / "zipped", tags={**T2}, pixels=body(4, ct=False)):
            archive.write(file, f"MEIER/{file.name}")
    before = tree(source)
    out = tmp_path / "set"
    assert main([str(out), str(source), "--workers", "1"]) == 0
    assert tree(source) == before
    assert len([row for row in rows(out) if row["status"] == "used"]) == 4
    said = capfd.readouterr()
    texts = [(said.out + said.err).replace(str(tmp_path), "").encode()]
    for file in out.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            if file.name.endswith(".gz"):
                import gzip

                content = gzip.decompress(content)
            texts.append(content)
    for word in PLANTED:
        for text in texts:
            assert word.encode() not in text and word.lower().encode() not in text.lower()
            assert hashlib.sha256(word.encode()).hexdigest()[:16].encode() not in text
    assert (out / "salt").stat().st_mode & 0o077 == 0
    assert not (out / ".work").exists()


def test_a_killed_run_goes_on_without_losing_or_repeating(tmp_path):
    """SIGKILL at several moments, then the same command to its end: the list is that of an undisturbed run."""
    for number in range(12):
        write_series(tmp_path / "in" / str(number), pixels=body(number), patient=f"P{number}")
    salt = tmp_path / "salt"
    salt.write_text("0123456789abcdef")
    command = [sys.executable, "-m", "tools.curate", "--salt", str(salt), "--workers", "2"]
    assert (
        subprocess.run(
            [*command, str(tmp_path / "whole"), str(tmp_path / "in")], cwd=ROOT, capture_output=True
        ).returncode
        == 0
    )
    out = tmp_path / "killed"
    for volumes in (0, 2, 7):
        process = subprocess.Popen(
            [*command, str(out), str(tmp_path / "in")], cwd=ROOT, stdout=-3, stderr=-3, start_new_session=True
        )
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if (out / "state.sqlite").exists() and len(list((out / "volumes").glob("[!.]*.nii.gz"))) >= volumes:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    times = {file.name: file.stat().st_mtime_ns for file in (out / "volumes").glob("[!.]*.nii.gz")}
    assert subprocess.run([*command, str(out), str(tmp_path / "in")], cwd=ROOT, capture_output=True).returncode == 0
    for name in ("datalist.json", "report.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for file in (tmp_path / "whole" / "volumes").iterdir():
        assert (out / "volumes" / file.name).read_bytes() == file.read_bytes()
    again = {file.name: file.stat().st_mtime_ns for file in (out / "volumes").iterdir()}
    assert sum(again[name] != stamp for name, stamp in times.items()) <= 2  # those at work when it was killed
    assert not list(out.rglob("*.part"))


def test_a_second_run_reads_nothing_again_and_takes_in_what_is_new(tmp_path, monkeypatch):
    write_series(tmp_path / "in" / "a", pixels=body(0))
    out = tmp_path / "set"
    assert main([str(out), str(tmp_path / "in"), "--workers", "1"]) == 0
    stamp = {file: file.stat().st_mtime_ns for file in (out / "volumes").iterdir()}
    write_series(tmp_path / "in" / "b", pixels=body(1), patient="P-0002")
    assert main([str(out), str(tmp_path / "in"), "--workers", "1"]) == 0
    assert len(list((out / "volumes").iterdir())) == 2
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in stamp.items())
    # Another rule needs no volume to be read again; a volume that is used again is made again.
    assert main([str(out), str(tmp_path / "in"), "--workers", "1", "--rule", "min_extent_mm=1000"]) == 2
    assert not list((out / "volumes").iterdir())
    assert main([str(out), str(tmp_path / "in"), "--workers", "1"]) == 0
    assert len(list((out / "volumes").iterdir())) == 2


def test_formats(tmp_path):
    """One body in each format, told by its name or by the command line, is one volume and its twins."""
    values = body(2).transpose(2, 1, 0).astype(np.int16) - 1024
    picture = SimpleITK.GetImageFromArray(values.transpose(2, 1, 0))
    picture.SetSpacing((3, 3, 3))
    picture.SetOrigin((-70, -60, 100))
    (tmp_path / "ct").mkdir()
    for name in ("a.mhd", "b.mha", "c.nrrd", "d.nhdr"):
        SimpleITK.WriteImage(picture, str(tmp_path / "ct" / name))
    affine = np.diag([-3.0, -3, 3, 1])
    affine[:3, 3] = 70, 60, 100
    nibabel.MGHImage(values.astype(np.float32), affine).to_filename(tmp_path / "ct" / "e.mgz")
    nibabel.Nifti1Image(values, affine).to_filename(tmp_path / "ct" / "f.nii")
    nibabel.Nifti1Pair(values, affine).to_filename(tmp_path / "ct" / "g.img")
    nibabel.AnalyzeImage(values, affine).to_filename(tmp_path / "ct" / "h.img")
    out = tmp_path / "set"
    assert main([str(out), f"ct={tmp_path / 'ct'}", "--workers", "1"]) == 0
    found = [row for row in rows(out) if row["id"]]
    assert len(found) == 8
    # Analyze does not tell left from right, so that its volume is mirrored.
    assert sum(row["reason"].startswith("exact twin") for row in found) == 6
    for file in (out / "volumes").iterdir():
        made = np.asanyarray(nibabel.as_closest_canonical(nibabel.load(file)).dataobj)
        assert np.array_equal(made, values[::-1, ::-1]) or np.array_equal(made, values[::-1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("shear", "sheared axes"), ("forms", "qform and sform disagree"), ("spacings", "two spacings"),
        ("none", "neither qform nor sform"),
        ("nan", "NaN or infinite voxels"), ("4d", "not a 3D volume: 4 dimensions"), ("short", "truncated or corrupted"),
        ("complex", "voxel type: complex"), ("huge", "truncated or corrupted"), ("mask", "label map, by its name"),
        ("mouse", "animal or specimen, by its name"), ("phantom", "phantom, by its name"), ("zero", "bad spacing"),
        ("mhd-far", "voxels in other folders"), ("mhd-gone", "the file of its voxels is missing"),
        ("nrrd-bare", "no spacing in its header"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_volume_to_train_on(tmp_path, in_process, change, reason):
    values = body(2).transpose(2, 1, 0).astype(np.float32) - 1024
    affine, name = np.diag([3.0, 3, 3, 1]), "x.nii"
    (tmp_path / "in").mkdir()
    name = {"mask": "x_seg.nii", "mouse": "mouse_1.nii", "phantom": "phantom.nii"}.get(change, name)
    if change.startswith(("mhd", "nrrd")):
        picture = SimpleITK.GetImageFromArray(values)
        SimpleITK.WriteImage(picture, str(tmp_path / "in" / ("x.mhd" if change.startswith("mhd") else "x.nrrd")))
        file = next(file for file in (tmp_path / "in").iterdir() if file.suffix in (".mhd", ".nrrd"))
        content = file.read_bytes()
        if change == "mhd-far":
            file.write_bytes(content.replace(b"x.raw", b"../../etc/passwd"))
        elif change == "mhd-gone":
            (tmp_path / "in" / "x.raw").unlink()
        else:
            lines = [
                line for line in content.split(b"\n", 12) if not line.startswith((b"space directions", b"space origin"))
            ]
            file.write_bytes(b"\n".join(lines))
    else:
        if change == "nan":
            values[3, 3, 3] = np.nan
        if change == "4d":
            values = np.stack([values] * 3, axis=-1)
        if change == "complex":
            values = values.astype(np.complex64)
        file = nibabel.Nifti1Image(values, affine)
        if change == "shear":
            sheared = affine.copy()
            sheared[0, 2] = 1.0
            file.set_sform(sheared, 1)
            file.set_qform(None, 0)
        if change in ("forms", "spacings"):
            turned = np.array([[0, 3.0, 0, 0], [-3, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
            file.set_sform(turned if change == "forms" else np.diag([3.0, 3, 6, 1]), 1)
            file.set_qform(affine, 1)
        if change == "none":
            file.set_sform(None, 0)
            file.set_qform(None, 0)
        file.to_filename(tmp_path / "in" / name)
        content = bytearray((tmp_path / "in" / name).read_bytes())
        if change == "short":
            content = content[:5000]
        if change == "huge":
            content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
        if change == "zero":
            content[80:84] = bytes(4)
        (tmp_path / "in" / name).write_bytes(content)
    out = tmp_path / "set"
    assert main([str(out), f"ct={tmp_path / 'in'}", "--workers", "1"]) == 2
    found = [row for row in rows(out) if row["status"] in ("refused", "left out")]
    assert len(found) == 1 and reason in found[0]["reason"], found


def test_a_patient_stays_on_one_side_across_sources(tmp_path):
    """DICOM with its patient's identifier, NIfTI named by the same, a volume named by its series, and BIDS sessions."""
    files = write_series(
        tmp_path / "dicom", pixels=body(0), patient="LIDC-0007", uid="1.2.826.0.1.3680043.8.498.4711.99"
    )
    assert files
    image(tmp_path / "nifti" / "lidc0007_ct.nii.gz", seed=1)
    image(tmp_path / "luna" / "1.2.826.0.1.3680043.8.498.4711.99.nii.gz", seed=2)
    image(tmp_path / "bids" / "sub-01" / "ses-1" / "sub-01_ses-1_T1w.nii.gz", seed=3, ct=False)
    image(tmp_path / "bids" / "sub-01" / "ses-2" / "sub-01_ses-2_FLAIR.nii.gz", seed=4, ct=False)
    for number in (2, 3):
        image(tmp_path / "bids" / f"sub-0{number}" / f"sub-0{number}_T1w.nii.gz", seed=5 + number, ct=False)
    out = tmp_path / "set"
    sources = [
        str(tmp_path / "dicom"),
        f"ct={tmp_path / 'nifti'}",
        f"luna,ct={tmp_path / 'luna'}",
        f"bids={tmp_path / 'bids'}",
    ]
    assert main([str(out), *sources, "--workers", "1", "--rule", "validation_share=0.3"]) == 0
    used = [row for row in rows(out) if row["status"] == "used"]
    assert len(used) == 7
    patients = {}
    for row in used:
        patients.setdefault(row["source"] in ("bids",), set()).add(row["patient"])
        assert row["patient"]
    assert len(patients[False]) == 1
    assert len(patients[True]) == 3
    content = json.loads((out / "datalist.json").read_text())
    sides = {name: {entry["patient"] for entry in content[name]} for name in ("training", "validation")}
    assert not sides["training"] & sides["validation"]
    assert sides["validation"]


def test_the_list_is_one_that_tools_and_training_take(tmp_path):
    from custom.data import read_datalist

    for number in range(3):
        write_series(tmp_path / "in" / str(number), pixels=body(number), patient=f"P{number}")
    out = tmp_path / "set"
    assert main([str(out), str(tmp_path / "in"), "--workers", "1", "--rule", "validation_share=0.3"]) == 0
    entries = [read_datalist(out / "datalist.json", name, out, ["ct"]) for name in ("training", "validation")]
    assert [len(part) for part in entries] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["SET", "NOWHERE"], "does not exist"),
        (["SET", "IN", "--rule", "min_slice=3"], "did you mean `min_slices`?"),
        (["SET", "IN", "--rule", "min_slices=x"], "takes a number"),
        (["SET", "IN", "--rule", "min_slices"], "not of the form NAME=VALUE"),
        (["SET", "IN", "--name", "x=pet"], "not of the form ID=MODALITY"),
        (["SET", "IN", "--name", "0000=t1"], "no volume of this id"),
        (["SET", "a,pet=IN"], "no modality pet"),
        (["IN/set", "IN"], "nothing is written into"),
        (["OTHER", "IN"], "holds other things"),
        (["SET", "EMPTY"], "None of the 0"),
    ],
)
def test_what_cannot_be_right_is_told_in_one_sentence(tmp_path, in_process, capsys, arguments, sentence):
    write_series(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.docx").touch()
    places = {"SET": "set", "IN": "in", "NOWHERE": "nowhere", "OTHER": "other", "EMPTY": "empty"}
    given = []
    for text in arguments:
        for word, name in places.items():
            text = text.replace(word, str(tmp_path / name)) if text.split("/")[0].endswith(word) else text
        given.append(text)
    assert main([*given, "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("curate: ") and sentence in said


def test_two_runs_in_one_folder(tmp_path):
    from custom.errors import BadInput
    from tools.curate.run import alone

    with alone(tmp_path / "set"):
        code = (
            "import sys; from pathlib import Path; from tools.curate.run import alone\nwith alone(Path(sys.argv[1])): 1"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "set")], cwd=ROOT, capture_output=True, text=True
        )
    assert other.returncode and "Another run is at work" in other.stderr
    assert BadInput.__name__ in other.stderr
