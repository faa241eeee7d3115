"""Make one NIfTI volume of a stack of DICOM images or of a file in another format, and trust no converter alone.

DICOM goes through dcm2niix; each voxel of what it writes is compared with what pydicom decodes, put where the headers
say. Other formats are read by nibabel or SimpleITK. What is written has a new header: none of the old one's texts.
"""

import errno
import gzip
import itertools
import operator
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import dcm2niix
import nibabel
import numpy as np
import pydicom
import SimpleITK
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.openers import ImageOpener
from pydicom.pixels import pixel_array
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage

from custom.data.nifti import corner_distance_mm, doubt_of_header, fault_of_affine
from custom.files import replacing
from tools.curate.rules import Rules
from tools.curate.series import LPS_TO_RAS
from tools.datalist_check import DEFLATE_RATIO, inspect_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental; its mosaics are compared with the converter's
    from nibabel.nicom import dicomwrappers

AIR_HU, DENSEST_HU = -1024, 3071  # of 12 bits, which is what scanners reconstruct


class Refused(ValueError):
    """Why a volume can't be made, in words that hold nothing of the header's texts."""


def convert_dicom(
    files: Sequence[tuple[str, int]],
    copies: Sequence[tuple[str, str]],
    record: dict,
    affine,
    scratch: str,
    rules: Rules,
):
    """Convert a stack.

    Args:
        files: (path, frame) of the slices in order.
        copies: (path, path) of files that claim to be one image.
        record: header of the first slice.
        affine: voxel to RAS by the headers; None for a mosaic.
        scratch: folder for the converter.
        rules: its time limit.

    Returns:
        Voxels in the order that the converter gives them, their affine, and notes.

    Raises:
        Refused: for pixel data that is truncated or damaged, copies that differ, or a converter that fails, takes too
            long, or gives another volume than the headers and pixels say.
    """
    notes = ["lossy compression"] if record["lossy"] else []
    paths = list(dict.fromkeys(path for path, _ in files))
    for kept, copy in copies:
        if not np.array_equal(_read(kept)[1], _read(copy)[1]):
            raise Refused("one SOPInstanceUID on different images")
    if copies:
        notes.append(f"{len(copies)} further copies of its images")
    if record["mosaic"]:
        expected, affine = _mosaic(paths[0])
        stored = None
    else:
        (expected, stored), affine = _stack(files), np.array(affine)
    last = "the converter wrote nothing"
    # It gets links to the images first. Then clean copies: of what it can't read, or takes for a part of more. It takes
    # one scale for all slices: where each has its own, it gets and is compared by stored values.
    for clean in (False, True) if stored is None else (True,):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            given = Path(folder, "given")
            given.mkdir()
            if clean:
                _clean_copies(files, affine, given, bare=stored is not None)
            else:
                for number, path in enumerate(paths):
                    (given / f"{number:06d}.dcm").symlink_to(os.path.abspath(path))
            for volume in _dcm2niix(given, Path(folder, "made"), rules.timeout_s):
                last, turn = _difference(volume, expected if stored is None else stored, affine, record["lossy"])
                if not last:
                    voxels = nibabel.orientations.apply_orientation(expected, turn)
                    return _without_padding(voxels, record, paths[0], notes), volume.affine, notes
    if shutil.disk_usage(scratch).free < 2 * expected.nbytes:  # no fault of the series, which the next run tries again
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), scratch)
    raise Refused(last)


def _dataset(path: str) -> pydicom.Dataset:
    """Read an image; one without a meta header gets the transfer syntax that its elements are written in."""
    dataset = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        dataset.file_meta.TransferSyntaxUID = syntax if little or implicit else pydicom.uid.ExplicitVRBigEndian
    return dataset


def _read(path: str) -> tuple[pydicom.Dataset, np.ndarray]:
    """Return an image and its stored pixel values, (frames, rows, columns)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = _dataset(path)
            pixels = pixel_array(dataset)
            if dataset.file_meta.TransferSyntaxUID.is_compressed:
                with open(path, "rb") as stream:
                    stream.seek(-min(os.path.getsize(path), 65536), os.SEEK_END)
                    if b"\xfe\xff\xdd\xe0" not in stream.read():  # decoders fill up what is missing at the end
                        raise Refused("truncated pixel data")
    except Refused:
        raise
    except AttributeError as error:
        raise Refused("no pixel data") from error
    except Exception as error:
        short = re.search(r"less than|too short|truncat|not enough|unexpected end|end of", str(error), re.IGNORECASE)
        raise Refused("truncated pixel data" if short else f"damaged pixel data: {type(error).__name__}") from error
    return dataset, pixels[None] if pixels.ndim == 2 else pixels


def _rescale(dataset: pydicom.Dataset, frame: int) -> tuple[float, float]:
    """Return slope and intercept of a frame."""
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        groups = dataset.get(name)
        if groups:
            values = groups[frame if name.startswith("Per") else 0].get("PixelValueTransformationSequence")
            if values:
                return float(values[0].get("RescaleSlope") or 1), float(values[0].get("RescaleIntercept") or 0)
    return float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)


def _stack(files: Sequence[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the rescaled pixels of the slices, (columns, rows, slices), and the stored ones if scales are several.

    Rescaled ones are int32 where all are whole, else float32.
    """
    slices, scales = [], []
    for path, frames in itertools.groupby(files, operator.itemgetter(0)):
        dataset, pixels = _read(path)
        for _, frame in frames:
            if frame >= len(pixels):
                raise Refused("truncated pixel data")
            scales.append(_rescale(dataset, frame))
            slices.append(pixels[frame].T)
    if len({part.shape for part in slices}) > 1:
        raise Refused("images of several sizes in one series")
    whole = all(slope == 1 and intercept == int(intercept) for slope, intercept in scales)
    kind = np.int32 if whole else np.float32
    expected = np.empty((*slices[0].shape, len(slices)), kind)
    for k, (part, (slope, intercept)) in enumerate(zip(slices, scales, strict=True)):
        expected[..., k] = part.astype(np.int64) + int(intercept) if whole else part * slope + intercept
    return expected, np.stack(slices, axis=-1) if len(set(scales)) > 1 else None


def _mosaic(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine (to RAS) of a Siemens mosaic, as nibabel reads it."""
    dataset, _ = _read(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = dicomwrappers.wrapper_from_data(dataset)
            return np.asarray(image.get_data()), LPS_TO_RAS @ image.affine
    except Exception as error:
        raise Refused(f"mosaic whose private header can't be read: {type(error).__name__}") from error


def _dcm2niix(given: Path, made: Path, timeout_s: float) -> list[nibabel.Nifti1Image]:
    """Run the converter on a folder of images."""
    made.mkdir()
    # No side file (it would hold dates), no compression, no cropping, the values that the headers' rescaling gives.
    options = ["-b", "n", "-z", "n", "-x", "n", "-p", "n", "-m", "y", "-f", "volume", "-o"]
    try:
        # Its words are read and dropped: without a pipe, waiting with a time limit looks every 50 ms only.
        subprocess.run(
            [dcm2niix.bin, *options, str(made), str(given)], stdin=subprocess.DEVNULL, capture_output=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Refused(f"the converter took longer than timeout_s = {timeout_s:g}") from error
    return [nibabel.load(file) for file in sorted(made.glob("*.nii"))]


def _clean_copies(files: Sequence[tuple[str, int]], affine: np.ndarray, folder: Path, bare: bool) -> None:
    """Write images uncompressed, with a meta header, and only the elements that a volume is made of.

    A frame of several is written as an image of its own, so that the converter sees those of one volume alone.
    """
    keep = """
    StudyInstanceUID SeriesInstanceUID Modality SeriesNumber AcquisitionNumber InstanceNumber Rows Columns PixelSpacing
    SliceThickness ImageOrientationPatient ImageType ImagePositionPatient SamplesPerPixel PhotometricInterpretation
    BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope RescaleIntercept EchoTime RepetitionTime
    ImageOrientation Manufacturer
    """.split()  # noqa: SIM905
    for path, frames in itertools.groupby(enumerate(files), lambda item: item[1][0]):
        dataset, pixels = _read(path)
        for number, (_, frame) in frames:
            copy = pydicom.Dataset()
            for name in keep:
                if name in dataset:
                    copy[name] = dataset[name]
            if len(pixels) > 1:
                copy.InstanceNumber = number + 1
                axes = LPS_TO_RAS @ affine
                spacing = np.linalg.norm(axes[:3, :3], axis=0)
                numbers = {
                    "PixelSpacing": spacing[1::-1], "SliceThickness": spacing[2:],
                    "ImageOrientationPatient": (axes[:3, :2] / spacing[:2]).T.ravel(),
                    "ImagePositionPatient": (axes @ (0, 0, number, 1))[:3],
                    "RescaleSlope": _rescale(dataset, frame)[:1], "RescaleIntercept": _rescale(dataset, frame)[1:],
                }  # fmt: skip
                for name, values in numbers.items():
                    setattr(copy, name, [pydicom.valuerep.format_number_as_ds(float(value)) for value in values])
            if bare:
                for name in {"RescaleSlope", "RescaleIntercept"} & set(dir(copy)):
                    del copy[name]
            copy.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[path, str(frame)])
            copy.SOPClassUID = MRImageStorage if dataset.get("Modality") == "MR" else CTImageStorage
            copy.PixelData = np.ascontiguousarray(pixels[frame]).tobytes()
            copy["PixelData"].VR = "OW"
            copy.file_meta = pydicom.dataset.FileMetaDataset()
            copy.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            copy.file_meta.MediaStorageSOPClassUID = copy.SOPClassUID
            copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
            copy.save_as(folder / f"{number:06d}.dcm", enforce_file_format=True)


def _difference(
    volume: nibabel.Nifti1Image, expected: np.ndarray, affine: np.ndarray, lossy: bool
) -> tuple[str, np.ndarray]:
    """Compare a converted volume with what pydicom and the headers say.

    Returns:
        How it differs, "" if it does not, and the orientation transform from the expected axes to the volume's.
    """
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.io_orientation(volume.affine))
    turned = nibabel.orientations.apply_orientation(expected, turn)
    if turned.shape != volume.shape:
        shapes = ("x".join(map(str, one)) for one in (volume.shape, expected.shape))
        return "the converter's volume has {} voxels, the images {}".format(*shapes), turn
    moved = affine @ nibabel.orientations.inv_ornt_aff(turn, expected.shape)
    apart_mm = corner_distance_mm(moved, volume.affine, volume.shape)
    if not apart_mm < 0.05 + 0.1 * np.linalg.norm(affine[:3, :3], axis=0).min():
        return f"the converter puts a corner {apart_mm:.3g} mm from where the headers do", turn
    voxels = np.asanyarray(volume.dataobj)
    for k in range(voxels.shape[2]):  # a slice at a time, as float64 of a whole volume is large
        one, other = voxels[..., k].astype(np.float64), turned[..., k].astype(np.float64)
        apart = np.abs(one - other).max()
        if apart > (2 if lossy else 0) + 1e-5 * max(np.abs(other).max(), 1):
            return f"the converter's voxels differ from the decoded ones, by up to {apart:.3g}", turn
    return "", turn


def _without_padding(voxels: np.ndarray, record: dict, path: str, notes: list[str]) -> np.ndarray:
    """Put air where a CT has its padding value outside of what scanners give."""
    if record["modality"] != "CT" or record["padding"] is None:
        return voxels
    slope, intercept = _rescale(_dataset(path), 0)
    voxels = np.array(voxels)
    for wrapped in (0, -65536, 65536):  # the header writes it signed or unsigned, whatever the pixels are
        value = (record["padding"] + wrapped) * slope + intercept
        if not AIR_HU <= value <= DENSEST_HU and (padded := voxels == value).any():
            voxels[padded] = AIR_HU
            notes.append("padding set to air")
    return voxels


def convert_image(path: str, kind: str, rules: Rules) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Read a volume of another format: "nifti", "analyze", "mgh" or "itk" (MetaImage, NRRD).

    Returns:
        Voxels, the affine to RAS, and notes.

    Raises:
        Refused: for what is no single 3D volume of one number a voxel, or does not say where its voxels lie.
    """
    try:
        with warnings.catch_warnings(), LoggingOutputSuppressor():
            warnings.simplefilter("ignore")
            voxels, affine, notes = _itk(path, rules) if kind == "itk" else _nibabel(path, kind, rules)
    except Refused:
        raise
    except (EOFError, gzip.BadGzipFile) as error:
        raise Refused("truncated or corrupted") from error
    except Exception as error:
        raise Refused(f"can't be read: {type(error).__name__}") from error
    if wrong := fault_of_affine(affine):
        raise Refused(f"bad affine: {wrong}")
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = columns.T @ columns
    if np.abs(cosines - np.eye(3)).max() > np.sin(np.radians(rules.max_tilt_deg)):
        raise Refused("sheared axes")
    return voxels, affine, notes


def _plausible(path: str, shape: Sequence[int], itemsize: int, rules: Rules) -> None:
    """Raise for voxels that a file can't hold, before memory is asked for."""
    size = float(np.prod(np.array(shape, float))) * itemsize
    stored = os.path.getsize(path)
    if re.search(r"\.(hdr|mhd|nhdr)(\.gz)?$", path, re.IGNORECASE):
        folder, stem = Path(path).parent, re.sub(r"\.(hdr|mhd|nhdr)(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)
        others = [other for other in folder.glob("*") if other.name.startswith(f"{stem}.") and other.is_file()]
        stored += sum(other.stat().st_size for other in others)
        if len(others) < 2:
            raise Refused("the file of its voxels is missing")
    if size > rules.max_file_gb * 1e9 or size > stored * DEFLATE_RATIO + 4096:
        raise Refused("truncated or corrupted: it claims more voxels than it can hold")


def _nibabel(path: str, kind: str, rules: Rules) -> tuple[np.ndarray, np.ndarray, list[str]]:
    notes = []
    if path.lower().endswith((".nii", ".nii.gz")):
        reason = inspect_file(path, headers_only=True).reason  # the check of every data list
        if reason:  # libraries' own words may hold the path
            own = re.match(r"not a 3D|voxel type|bad spacing|bad affine|bad header: it", reason)
            raise Refused(reason if own else reason.partition(":")[0])
    image = nibabel.load(path)
    if type(image) not in (
        nibabel.Nifti1Image,
        nibabel.Nifti2Image,
        nibabel.Nifti1Pair,
        nibabel.Nifti2Pair,
        nibabel.AnalyzeImage,
        nibabel.Spm99AnalyzeImage,
        nibabel.Spm2AnalyzeImage,
        nibabel.MGHImage,
    ):
        raise Refused(f"not a 3D volume: {type(image).__name__}")
    shape = image.shape
    if len(shape) > 3 and np.prod(shape[3:]) > 1:
        raise Refused(f"4D: {np.prod(shape[3:])} volumes")
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise Refused("not a 3D volume")
    if image.get_data_dtype().kind not in "iuf":
        raise Refused("colour or complex voxels")
    _plausible(path, shape, image.get_data_dtype().itemsize, rules)
    affine = np.array(image.affine, float)
    if kind == "mgh":
        with ImageOpener(path) as stream:  # nibabel fills in what the file does not say
            if stream.read(30)[28:] == b"\0\0":
                raise Refused("it does not say how it lies")
    if kind == "nifti":
        header = image.header
        qform, sform = image.get_qform(coded=True), image.get_sform(coded=True)
        if not qform[1] and not sform[1]:
            raise Refused("neither qform nor sform: it does not say how it lies")
        if qform[1] and sform[1]:
            lengths = [np.linalg.norm(form[0][:3, :3], axis=0) for form in (qform, sform)]
            axes = [nibabel.aff2axcodes(form[0]) for form in (qform, sform)]
            if axes[0] != axes[1] or not np.allclose(lengths[0], lengths[1], rtol=0.02):
                raise Refused("qform and sform disagree on axes or spacing")
        if doubt_of_header(header):
            notes.append("qform and sform differ; the sform was taken")
        unit = int(header["xyzt_units"]) & 7
        if unit in (1, 3):  # metres, micrometres
            affine[:3] *= 1000.0 if unit == 1 else 0.001
            notes.append("units other than mm in its header")
    elif kind == "analyze":
        notes.append("left and right by Analyze's convention")
        if not (np.asarray(image.header["pixdim"][1:4]) > 0).all():
            raise Refused("no spacing above 0 in its header")
    voxels = np.asanyarray(image.dataobj)
    return voxels.reshape(shape[:3]), affine, notes


def _itk(path: str, rules: Rules) -> tuple[np.ndarray, np.ndarray, list[str]]:
    with open(path, "rb") as stream:
        text = stream.read(65536).partition(b"\n\n")[0].decode("latin-1")
    fields = dict(re.findall(r"^\s*([A-Za-z ]+?)\s*:?[:=]\s*(.*?)\s*$", text, re.MULTILINE))
    fields = {name.casefold(): value for name, value in fields.items()}
    data = fields.get("elementdatafile") or fields.get("data file") or fields.get("datafile") or "LOCAL"
    if data.upper() != "LOCAL":
        if "/" in data or "\\" in data or data.upper().startswith("LIST") or "%" in data:
            raise Refused("voxels in other folders or in a list of files")
        if not (Path(path).parent / data).is_file():
            raise Refused("the file of its voxels is missing")
    if not any(name in fields for name in ("elementspacing", "elementsize", "spacings", "space directions")):
        raise Refused("no spacing in its header")
    notes = []
    if text.startswith("NRRD") and "space" not in fields:
        notes.append("orientation by convention")
    if fields.get("space", "").casefold() in ("scanner-xyz", "3d-right-handed", "3d-left-handed"):
        raise Refused("it does not say how it lies")
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    if reader.GetNumberOfComponents() != 1:
        raise Refused("colour or several numbers a voxel")
    size = reader.GetSize()
    if len(size) > 3 and np.prod(size[3:]) > 1:
        raise Refused(f"4D: {int(np.prod(size[3:]))} volumes")
    if len(size) < 3 or min(size[:3]) < 2:
        raise Refused("not a 3D volume")
    _plausible(path, size, 2, rules)
    image = reader.Execute()
    if len(size) > 3:
        image = image[(slice(None),) * 3 + (0,) * (len(size) - 3)]
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine, notes


def compact(voxels: np.ndarray) -> np.ndarray:
    """Return voxels as int16, uint16 or int32 if all are whole numbers in its range, else as float32."""
    if voxels.dtype.kind == "f":
        if not np.isfinite(voxels).all():
            raise Refused("NaN or infinite voxels")
        if not (np.floor(voxels) == voxels).all():
            return voxels.astype(np.float32)
    low, high = float(voxels.min()), float(voxels.max())
    for kind in (np.int16, np.uint16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return voxels.astype(kind)
    return voxels.astype(np.float32)


def write_volume(voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write a .nii.gz whole or not at all, with a header that holds geometry only; the same voxels, the same bytes."""
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    with replacing(path) as part, open(part, "wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as stream:
        image.to_stream(stream)
