"""NIfTI in and out, with the affine, which the SDK's operators drop."""

from pathlib import Path
from typing import Any

import nibabel
from errors import BadInput
from monai.deploy.core import Fragment, Operator, OperatorSpec
from monai.deploy.core.domain.image import Image
from monai.transforms import LoadImage


def find_nifti(path: Path) -> Path | None:
    """Return a NIfTI file, given itself or its folder; None where there is none.

    Raises:
        BadInput: for several.
    """
    files = sorted(path.glob("*.nii*")) if path.is_dir() else [path]
    if len(files) > 1:
        raise BadInput(f"{path} has {len(files)} NIfTI files; name one with --input.")
    return files[0] if files else None


class NiftiReader(Operator):
    """Reads a NIfTI file as the bundle's own `LoadImaged` does.

    Args:
        fragment: the application.
        path: the file.
    """

    def __init__(self, fragment: Fragment, *args, path: Path, **kwargs) -> None:
        self.path = path
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the output: `image`, an Image of (W, H, D)."""
        spec.output("image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Read the file.

        Raises:
            BadInput: for a file that can't be read, or is no 3D volume.
        """
        try:
            image = LoadImage(image_only=True)(self.path)
        except Exception as error:  # readers raise whatever the damage leads to
            raise BadInput(f"{self.path} can't be read; is it a whole NIfTI file?") from error
        if image.ndim != 3:
            raise BadInput(f"{self.path} is no 3D volume, its shape is {tuple(image.shape)}; name one with --input.")
        op_output.emit(Image(image.numpy(), image.meta), "image")


class NiftiWriter(Operator):
    """Writes a label map beside nothing else, in the geometry of the scan.

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
        self.output.mkdir(parents=True, exist_ok=True)
        name = Path(meta["filename_or_obj"]).name.partition(".nii")[0]
        label = nibabel.Nifti1Image(pred.asnumpy().swapaxes(0, 2), meta["original_affine"])
        label.to_filename(self.output / f"{name}_seg.nii.gz")
