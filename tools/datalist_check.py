"""Whether a file is a 3D scan that training can read, and whether its label map fits it; for `tools.datalist`."""

from __future__ import annotations

import gzip
import io
import math
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import LoggingOutputSuppressor
from nibabel.spatialimages import HeaderDataError

from custom.data.nifti import corner_distance_mm, fault_of_affine, fault_of_header, turned_place
from custom.data.twins import VoxelDigest
from custom.data.values import Values, digits, whole_number

SLAB_BYTES = 16 << 20  # read at a time, a multiple of every voxel size
DEFLATE_RATIO = 1032  # deflate cannot shrink data further than this, so a larger claim is a lie


class Refusal(ValueError):
    """Why one file is not listed, as "kind" or "kind: detail"."""


@dataclass(frozen=True)
class FileReport:
    """What a check found.

    Args:
        shape: in voxels, with the number of channels if there are several.
        spacing: in mm.
        reason: of a refusal, "" when accepted.
        ids: of the label.
        values: what its modality can't have, "" for nothing.
        digest: of the voxels, "" where they were not read.
    """

    path: str
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    reason: str = ""
    ids: tuple[int, ...] = ()
    values: str = ""
    digest: str = ""


def inspect_file(
    path: str | os.PathLike[str],
    headers_only: bool = False,
    label: str = "",
    modality: str | None = None,
    strict: bool = False,
    others: Sequence[str] = (),
    channels: int = 1,
) -> FileReport:
    """Check that one file is a 3D scan that training can read, and that its label, if it has one, fits.

    Args:
        path: a .nii or .nii.gz file.
        headers_only: trust the voxels, which saves reading (and decompressing) them.
        label: file with an id (whole number) per voxel of the scan; "" for none.
        modality: whose values the scan should have, None if it is not known.
        strict: whether other values are refused.
        others: files of the scan's further channels.
        channels: that the scan should have: in a file each, or in one of 4 dimensions.

    Returns:
        What was found. Never raises for a bad file.
    """
    found: dict[str, Any] = {}
    where = ""
    try:
        with LoggingOutputSuppressor(), np.errstate(all="ignore"):
            if others and len(others) + 1 != channels:
                raise Refusal(f"{_not_a_volume(channels)}: {len(others) + 1} files")
            affine = _check(os.fspath(path), headers_only, found, modality, 1 if others else channels)
            for number, other in enumerate(others, 2):
                where = f"channel {number}: {other}: "
                its: dict[str, Any] = {}
                _check_place(_check(other, headers_only, its, modality), its, affine, found, "its first channel")
                found["values"] = found.get("values") or its.get("values", "")
            where = ""
            if strict and found.get("values"):
                raise Refusal(f"values: {found['values']}")
            if label:
                where = f"label: {label}: "
                its = {}
                _check_place(_check(label, headers_only, its, None, is_label=True), its, affine, found, "its scan")
                found["ids"] = its.get("ids", ())
            if others:
                found["shape"] = (*found["shape"][:3], channels)
        where = reason = ""
    except Refusal as refusal:
        reason = str(refusal)
    except FileNotFoundError:
        kind, _, rest = where.partition(": ")
        where, reason = (f"no {kind}: {rest.removesuffix(': ')}" if where else "missing file or dangling link"), ""
    except PermissionError:
        reason = "permission denied"
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = f"truncated or corrupted: {error}"
    except Exception as error:  # whatever a hostile header provokes (MemoryError too) concerns this file only
        reason = f"unreadable: {type(error).__name__} {error}"
    return FileReport(os.fspath(path), **found, reason=where + " ".join(reason.split()))


def _check_place(affine: np.ndarray, its: dict[str, Any], scan: np.ndarray, found: dict[str, Any], whose: str) -> None:
    """Raise for a file that does not have the voxels of its scan in space; as in training, in any order of the axes."""
    shape, affine = turned_place(its["shape"][:3], affine, scan)
    if shape != found["shape"][:3]:
        raise Refusal(f"shape {shape} is not that of {whose}, {found['shape'][:3]}")
    apart_mm = corner_distance_mm(affine, scan, shape)
    if apart_mm > min(found["spacing"]) / 2:
        raise Refusal(f"its affine puts a corner {apart_mm:.3g} mm from {whose}'s")


def _check(
    path: str,
    headers_only: bool,
    found: dict[str, Any],
    modality: str | None,
    channels: int = 1,
    is_label: bool = False,
) -> np.ndarray:
    """Raise for a file that is not to be listed, else return its affine; put what is known of it into `found`."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise Refusal("a folder, not a file")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise Refusal("not a regular file")
    if not status.st_size:
        raise Refusal("empty file")
    packed = path.lower().endswith(".gz")
    with gzip.open(path) if packed else open(path, "rb") as stream:
        try:
            block = stream.read(540)
        except gzip.BadGzipFile as error:
            raise Refusal(f"not a NIfTI file: {error}") from None
        if block[344:347] != b"n+1" and block[4:7] != b"n+2":
            raise Refusal("not a NIfTI file: its header has no n+1 or n+2 mark")
        try:
            image = nib.load(path)
        except (ImageFileError, HeaderDataError) as error:
            raise Refusal(f"bad header: {error}") from None
        if type(image) not in (nib.Nifti1Image, nib.Nifti2Image):  # surfaces (CIFTI) share the file name
            raise Refusal(f"not a 3D volume: {type(image).__name__}")

        voxels = image.dataobj
        found["shape"] = tuple(int(n) for n in image.shape)
        volumes = math.prod(image.shape[3:])
        if not 3 <= len(image.shape) <= 4 or volumes != channels:
            raise Refusal(f"{_not_a_volume(channels)}: {len(image.shape)} dimensions, {volumes} volumes")
        if min(image.shape[:3]) < 2:
            raise Refusal("not a 3D volume: an axis has fewer than 2 voxels")
        if voxels.dtype.kind not in "iuf":  # colour is structured, complex is "c"
            raise Refusal(f"voxel type: {'complex' if voxels.dtype.kind == 'c' else 'colour'}, not one number")

        # nibabel silently turns a zero pixdim into 1 mm, so look at the header as it was written.
        header = type(image.header)(block[: image.header.sizeof_hdr], check=False)
        pixdim = np.asarray(header["pixdim"][1:4], float)
        if not (np.isfinite(pixdim) & (pixdim > 0)).all():
            raise Refusal(f"bad spacing: {' x '.join(f'{p:g}' for p in pixdim)} mm")
        if wrong := fault_of_affine(image.affine):
            raise Refusal(f"bad affine: {wrong}")
        if wrong := fault_of_header(header):
            raise Refusal(f"bad header: it {wrong}")
        found["spacing"] = tuple(float(f"{s:.5g}") for s in np.linalg.norm(image.affine[:3, :3], axis=0))

        if voxels.offset < header.sizeof_hdr:
            raise Refusal("bad header: voxels would start inside it")
        size = math.prod(found["shape"]) * voxels.dtype.itemsize
        if voxels.offset + size > status.st_size * (DEFLATE_RATIO if packed else 1):
            raise Refusal(f"truncated or corrupted: {status.st_size} bytes cannot hold {size} bytes of voxels")
        if not headers_only:
            stream.seek(voxels.offset)
            digest = VoxelDigest(found["shape"][: 4 if channels > 1 else 3])
            for number in range(1, channels + 1):
                seen = Values()

                def telling(slab: np.ndarray, seen: Values = seen) -> np.ndarray:
                    if is_label:
                        return np.unique(slab)
                    trained = scaled(slab, voxels)
                    seen.add(trained)
                    digest.add(trained)
                    return np.array([slab.min(), slab.max()])  # scaling is monotone

                slabs = map(telling, _slabs(stream, voxels.dtype, size // channels))
                values = scaled(reduce(np.union1d, slabs, np.array([], voxels.dtype)), voxels)
                if is_label:
                    for value in values.tolist():
                        if (id := whole_number(value)) is None or id < 0:
                            raise Refusal(f"a voxel is {digits(value)}, not a whole number from 0 on")
                    found["ids"] = tuple(sorted(set(map(whole_number, values.tolist()))))
                elif not np.isfinite(values).all():
                    raise Refusal("NaN or infinite voxels")
                elif values.min() == values.max():
                    where = f" of channel {number}" * (channels > 1)
                    raise Refusal(f"constant voxels: all{where} are {values[0]:g}")
                else:
                    found["values"] = found.get("values") or seen.note(modality)
            _read_to_the_end(stream, size)
            if not is_label:
                found["digest"] = digest.text()
        return image.affine


def _not_a_volume(channels: int) -> str:
    return "not a 3D volume" if channels == 1 else f"not a 3D volume of {channels} channels"


def scaled(stored: np.ndarray, voxels: nib.arrayproxy.ArrayProxy) -> np.ndarray:
    """Return what training makes of stored values."""
    if voxels.slope == 1 and voxels.inter == 0:
        return stored.astype(np.float32)
    return np.float32(stored.astype(float) * float(voxels.slope) + float(voxels.inter))


def _slabs(stream: io.BufferedIOBase, dtype: np.dtype, size: int) -> Iterator[np.ndarray]:
    """Read `size` bytes of stored voxels front to back; each slab overwrites the one before."""
    buffer = memoryview(bytearray(min(size, SLAB_BYTES)))
    while size:
        want = filled = min(size, SLAB_BYTES)
        while filled and (got := stream.readinto(buffer[want - filled : want])):
            filled -= got
        if filled:
            raise Refusal(f"truncated or corrupted: {size - want + filled} bytes of voxels are missing")
        yield np.frombuffer(buffer[:want], dtype)
        size -= want


def _read_to_the_end(stream: io.BufferedIOBase, size: int) -> None:
    """Let gzip compare its checksum, at its end; damage may put the end off, a bomb must not do so for ever."""
    while stream.read(1 << 20) and stream.tell() < 2 * size + (64 << 20):
        pass
