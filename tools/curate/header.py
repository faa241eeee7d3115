"""Read what a file is, and of its header only what curation needs: numbers, hashes and words of a fixed vocabulary.

This is the border that nothing of the patient crosses: a record holds no text of a header or a path but words that
stand in this file.
"""

import contextlib
import math
import os
import re
import struct
import warnings
import zlib
from typing import Any

import pydicom
from nibabel.imageglobals import LoggingOutputSuppressor
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from tools.curate.find import Found
from tools.curate.privacy import Pseudonyms

# What descriptions, protocols and paths may tell; only these words are kept.
WORDS = {
    "t1": r"t1(?![0-9ρ])(?!_?(?:rho|map|mapping))(?:w|wi|n)?|mp[-_ ]?rage|mp2rage|spgr|bravo|tfl3d|vibe|mdixon",
    "t1ce": r"t1[-_ ]?(?:w[-_ ]?)?(?:ce|c|gd|gad|post|contrast|km|\+c)|t1post|gd[-_ ]?t1|post[-_ ]?t1",
    "t2": r"t2(?!\*|[-_ ]?(?:star|flair|f(?![a-z])|map|mapping|dark))(?:w|wi)?|haste|ssfse|tirm_t2",
    "flair": r"t?ir?flair|flair|t2f|dark[-_ ]?fluid|tirm[-_ ]?dark",
    "contrast": r"post|gad|gd|contrast|\+c|ce|km|with[-_ ]?contrast|enhanced|c\+|gadavist|multihance|dotarem|omniscan",
    "without": r"pre|non[-_ ]?contrast|without[-_ ]?contrast|native|nativ|noncon|unenhanced",
    "ct": r"ct|cta|ldct|hrct|ncct|cect",
    "star": r"t2\*|t2[-_ ]?star|swi|swan|gre[-_ ]?t2|hemo|venbold|medic",
    "pd": r"pd|pdw|proton",
    "stir": r"stir",
    "diffusion": r"dwi|dti|adc|diff|diffusion|tracew?|b\d{3,4}|isotropic|dki|noddi|hardi",
    "functional": r"fmri|bold|rest|resting|func|epi|task",
    "perfusion": r"perf|perfusion|asl|pasl|pcasl|dsc|dce|cbf|cbv|mtt|tmax|ttp|rcbf|rcbv",
    "angiography": r"tof|mra|mrv|angio|venogram|pca",
    "map": r"fieldmap|field_?map|b[01][-_ ]?(?:map|ns)|phase|magn_?phase|t1map|t2map|quant|mapping|t1rho",
    "localizer": r"loc|locali[sz]er|scout|survey|surview|topogram|pilot|scanogram|3[-_ ]?plane|aahscout|smartprep",
    "derived": r"mip|minip|mpr|subtraction|subtr|projection|projected|screen[-_ ]?save|summary|processed|3d[-_ ]?vr",
    "mask": r"(?<!without[- ])(?<!no[- ])(?<!and[- ])(?:seg|segs|segm|segmentation|label|labels(?:tr|ts)?|labelmap|"
    r"mask|masks|roi|aseg|aparc|dseg|parcellation|lesion|drawing|groundtruth|gt|annotation|contour|atlaslabels)",
    "animal": r"mouse|mice|murine|rat|rats|macaque|monkey|primate|rhesus|inia19|canine|feline|porcine|pig|rabbit|"
    r"sheep|ovine|marmoset|zebrafish|specimen|exvivo|ex[-_ ]?vivo",
    "phantom": r"phantom|phantoms|qa|acr|water_?bottle|catphan|test_?object",
}
# A word ends where letters and digits end: "ct" is no part of "contact", nor "rat" of "saturation".
VOCABULARY = {word: re.compile(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])") for word, pattern in WORDS.items()}

TAGS = """
SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID PatientID IssuerOfPatientID Modality
ImageType SeriesDescription ProtocolName StudyDescription SequenceName BodyPartExamined SeriesNumber AcquisitionNumber
InstanceNumber TemporalPositionIdentifier NumberOfTemporalPositions TriggerTime Rows Columns NumberOfFrames
PixelSpacing ImagerPixelSpacing SpacingBetweenSlices SliceThickness SliceLocation ImageOrientationPatient
ImagePositionPatient GantryDetectorTilt SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored
PixelRepresentation PixelPaddingValue RescaleSlope RescaleIntercept RescaleType RepetitionTime EchoTime EchoNumbers
InversionTime FlipAngle EchoTrainLength ScanningSequence SequenceVariant ScanOptions MRAcquisitionType
ContrastBolusAgent DiffusionBValue BurnedInAnnotation PatientSpeciesDescription ComplexImageComponent
SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence DimensionIndexSequence ContrastBolusAgentSequence
PatientName EchoPulseSequence ConvolutionKernel ModalityLUTSequence
""".split()  # noqa: SIM905
SIEMENS_B, GE_B, PHILIPS_B = 0x0019100C, 0x00431039, 0x20011003  # b values before the standard had a place for them
READ = [*map(Tag, TAGS), *map(Tag, (SIEMENS_B, GE_B, PHILIPS_B, 0x00041220))]

# SOP classes end in these numbers (1.2.840.10008.5.1.4.1.1.*); what is no volume of CT or MR is told by name.
CLASSES = {"2": "CT", "2.1": "CT", "2.2": "CT", "4": "MR", "4.1": "MR", "4.4": "MR"}
LEFT_OUT = {
    "7": "secondary capture", "7.1": "secondary capture", "7.2": "secondary capture", "7.3": "secondary capture",
    "7.4": "secondary capture", "66": "raw data", "66.1": "registration", "66.2": "registration",
    "66.4": "segmentation (SEG)", "66.7": "segmentation (SEG)", "67": "value mapping", "30": "parametric map",
    "4.2": "spectroscopy", "4.3": "colour", "481.2": "dose (RTDOSE)", "481.3": "structures (RTSTRUCT)",
    "481.5": "plan (RTPLAN)", "481.1": "RT image", "88.67": "dose report (SR)", "88.11": "report (SR)",
    "88.22": "report (SR)", "88.33": "report (SR)", "88.34": "report (SR)", "88.59": "key objects (KO)",
    "104.1": "document", "11.1": "presentation state", "11.2": "presentation state",
}  # fmt: skip
# What stands as "Modality" of what is neither CT nor MR is told, if the standard has it (PS3.3, C.7.3.1.1.1).
KNOWN = "AU BI CR DG DX ECG EPS ES GM HD IO IVUS LS MG NM OCT OP OT PT PX RF RG SC SM US XA XC".split()  # noqa: SIM905
MATERIALS = {  # of dual energy, not in Hounsfield units
    *("MAT_SPECIFIC", "MAT_REMOVED", "MAT_FRACTIONAL", "MAT_MODIFIED", "MAT_VALUE_BASED"),
    *("EFF_ATOMIC_NUM", "ELECTRON_DENSITY", "IODINE"),
}
MOST_FRAMES = 100_000
ROOT_CLASS = "1.2.840.10008.5.1.4.1.1."


def words_of(*texts: object) -> list[str]:
    """Return the words of the vocabulary that stand in texts; nothing else of the texts is kept."""
    text = " ; ".join(str(text) for text in texts if text).casefold()
    text = re.sub(r"[_./\\!()\[\]<>|,]+", " ", text)
    return sorted(word for word, pattern in VOCABULARY.items() if pattern.search(text))


def read_record(found: Found, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Read what a file is.

    Args:
        found: the file.
        pseudonyms: of what tells patients, series and files apart.

    Returns:
        A record, JSON of numbers, hashes and words. "kind" is "dicom", "image" (another format), "part" (voxels of
        another file), "other" (no image) or "refused" (with a "reason").
    """
    try:
        with warnings.catch_warnings(), LoggingOutputSuppressor():
            warnings.simplefilter("ignore")
            return _record(found, pseudonyms)
    except PermissionError:
        return {"kind": "refused", "reason": "no permission to read it"}
    except Exception as error:  # whatever a hostile header provokes concerns this file only
        return {"kind": "refused", "reason": f"damaged header: {type(error).__name__}"}


def _record(found: Found, pseudonyms: Pseudonyms) -> dict[str, Any]:
    if found.reason:
        return {"kind": "refused", "reason": found.reason}
    with open(found.path, "rb") as stream:
        head = stream.read(4096)
    lower = found.path.lower()
    if head[128:132] == b"DICM" or _bare_dicom(head):
        return _dicom(found, pseudonyms)
    kind = _image_kind(head, lower)
    if kind == "":
        return {"kind": "other", "suffix": _suffix(lower)}
    if kind == "part":
        return {"kind": "part"}
    if kind.startswith("!"):
        return {"kind": "refused", "reason": f"a format that is not read: {kind[1:]}"}
    return {"kind": "image", "format": kind, **_named(found, pseudonyms)}


def _suffix(lower: str) -> str:
    """Return a suffix for counting; one that is not usual could be a part of a name."""
    suffix = os.path.splitext(lower)[1]
    usual = ".txt .csv .json .xml .pdf .png .jpg .jpeg .html .md .tsv .xls .xlsx .doc .docx .py .sh .log .gif .bmp .tif"
    usual += " .bval .bvec .mat .npy .npz .h5 .exe .inf .ini .dll .rtf .dat .js .css .bin"
    return suffix if suffix in usual.split() else "other"


def _bare_dicom(head: bytes) -> bool:
    """Tell a DICOM file without preamble: it begins with an element of group 2 or 8 that makes sense."""
    if len(head) < 16:
        return False
    for order in "<>":
        group, element = struct.unpack(f"{order}HH", head[:4])
        if group not in (0x0002, 0x0008) or element > 0x1200:
            continue
        (length,) = struct.unpack(f"{order}I", head[4:8])
        if head[4:6].isalpha() and head[4:6].isupper() or length < 256:
            return True
    return False


def _image_kind(head: bytes, lower: str) -> str:
    """Return the format of an image, "part" for the voxels of another file, "!format" for one not read, or ""."""
    if lower.endswith((".nii.gz", ".hdr.gz", ".img.gz", ".mgz")):
        try:
            head = zlib.decompressobj(31).decompress(head, 540)
        except zlib.error:
            return "!a file named .gz that is not compressed"
    elif lower.endswith(".mgh"):
        return "mgh"
    if lower.endswith(".mgz"):
        return "mgh"
    if lower.endswith((".img", ".img.gz", ".raw", ".zraw", ".rec", ".brik", ".brik.gz")):
        return "part"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "nifti"
    if lower.endswith((".nii", ".nii.gz")):
        return "!a file named .nii that is no NIfTI"
    if len(head) >= 4 and head[:4] in (struct.pack("<i", 348), struct.pack(">i", 348)) and ".hdr" in lower:
        return "analyze"
    if head.startswith(b"NRRD0"):
        return "itk"
    if lower.endswith((".mhd", ".mha")) or head.startswith((b"ObjectType", b"NDims")):
        return "itk"
    known = {
        "!Philips PAR/REC": b"# === DATA DESCRIPTION", "!MIF": b"mrtrix image", "!MINC": b"CDF\x01",
        "!7z archive": b"7z\xbc\xaf\x27\x1c", "!RAR archive": b"Rar!\x1a\x07", "!zstd": b"\x28\xb5\x2f\xfd",
    }  # fmt: skip
    for name, magic in known.items():
        if head.startswith(magic):
            return name
    suffixes = {".par": "!Philips PAR/REC", ".mif": "!MIF", ".mnc": "!MINC", ".head": "!AFNI", ".v": "!ECAT"}
    return suffixes.get(os.path.splitext(lower.removesuffix(".gz"))[1], "")


def _named(found: Found, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Return what the place of a file tells: words, and who the patient is."""
    place = found.place.partition("/")[2] or found.place
    parts = [
        re.sub(r"\.(nii|mgz|mgh|mhd|mha|nrrd|nhdr|hdr|img|gz)\b", "", part, flags=re.I)
        for part in re.split(r"[/!]", place)
    ]
    name = parts[-1]
    # The file's own name tells more than its folders', which is why "t1/x_flair" is a FLAIR.
    record: dict[str, Any] = {"words": words_of(name), "folder_words": words_of(*parts[:-1])}
    contrast = r"(?:^|[_.\- ])(?:ct|t1|t2|flair|t1ce|t1c|t1gd|t1n|t1w|t2f|t2w|pd|t1post|000\d)(?=$|[_.\- ])"
    bare = [re.sub(contrast, "", part, flags=re.IGNORECASE).strip("_.- ") for part in parts]
    bare = [part for part in bare if part]
    uid = re.fullmatch(r"[0-9]+(\.[0-9]+){5,}", name)  # LUNA16 and others name a volume by its series
    record["series_uid"] = pseudonyms("series", name) if uid else ""
    own = re.match(r"(sub-[A-Za-z0-9]+)", name) or re.match(
        r"(.*?)(?:[_-](?:ses|study|visit|tp|session)[-_]?\w+)$", bare[-1] if bare else ""
    )
    record["group"] = pseudonyms("group", found.source, own[1] if own else "/".join(bare) or place)
    # "PGBM-003_t1.nii.gz" is the patient whose DICOM says PGBM-003.
    tokens = {own[1] if own else "", *(bare[-2:])}
    record["patients"] = sorted(
        {hashed for t in tokens if len(t) > 4 and re.search(r"\d", t) and (hashed := pseudonyms.patient(t))}
    )
    return record


def _number(value: Any) -> float | None:
    """Return a finite number, or None for whatever else stands in a header."""
    if isinstance(value, (list, tuple, pydicom.multival.MultiValue)):
        value = value[0] if len(value) else None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _numbers(value: Any, count: int) -> list[float] | None:
    """Return a list of so many finite numbers, or None."""
    try:
        numbers = [float(part) for part in value]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


NOTHING = Dataset()


def _first(dataset: Dataset, name: str) -> Dataset:
    """Return the first item of a sequence, an empty one if there is none."""
    try:
        sequence = dataset.get(name) if len(dataset) else None
        return sequence[0] if sequence else NOTHING
    except (TypeError, IndexError, AttributeError):
        return NOTHING


def _kept(value: Any) -> list[str]:
    """Return a coded value (CS) as words, upper case; what is no code is dropped."""
    parts = value if isinstance(value, (list, pydicom.multival.MultiValue)) else [value]
    return [str(part).upper() for part in parts if re.fullmatch(r"[A-Za-z0-9_ ]{1,16}", str(part or ""))]


def _dicom(found: Found, pseudonyms: Pseudonyms) -> dict[str, Any]:
    dataset = pydicom.dcmread(found.path, force=True, stop_before_pixels=True, specific_tags=READ)
    get = dataset.get
    if 0x00041220 in dataset or str(dataset.file_meta.get("MediaStorageSOPClassUID", "")) == "1.2.840.10008.1.3.10":
        return {"kind": "other", "suffix": "DICOMDIR"}
    sop_class = str(get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    modality = str(get("Modality") or "").upper()
    patient = pseudonyms.patient(get("PatientID"))
    study = pseudonyms("study", get("StudyInstanceUID")) if get("StudyInstanceUID") else ""
    folder = pseudonyms("folder", found.place.rpartition("/")[0])
    uid = get("SeriesInstanceUID")
    # Without an own identifier the series is what lies in one folder.
    series = pseudonyms("series", uid) if uid else folder
    image_type = _kept(get("ImageType"))
    record: dict[str, Any] = {
        "kind": "dicom",
        "series": series,
        "study": study,
        "patient": patient or study or folder,
        "instance": pseudonyms("instance", get("SOPInstanceUID")) if get("SOPInstanceUID") else "",
        "words": words_of(get("SeriesDescription"), get("ProtocolName")),
        "study_words": words_of(
            get("StudyDescription"),
            get("PatientSpeciesDescription"),
            get("PatientName"),
            get("PatientID"),
            get("SequenceName"),
        ),
        "modality": modality if modality in ("CT", "MR") else CLASSES.get(sop_class.removeprefix(ROOT_CLASS), ""),
    }
    reason = _reason(dataset, sop_class, modality, image_type, record["words"])
    if reason:
        return {**record, "reason": reason}

    shared, frames = _first(dataset, "SharedFunctionalGroupsSequence"), get("PerFrameFunctionalGroupsSequence")
    count = int(_number(get("NumberOfFrames")) or 1)
    if not 1 <= count <= MOST_FRAMES or frames and len(frames) != count:
        return {**record, "reason": "another number of frames than its header says"}
    mosaic = "MOSAIC" in image_type
    types = [part for part in image_type[2:] if part not in ("NORM", "ND", "DIS2D", "DIS3D", "MFSPLIT", "PRIMARY")]
    record.update(
        size=[int(get("Columns") or 0), int(get("Rows") or 0)],
        type=pseudonyms("type", *types, get("ConvolutionKernel")),  # codes may be anything, and a name too
        number=int(_number(get("SeriesNumber")) or 0),
        modality_tags=_parameters(dataset, shared, _first(dataset, "PerFrameFunctionalGroupsSequence")),
        padding=_number(get("PixelPaddingValue")) if get("PixelPaddingValue") is not None else None,
        lossy=str(dataset.file_meta.get("TransferSyntaxUID", "")) in LOSSY,
        mosaic=mosaic,
        frames=[],
    )
    groups = list(frames) if frames is not None and len(frames) else [NOTHING] * count
    for index, own in enumerate(groups[:count]):
        frame = _frame(dataset, shared, own, index)
        record["frames"].append({**frame, "kinds": pseudonyms("type", *frame["kinds"])})
    return record


LOSSY = {
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.203",
}  # fmt: skip


def _parameters(dataset: Dataset, shared: Dataset, frame: Dataset) -> dict[str, Any]:
    """Return the sequence's parameters, in ms and degrees, of classic and of enhanced images (their first frame)."""
    names = ("MRTimingAndRelatedParametersSequence", "MREchoSequence", "MRModifierSequence")
    timing, echo, modifier = (_first(shared, name) or _first(frame, name) for name in names)
    agent = str(dataset.get("ContrastBolusAgent") or "").strip().casefold()
    none = agent in ("", "none", "no", "n", "0", "no contrast", "without", "-")
    sequence = _kept(dataset.get("ScanningSequence"))
    pulse = str(dataset.get("EchoPulseSequence") or "")
    if not sequence and pulse:
        sequence = [{"SPIN": "SE", "GRADIENT": "GR"}.get(pulse, "")]
    return {
        "tr_ms": _number(dataset.get("RepetitionTime")) or _number(timing.get("RepetitionTime")),
        "te_ms": _number(dataset.get("EchoTime")) or _number(echo.get("EffectiveEchoTime")),
        "ti_ms": _number(dataset.get("InversionTime")) or _number(modifier.get("InversionTimes")),
        "flip_deg": _number(dataset.get("FlipAngle")) or _number(timing.get("FlipAngle")),
        "train": _number(dataset.get("EchoTrainLength")),
        "sequence": [part for part in sequence if part in ("SE", "GR", "IR", "EP", "RM")],
        "agent": not none or bool(dataset.get("ContrastBolusAgentSequence")),
        "fatsat": "FS" in _kept(dataset.get("ScanOptions")),
    }


def _frame(dataset: Dataset, shared: Dataset, own: Dataset, index: int) -> dict[str, Any]:
    """Return place, echo, phase and time of one image, from its own, the shared or the file's attributes."""

    groups = [group for group in (own, shared) if len(group)]

    def one(sequence: str, name: str) -> Any:
        for group in groups:
            value = _first(group, sequence).get(name)
            if value is not None:
                return value
        return dataset.get(name)

    orientation = _numbers(one("PlaneOrientationSequence", "ImageOrientationPatient"), 6)
    position = _numbers(one("PlanePositionSequence", "ImagePositionPatient"), 3)
    spacing = _numbers(one("PixelMeasuresSequence", "PixelSpacing"), 2)
    content = _first(own, "FrameContentSequence")
    b_values = [_first(own, "MRDiffusionSequence").get("DiffusionBValue"), dataset.get("DiffusionBValue")]
    # Other makers have other things at these places, but not in an echo-planar sequence.
    for tag in (SIEMENS_B, GE_B, PHILIPS_B) if "EP" in _kept(dataset.get("ScanningSequence")) else ():
        with contextlib.suppress(Exception):
            value = dataset[tag].value if tag in dataset else None
            value = value if not isinstance(value, bytes) else None
            number = _number(value)
            b_values.append(number % 1e9 if number is not None and tag == GE_B else number)
    b_value = next((number for value in b_values if (number := _number(value)) is not None), None)
    kinds = _kept(one("MRImageFrameTypeSequence", "FrameType") or one("CTImageFrameTypeSequence", "FrameType"))
    component = str(one("MRImageFrameTypeSequence", "ComplexImageComponent") or "").upper()[:4]
    types = [*_kept(dataset.get("ImageType"))[2:], *kinds[2:]]
    if not component:
        component = (
            "PHAS"
            if {"P", "PHASE", "PHASE MAP"} & set(types)
            else "REAL"
            if {"R", "REAL"} & set(types)
            else "IMAG"
            if {"I", "IMAGINARY"} & set(types)
            else "MAGN"
        )
    echo = _number(one("MREchoSequence", "EffectiveEchoTime") or dataset.get("EchoTime"))
    return {
        "index": index,
        "orientation": orientation,
        "position": position,
        "spacing": spacing,
        "thickness": _number(one("PixelMeasuresSequence", "SliceThickness")),
        "echo": round(echo, 1) if echo is not None else (_number(dataset.get("EchoNumbers")) or 0),
        "component": component,
        "b": b_value or 0,
        "kinds": [kind for kind in kinds[2:] if kind not in ("NONE",)],
        "stack": _number(content.get("StackID")),
        "time": [
            _number(content.get("TemporalPositionIndex")) or _number(dataset.get("TemporalPositionIdentifier")),
            _number(dataset.get("AcquisitionNumber")),
            _number(dataset.get("TriggerTime")),
        ],
        "instance": _number(dataset.get("InstanceNumber")) or 0,
    }


def _reason(dataset: Dataset, sop_class: str, modality: str, image_type: list[str], words: list[str]) -> str:
    """Return why an object is left out by what it says of itself, "" if it is not."""
    number = sop_class.removeprefix(ROOT_CLASS)
    if number in LEFT_OUT:
        return LEFT_OUT[number]
    by_modality = {
        "SEG": "segmentation (SEG)", "RTSTRUCT": "structures (RTSTRUCT)", "RTDOSE": "dose (RTDOSE)",
        "RTPLAN": "plan (RTPLAN)", "SR": "report (SR)", "PR": "presentation state", "KO": "key objects (KO)",
    }  # fmt: skip
    if modality in by_modality:
        return by_modality[modality]
    if modality not in ("CT", "MR"):
        if number not in CLASSES:
            return f"neither CT nor MR: {modality if modality in KNOWN else 'unknown'}"
    elif sop_class and number not in CLASSES and sop_class.startswith(ROOT_CLASS):
        return "neither CT nor MR: by its class"
    types = set(image_type)
    if dataset.get("ModalityLUTSequence"):
        return "values by a table (Modality LUT)"
    if types & MATERIALS:
        return "material map of dual energy"
    if not dataset.get("Rows") or not dataset.get("Columns"):
        return "no image in it"
    if (_number(dataset.get("SamplesPerPixel")) or 1) != 1 or not str(
        dataset.get("PhotometricInterpretation") or "MONOCHROME2"
    ).startswith("MONO"):
        return "colour"
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES":
        return "burned-in annotation"
    if {"LOCALIZER", "SCOUT"} & types or "localizer" in words:
        return "localizer"
    if {"SCREEN SAVE", "POSDISP", "CSAIMAGE"} & types:
        return "secondary capture"
    if {"PROJECTION IMAGE", "MIP", "CSA MIP", "MINIP", "MIN IP", "VRT", "SUBTRACTION", "SUB"} & types or types & {
        "MPR",
        "CSA MPR",
        "REFORMATTED",
        "CURVED MPR",
        "RADIAL",
    }:
        return "derived: projection, reformat or difference"
    if {"ADC", "FA", "TRACEW", "EADC", "DIFFUSION", "TENSOR"} & types:
        return "diffusion"
    if {"PERFUSION", "RCBF", "RCBV", "MTT", "TTP", "CBF", "CBV", "PBP"} & types:
        return "perfusion"
    if "SECONDARY" in types and "DERIVED" in types and modality != "CT" or "derived" in words:
        return "derived"
    if modality == "MR" and str(dataset.get("PhotometricInterpretation") or "") == "MONOCHROME1":
        return "MONOCHROME1: bright and dark may be exchanged"
    return ""
