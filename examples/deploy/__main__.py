"""Segment a CT or MRI with a bundle, as a MONAI Deploy application: DICOM series to DICOM SEG, or NIfTI to NIfTI.

    python examples/deploy --input SERIES_OR_NIFTI --output FOLDER --model BUNDLE

BUNDLE is a folder with weights, as it is downloaded. All that the application knows of it stands in its metadata: the
modality that it takes, the names of its segments, its name and version. What a scan is, how it is read and checked, and
what is told of a mistake, is the bundle's own `custom`.
"""

import sys
from pathlib import Path

from monai.deploy.core import init_app_context


def find_bundle(folder: Path) -> tuple[Path, Path]:
    """Return a bundle's folder and its weights; a folder that is no bundle, or has no weights, ends the program.

    Args:
        folder: of the bundle, or one that has the bundle in it, as in a MAP.
    """
    for bundle in (folder, *folder.iterdir()):
        if (bundle / "configs/metadata.json").is_file():
            for name in ("model.ts", "model.pt"):  # in the order of the SDK
                if (bundle / "models" / name).is_file():
                    return bundle, bundle / "models" / name
            sys.exit(
                f"error: The bundle {bundle} has no models/model.ts or models/model.pt; download one with weights."
            )
    sys.exit(f"error: {folder} is no bundle, it has no configs/metadata.json; name another with --model.")


if __name__ == "__main__":
    context = init_app_context(sys.argv)
    bundle, weights = find_bundle(Path(context.model_path))
    sys.path.insert(0, str(bundle.absolute()))
    from segmentation import Segmentation

    from custom.errors import user_message

    try:
        Segmentation(context, bundle, weights).run()
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        sys.exit(f"error: {message}")
