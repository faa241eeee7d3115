"""Checks of NIfTI headers, the same for training, inference and the tools."""

from collections.abc import Sequence

import nibabel
import numpy as np

from custom.errors import BadInput

LEAST_SPACING_MM, MOST_SPACING_MM = 0.01, 100  # beyond, resampling would fill the memory


def check_header(file: str) -> None:
    """Raise `BadInput` for a NIfTI file whose affine is senseless, or whose voxels are not one number each.

    MONAI replaces such an affine by a guess, and takes the real part of a complex number.
    """
    if not file.lower().endswith((".nii", ".nii.gz")):
        return
    header = nibabel.load(file)
    if header.get_data_dtype().kind not in "iuf":
        raise BadInput(f"{file} does not have one number a voxel; convert it or take it out of the data list.")
    if wrong := fault_of_affine(header.affine):
        raise BadInput(f"{file} has a bad affine: {wrong}; correct the header or take it out of the data list.")


def fault_of_affine(affine: np.ndarray) -> str:
    """Say what is wrong with an affine (4, 4) in mm; "" where nothing is."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    in_range = ((spacing_mm > LEAST_SPACING_MM) & (spacing_mm < MOST_SPACING_MM)).all() and np.isfinite(affine).all()
    if in_range and abs(np.linalg.det(affine[:3, :3] / spacing_mm)) > 1e-6:
        return ""
    return (
        f"singular, not finite, or voxels, here {' x '.join(f'{s:g}' for s in spacing_mm)} mm, outside of "
        f"{LEAST_SPACING_MM} to {MOST_SPACING_MM} mm"
    )


def corner_distance_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Return how far apart, in mm, two affines (4, 4) put the same corner of a volume (D, H, W), at the most."""
    corners = np.array([(*np.multiply(corner, shape), 1) for corner in np.ndindex(2, 2, 2)])
    difference = np.asarray(affine, float) - np.asarray(other, float)
    return float(np.linalg.norm(corners @ difference.T, axis=1).max())
