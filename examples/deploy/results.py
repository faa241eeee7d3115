"""DICOM out: a SEG whose segments are coded, and an SR with their volumes."""

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from monai.deploy.core.domain.dicom_series import DICOMSeries
from monai.deploy.operators import DICOMSegmentationWriterOperator, ModelInfo
from monai.deploy.operators.dicom_seg_writer_operator import SegmentDescription
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

SIDES = {"right": codes.SCT.Right, "left": codes.SCT.Left}
# Classes whose SNOMED term has another name. All terms are pydicom's, which has them from DICOM PS3.16.
TERMS = {
    "brainstem": codes.SCT.BrainStem,
    "external cerebrospinal fluid": codes.SCT.CerebrospinalFluid,
    "grey matter": codes.SCT.GrayMatter,
    "ventricles": codes.SCT.BrainVentricle,
}
PROCEDURES = {"CT": codes.LN.CTUnspecifiedBodyRegion, "MR": codes.LN.MRIUnspecifiedBodyRegion}
MILLILITRE = Code("mL", "UCUM", "milliliter")


def coded(name: str) -> tuple[Code, Code | None]:
    """Return the SNOMED term and the side of a class; of a class without a term, that of any anatomical structure."""
    side, _, rest = name.partition(" ")
    what = rest if side in SIDES else name
    term = TERMS.get(what) or getattr(codes.SCT, what.title().replace(" ", ""), codes.SCT.AnatomicalStructure)
    return term, SIDES.get(side)


class Segment(SegmentDescription):
    """Describes a segment by the name of its class, with the side that the SDK leaves out.

    Args:
        name: of the class, such as "right kidney".
        algorithm: name of what has segmented.
        version: of that.
    """

    def __init__(self, name: str, algorithm: str, version: str) -> None:
        self.name = name
        self.type, self.side = coded(name)
        super().__init__(name, codes.SCT.AnatomicalStructure, self.type, algorithm, version)

    def to_segment_description(self, segment_number: int) -> hd.seg.SegmentDescription:
        described = super().to_segment_description(segment_number)
        if self.side is not None:
            side = hd.sr.CodedConcept.from_code(self.side)
            described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
        return described


class Writer(DICOMSegmentationWriterOperator):
    """Writes the SEG, and beside it an SR (TID 1500) with the volume of each segment that was found.

    Args:
        segments: of the label map, in the order of their ids.
        model_info: what has segmented.
        kwargs: see `DICOMSegmentationWriterOperator`.
    """

    def __init__(self, fragment, segments: list[Segment], model_info: ModelInfo, **kwargs) -> None:
        self.segments, self.model = segments, model_info
        super().__init__(fragment, segment_descriptions=segments, model_info=model_info, **kwargs)

    def create_dicom_seg(self, image: np.ndarray, dicom_series: DICOMSeries, output_dir: Path) -> None:
        before = set(output_dir.glob("*.dcm"))
        super().create_dicom_seg(image, dicom_series, output_dir)
        (file,) = set(output_dir.glob("*.dcm")) - before
        images = dicom_series.get_sop_instances()
        scan = [one.get_native_sop_instance() for one in images]
        gap_mm = np.ptp([one.distance for one in images]) / (len(images) - 1)
        voxel_ml = float(np.prod(scan[0].PixelSpacing) * gap_mm / 1000)
        volumes_ml = np.bincount(image.ravel(), minlength=len(self.segments) + 1)[1:] * voxel_ml
        report = self.report(pydicom.dcmread(file), scan, volumes_ml)
        report.save_as(output_dir / f"{report.SOPInstanceUID}.dcm")

    def report(
        self, seg: pydicom.Dataset, scan: list[pydicom.Dataset], volumes_ml: np.ndarray
    ) -> hd.sr.Comprehensive3DSR:
        """Return the SR on a SEG of a scan."""
        groups = []
        for number, (segment, volume_ml) in enumerate(zip(self.segments, volumes_ml, strict=True), 1):
            if volume_ml == 0:
                continue
            source = hd.sr.SourceSeriesForSegmentation(scan[0].SeriesInstanceUID)
            groups.append(
                hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                    hd.sr.TrackingIdentifier(hd.UID(), segment.name),
                    referenced_segment=hd.sr.ReferencedSegment(
                        seg.SOPClassUID, seg.SOPInstanceUID, number, source_series=source
                    ),
                    finding_type=segment.type,
                    finding_sites=[hd.sr.FindingSite(segment.type, segment.side)],
                    measurements=[hd.sr.Measurement(codes.SCT.Volume, round(float(volume_ml), 3), MILLILITRE)],
                )
            )
        model = hd.sr.DeviceObserverIdentifyingAttributes(
            self.model.uid, self.model.name, self.model.creator, self.model.version
        )
        return hd.sr.Comprehensive3DSR(
            evidence=[seg, *scan],
            content=hd.sr.MeasurementReport(
                hd.sr.ObservationContext(observer_device_context=hd.sr.ObserverContext(codes.DCM.Device, model)),
                PROCEDURES[scan[0].Modality],
                groups or None,
            ),
            series_instance_uid=hd.UID(),
            series_number=int(seg.SeriesNumber) + 1,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=seg.Manufacturer,
            is_complete=True,
        )
