"""Measure a volume, and judge by the rules whether it is a scan worth training on.

Measuring and judging are apart: the measures are kept, so that another rule needs no volume to be read again.
"""

from typing import Any

import numpy as np
from scipy import ndimage

from tools.curate.rules import Rules

SAMPLES = 2_000_000  # voxels that measures are taken of, on a regular grid


def measure(voxels: np.ndarray, spacing_mm: np.ndarray) -> dict[str, Any]:
    """Measure a volume.

    Args:
        voxels: (x, y, z), any type of number.
        spacing_mm: of each axis.

    Returns:
        Numbers that can be written as JSON: shape, spacing_mm, lowest, highest, median, percentiles of 1 and 99 %,
        grey_values (distinct, at most 1000 counted), background_share, empty_share (worst axis), flat_share,
        neighbour_correlation (best axis), body_mm (sides of the bounding box of the foreground), soft_tissue_share,
        cut_sides.
    """
    step = [max(1, int(np.ceil(n / max(1, round((SAMPLES / voxels.size) ** (1 / 3) * n))))) for n in voxels.shape]
    sample = voxels[:: step[0], :: step[1], :: step[2]].astype(np.float32)
    flat = sample.ravel()
    values, counts = np.unique(flat, return_counts=True)
    low, high = (float(np.percentile(flat, q)) for q in (1, 99))
    empty = [float((voxels.min(axis=other) == voxels.max(axis=other)).mean()) for other in ((1, 2), (0, 2), (0, 1))]
    inside = _foreground(sample, values, counts)
    sides = [np.flatnonzero(inside.any(axis=other)) for other in ((1, 2), (0, 2), (0, 1))]
    body = [
        float((side[-1] - side[0] + 1) * s * mm) if len(side) else 0.0
        for side, s, mm in zip(sides, step, spacing_mm, strict=True)
    ]
    share = max(inside.mean(), 1e-6)
    cut = sum(bool(np.take(inside, edge, axis=axis).mean() > 0.2 * share) for axis in range(3) for edge in (0, -1))
    return {
        "shape": list(voxels.shape),
        "spacing_mm": [round(float(mm), 4) for mm in spacing_mm],
        "lowest": float(voxels.min()),
        "highest": float(voxels.max()),
        "p1": low,
        "median": float(np.median(flat)),
        "p99": high,
        "grey_values": min(len(values), 1000),
        "background_share": float(counts.max() / flat.size),
        "empty_share": max(empty),
        "flat_share": _flat_share(voxels),
        "neighbour_correlation": _neighbour_correlation(voxels),
        "body_mm": body,
        "soft_tissue_share": float(((flat > -200) & (flat < 300)).sum() / max(1, (flat > -500).sum())),
        "cut_sides": cut,
    }


def _foreground(sample: np.ndarray, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return what is brighter than a threshold between background and body (Otsu's, of what lies below 99 %)."""
    top = np.percentile(sample, 99)
    clipped = np.minimum(sample, top)
    low, high = float(clipped.min()), float(clipped.max())
    if not high > low:
        return np.zeros(sample.shape, bool)
    histogram, edges = np.histogram(clipped, 128, (low, high))
    weight = np.cumsum(histogram)
    mean = np.cumsum(histogram * (edges[:-1] + edges[1:]) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * weight / weight[-1] - mean) ** 2 / (weight * (weight[-1] - weight))
    threshold = edges[1:][np.nanargmax(between[:-1])]
    inside = ndimage.binary_opening(clipped > threshold) if min(sample.shape) > 4 else clipped > threshold
    return inside if inside.any() else clipped > threshold


def _flat_share(voxels: np.ndarray) -> float:
    """Return the share of the foreground's voxels that equal their next neighbours along all axes."""
    centre = tuple(slice(n // 4, max(n // 4 + 2, 3 * n // 4)) for n in voxels.shape)
    part = voxels[centre] if voxels.size > 4 * SAMPLES else voxels
    inner = part[:-1, :-1, :-1]
    values, counts = np.unique(part[::2, ::2, ::2], return_counts=True)
    inside = inner != values[counts.argmax()]  # the background
    if len(values) > 3:  # what a window cut off is flat too
        inside &= (inner != values[0]) & (inner != values[-1])
    if inside.sum() < 50:
        return 0.0
    same = (inner == part[1:, :-1, :-1]) & (inner == part[:-1, 1:, :-1]) & (inner == part[:-1, :-1, 1:])
    return float(same[inside].mean())


def _neighbour_correlation(voxels: np.ndarray) -> float:
    """Return the highest correlation of neighbouring voxels among the axes: about 0 for noise."""
    best = 0.0
    for axis in range(3):
        lines = np.moveaxis(voxels, axis, 0)
        skip = max(1, round((lines.size / SAMPLES) ** 0.5))
        lines = lines[:, ::skip, ::skip].astype(np.float64)
        one, other = lines[:-1].ravel(), lines[1:].ravel()
        if one.std() > 0 and other.std() > 0:
            best = max(best, float(np.corrcoef(one, other)[0, 1]))
    return best


def judge(measures: dict[str, Any], modality: str, rules: Rules) -> list[str]:
    """Return why a volume is not worth training on, one reason a rule that it breaks; none if it is."""
    shape, spacing = measures["shape"], measures["spacing_mm"]
    extent = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    reasons = []

    def refuse(broken: bool, reason: str) -> None:
        if broken:
            reasons.append(reason)

    if measures["lowest"] == measures["highest"]:
        return ["constant: all voxels have one value"]
    if measures["background_share"] > rules.max_background_share:
        return [f"blank: {measures['background_share']:.1%} of the voxels have one value"]
    refuse(min(shape) < rules.min_slices, f"too few slices: {min(shape)}, min_slices is {rules.min_slices}")
    refuse(
        min(spacing) < rules.min_spacing_mm or max(spacing) > rules.max_spacing_mm,
        f"spacing of {min(spacing):.3g} to {max(spacing):.3g} mm, outside of min_spacing_mm to max_spacing_mm",
    )
    refuse(
        min(extent) < rules.min_extent_mm,
        f"field of view of {min(extent):.3g} mm, min_extent_mm is {rules.min_extent_mm:g}",
    )
    refuse(
        max(measures["body_mm"]) < rules.min_body_mm <= max(extent),
        f"body of {max(measures['body_mm']):.3g} mm: an animal, a phantom or a specimen by its size",
    )
    refuse(measures["empty_share"] > rules.max_empty_share, f"empty slices: {measures['empty_share']:.0%}")
    mask = measures["grey_values"] < rules.min_grey_values
    refuse(mask, f"mask or label map: {measures['grey_values']} grey values")
    refuse(
        not mask and measures["flat_share"] > rules.max_flat_share,
        f"label map: {measures['flat_share']:.0%} of the foreground is piecewise constant",
    )
    refuse(
        measures["neighbour_correlation"] < rules.min_neighbour_correlation,
        f"noise alone: neighbouring voxels correlate by {measures['neighbour_correlation']:.2f}",
    )
    refuse(measures["cut_sides"] > rules.max_cut_sides, f"cut-off anatomy: {measures['cut_sides']} of 6 sides")
    if modality == "ct":
        refuse(
            measures["lowest"] > rules.max_lowest_hu,
            f"not in Hounsfield units: the lowest value is {measures['lowest']:g}",
        )
        refuse(
            measures["lowest"] <= rules.max_lowest_hu and measures["soft_tissue_share"] < rules.min_soft_tissue_share,
            f"not in Hounsfield units: {measures['soft_tissue_share']:.0%} of the body is soft tissue",
        )
    return reasons
