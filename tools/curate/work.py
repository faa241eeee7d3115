"""What a process does: read the headers of some files, or make and measure one volume."""

import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

from tools.curate import convert
from tools.curate.find import Found
from tools.curate.header import read_record
from tools.curate.privacy import Pseudonyms
from tools.curate.quality import measure
from tools.curate.rules import Rules
from tools.curate.twins import fingerprint

SIDE_PX = 72  # of each plane in a picture
WINDOW_HU = (-300.0, 300.0)


@dataclass(frozen=True)
class Headers:
    """Files whose headers are to be read."""

    files: tuple[tuple[str, str, Found], ...]  # id, stamp, where it is
    pseudonyms: Pseudonyms


@dataclass(frozen=True)
class Making:
    """A volume to make: its name and stamp, its files, what their header says, and where to write."""

    id: str
    stamp: str
    files: tuple[tuple[str, int], ...]
    copies: tuple[tuple[str, str], ...]
    record: dict[str, Any]
    affine: Any
    out: str
    rules: Rules


def read_headers(task: Headers) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (id, stamp, record) of each file."""
    return [(id_, stamp, read_record(found, task.pseudonyms)) for id_, stamp, found in task.files]


def make(task: Making) -> tuple[dict[str, Any], str, bytes]:
    """Write a volume; return what was found ("reason" if it can't be made), its fingerprint and its picture."""
    np.seterr(all="ignore")
    scratch = os.path.join(task.out, ".work")
    try:
        if task.record["kind"] == "dicom":
            voxels, affine, notes = convert.convert_dicom(
                task.files, task.copies, task.record, task.affine, scratch, task.rules
            )
        else:
            voxels, affine, notes = convert.convert_image(task.files[0][0], task.record["format"], task.rules)
        voxels = convert.compact(voxels)
    except convert.Refused as refused:
        return {"reason": " ".join(str(refused).split())}, "", b""
    except MemoryError:
        return {"reason": "more memory needed than there is"}, "", b""
    except OSError:  # of the disk that is written to, no fault of the series
        raise
    except Exception as error:  # whatever a hostile header provokes concerns this series only
        return {"reason": f"damaged header: {type(error).__name__}"}, "", b""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    result = {"reason": "", "notes": notes, **measure(voxels, spacing)}
    convert.write_volume(voxels, affine, Path(task.out, "volumes", f"{task.id}.nii.gz"))
    ct = task.record.get("modality") == "CT" or result["lowest"] < -500
    return result, fingerprint(voxels, affine).to_text(), picture(voxels, affine, WINDOW_HU if ct else None)


def picture(voxels: np.ndarray, affine: np.ndarray, window: tuple[float, float] | None) -> bytes:
    """Return three planes through the middle, side by side, as a WebP: axial, coronal, sagittal, the head on top."""
    turn = nibabel.io_orientation(affine)
    upright = nibabel.orientations.apply_orientation(voxels, turn)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(turn[:, 0])]
    low, high = window or np.percentile(upright[::2, ::2, ::2], (1, 99.5))
    canvas = Image.new("L", (3 * SIDE_PX, SIDE_PX))
    longest = max(n * mm for n, mm in zip(upright.shape, spacing, strict=True))
    for column, axis in enumerate((2, 1, 0)):
        plane = np.take(upright, upright.shape[axis] // 2, axis=axis).astype(np.float32)
        across, up = (
            (np.delete(np.multiply(upright.shape, spacing), axis) * SIDE_PX / longest).round().clip(1).astype(int)
        )
        grey = np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255
        tile = Image.fromarray(np.flipud(grey.T).astype(np.uint8)).resize(
            (int(across), int(up)), Image.Resampling.BILINEAR
        )
        canvas.paste(tile, (column * SIDE_PX + (SIDE_PX - int(across)) // 2, (SIDE_PX - int(up)) // 2))
    stream = BytesIO()
    canvas.save(stream, "WEBP", quality=55, method=2)
    return stream.getvalue()
