"""What the tests of the Deploy application do with DICOM, run by the Python of its environment.

python dicom.py draw FOLDER MODALITY     a series of unequal pixel spacing, turned, with structures in it
python dicom.py nifti FOLDER FILE        a series as NIfTI, by SimpleITK, not by the application's own reading
python dicom.py read SEG NIFTI OUT       a SEG as highdicom reads it, put together in the grid of a NIfTI file
python dicom.py results FOLDER OUT       the codes of a SEG's segments, and the volumes of the SR beside it, as JSON
python dicom.py study FOLDER             three series of a study: a localizer, thick images, and fewer thin ones
"""

import json
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import SimpleITK
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

# Along a row the voxels are 2.5 mm apart, along a column 4 mm; images are turned around the patient's axis.
ROWS, COLUMNS, IMAGES = 40, 64, 12
ROWS_MM, COLUMNS_MM, IMAGES_MM = 4.0, 2.5, 5.0
ALONG_ROW, ALONG_COLUMN = (0.8660254, 0.5, 0.0), (-0.5, 0.8660254, 0.0)


def draw(folder: Path, modality: str) -> None:
    """Write the images of a series, shuffled by name, as a scanner sends them."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in (IMAGES, ROWS, COLUMNS)), indexing="ij")
    scan = 1024 + 60 * random.standard_normal(z.shape) + 120 * ((x - 0.3) ** 2 + y**2 + z**2 < 0.3) - 900 * (x < -0.8)
    for number, name in enumerate(random.permutation(IMAGES)):
        image = pydicom.Dataset()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image.SOPClassUID = getattr(pydicom.uid, f"{modality}ImageStorage")
        image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        image.Modality, image.SeriesNumber, image.InstanceNumber = modality, None, number + 1
        image.PatientID = image.PatientName = "phantom"
        for empty in ("PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber"):
            setattr(image, empty, "")
        image.ReferringPhysicianName = image.Manufacturer = ""
        image.PixelSpacing = [ROWS_MM, COLUMNS_MM]
        image.SliceThickness = IMAGES_MM
        image.ImageOrientationPatient = [*ALONG_ROW, *ALONG_COLUMN]
        image.ImagePositionPatient = [-50.0, -70.0, 100.0 + IMAGES_MM * number]
        image.Rows, image.Columns, image.SamplesPerPixel = ROWS, COLUMNS, 1
        image.PhotometricInterpretation = "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
        image.RescaleIntercept, image.RescaleSlope = -1024, 1
        image.PixelData = scan[number].clip(0).astype(np.uint16).tobytes()
        image.save_as(folder / f"{name}.dcm", enforce_file_format=True)


def study(folder: Path) -> None:
    """Make three series of one study out of one: all are CT, and the localizer has the most images."""
    draw(folder / "localizer", "CT")
    kinds = {
        "localizer": ("LOCALIZER", 5.0, "B70f", 12),
        "thick": ("AXIAL", 5.0, "B70f", 10),
        "thin": ("AXIAL", 1.0, "B30f", 8),
    }
    files = sorted((folder / "localizer").iterdir(), key=lambda file: pydicom.dcmread(file).InstanceNumber)
    for name, (kind, thickness_mm, kernel, count) in kinds.items():
        series = generate_uid()
        (folder / name).mkdir(exist_ok=True)
        for file in files[:count]:
            image = pydicom.dcmread(file)
            image.SeriesInstanceUID, image.SeriesDescription, image.SliceThickness = series, name, thickness_mm
            image.ImageType, image.ConvolutionKernel = ["ORIGINAL", "PRIMARY", kind], kernel
            image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            image.save_as(folder / name / file.name, enforce_file_format=True)


def results(folder: Path, out: Path) -> None:
    """Write what a SEG and an SR in a folder say, by the names of the segments."""
    found = {}
    for file in folder.glob("*"):
        dataset = pydicom.dcmread(file)
        if dataset.Modality == "SEG":
            for segment in dataset.SegmentSequence:
                (kind,) = segment.SegmentedPropertyTypeCodeSequence
                sides = kind.get("SegmentedPropertyTypeModifierCodeSequence", [])
                found.setdefault("codes", {})[segment.SegmentLabel] = [code.CodeValue for code in (kind, *sides)]
            found["seg"] = dataset.SOPInstanceUID
            found["series"] = dataset.ReferencedSeriesSequence[0].SeriesInstanceUID
        else:
            report = highdicom.sr.srread(file)
            groups = report.content.get_volumetric_roi_measurement_groups()
            found["volumes_ml"] = {
                group.tracking_identifier: float(group.get_measurements()[0].value) for group in groups
            }
            found["referenced"] = sorted({group.reference_type.value for group in groups})
            (evidence,) = report.CurrentRequestedProcedureEvidenceSequence
            found["evidence"] = [
                item.ReferencedSOPInstanceUID
                for one in evidence.ReferencedSeriesSequence
                for item in one.ReferencedSOPSequence
            ]
    out.write_text(json.dumps(found))


def nifti(folder: Path, file: Path) -> None:
    """Write a series as NIfTI."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    SimpleITK.WriteImage(reader.Execute(), str(file))


def read(file: Path, grid: Path, out: Path) -> None:
    """Write label map, names and model info of a SEG; each frame lies where its own position says."""
    seg = highdicom.seg.segread(file)
    volume = seg.get_volume(combine_segments=True)
    index = np.argwhere(volume.array)
    world_mm = volume.affine @ np.c_[index, np.ones(len(index))].T
    world_mm[:2] *= -1  # to the right and the front in NIfTI, to the left and the back in DICOM
    grid = nibabel.load(grid)
    place = (np.linalg.inv(grid.affine) @ world_mm)[:3]
    assert np.abs(place - place.round()).max(initial=0) < 1e-3, "voxels of the SEG lie between those of the scan"
    label = np.zeros(grid.shape, np.uint8)
    label[tuple(place.round().astype(int))] = volume.array[tuple(index.T)]
    (model,) = seg.ContributingEquipmentSequence
    np.savez(
        out,
        label=label,
        names=[segment.SegmentLabel for segment in seg.SegmentSequence],
        model=[model.Manufacturer, model.ManufacturerModelName, model.SoftwareVersions, model.DeviceUID],
        series=seg.ReferencedSeriesSequence[0].SeriesInstanceUID,
    )


if __name__ == "__main__":
    command, first, *rest = sys.argv[1:]
    if command == "draw":
        draw(Path(first), *rest)
    else:
        known = {"nifti": nifti, "read": read, "results": results, "study": study}
        known[command](Path(first), *map(Path, rest))
