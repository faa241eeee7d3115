"""Read and check what the user gives: the data list, the scans and their modalities."""

import glob
import json
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from monai.config import KeysCollection
from monai.transforms import LoadImaged, MapTransform

from custom.errors import BadInput

logger = logging.getLogger(__name__)


def read_datalist(
    datalist: str | Path, section: str, dataset_dir: str | Path, modalities: Sequence[str], repeat: int = 1
) -> list[dict]:
    """Read one section of a Decathlon data list whose entries carry a `modality`.

    MONAI's `load_decathlon_datalist` turns any value that happens to be the name of an existing path into that path, a
    modality "ct" beside a folder `ct` for one; here only `image` is a path.

    Args:
        datalist: JSON file, `{"training": [{"image": path, "modality": name}, ...], "validation": [...]}`.
        section: "training" or "validation".
        dataset_dir: folder that relative image paths start from.
        modalities: the known names.
        repeat: how often each entry comes in the list returned, so that an epoch takes as many crops of each scan.

    Returns:
        A list of {"image": absolute path, "modality": name, "case": path as written in the list}.

    Raises:
        BadInput: for a list that is missing, unreadable or empty; an entry without image or modality, with an unknown
            modality, or whose file does not exist.
    """
    try:
        content = json.loads(Path(datalist).read_text())
        entries = content.get(section, [])
    except OSError as error:
        raise BadInput(
            f"The data list {datalist} can't be read ({error.strerror}); make one with `python -m tools.datalist`, or "
            f"name yours with --datalist."
        ) from error
    except (ValueError, AttributeError) as error:
        raise BadInput(f"The data list {datalist} is not a JSON object: {error}.") from error
    if not entries:
        raise BadInput(
            f'The data list {datalist} has no entries under "{section}"; it needs at least one '
            f"(`python -m tools.datalist` splits scans into training and validation)."
        )
    items = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not {"image", "modality"} <= entry.keys():
            raise BadInput(f'{datalist}: entry {number} of "{section}" needs "image" and "modality", found {entry}.')
        check_modality(entry["modality"], modalities, f"{datalist}: {entry['image']}")
        items.append(
            {
                "image": os.path.join(os.path.abspath(dataset_dir), entry["image"]),
                "modality": entry["modality"],
                "case": entry["image"],
            }
        )
    missing = [item["image"] for item in items if not os.path.isfile(item["image"])]
    if missing:
        raise BadInput(
            f"{missing[0]} of the data list {datalist} does not exist ({len(missing)} of {len(items)} are missing); "
            f"relative paths start from --dataset_dir, which is {os.path.abspath(dataset_dir)}."
        )
    return items * repeat


def find_scans(images: str | Sequence[str], modality: str, modalities: Sequence[str]) -> list[dict]:
    """List scans for inference.

    Args:
        images: a folder with .nii or .nii.gz files, one such file, or a list of files.
        modality: of all of them.
        modalities: the known names.

    Returns:
        As `read_datalist`.

    Raises:
        BadInput: when there is none, a file does not exist, or the modality is unknown.
    """
    check_modality(modality, modalities, "--modality")
    if isinstance(images, str):
        folder = images
        images = sorted(glob.glob(os.path.join(folder, "*.nii*"))) if os.path.isdir(folder) else [folder]
        if not images:
            raise BadInput(f"There is no .nii or .nii.gz file in the folder {folder}; name another with --dataset_dir.")
    for image in images:
        if not os.path.isfile(image):
            raise BadInput(f"The scan {image} does not exist; name a file or a folder with --dataset_dir.")
    return [{"image": os.path.abspath(i), "modality": modality, "case": os.path.basename(i)} for i in images]


def check_modality(name: str, known: Sequence[str], where: str) -> None:
    """Raise `BadInput` that says where, for a modality that is not known."""
    if name not in known:
        close = get_close_matches(str(name), list(known), n=1)
        raise BadInput(
            f"{where} has the modality {name!r}, which is not one of {list(known)}"
            + (f"; did you mean {close[0]!r}?" if close else ".")
            + ' A further modality is one entry of "modalities" in the config.'
        )


class LoadScand(LoadImaged):
    """MONAI's `LoadImaged`, channel first, which accepts only one finite, varying 3D volume and else says what to mend.

    Args:
        keys: the images to load.
        patch_size: if given, a volume smaller than it is noted in the log (it will be padded).

    Shapes:
        a path becomes a (1, D, H, W) float32 `MetaTensor`.

    Raises:
        BadInput: for a file that can't be read, is not 3D, holds NaN or infinity, or the same value everywhere.
    """

    def __init__(self, keys: KeysCollection, patch_size: Sequence[int] | None = None) -> None:
        super().__init__(keys, ensure_channel_first=True, image_only=True)
        self.patch_size = patch_size

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        output = dict(data)
        for key in self.keys:
            path = data[key]
            try:
                output[key] = image = super().__call__({key: path})[key]
            except Exception as error:  # readers raise whatever the damage leads to
                cause = error.__cause__ or error
                raise BadInput(
                    f"{path} can't be read ({type(cause).__name__}: {cause}); is it a whole NIfTI file? Copy it again "
                    f"or take it out of the data list (`python -m tools.datalist` finds such files)."
                ) from error
            shape = "x".join(map(str, image.shape[1:]))
            if image.shape[0] != 1 or image.ndim != 4:
                raise BadInput(
                    f"{path} is not a 3D volume but has {image.shape[0]} channels of {shape}; split it into 3D volumes."
                )
            if not torch.isfinite(image).all():
                raise BadInput(f"{path} holds NaN or infinity; replace those voxels or take it out of the data list.")
            if image.min() == image.max():
                raise BadInput(f"{path} has the same value {image.min().item():g} everywhere; take it out of the list.")
            if self.patch_size is not None and (torch.tensor(image.shape[1:]) < torch.tensor(self.patch_size)).any():
                logger.warning(
                    f"{path} is {shape} voxels, smaller than the patch {'x'.join(map(str, self.patch_size))}, and is "
                    f"padded; a smaller --patch_size or --pixdim_mm avoids it."
                )
        return output


class ByModalityd(MapTransform):
    """Transform an image by the transform of its modality.

    Args:
        keys: the images.
        transforms: transform of each modality.
        modality_key: where the name of the modality is.

    Shapes:
        input and output: (1, D, H, W).

    Raises:
        BadInput: for a modality without a transform.
    """

    def __init__(
        self, keys: KeysCollection, transforms: Mapping[str, Callable], modality_key: str = "modality"
    ) -> None:
        super().__init__(keys)
        self.transforms = dict(transforms)
        self.modality_key = modality_key

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        output = dict(data)
        check_modality(output[self.modality_key], list(self.transforms), str(output.get("case", "A scan")))
        for key in self.key_iterator(output):
            output[key] = self.transforms[output[self.modality_key]](output[key])
        return output
