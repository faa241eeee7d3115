"""What NIfTI headers say of where a scan lies: checks, the same for training, inference and the tools."""

from collections.abc import Sequence

import nibabel
import numpy as np
from nibabel.openers import ImageOpener
from nibabel.spatialimages import HeaderDataError

from custom.data.cases import SUFFIX
from custom.data.datalist import warn_once
from custom.errors import BadInput

PLACE = (  # the fields of a header that say where the scan lies
    *("sform_code", "srow_x", "srow_y", "srow_z"),
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("pixdim", "xyzt_units"),
)
LEAST_SPACING_MM, MOST_SPACING_MM = 0.01, 100  # beyond, resampling would fill the memory
SPACING_TOLERANCE = 0.01  # share of a spacing, for headers that round it
PLACE_TOLERANCE = 0.1  # share of a voxel, for quaternions in single precision
UNITS = {1: "metres", 3: "micrometres"}  # of `xyzt_units`; 2 is mm, and 0 is read as mm by all programs


def check_header(file: str) -> nibabel.Nifti1Header | None:
    """Return the header of a NIfTI file, None for any other, and say in the log where its place is in doubt.

    See `doubt_of_header`.

    Raises:
        BadInput: for a file that can't be used as it is, see `fault_of_header`.
    """
    if not SUFFIX.search(file):
        return None
    header = read_header(file)
    if fault := fault_of_header(header):
        raise BadInput(f"{file} {fault}; correct the header or take it out of the data list.")
    if doubt := doubt_of_header(header):
        warn_once(f"{file} {doubt}.")
    return header


def read_header(file: str) -> nibabel.Nifti1Header:
    """Read a NIfTI header as it is: nibabel's `load` replaces what is senseless, such as a spacing of 0 by 1 mm.

    Raises:
        BadInput: for a file that is no volume, such as a surface.
    """
    image = nibabel.load(file)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise BadInput(f"{file} is no volume but a {type(image).__name__}; take it out of the data list.")
    with ImageOpener(file) as stream:
        return type(image.header).from_fileobj(stream, check=False).as_byteswapped("<")


def fault_of_header(header: nibabel.Nifti1Header) -> str:
    """Say why a scan can't be used, as what follows its name in a sentence; "" where it can.

    Its voxels are not one number each, of which MONAI takes the real part; its affine is senseless, which MONAI
    replaces by a guess; or its spacing is in doubt: in another unit than mm, unknown, or another one by `pixdim`,
    which ITK takes, than by the sform, which nibabel takes.
    """
    if header.get_data_dtype().kind not in "iuf":
        return "does not have one number a voxel"
    if (unit := int(header["xyzt_units"]) & 7) in UNITS:
        return f"gives its spacing in {UNITS[unit]}, which programs read as mm or convert"
    if wrong := fault_of_affine(header.get_best_affine()):
        return f"has a bad affine: {wrong}"
    pixdim_mm = np.abs(np.asarray(header["pixdim"][1:4], float))
    axes = header.get_best_affine()[:3, :3]
    # Along an axis and from slice to slice: in a sheared scan, as of a tilted gantry, `pixdim` may be either.
    along_mm, across_mm = np.linalg.norm(axes, axis=0), 1 / np.linalg.norm(np.linalg.inv(axes), axis=1)
    least, most = across_mm * (1 - SPACING_TOLERANCE), along_mm * (1 + SPACING_TOLERANCE)
    if not ((least <= pixdim_mm) & (pixdim_mm <= most)).all():
        return f"has two spacings in its header: {_mm(along_mm)} by its affine, {_mm(pixdim_mm)} by its pixdim"
    return ""


def doubt_of_header(header: nibabel.Nifti1Header) -> str:
    """Say why programs may put a scan at different places, as what follows its name in a sentence; "" where they don't.

    The scan can be used: what is written for it keeps its sform and its qform.
    """
    if not header["sform_code"] and not header["qform_code"]:
        return "has neither sform nor qform in its header, so where its left is, is a guess"
    if not header["sform_code"] or not header["qform_code"]:
        return ""
    sform = header.get_sform()
    try:
        distance_mm = corner_distance_mm(sform, header.get_qform(), header.get_data_shape()[:3])
    except (ValueError, HeaderDataError):  # no rotation
        distance_mm = np.inf
    if distance_mm <= PLACE_TOLERANCE * np.linalg.norm(sform[:3, :3], axis=0).min():
        return ""
    return (
        f"lies at two places: its sform, which is used, and its qform put a corner {distance_mm:.3g} mm apart; other "
        f"programs may use the qform"
    )


def fault_of_affine(affine: np.ndarray) -> str:
    """Say what is wrong with an affine (4, 4) in mm; "" where nothing is."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    in_range = ((spacing_mm > LEAST_SPACING_MM) & (spacing_mm < MOST_SPACING_MM)).all() and np.isfinite(affine).all()
    if in_range and abs(np.linalg.det(affine[:3, :3] / spacing_mm)) > 1e-6:
        return ""
    return (
        f"singular, not finite, or voxels, here {_mm(spacing_mm)}, outside of {LEAST_SPACING_MM} to "
        f"{MOST_SPACING_MM} mm"
    )


def corner_distance_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Return how far apart, in mm, two affines (4, 4) put the same corner of a volume (D, H, W), at the most."""
    corners = np.array([(*np.multiply(corner, shape), 1) for corner in np.ndindex(2, 2, 2)])
    difference = np.asarray(affine, float) - np.asarray(other, float)
    return float(np.linalg.norm(corners @ difference.T, axis=1).max())


def turn(voxels: np.ndarray, affine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn a volume to the axes of another, without resampling: axes are swapped and flipped.

    Args:
        voxels: (C, D, H, W).
        affine: of the volume, (4, 4) in mm.
        other: affine whose axes the volume gets.

    Returns:
        The turned volume and its affine; each voxel stays where it was in mm.
    """
    axes = nibabel.io_orientation(np.linalg.inv(other) @ affine)
    turned = np.stack([nibabel.apply_orientation(channel, axes) for channel in voxels])
    return turned, turned_place(voxels.shape[1:], affine, other)[1]


def turned_place(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the shape (D, H, W) and the affine that `turn` gives a volume, without its voxels."""
    axes = nibabel.io_orientation(np.linalg.inv(other) @ affine)
    turned = np.empty(3, int)
    turned[axes[:, 0].astype(int)] = shape
    return tuple(turned.tolist()), affine @ nibabel.orientations.inv_ornt_aff(axes, shape)


def _mm(spacing_mm: np.ndarray) -> str:
    return f"{' x '.join(f'{s:g}' for s in spacing_mm)} mm"
