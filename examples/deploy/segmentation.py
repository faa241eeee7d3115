"""The application: which operators run, and what they are told of the bundle by its metadata."""

import hashlib
import json
from pathlib import Path

from dicom import Loader, Selector, Volume
from holoscan.conditions import CountCondition
from monai.deploy.core import AppContext, Application, IOType
from monai.deploy.core.domain.image import Image
from monai.deploy.operators import ModelInfo
from monai.deploy.operators.monai_bundle_inference_operator import IOMapping, MonaiBundleInferenceOperator
from nifti import NiftiReader, NiftiWriter, find_nifti
from pydicom.uid import generate_uid
from results import Segment, Writer

from custom.errors import BadInput


class Segmentation(Application):
    """Segments with a bundle.

    Args:
        app_context: input, output and model, as the command line or the environment of a MAP names them.
        bundle: its folder.
        weights: its weights.

    Raises:
        BadInput: for a bundle that takes several channels.
    """

    def __init__(self, app_context: AppContext, bundle: Path, weights: Path) -> None:
        # To the SDK any folder is a model; without one it takes the bundle_path of the operator.
        app_context.models = None
        self.app_context = app_context
        self.bundle, self.weights = bundle, weights
        self.about = json.loads((self.bundle / "configs/metadata.json").read_text())
        channels = self.about["network_data_format"]["inputs"]["image"]["num_channels"]
        if channels != 1:
            raise BadInput(f"The bundle {self.bundle} takes scans of {channels} channels, this application has one.")
        super().__init__()

    def compose(self) -> None:
        """Connect the operators: the SDK's own, but for what they get wrong."""
        source, output = Path(self.app_context.input_path), Path(self.app_context.output_path)
        infer = MonaiBundleInferenceOperator(
            self,
            app_context=self.app_context,
            bundle_path=self.bundle,
            input_mapping=[IOMapping("image", Image, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", Image, IOType.IN_MEMORY)],
            name="infer",
        )
        once = CountCondition(self, 1)
        modality = self.about["network_data_format"]["inputs"]["image"]["modality"]
        nifti = find_nifti(source)
        if nifti:
            self.add_flow(
                NiftiReader(self, once, path=nifti, modality=modality.lower(), name="read"), infer, {("image", "image")}
            )
            self.add_flow(infer, NiftiWriter(self, output=output, name="write"), {("pred", "pred")})
            return
        load = Loader(self, once, input_folder=source, must_load=False, name="load")
        select = Selector(self, folder=source, modality=modality, name="select")
        volume = Volume(self, name="volume")
        write = Writer(
            self,
            segments=self.segments(),
            model_info=self.model_info(),
            custom_tags={"SeriesDescription": self.about["name"]},
            output_folder=output,
            name="write",
        )
        self.add_flow(load, select, {("dicom_study_list", "dicom_study_list")})
        for user in (volume, write):
            self.add_flow(select, user, {("study_selected_series_list", "study_selected_series_list")})
        self.add_flow(volume, infer, {("image", "image")})
        self.add_flow(infer, write, {("pred", "seg_image")})

    def segments(self) -> list[Segment]:
        """Describe the segments by the names of their classes; background is none."""
        names = self.about["network_data_format"]["outputs"]["pred"]["channel_def"]
        return [Segment(names[str(n)], self.about["name"], self.about["version"]) for n in range(1, len(names))]

    def model_info(self) -> ModelInfo:
        """Say what has segmented; other weights have another UID, as the IHE profile AI Results asks for."""
        digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        uid = generate_uid(entropy_srcs=[digest])
        return ModelInfo(self.about["authors"], self.about["name"], self.about["version"], uid)
