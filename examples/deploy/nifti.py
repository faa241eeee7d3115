"""NIfTI in and out, with where the scan lies, which the SDK's operators drop."""

from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monai.deploy.core import Fragment, Operator, OperatorSpec
from monai.deploy.core.domain.image import Image
from monai.transforms import SaveImage

from custom.data import LoadScand, find_scans
from custom.data.cases import is_nifti
from custom.data.saving import PlaceWriter, name_by_case
from custom.errors import BadInput


def find_nifti(path: Path) -> Path | None:
    """Return a NIfTI file, given itself or its folder; None where there is none.

    Raises:
        BadInput: for several.
    """
    files = sorted(file for file in path.iterdir() if is_nifti(file.name)) if path.is_dir() else [path]
    if len(files) > 1:
        raise BadInput(f"{path} has {len(files)} NIfTI files; name one with --input.")
    return files[0] if files else None


class NiftiReader(Operator):
    """Reads a NIfTI file as the bundle's own inference does, with all its checks.

    Args:
        fragment: the application.
        path: the file.
        modality: of the scans that the bundle takes.
    """

    def __init__(self, fragment: Fragment, *args, path: Path, modality: str, **kwargs) -> None:
        self.path, self.modality = path, modality
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the output: `image`, an Image of (W, H, D)."""
        spec.output("image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read the file.

        Raises:
            BadInput: see `LoadScand`.
        """
        scan = LoadScand("image", modality=self.modality)(find_scans(str(self.path))[0])["image"]
        op_output.emit(Image(scan[0].numpy(), scan.meta), "image")


class NiftiWriter(Operator):
    """Writes a label map where the scan lies.

    Args:
        fragment: the application.
        output: folder to write to.
    """

    def __init__(self, fragment: Fragment, *args, output: Path, **kwargs) -> None:
        self.output = output
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the input: `pred`, an Image of (D, H, W) and the metadata of the scan."""
        spec.input("pred")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the file."""
        pred = op_input.receive("pred")
        meta = pred.metadata()
        save = SaveImage(
            self.output,
            "seg",
            output_dtype=pred.asnumpy().dtype,
            resample=False,
            separate_folder=False,
            writer=PlaceWriter,
            data_root_dir=".",
            output_name_formatter=name_by_case,
        )
        place = {name: meta[name] for name in ("case", "filename_or_obj", "original_affine", "place")}
        save(MetaTensor(pred.asnumpy().swapaxes(0, 2)[None].copy(), meta["original_affine"], place))
