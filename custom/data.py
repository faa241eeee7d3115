"""Read and check what the user gives: the data list, the scans and their modalities."""

import glob
import json
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import LoadImaged, MapTransform

from custom.errors import BadInput

logger = logging.getLogger(__name__)


def read_datalist(
    datalist: str | Path,
    section: str,
    dataset_dir: str | Path,
    modalities: Sequence[str] | None = None,
    labelled: bool = False,
    fold: int | None = None,
    fraction: float = 1,
    seed: int = 0,
    repeat: int = 1,
) -> list[dict]:
    """Read one section of a Decathlon data list.

    MONAI's `load_decathlon_datalist` turns any value that happens to be the name of an existing path into that path, a
    modality "ct" beside a folder `ct` for one; here only images and labels are paths.

    Args:
        datalist: JSON file, `{"training": [{"image": path}, ...], "validation": [...]}`, each entry with "modality",
            "label" or "fold" where those are asked for. An image of several channels is a list of paths.
        section: "training" or "validation".
        dataset_dir: folder that relative paths start from.
        modalities: the known names; None asks for no modality.
        labelled: whether each entry needs a "label".
        fold: None takes the list's own sections. A number takes all entries that have a "fold" instead: those of this
            fold to validate, the others to train.
        fraction: share of the entries to take, in (0, 1]; chosen at random, a smaller share out of a larger one.
        seed: of that choice.
        repeat: how often each entry comes in the list returned, so that an epoch takes as many crops of each scan.

    Returns:
        A list of {"image": absolute path or paths, "case": path as written in the list}, and "modality" and "label" as
        asked for.

    Raises:
        BadInput: for a list that is missing, unreadable or empty; an entry that lacks what is asked for, with an
            unknown modality, or whose file does not exist; a fold that the list does not have; a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise BadInput(f"--label_fraction is a share above 0 and up to 1, got {fraction}.")
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
    needed = ["image"] + ["modality"] * (modalities is not None) + ["label"] * labelled
    if fold is not None:
        entries = [e for name in ("training", "validation") for e in content.get(name, []) if "fold" in e]
        folds = sorted({entry["fold"] for entry in entries})
        if fold not in folds:
            raise BadInput(
                f"The data list {datalist} has the folds {folds}, not {fold}; give --fold one of them, or leave it out "
                f'for the list\'s own "training" and "validation" (`python -m tools.datalist --folds 5` makes folds).'
            )
        entries = [entry for entry in entries if (entry["fold"] == fold) is (section == "validation")]
    if not entries:
        raise BadInput(
            f'The data list {datalist} has no entries under "{section}"; it needs at least one '
            f"(`python -m tools.datalist` splits scans into training and validation)."
        )
    items, missing = [], []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.keys() >= set(needed):
            raise BadInput(
                f'{datalist}: entry {number} of "{section}" needs {" and ".join(map(json.dumps, needed))}, '
                f"found {entry}."
            )
        item = {name: entry[name] for name in needed}
        if modalities is not None:
            check_modality(entry["modality"], modalities, f"{datalist}: {entry['image']}")
        item["case"] = entry["image"] if isinstance(entry["image"], str) else entry["image"][0]
        for name in {"image", "label"} & item.keys():
            paths = [item[name]] if isinstance(item[name], str) else item[name]
            paths = [os.path.join(os.path.abspath(dataset_dir), path) for path in paths]
            missing += [path for path in paths if not os.path.isfile(path)]
            item[name] = paths[0] if isinstance(item[name], str) else paths
        items.append(item)
    if missing:
        raise BadInput(
            f"{missing[0]} of the data list {datalist} does not exist ({len(missing)} are missing); "
            f"relative paths start from --dataset_dir, which is {os.path.abspath(dataset_dir)}."
        )
    chosen = np.random.RandomState(seed).permutation(len(items))[: max(1, round(fraction * len(items)))]
    return [items[number] for number in sorted(chosen)] * repeat


def find_scans(
    images: str | Sequence, modality: str | None = None, modalities: Sequence[str] | None = None
) -> list[dict]:
    """List scans for inference.

    Args:
        images: a folder with .nii or .nii.gz files, one such file, or a list of files; a scan of several channels is a
            list of files in that list.
        modality: of all of them.
        modalities: the known names; None asks for no modality.

    Returns:
        As `read_datalist`.

    Raises:
        BadInput: when there is none, a file does not exist, or the modality is unknown.
    """
    if modalities is not None:
        check_modality(modality, modalities, "--modality")
    if isinstance(images, str):
        folder = images
        images = sorted(glob.glob(os.path.join(folder, "*.nii*"))) if os.path.isdir(folder) else [folder]
        if not images:
            raise BadInput(f"There is no .nii or .nii.gz file in the folder {folder}; name another with --dataset_dir.")
    items = []
    for image in images:
        paths = [os.path.abspath(path) for path in ([image] if isinstance(image, str) else image)]
        for path in paths:
            if not os.path.isfile(path):
                raise BadInput(f"The scan {path} does not exist; name a file or a folder with --dataset_dir.")
        item = {"image": paths[0] if isinstance(image, str) else paths, "case": os.path.basename(paths[0])}
        items.append(item if modalities is None else {**item, "modality": modality})
    return items


def name_of(item: Mapping[Hashable, Any]) -> str:
    """Return the name of a case: its "case" or, where a program such as MONAI Label gives none, its (first) file."""
    if "case" in item:
        return item["case"]
    return item["image"] if isinstance(item["image"], str) else item["image"][0]


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
    """MONAI's `LoadImaged`, channel first, which accepts only a finite, varying 3D volume and else says what to mend.

    Args:
        keys: the images to load; several channels are a list of files.
        channels: that the scan has to have.
        patch_size: if given, a volume smaller than it is noted in the log (it will be padded).

    Shapes:
        a path becomes a (channels, D, H, W) float32 `MetaTensor`. An item without a "case" is given one.

    Raises:
        BadInput: for a file that can't be read, is not 3D, has other channels, holds NaN or infinity, or the same value
            everywhere; and see `check_header`.
    """

    def __init__(self, keys: KeysCollection, channels: int = 1, patch_size: Sequence[int] | None = None) -> None:
        super().__init__(keys, ensure_channel_first=True, image_only=True, allow_missing_keys=True)
        self.channels = channels
        self._patch_size = patch_size  # private, because the volume does not depend on it: see `custom.store`

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        output = {"case": name_of(data), **data}
        for key in self.keys:
            path = data[key] if isinstance(data[key], str) else " and ".join(map(str, data[key]))
            output[key] = image = self.load(key, data[key], path)
            shape = "x".join(map(str, image.shape[1:]))
            if image.shape[0] != self.channels or image.ndim != 4 or min(image.shape[1:]) < 2:
                expected = "3D volume" if self.channels == 1 else f"3D volume of {self.channels} channels"
                raise BadInput(
                    f"{path} is not a {expected} but has {image.shape[0]} channels of {shape}; split it into 3D "
                    f"volumes, or give the segmentation bundles --in_channels."
                )
            if not torch.isfinite(image).all():
                raise BadInput(f"{path} holds NaN or infinity; replace those voxels or take it out of the data list.")
            if image.min() == image.max():
                raise BadInput(f"{path} has the same value {image.min().item():g} everywhere; take it out of the list.")
            if self._patch_size is not None and (torch.tensor(image.shape[1:]) < torch.tensor(self._patch_size)).any():
                logger.warning(
                    f"{path} is {shape} voxels, smaller than the patch {'x'.join(map(str, self._patch_size))}, and is "
                    f"padded; a smaller --patch_size or --pixdim_mm avoids it."
                )
        return output

    def load(self, key: Hashable, file: str | Sequence[str], path: str) -> torch.Tensor:
        """Load a file, or several as channels; `path` names them in an error."""
        try:
            image = super().__call__({key: file})[key]
        except Exception as error:  # readers raise whatever the damage leads to
            cause = error.__cause__ or error
            raise BadInput(
                f"{path} can't be read ({type(cause).__name__}: {cause}); is it a whole NIfTI file? Copy it again "
                f"or take it out of the data list (`python -m tools.datalist` finds such files)."
            ) from error
        for one in [file] if isinstance(file, str) else file:
            check_header(one)
        return image


def check_header(file: str) -> None:
    """Raise `BadInput` for a NIfTI file whose affine is senseless, or whose voxels are not one number each.

    MONAI replaces such an affine by a guess, and takes the real part of a complex number.
    """
    if not file.lower().endswith((".nii", ".nii.gz")):
        return
    header = nibabel.load(file)
    if header.get_data_dtype().kind not in "iuf":
        raise BadInput(f"{file} does not have one number a voxel; convert it or take it out of the data list.")
    spacing_mm = np.linalg.norm(header.affine[:3, :3], axis=0)
    in_range = ((spacing_mm > 0.01) & (spacing_mm < 100)).all() and np.isfinite(header.affine).all()
    if not in_range or not abs(np.linalg.det(header.affine[:3, :3] / spacing_mm)) > 1e-6:
        raise BadInput(
            f"{file} has a senseless affine: it is singular, not finite, or the voxels, here "
            f"{' x '.join(f'{s:g}' for s in spacing_mm)} mm, are outside of 0.01 to 100 mm; correct the header or take "
            f"it out of the data list."
        )


class LoadLabeld(LoadScand):
    """Load the label map of a scan that is loaded already, and check that the two belong together.

    Args:
        keys: the label maps.
        labels: names of the classes; their positions are the ids.
        image_key: where the scan is.

    Shapes:
        a path becomes a (1, D, H, W) uint8 `MetaTensor`.

    Raises:
        BadInput: for a file that can't be read, has another shape or place in space than the scan, or holds anything
            but ids of the classes.
    """

    def __init__(self, keys: KeysCollection, labels: Sequence[str], image_key: str = "image") -> None:
        super().__init__(keys)
        self.labels = labels
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, str]) -> dict[Hashable, torch.Tensor]:
        output = dict(data)
        image = data[self.image_key]
        for key in self.keys:
            label = self.load(key, data[key], data[key])
            of = f"its scan {image.meta['filename_or_obj']}"
            if label.shape[1:] != image.shape[1:] or label.shape[0] != 1:
                raise BadInput(
                    f"{data[key]} has the shape {tuple(label.shape[1:])}, {of} has {tuple(image.shape[1:])}; resample "
                    f"the label map to the scan, or correct the data list."
                )
            distance_mm = misalignment_mm(label.affine, image.affine, image.shape[1:])
            if distance_mm > float(image.pixdim.min()) / 2:
                raise BadInput(
                    f"{data[key]} lies elsewhere than {of}: their affines put a corner {distance_mm:.3g} mm apart; "
                    f"resample the label map to the scan, or copy the scan's affine if they do overlap."
                )
            ids = label.unique()
            wrong = [f"{id:g}" for id in ids.tolist() if id not in range(len(self.labels))]
            if wrong:
                raise BadInput(
                    f"{data[key]} holds {', '.join(wrong[:5])}, but the ids go from 0 to {len(self.labels) - 1} "
                    f"({', '.join(self.labels)}); correct the label map, or name all classes with --labels."
                )
            output[key] = label.to(torch.uint8)
        return output


def misalignment_mm(affine: torch.Tensor, other: torch.Tensor, shape: Sequence[int]) -> float:
    """Return how far apart two affines put the same corner of a volume, in mm, at the most."""
    corners = np.array([(*np.multiply(corner, shape), 1) for corner in np.ndindex(2, 2, 2)])
    difference = np.asarray(affine, float) - np.asarray(other, float)
    return float(np.linalg.norm(corners @ difference.T, axis=1).max())


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
