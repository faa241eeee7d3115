"""What archives do to a series, each made on purpose: it is turned into the right volume or refused with its reason."""

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from tests.tools.curate.series import COUNT, CT, FLAIR, MM, T1, T2, body, write_series

UPRIGHT = np.diag([-MM, -MM, MM, 1])
UPRIGHT[:3, 3] = [70, 60, 100]


def voxels(image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine of a volume with its axes in the order and direction of DICOM's."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("LPS")
    )
    turned = image.as_reoriented(turn)
    return np.asanyarray(turned.dataobj), turned.affine


def test_an_axial_ct_is_its_pixels_in_hounsfield_units_where_the_headers_say(tmp_path, curated):
    pixels = body()
    write_series(tmp_path / "a", pixels=pixels)
    found = curated(tmp_path / "a")
    (image,) = found.used()
    values, affine = voxels(image)
    assert np.array_equal(values, pixels.transpose(2, 1, 0).astype(int) - 1024)
    assert np.allclose(affine, UPRIGHT, atol=1e-3)
    assert image.get_data_dtype() == np.int16
    listed = json.loads((found.out / "datalist.json").read_text())
    (entry,) = listed["training"]
    assert entry == {"image": f"volumes/{found.rows[0]['id']}.nii.gz", "modality": "ct", "patient": entry["patient"]}
    assert "P-0001" not in entry["patient"]


@pytest.mark.parametrize(
    "orientation",
    [
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        (-1, 0, 0, 0, -1, 0),
        (0.8, 0.6, 0, -0.6, 0.8, 0),
        (0, 0, -1, 0.6, 0.8, 0),
    ],
)
@pytest.mark.parametrize("step_mm", [3.0, -2.5])
def test_any_orientation_and_order(tmp_path, curated, orientation, step_mm):
    """Sagittal, coronal, feet first or prone, turned and oblique; slices that run against the normal."""
    pixels = body()
    files = write_series(tmp_path / "a", pixels=pixels, orientation=orientation, step_mm=step_mm)
    (image,) = curated(tmp_path / "a").used()
    values = np.asanyarray(image.dataobj)
    first = pydicom.dcmread(files[5])
    row, column = np.reshape(orientation, (2, 3))
    for i, j in ((3, 40), (30, 11)):  # the value of one pixel at its place
        place = np.array(first.ImagePositionPatient) + row * MM * i + column * MM * j
        at = np.linalg.inv(image.affine) @ np.array([-place[0], -place[1], place[2], 1])
        assert np.allclose(at, at.round(), atol=0.02)
        assert values[tuple(at[:3].round().astype(int))] == int(pixels[5, j, i]) - 1024


def refused(reason: str, **changes):
    return pytest.param(changes, reason, id=reason.replace(" ", "_"))


def shift(number: int, mm: float):
    def each(image, n):
        if n == number:
            image.ImagePositionPatient[2] += mm

    return each


def tilt(image, n):
    image.ImagePositionPatient[1] += n * MM * np.tan(np.radians(12))


def sideways(image, n):
    image.ImagePositionPatient[0] += 6 * (n % 2)


def setting(**values):
    def each(image, n):
        for name, value in values.items():
            setattr(image, name, value)

    return each


def truncated(image, n):
    if n == 4:
        image.PixelData = image.PixelData[:-1000]


def smaller(image, n):
    if n % 2:
        image.Rows = image.Columns = 24
        image.PixelData = np.zeros((24, 24), np.uint16).tobytes()


def both_ways(image, n):
    if n % 2:
        image.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        image.ImagePositionPatient = [3.0 * n, -60, 100]


PET = "1.2.840.10008.5.1.4.1.1.128"
SPECIMEN = np.pad(body(shape=(64, 20, 20))[:, 4:16, 4:16], ((20, 20), (26, 26), (26, 26)))
MPRAGE = {**T1, "RepetitionTime": 2000, "EchoTime": 2.5, "InversionTime": 900, "ScanningSequence": "GR"}
MPRAGE["SeriesDescription"] = "mprage"
SERIES = [
    refused("missing slices", each=lambda image, n: n not in (5, 6)),
    refused("unequal distances", each=shift(7, 0.8)),
    refused("gantry tilt of 12 degrees", each=tilt),
    refused("slices that are shifted sideways", each=sideways),
    refused("doubled slices", each=shift(7, MM)),
    refused("truncated pixel data", each=truncated),
    refused("images of 2 sizes", each=smaller),
    refused("no pixel data", each=lambda image, n: delattr(image, "PixelData")),
    refused("no position or orientation", each=lambda image, n: delattr(image, "ImagePositionPatient")),
    refused("no pixel spacing", each=lambda image, n: delattr(image, "PixelSpacing")),
    refused("no pixel spacing above 0", each=setting(PixelSpacing=[-3, 3])),
    refused("not orthogonal", each=setting(ImageOrientationPatient=[1, 0, 0, 0.5, 0.8, 0])),
    refused("too few slices: 8", each=both_ways),
    refused("localizer", tags={**CT, "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}),
    refused("localizer", tags={**T1, "SeriesDescription": "3 plane loc"}),
    refused("derived", tags={**T1, "ImageType": ["DERIVED", "SECONDARY", "MPR"]}),
    refused("derived", tags={**CT, "ImageType": ["DERIVED", "SECONDARY", "MIP"]}),
    refused("derived", tags={**CT, "SeriesDescription": "cor MIP 10mm"}),
    refused("secondary capture", each=setting(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")),
    refused("segmentation", tags={**CT, "Modality": "SEG"}),
    refused("neither CT nor MR: PT", tags={**CT, "Modality": "PT"}, each=setting(SOPClassUID=PET)),
    refused("colour", each=setting(SamplesPerPixel=3, PhotometricInterpretation="RGB")),
    refused("MONOCHROME1", tags={**T1, "PhotometricInterpretation": "MONOCHROME1"}),
    refused("burned-in annotation", each=setting(BurnedInAnnotation="YES")),
    refused("diffusion", tags={**T1, "SeriesDescription": "ep2d_diff_3scan_trace"}),
    refused("diffusion", tags=T1, each=lambda image, n: setattr(image, "DiffusionBValue", 1000.0 * (n > 7))),
    refused("no magnitude image", tags={**T1, "ImageType": ["ORIGINAL", "PRIMARY", "P"]}),
    refused("phantom", tags={**CT, "SeriesDescription": "ACR phantom"}),
    refused("animal", tags={**CT, "PatientSpeciesDescription": "rat"}),
    refused("modality: echo-planar", tags={**T1, "ScanningSequence": "EP", "EchoTime": 30, "SeriesDescription": "x"}),
    refused("modality: description: star", tags={**T1, "SeriesDescription": "T2* gre"}),
    refused("modality: description: angiography", tags={**T1, "SeriesDescription": "TOF 3D"}),
    refused("the description says t2, the parameters t1", tags={**T1, "SeriesDescription": "t2 tse"}),
    refused("modality: proton density", tags={**T2, "EchoTime": 15, "SeriesDescription": "x"}),
    refused("modality: STIR", tags={**T2, "InversionTime": 150, "SeriesDescription": "x"}),
    refused("modality: nothing tells it", tags={**T1, "RepetitionTime": None, "SeriesDescription": "x"}),
    refused("not in Hounsfield units: the lowest value is", tags={**CT, "RescaleIntercept": 0}),
    refused("not in Hounsfield units: 0%", tags={**CT, "RescaleIntercept": -4000}),
    refused("noise alone", pixels=np.random.default_rng(0).integers(0, 2000, (COUNT, 48, 48)).astype(np.uint16)),
    refused("constant", pixels=np.full((COUNT, 48, 48), 7, np.uint16)),
    refused("blank", pixels=np.pad(body(shape=(COUNT, 4, 4)), ((0, 0), (22, 22), (22, 22)))),
    refused("mask or label map: 3 grey values", pixels=np.digitize(body(), [500, 1100]).astype(np.uint16) * 500),
    refused("label map: ", pixels=body(shape=(COUNT, 6, 6)).repeat(8, 1).repeat(8, 2).repeat(4, 0)),
    refused("empty slices", pixels=np.concatenate([body(shape=(12, 48, 48)), np.zeros((52, 48, 48), np.uint16)])),
    refused("field of view", pixels=body(), each=setting(PixelSpacing=[0.3, 0.3])),
    refused("spacing of", pixels=body(), step_mm=15.0),
    refused("body of", pixels=SPECIMEN, each=setting(PixelSpacing=[0.5, 0.5]), step_mm=0.4),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), SERIES)
def test_a_series_that_is_no_volume_to_train_on_is_left_out_with_its_reason(tmp_path, curated, changes, reason):
    write_series(tmp_path / "a", **changes)
    found = curated(tmp_path / "a", status=2)
    assert not found.used()
    assert found.rows
    assert all(reason in row for row in found.reasons()), found.reasons()


@pytest.mark.parametrize(
    ("tags", "modality"),
    [
        (CT, "ct"), (T1, "t1"), (T2, "t2"), (FLAIR, "flair"),
        ({**T1, "SeriesDescription": "ax t1 post"}, "t1ce"), ({**T1, "ContrastBolusAgent": "Gadovist"}, "t1ce"),
        ({**T1, "SeriesDescription": "x"}, "t1"), ({**T2, "SeriesDescription": "x"}, "t2"),
        ({**FLAIR, "SeriesDescription": "x"}, "flair"), ({**FLAIR, "SeriesDescription": "T2 FLAIR"}, "flair"),
        (MPRAGE, "t1"),
    ],
)  # fmt: skip
def test_the_modality_of_a_series(tmp_path, curated, tags, modality):
    write_series(tmp_path / "a", tags=tags)
    found = curated(tmp_path / "a", status=0)
    assert [row["modality"] for row in found.rows] == [modality]


def test_a_name_makes_an_uncertain_volume_used(tmp_path, curated):
    write_series(tmp_path / "a", tags={**T1, "SeriesDescription": "t2 tse"})
    (row,) = curated(tmp_path / "a", status=2).rows
    assert row["status"] == "uncertain"
    (row,) = curated(tmp_path / "a", options=("--name", f"{row['id']}=t1"), status=0).rows
    assert (row["status"], row["modality"]) == ("used", "t1")


def test_echoes_in_turns_are_two_volumes_and_repetitions_4d(tmp_path, curated):
    t2 = {**T2, "SeriesDescription": "x"}
    pixels = body(ct=False)

    def echoes(image, n):
        image.EchoTime = (90, 120)[n % 2]
        image.ImagePositionPatient[2] = 100 + MM * (n // 2)

    write_series(tmp_path / "a", tags=t2, pixels=np.repeat(pixels, 2, axis=0), each=echoes)
    found = curated(tmp_path / "a")
    assert {row["status"] for row in found.rows} == {"used", "twin"}  # of one content here
    assert {row["images"] for row in found.rows} == {str(COUNT)}


@pytest.mark.parametrize("mark", ["TemporalPositionIdentifier", "AcquisitionNumber", "InstanceNumber"])
@pytest.mark.parametrize("times", [2, 5])
def test_repetitions(tmp_path, curated, mark, times):
    def each(image, n):
        image.InstanceNumber = n + 1
        setattr(image, mark, n // COUNT + 1 if mark != "InstanceNumber" else n + 1)
        image.ImagePositionPatient[2] = 100 + MM * (n % COUNT)

    pixels = np.concatenate([body(seed) for seed in range(times)])
    write_series(tmp_path / "a", pixels=pixels, each=each)
    found = curated(tmp_path / "a")
    if times == 5:
        assert found.reasons() == ["4D: 5 repetitions"]
        return
    got = sorted(int(np.asanyarray(image.dataobj).astype(int).sum()) for image in found.used())
    want = sorted(int((pixels[i * COUNT : (i + 1) * COUNT].astype(int) - 1024).sum()) for i in range(2))
    assert got == want


def test_a_localizer_within_the_axial_series(tmp_path, curated):
    def each(image, n):
        if n == 0:
            image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            image.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]

    write_series(tmp_path / "a", each=each)
    found = curated(tmp_path / "a")
    assert found.reasons() == ["localizer"]
    assert [image.shape[2] for image in found.used()] == [COUNT - 1]


def test_each_slice_with_its_own_rescaling(tmp_path, curated):
    pixels = body(ct=False)

    def each(image, n):
        image.RescaleSlope, image.RescaleIntercept = f"{1 + n / 8:.6g}", "0"

    write_series(tmp_path / "a", tags=T1, pixels=pixels, each=each)
    (image,) = curated(tmp_path / "a").used()
    want = pixels * (1 + np.arange(COUNT) / 8)[:, None, None]
    assert np.allclose(voxels(image)[0], want.transpose(2, 1, 0), rtol=1e-5)


@pytest.mark.parametrize("padding", [63536, 0])
def test_the_padding_of_a_ct_becomes_air(tmp_path, curated, padding):
    pixels = body()
    pixels[:, :6, :6] = padding
    tags = CT if padding else {**CT, "RescaleIntercept": -8192}
    if not padding:
        pixels[pixels > 0] += 8192 - 1024

    write_series(tmp_path / "a", tags=tags, pixels=pixels, each=setting(PixelPaddingValue=padding))
    (image,) = curated(tmp_path / "a").used()
    values = voxels(image)[0]
    assert (values[:6, :6] == -1024).all()
    assert values.max() < 1000


@pytest.mark.parametrize(
    "syntax",
    [
        "1.2.840.10008.1.2",
        "1.2.840.10008.1.2.2",
        "1.2.840.10008.1.2.5",
        "1.2.840.10008.1.2.4.80",
        "1.2.840.10008.1.2.4.90",
    ],
)
def test_transfer_syntaxes(tmp_path, curated, syntax):
    pixels = body()
    files = write_series(tmp_path / "a", pixels=pixels)
    for file in files:
        image = pydicom.dcmread(file)
        if syntax == "1.2.840.10008.1.2.2":
            image.PixelData = image.pixel_array.astype(">u2").tobytes()
        if pydicom.uid.UID(syntax).is_compressed:
            image.compress(syntax)
        else:
            image.file_meta.TransferSyntaxUID = syntax
        implicit, little = syntax == "1.2.840.10008.1.2", syntax != "1.2.840.10008.1.2.2"
        pydicom.dcmwrite(file, image, implicit_vr=implicit, little_endian=little, force_encoding=True)
    (image,) = curated(tmp_path / "a").used()
    assert np.array_equal(voxels(image)[0], pixels.transpose(2, 1, 0).astype(int) - 1024)


def test_files_without_meta_header_or_preamble(tmp_path, curated):
    pixels = body()
    for file in write_series(tmp_path / "a", pixels=pixels):
        image = pydicom.dcmread(file)
        del image.file_meta
        image.preamble = None
        pydicom.dcmwrite(file, image, implicit_vr=True, little_endian=True)
    (image,) = curated(tmp_path / "a").used()
    assert np.array_equal(voxels(image)[0], pixels.transpose(2, 1, 0).astype(int) - 1024)


def test_a_series_spread_over_folders_and_archives_and_sent_twice(tmp_path, curated):
    deep = tmp_path / "a" / "/".join(["très profond ümläut 日本"] * 8 + ["x" * 200] * 8)
    deep.mkdir(parents=True)
    files = write_series(tmp_path / "a", each=lambda image, n: deep / f"x{n}" if n % 3 == 0 else None)
    with zipfile.ZipFile(tmp_path / "a" / "more.zip", "w") as archive:
        for file in files[1::3]:
            archive.write(file, f"deep/{file.name}")
            file.unlink()
    with tarfile.open(tmp_path / "a" / "more.tgz", "w:gz") as archive:
        for file in files[2::3]:
            archive.add(file, f"y/{file.name}")
            file.unlink()
    (tmp_path / "b").mkdir()
    for file in files[::3]:  # the same instances again
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "b" / "packed.gz").write_bytes(gzip.compress(files[0].read_bytes()))
    found = curated(tmp_path / "a", tmp_path / "b")
    (image,) = found.used()
    assert image.shape[2] == COUNT
    assert "further copies" in found.rows[0]["notes"]


def test_two_images_that_claim_to_be_one(tmp_path, curated):
    files = write_series(tmp_path / "a")
    image = pydicom.dcmread(files[4])
    image.PixelData = bytes(len(image.PixelData))
    image.save_as(tmp_path / "a" / "other.dcm")
    assert curated(tmp_path / "a").reasons() == ["one SOPInstanceUID on different images"]


def test_one_series_number_for_two_patients(tmp_path, curated):
    """A bad anonymiser gave all series one identifier."""
    uid = generate_uid()
    write_series(tmp_path / "a", uid=uid, patient="A-1", pixels=body(1))
    write_series(tmp_path / "b", uid=uid, patient="B-2", pixels=body(2))
    found = curated(tmp_path / "a", tmp_path / "b")
    assert len(found.used()) == 2
    assert len({row["patient"] for row in found.rows}) == 2


def test_links_loops_pipes_and_what_cannot_be_read(tmp_path, curated):
    write_series(tmp_path / "a" / "real")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "real")
    (tmp_path / "a" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "empty.dcm").touch()
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "a" / "text.txt").write_text("Planted^Name")
    (tmp_path / "a" / "half.dcm").write_bytes((tmp_path / "a" / "real" / "0003.dcm").read_bytes()[:300])
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a" / "socket"))
    closed = tmp_path / "a" / "closed"
    closed.mkdir(mode=0)
    found = curated(tmp_path / "a")
    assert len(found.used()) == 1
    reasons = {row["reason"] for row in found.files}
    assert {"empty file", "missing file or dangling link", "not a regular file", "no image: .txt"} <= reasons
    if os.geteuid():
        assert any("can't be opened" in reason for reason in reasons)


def test_archives_that_mean_harm(tmp_path, curated):
    write_series(tmp_path / "a" / "real")
    member = next((tmp_path / "a" / "real").glob("*.dcm")).read_bytes()
    with zipfile.ZipFile(tmp_path / "a" / "slip.zip", "w") as archive:
        archive.writestr("../../../escaped.dcm", member)
        archive.writestr("/tmp/escaped-from-zip.dcm", member)
    with zipfile.ZipFile(tmp_path / "a" / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(400_000_000))
    with tarfile.open(tmp_path / "a" / "links.tar", "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        info = tarfile.TarInfo("../escaped")
        info.size = len(member)
        archive.addfile(info, io.BytesIO(member))
    (tmp_path / "a" / "broken.zip").write_bytes((tmp_path / "a" / "slip.zip").read_bytes()[:200])
    (tmp_path / "a" / "broken.gz").write_bytes(gzip.compress(member)[:-500])
    inner = (tmp_path / "a" / "slip.zip").read_bytes()
    for _ in range(5):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("inner.zip", inner)
        inner = stream.getvalue()
    (tmp_path / "a" / "nested.zip").write_bytes(inner)
    found = curated(tmp_path / "a")
    assert len(found.used()) == 1
    reasons = {row["reason"] for row in found.files}
    assert "unsafe path in an archive" in reasons
    assert "a link or device in an archive" in reasons
    assert any(reason.startswith("damaged archive") for reason in reasons)
    assert any("max_unpacking" in reason for reason in reasons)
    assert any("archives in archives" in reason for reason in reasons)
    assert not list(tmp_path.rglob("escaped*")) and not os.path.exists("/tmp/escaped-from-zip.dcm")
    assert not (found.out / ".work").exists()


def test_a_converter_that_hangs_or_fails_is_a_reason(tmp_path, curated, monkeypatch):
    """The converter in the test's own process: what it is called by is replaced by a program that waits."""
    from tools.curate import convert
    from tools.curate.rules import Rules

    waits = tmp_path / "dcm2niix"
    waits.write_text("#!/bin/sh\nexec sleep 60\n")
    waits.chmod(0o755)
    monkeypatch.setattr(convert.dcm2niix, "bin", str(waits))
    files = write_series(tmp_path / "a")
    record = {"mosaic": False, "lossy": False, "modality": "CT", "padding": None}
    with pytest.raises(convert.Refused, match="longer than timeout_s = 1"):
        convert.convert_dicom([(str(f), 0) for f in files], [], record, UPRIGHT, str(tmp_path), Rules(timeout_s=1))
    waits.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(convert.Refused, match="wrote nothing"):
        convert.convert_dicom([(str(f), 0) for f in files], [], record, UPRIGHT, str(tmp_path), Rules())
    waits.write_text(f'#!/bin/sh\nexec {Path(convert.dcm2niix.__file__).parent}/dcm2niix "$@"\n')
