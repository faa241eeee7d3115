"""DICOM series as a scanner, an archive or a mishap makes them, for the tests of curation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

SIZE, COUNT, MM = 48, 16, 3.0  # rows and columns, slices, of both pixels and slices
CT = {"Modality": "CT", "RescaleIntercept": -1024, "RescaleSlope": 1, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}
T1 = {
    "Modality": "MR", "RepetitionTime": 500, "EchoTime": 10, "ScanningSequence": "SE",
    "ImageType": ["ORIGINAL", "PRIMARY", "M"], "SeriesDescription": "ax t1",
}  # fmt: skip
T2 = {**T1, "RepetitionTime": 4000, "EchoTime": 100, "SeriesDescription": "ax t2 tse"}
FLAIR = {**T1, "RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2500, "ScanningSequence": ["SE", "IR"]}
FLAIR["SeriesDescription"] = "ax flair"


def body(seed: int = 0, shape: tuple[int, int, int] = (COUNT, SIZE, SIZE), ct: bool = True) -> np.ndarray:
    """Return stored values (slices, rows, columns) of a body with organs in air: CT with an offset of 1024, or MR."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    values = np.full(shape, 24.0 if ct else 0.0)
    values[(grid[1] ** 2 + grid[2] ** 2) < 0.75] = 1060 if ct else 300
    for _ in range(12):
        centre, radius = random.uniform(-0.6, 0.6, (3, 1, 1, 1)), random.uniform(0.1, 0.3)
        values[((grid - centre) ** 2).sum(0) < radius**2] = (
            random.uniform(900, 1300) if ct else random.uniform(100, 900)
        )
    return (values + random.normal(0, 8, shape)).clip(0).astype(np.uint16)


def write_series(
    folder: Path,
    tags: dict | None = None,
    pixels: np.ndarray | None = None,
    each: Callable[[pydicom.Dataset, int], Path | bool | None] | None = None,
    patient: str = "P-0001",
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    step_mm: float = MM,
    uid: str | None = None,
    syntax: str = ExplicitVRLittleEndian,
) -> list[Path]:
    """Write a series; `each` may change an image, name its file, or return False to leave it out."""
    tags = CT if tags is None else tags
    pixels = body(ct=tags["Modality"] == "CT") if pixels is None else pixels
    folder.mkdir(parents=True, exist_ok=True)
    study, series, frame = generate_uid(), uid or generate_uid(), generate_uid()
    normal = np.cross(orientation[:3], orientation[3:])
    files = []
    for number, plane in enumerate(pixels):
        image = pydicom.Dataset()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = syntax
        image.SOPClassUID = MRImageStorage if tags["Modality"] == "MR" else CTImageStorage
        image.SOPInstanceUID = generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.PatientID, image.PatientName, image.PatientBirthDate = patient, "Planted^Name", "19330417"
        image.AccessionNumber, image.StudyDate, image.StudyID = "ACC4711", "20190304", "S1"
        image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = 3, number + 1, 1
        image.Rows, image.Columns, image.SamplesPerPixel = *plane.shape, 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.PixelSpacing, image.SliceThickness = [MM, MM], abs(step_mm)
        image.ImageOrientationPatient = list(orientation)
        image.ImagePositionPatient = [
            float(f"{v:.6g}") for v in np.array([-70.0, -60, 100]) + normal * step_mm * number
        ]
        image.PixelData = np.ascontiguousarray(plane, np.uint16).tobytes()
        for name, value in tags.items():
            setattr(image, name, value)
        changed = each(image, number) if each else None
        if changed is False:
            continue
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
        file = changed if isinstance(changed, Path) else folder / f"{number:04d}.dcm"
        image.save_as(file, enforce_file_format=True)
        files.append(file)
    return files
