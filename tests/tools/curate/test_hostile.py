"""Headers, names and archives that are damaged, odd or mean harm: no crash, no leak, no volume with wrong values."""

import bz2
import gzip
import os
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import ExplicitVRLittleEndian

from tests.tools.curate.series import COUNT, CT, MM, T1, T2, body, write_series
from tests.tools.curate.test_traps import setting, voxels


def rewrite(files: list[Path], change) -> None:
    """Change images on the disk, whatever the standard says of the result."""
    for number, file in enumerate(files):
        image = pydicom.dcmread(file)
        change(image, number)
        pydicom.dcmwrite(file, image, implicit_vr=False, little_endian=True, force_encoding=True)


def without(*names: str):
    def change(image, number):
        for name in names:
            delattr(image, name)

    return change


def raw(name: str, text: bytes):
    """Put text that is no value of its kind into an element."""

    def change(image, number):
        tag = pydicom.tag.Tag(name)
        image._dict[tag] = pydicom.dataelem.RawDataElement(
            tag, pydicom.datadict.dictionary_VR(tag), len(text), text, 0, False, True
        )

    return change


def no_class(image, number):
    del image.SOPClassUID, image.file_meta.MediaStorageSOPClassUID


def signed(image, number):
    pixels = image.pixel_array.astype(np.int16) - 1024
    image.PixelRepresentation, image.RescaleIntercept, image.PixelData = 1, 0, pixels.tobytes()


def of_32_bits(image, number):
    pixels = image.pixel_array.astype(np.uint32)
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelData = 32, 32, 31, pixels.tobytes()


def overlay_in_the_upper_bits(image, number):
    pixels = image.pixel_array | np.uint16(0x4000)
    image.BitsStored, image.HighBit, image.PixelData = 12, 11, pixels.tobytes()


def second_table(image, number):
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [4, 0, 16], [0, 1, 2, 3]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    image.ModalityLUTSequence = [item]


# What the header says, and why the series is left out; "" where its volume has to be right.
HEADERS = {
    "no patient": (without("PatientID", "PatientName"), ""),
    "no series": (without("SeriesInstanceUID"), ""),
    "no study": (without("StudyInstanceUID"), ""),
    "no instance": (without("SOPInstanceUID"), ""),
    "no modality": (without("Modality"), ""),
    "no class": (no_class, ""),
    "no instance number": (without("InstanceNumber"), ""),
    "one instance number": (setting(InstanceNumber=1), ""),
    "no rescaling": (without("RescaleSlope", "RescaleIntercept"), "not in Hounsfield units"),
    "no size": (without("Rows"), "no image in it"),
    "no bits": (without("BitsStored"), "pixel data"),
    "odd character set": (setting(SpecificCharacterSet="ISO_IR 4711"), ""),
    "words as slope": (raw("RescaleSlope", b"Planted "), "damaged header"),
    "words as position": (raw("ImagePositionPatient", b"Planted\\1\\2 "), "no position or orientation"),
    "two slopes": (raw("RescaleSlope", b"1\\2 "), "damaged header"),
    "billions of frames": (setting(NumberOfFrames=2**31 - 1), "another number of frames"),
    "frames below zero": (setting(NumberOfFrames=-3), "another number of frames"),
    "two frames": (setting(NumberOfFrames=2), "pixel data"),
    "no spacing": (setting(PixelSpacing=[0, 0]), "no pixel spacing above 0"),
    "no direction": (setting(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]), "not orthogonal"),
    "one place": (setting(ImagePositionPatient=[0, 0, 0]), "doubled slices"),
    "MONOCHROME1": (setting(PhotometricInterpretation="MONOCHROME1"), ""),
    "signed": (signed, ""),
    "32 bits": (of_32_bits, ""),
    "overlay in the upper bits": (overlay_in_the_upper_bits, ""),
    "values by a table": (second_table, "values by a table"),
    "material map": (setting(ImageType=["DERIVED", "PRIMARY", "AXIAL", "MAT_SPECIFIC"]), "material map"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lacks_or_claims_something(tmp_path, curated, name):
    change, reason = HEADERS[name]
    pixels = body()
    rewrite(write_series(tmp_path / "a", pixels=pixels), change)
    found = curated(tmp_path / "a")
    if reason:
        assert not found.used()
        assert all(reason in row for row in found.reasons()), found.reasons()
    else:
        (image,) = found.used()
        assert np.array_equal(voxels(image)[0], pixels.transpose(2, 1, 0).astype(int) - 1024)


@pytest.mark.parametrize("syntax", ["1.2.840.113619.4711", "1.2.840.10008.1.2.5"])
def test_a_transfer_syntax_that_is_unknown_or_a_lie(tmp_path, curated, syntax):
    """A private one, and uncompressed pixels that are said to be RLE."""
    for file in write_series(tmp_path / "a"):
        file.write_bytes(file.read_bytes().replace(ExplicitVRLittleEndian.encode() + b"\0", syntax.encode() + b"\0"))
    (reason,) = curated(tmp_path / "a").reasons()
    assert "pixel data" in reason


def test_bytes_as_pixels(tmp_path, curated):
    pixels = (body(ct=False) // 4).astype(np.uint8)

    def of_8_bits(image, number):
        image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
        image.PixelData = pixels[number].tobytes()

    rewrite(write_series(tmp_path / "a", tags=T1, pixels=pixels), of_8_bits)
    (image,) = curated(tmp_path / "a").used()
    assert np.array_equal(voxels(image)[0], pixels.transpose(2, 1, 0))


def test_two_kernels_under_one_series_number(tmp_path, curated):
    """Two reconstructions that an archive gave one UID, in mixed order: they are parted, not mixed."""
    pixels = np.stack([body(1), body(2)])

    def kernels(image, n):
        image.ConvolutionKernel, image.InstanceNumber = ("B30f", "B70f")[n // COUNT], (7 * n) % (2 * COUNT) + 1
        image.ImagePositionPatient[2] = 100 + MM * (n % COUNT)

    write_series(tmp_path / "a", pixels=np.concatenate(pixels), each=kernels)
    got = sorted(int(np.asanyarray(image.dataobj).astype(int).sum()) for image in curated(tmp_path / "a").used())
    assert got == sorted(int((part.astype(int) - 1024).sum()) for part in pixels)


def enhanced(folder: Path, frames: list[tuple[np.ndarray, float, float]]) -> None:
    """Write an enhanced MR image of (plane, z in mm, echo time) frames."""
    (file,) = write_series(folder, tags=T2, pixels=frames[0][0][None])
    image = pydicom.dcmread(file)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    image.NumberOfFrames, image.PixelData = len(frames), b"".join(plane.tobytes() for plane, *_ in frames)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "EchoTime", "SliceThickness"):
        delattr(image, name)

    def item(**values):
        made = pydicom.Dataset()
        for name, value in values.items():
            setattr(made, name, value)
        return made

    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[MM, MM], SliceThickness=MM)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    image.SharedFunctionalGroupsSequence = [shared]
    echoes = sorted({echo for *_, echo in frames})
    image.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-70, -60, z])],
            MREchoSequence=[item(EffectiveEchoTime=echo)],
            FrameContentSequence=[item(DimensionIndexValues=[echoes.index(echo) + 1, round(z / MM) + 1], StackID="1")],
        )
        for _, z, echo in frames
    ]
    image.save_as(file, enforce_file_format=True)


def test_an_enhanced_image_of_two_echoes_in_any_order(tmp_path, curated):
    pixels = np.stack([body(1, ct=False), body(2, ct=False)])
    frames = [(pixels[e, k], MM * k, (90.0, 120.0)[e]) for e in range(2) for k in range(COUNT)]
    enhanced(tmp_path / "a", [frames[i] for i in np.random.default_rng(0).permutation(len(frames))])
    got = {voxels(image)[0].tobytes() for image in curated(tmp_path / "a").used()}
    assert got == {np.ascontiguousarray(part.transpose(2, 1, 0)).astype(np.int16).tobytes() for part in pixels}


def test_an_enhanced_image_with_fewer_headers_than_frames(tmp_path, curated):
    frames = [(plane, MM * k, 90.0) for k, plane in enumerate(body(ct=False))]
    enhanced(tmp_path / "a", frames)
    rewrite([tmp_path / "a" / "0000.dcm"], lambda image, n: image.PerFrameFunctionalGroupsSequence.pop())
    assert curated(tmp_path / "a").reasons() == ["another number of frames than its header says"]


def test_two_patients_without_identifiers(tmp_path, curated):
    """By their studies they are two; a bad anonymiser's one study is one patient, which the split is safe with."""
    for number, study in enumerate(("1.2.3.4", "1.2.3.4", "1.2.3.5")):
        rewrite(
            write_series(tmp_path / "a" / str(number), pixels=body(number), patient=""),
            setting(StudyInstanceUID=study),
        )
    found = curated(tmp_path / "a")
    assert len(found.used()) == 3
    assert len({row["patient"] for row in found.rows}) == 2


@pytest.mark.parametrize(("studies", "used"), [(("1.2.3", "1.2.4"), 2), (("1.2.3", "1.2.3"), 0)])
def test_two_visits_under_one_series_number_are_not_mixed(tmp_path, curated, studies, used):
    """A bad anonymiser gave both one series; if it gave them one study too, nothing tells their slices apart."""
    for number, study in enumerate(studies):
        rewrite(
            write_series(tmp_path / "a" / str(number), pixels=body(number), uid="1.2.3.4"),
            setting(StudyInstanceUID=study, StudyID="", AcquisitionNumber=1),
        )
    found = curated(tmp_path / "a")
    assert len(found.used()) == used
    assert found.reasons() == ([] if used else ["doubled slices: 16 of 32"])


def test_a_source_named_twice(tmp_path, curated):
    write_series(tmp_path / "a", pixels=body(1))
    assert len(curated(tmp_path / "a", f"again={tmp_path / 'a'}").used()) == 1


def test_odd_names(tmp_path, curated):
    """Line ends, bytes that are no UTF-8, spaces and a leading dash, in folders, files, and members of archives."""
    folder = tmp_path / "a" / "x\r\ny" / os.fsdecode(b"\xff\xfe") / "- -o =" / "$(x);*"
    write_series(folder, each=lambda image, n: folder / os.fsdecode(b"\xe9\n%d .dcm" % n))
    with zipfile.ZipFile(tmp_path / "a" / "odd.zip", "w") as archive:
        for n, file in enumerate(write_series(tmp_path / "b", pixels=body(1), patient="P2")):
            archive.write(file, ("c\rd\n/%d", "e\\f/%d", "é\u2028/%d")[n % 3] % n)
    found = curated(tmp_path / "a")
    assert [image.shape[2] for image in found.used()] == [COUNT, COUNT]
    assert not found.files


def test_archives_that_are_no_zip_or_tar(tmp_path, curated):
    """Single packed files are read; an archive that is not read, and a locked one, are said to be so."""
    (tmp_path / "a").mkdir()
    image = nibabel.Nifti1Image(body().transpose(2, 1, 0).astype(np.int16) - 1024, np.diag([3.0, 3, 3, 1]))
    (tmp_path / "a" / "ct.nii.bz2").write_bytes(bz2.compress(image.to_bytes()))
    (tmp_path / "a" / "x.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(500))
    (tmp_path / "a" / "x.rar").write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(500))
    with zipfile.ZipFile(tmp_path / "a" / "locked.zip", "w") as archive:
        archive.writestr("x.dcm", b"x" * 500)
    content = bytearray((tmp_path / "a" / "locked.zip").read_bytes())
    for magic, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(magic) + place] |= 1
    (tmp_path / "a" / "locked.zip").write_bytes(content)
    found = curated(tmp_path / "a")
    assert len(found.used()) == 1
    assert found.reasons() == [
        "a format that is not read: 7z archive", "a format that is not read: RAR archive", "encrypted archive",
    ]  # fmt: skip


def test_a_loop_of_links_and_a_file_that_goes_away(tmp_path, curated, monkeypatch):
    write_series(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "gone.dcm").write_bytes(b"x" * 500)
    from tools.curate import run

    def find(*arguments, found=run.find):
        for file in found(*arguments):
            Path(file.path).unlink() if file.path.endswith("gone.dcm") else None
            yield file

    monkeypatch.setattr(run, "find", find)
    found = curated(tmp_path / "a")
    assert len(found.used()) == 1
    assert found.reasons()[0] == "can't be opened: Too many levels of symbolic links"
    assert found.reasons()[1:] == ["damaged header: FileNotFoundError"]


PLANTED = "Meier19330417"


def damaged_nifti(folder: Path) -> None:
    """Files whose reading fails in a library's words, which hold the path."""
    whole = nibabel.Nifti1Image(body().transpose(2, 1, 0).astype(np.int16) - 1024, np.diag([3.0, 3, 3, 1])).to_bytes()
    for number, (place, value) in enumerate([(0, 9), (42, 255), (70, 255), (108, 255), (254, 9), (344, 0)]):
        content = bytearray(whole)
        content[place] = content[place + 1] = value
        (folder / f"{PLANTED}_{number}.nii").write_bytes(content)
        (folder / f"{PLANTED}_{number}.nii.gz").write_bytes(gzip.compress(content))
    (folder / f"{PLANTED}_cut.nii.gz").write_bytes(gzip.compress(whole)[:-5000])
    (folder / f"{PLANTED}_plain.nii.gz").write_bytes(whole)
    (folder / f"{PLANTED}_text.mgz").write_bytes(gzip.compress(PLANTED.encode() * 99))
    (folder / f"{PLANTED}_cut.mha").write_text(f"ObjectType = Image\nNDims = 3\nComment = {PLANTED}\n")
    (folder / f"{PLANTED}.nrrd").write_text(
        f"NRRD0004\n# {PLANTED}\ntype: short\ndimension: 3\nsizes: 9 9 9\nspace: left-posterior-superior\n"
        f"space directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: {PLANTED}\n\n"
    )


def planted_dicom(folder: Path) -> None:
    """Names where codes are expected."""
    codes = {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", PLANTED.upper()[:16]], "ConvolutionKernel": PLANTED,
        "PhotometricInterpretation": f"MONO {PLANTED.upper()}"[:16], "SeriesDescription": f"ct {PLANTED}",
        "ScanOptions": PLANTED.upper(), "BodyPartExamined": PLANTED.upper(), "StationName": PLANTED,
    }  # fmt: skip
    write_series(folder / "x", each=setting(**codes))
    write_series(folder / "y", tags={**CT, "Modality": PLANTED.upper()[:4]}, each=setting(SOPClassUID="1.2"))
    write_series(folder / "z", tags=T1, each=raw("RescaleSlope", PLANTED.encode() + b" "))
    for n, file in enumerate(write_series(folder / PLANTED)):
        file.write_bytes(file.read_bytes()[: 300 + 50 * n])


@pytest.mark.parametrize("plant", [damaged_nifti, planted_dicom])
def test_no_reason_or_library_tells_a_name(tmp_path, curated, capfd, plant):
    (tmp_path / "a").mkdir()
    plant(tmp_path / "a")
    found = curated(tmp_path / "a")
    said = capfd.readouterr()
    texts = [(said.out + said.err).encode(), *(f.read_bytes() for f in found.out.rglob("*") if f.is_file())]
    assert not any(PLANTED[:5].lower().encode() in text.lower() for text in texts)
    assert not any(b"19330417" in text for text in texts)


def test_a_volume_that_does_not_say_how_it_lies(tmp_path, curated):
    (tmp_path / "a").mkdir()
    values = body().transpose(2, 1, 0).astype(np.int16) - 1024
    nibabel.MGHImage(values, np.diag([3.0, 3, 3, 1])).to_filename(tmp_path / "a" / "ct.mgz")
    content = bytearray(gzip.decompress((tmp_path / "a" / "ct.mgz").read_bytes()))
    content[28:30] = bytes(2)  # goodRASFlag
    (tmp_path / "a" / "ct.mgz").write_bytes(gzip.compress(bytes(content)))
    picture = SimpleITK.GetImageFromArray(values.transpose(2, 1, 0))
    picture.SetDirection((1, 0, 0.4, 0, 1, 0, 0, 0, 1))
    SimpleITK.WriteImage(picture, str(tmp_path / "a" / "ct.mha"))
    assert curated(tmp_path / "a").reasons() == ["it does not say how it lies", "sheared axes"]
