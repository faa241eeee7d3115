"""DICOM in: one series of the right kind, as a volume that lies where the scan lies."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pydicom
import pydicom.errors
import pydicom.uid
from monai.deploy.core import Fragment
from monai.deploy.core.domain.dicom_series import DICOMSeries
from monai.deploy.core.domain.dicom_series_selection import StudySelectedSeries
from monai.deploy.core.domain.dicom_study import DICOMStudy
from monai.deploy.operators import (
    DICOMDataLoaderOperator,
    DICOMSeriesSelectorOperator,
    DICOMSeriesToVolumeOperator,
)

from custom.errors import BadInput

RULES = Path(__file__).with_name("rules.json")


def readable(file: str) -> str | io.BytesIO:
    """Return a DICOM file as the SDK can read it: itself, or a copy in memory that lacks nothing.

    A series number may be empty, which the SDK can't read. De-identification often empties UIDs. Those of class and
    instance stand in the file's header too; those of series and study are made from that of the frame of reference,
    which all images of a series have in common.
    """
    try:
        dataset = pydicom.dcmread(file)
    except pydicom.errors.InvalidDicomError:
        return file  # which the SDK ignores
    changed = False
    header = dataset.file_meta
    frame = dataset.get("FrameOfReferenceUID", "")
    for name, uid in {
        "SOPClassUID": header.get("MediaStorageSOPClassUID"),
        "SOPInstanceUID": header.get("MediaStorageSOPInstanceUID"),
        "SeriesInstanceUID": pydicom.uid.generate_uid(entropy_srcs=["series", frame]),
        "StudyInstanceUID": pydicom.uid.generate_uid(entropy_srcs=["study", frame]),
    }.items():
        if not dataset.get(name):
            logging.warning(f"{file} has no {name}; it is segmented as {uid}.")
            setattr(dataset, name, uid)
            changed = True
    if "SeriesNumber" in dataset and dataset.SeriesNumber is None:
        del dataset.SeriesNumber
        changed = True
    if not changed:
        return file
    copy = io.BytesIO()
    dataset.save_as(copy)
    copy.seek(0)
    return copy


class Loader(DICOMDataLoaderOperator):
    """Loads DICOM files, also those that lack UIDs or a series number."""

    def _load_data(self, files: list[str]) -> list[DICOMStudy]:
        return super()._load_data([readable(file) for file in files])


class Selector(DICOMSeriesSelectorOperator):
    """Selects the series to segment: of a study's CT or MR series that fit the rules, the one with the most images.

    `rules.json`, beside this file, has the SDK's selections. A series that fits an earlier one goes before others.

    Args:
        fragment: the application.
        folder: that the studies come from.
        modality: CT or MR.
    """

    def __init__(self, fragment: Fragment, *args, folder: Path, modality: str, **kwargs) -> None:
        self.folder = folder
        self.kind = getattr(pydicom.uid, f"{modality}ImageStorage")
        super().__init__(fragment, *args, **kwargs)

    def filter(self, rules: dict | None, studies: list[DICOMStudy], *options: bool) -> list[StudySelectedSeries]:
        """Return the one study with its series, the selected one first.

        Raises:
            BadInput: for no series of the kind, and for several studies that have some.
        """
        selections = json.loads(RULES.read_text())["selections"]
        kind = {"SOPClassUID": f"^{self.kind}$"}
        rules = {"selections": [{**one, "conditions": {**kind, **one["conditions"]}} for one in selections]}
        selected = super().filter(rules, studies, True, True)
        if len(selected) > 1:
            raise BadInput(f"{self.folder} has {self.kind.name} of {len(selected)} studies; name a folder with one.")
        if not selected:
            series = [one.get_sop_instances()[0] for study in studies for one in study.get_all_series()]
            kinds = sorted({one.get_native_sop_instance().SOPClassUID.name for one in series})
            if self.kind.name in kinds:
                raise BadInput(
                    f"{self.folder} has {self.kind.name}, but no series that fits {RULES}; change the rules."
                )
            found = f"{' and '.join(kinds)} only" if kinds else "no DICOM files"
            raise BadInput(f"{self.folder} has {found}, the bundle takes {self.kind.name}; name another with --input.")
        return selected


class Volume(DICOMSeriesToVolumeOperator):
    """Makes a volume of a series, for unequal pixel spacing too."""

    def prepare_series(self, series: DICOMSeries) -> None:
        """Sort a series and set its affines.

        Raises:
            BadInput: for one image, and for images that are not equally far apart.
        """
        super().prepare_series(series)
        images = series.get_sop_instances()
        gaps_mm = np.diff([image.distance for image in images]) if len(images) > 1 else np.zeros(1)
        if not np.ptp(gaps_mm) < 0.1 * gaps_mm.mean():
            raise BadInput(
                f"The series {series.SeriesInstanceUID} of {len(images)} images is no volume: between its images are "
                f"{gaps_mm.min():.3g} to {gaps_mm.max():.3g} mm; some are missing, or it is several volumes."
            )
        # Going along a row, from column to column, takes the spacing of columns, the second of PixelSpacing; the SDK
        # takes the first, and the second for going along a column.
        rows_mm, columns_mm = images[0].get_native_sop_instance().PixelSpacing
        for name in (self.ATTRIBUTE_DICOM_AFFINE, self.ATTRIBUTE_NIFTI_AFFINE):
            getattr(series, name)[:, :2] *= (columns_mm / rows_mm, rows_mm / columns_mm)
