"""Load scans and label maps, check them, and normalise them by modality."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import LoadImaged, MapTransform

from custom.data.datalist import case_name, check_modality, warn_once
from custom.data.nifti import PLACE, check_header, corner_distance_mm, turn
from custom.data.values import Values, digits, whole_number
from custom.errors import BadInput

SHOWN_NAMES = 20  # of classes, in an error
logger = logging.getLogger(__name__)
# Where pydicom is installed, MONAI warns for each loader that a codec for DICOM on a GPU is not.
logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)


class LoadScand(LoadImaged):
    """MONAI's `LoadImaged`, channel first, which accepts only a finite, varying 3D volume and else says what to mend.

    Args:
        keys: the images to load; several channels are a list of files.
        channels: that the scan has to have.
        patch_size: if given, a volume smaller than it is noted in the log (it will be padded).
        modality: of items that have none themselves. Values that it can't have are noted in the log.
        strict: whether such values are an error.

    Shapes:
        a path becomes a (channels, D, H, W) float32 `MetaTensor`. An item without a "case" is given one, which the
        volume's meta data have too: outputs are named by it, and placed by "place", see `PLACE`.

    Raises:
        BadInput: for a file that can't be read, is not 3D, has other channels, holds NaN or infinity, or a channel of
            one value, or, if strict, values that can't be; and see `check_header`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        channels: int = 1,
        patch_size: Sequence[int] | None = None,
        modality: str | None = None,
        strict: bool = False,
    ) -> None:
        # Not whatever reader else is installed, which may take another geometry from a header.
        options = {"ensure_channel_first": True, "image_only": True, "allow_missing_keys": True}
        super().__init__(keys, reader="NibabelReader", **options)
        self._loader.readers = self._loader.readers[-1:]  # MONAI tries all that are installed, this one first
        self.channels = channels
        self._patch_size = patch_size  # private, because the volume does not depend on it: see `custom.data.store`
        self._modality, self._strict = modality, strict  # as little

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = {"case": case_name(data), **data}
        for key in self.keys:
            path = data[key] if isinstance(data[key], str) else " and ".join(map(str, data[key]))
            output[key] = image = self.load(key, data[key])
            shape = "x".join(map(str, image.shape[1:]))
            if image.shape[0] != self.channels or image.ndim != 4 or min(image.shape[1:]) < 2:
                expected = "3D volume" if self.channels == 1 else f"3D volume of {self.channels} channels"
                remedy = "split it into 3D volumes, or give the segmentation bundles --in_channels"
                if image.shape[0] == self.channels and image.ndim <= 4:
                    remedy = "a 3D network needs several slices, so take it out of the data list"
                raise BadInput(f"{path} is not a {expected} but has {image.shape[0]} channels of {shape}; {remedy}.")
            if not torch.isfinite(image).all():
                raise BadInput(f"{path} holds NaN or infinity; replace those voxels or take it out of the data list.")
            for channel in image.as_tensor().numpy():
                if channel.min() == channel.max():
                    where = "everywhere" if self.channels == 1 else "everywhere in one channel"
                    raise BadInput(f"{path} has the same value {channel.min():g} {where}; take it out of the list.")
                if note := Values().add(channel).note(data.get("modality", self._modality)):
                    if self._strict:
                        raise BadInput(f"{path}: {note}; convert it, or take it out of the data list.")
                    warn_once(f"{path}: {note}.")
            image.meta["case"] = output["case"]
            if self._patch_size is not None and (torch.tensor(image.shape[1:]) < torch.tensor(self._patch_size)).any():
                logger.warning(
                    f"{path} is {shape} voxels, smaller than the patch {'x'.join(map(str, self._patch_size))}, and is "
                    f"padded; a smaller --patch_size or --pixdim_mm avoids it."
                )
        return output

    def load(self, key: Hashable, files: str | Sequence[str]) -> MetaTensor:
        """Load a file, or several as channels, (C, D, H, W), placed as the (first) header says."""
        if isinstance(files, str):
            return self._load_one(key, files)
        first, *others = (self._load_one(key, file) for file in files)
        matched = [
            match(image, file, first, f"its first channel {files[0]}")
            for image, file in zip(others, files[1:], strict=True)
        ]
        return MetaTensor(torch.cat([image.as_tensor() for image in (first, *matched)]), meta=first.meta)

    def _load_one(self, key: Hashable, file: str) -> MetaTensor:
        try:
            image = super().__call__({key: file})[key]
        except Exception as error:  # readers raise whatever the damage leads to
            reason = str(error.__cause__ or error).strip().splitlines()[-1:]  # MONAI's error ends with the reader's
            raise BadInput(
                f"{file} can't be read ({reason[0] if reason else type(error).__name__}); is it a whole NIfTI "
                f"file? Copy it again or take it out of the data list (`python -m tools.datalist` finds such files)."
            ) from error
        header = check_header(file)
        if header is not None:
            # MONAI puts the qform, even one that does not count (code 0), in the place of a sform whose spacing differs
            # from `pixdim` by more than 1e-5.
            image.affine = torch.as_tensor(header.get_best_affine())
            image.meta["original_affine"] = header.get_best_affine()
            # What is saved needs it. MONAI changes the header's fields that it keeps, by its name, such as `pixdim`.
            image.meta["place"] = {name: header[name] for name in PLACE}
        return image


class LoadLabeld(LoadScand):
    """Load the label map of a scan that is loaded already, and check that the two belong together.

    Args:
        keys: the label maps.
        labels: names of the classes; their positions are the ids.
        image_key: where the scan is.

    Shapes:
        a path becomes a (1, D, H, W) `MetaTensor` of uint8, or the least signed integer that has the ids, in the
        scan's own order and direction of axes.

    Raises:
        BadInput: for a file that can't be read, has another shape or place in space than the scan, or holds anything
            but ids of the classes.
    """

    def __init__(self, keys: KeysCollection, labels: Sequence[str], image_key: str = "image") -> None:
        super().__init__(keys)
        self.labels = labels
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        image = data[self.image_key]
        for key in self.keys:
            label = self.load(key, data[key])
            if label.shape[0] != 1 or label.ndim != 4:
                raise BadInput(f"{data[key]} is not a 3D label map but has the shape {tuple(label.shape)}; split it.")
            label = match(label, data[key], image, f"its scan {image.meta['filename_or_obj']}")
            ids = label.unique()
            wrong = [id for id in ids.tolist() if whole_number(id) not in range(len(self.labels))]
            if wrong:
                raise BadInput(
                    f"{data[key]} holds {', '.join(map(digits, wrong[:5]))}, but the ids go from 0 to "
                    f"{len(self.labels) - 1} ({', '.join(self.labels[:SHOWN_NAMES])}"
                    f"{', ...' * (len(self.labels) > SHOWN_NAMES)}); correct the label map, or name all classes with "
                    f"--labels."
                )
            output[key] = label.round().to(id_type(len(self.labels)))
        return output


def match(volume: MetaTensor, file: str, other: MetaTensor, name: str) -> MetaTensor:
    """Turn a volume to the axes of another, if both have the same voxels in space: to half a voxel.

    Args:
        volume: (C, D, H, W).
        file: its name in an error.
        other: (C, D, H, W).
        name: of the other in an error.

    Returns:
        The volume with the affine of the other, so that both are resampled to the same voxels.

    Raises:
        BadInput: for a volume of another shape or place.
    """
    voxels, affine = turn(volume.numpy(), volume.affine.numpy(), other.affine.numpy())
    if voxels.shape[1:] != other.shape[1:]:
        raise BadInput(
            f"{file} has the shape {voxels.shape[1:]}, {name} has {tuple(other.shape[1:])}; resample the one to the "
            f"other, or correct the data list."
        )
    distance_mm = corner_distance_mm(affine, other.affine, voxels.shape[1:])
    if distance_mm > float(other.pixdim.min()) / 2:
        raise BadInput(
            f"{file} lies elsewhere than {name}: by their affines a corner is {distance_mm:.3g} mm apart; resample the "
            f"one to the other, or correct the header that is wrong."
        )
    return MetaTensor(voxels, other.affine, {"filename_or_obj": file})


def id_type(classes: int) -> torch.dtype:
    """Return the type of label maps of so many classes: all programs read uint8, int16 and int32."""
    return torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32


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

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        output = dict(data)
        check_modality(output[self.modality_key], list(self.transforms), str(output.get("case", "A scan")))
        for key in self.key_iterator(output):
            output[key] = self.transforms[output[self.modality_key]](output[key])
        return output
