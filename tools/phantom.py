"""Draw a small synthetic data set: abdominal CT, fetal brain MRI and four-contrast brain MRI.

Every subject is a table of ellipsoids and tubes in millimetres, painted in order onto a randomly rotated, scaled and
warped grid, then given vessels, texture, a bias field and noise. World axes are RAS+: x grows to the patient's right,
y to the front, z to the head.

Voxel arithmetic is limited to ``+ - * / sqrt``, comparisons and rounding. These are exact in IEEE 754, so the arrays
do not depend on the processor; ``sin`` or ``exp`` over an array, or a matrix product, would.
"""

import argparse
import gzip
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

from custom.errors import BadInput
from tools._cli import tool

KINDS = ("ct", "fetal", "brain")  # the position is the kind's random stream: append, never reorder
CONTRASTS = ("t1", "t1ce", "t2", "flair")
MIN_SHAPE = 32
OUTSIDE_MM = -1e3  # depth given to voxels that are nowhere near a structure


Point = tuple[float, float, float]


class Ball(NamedTuple):
    """Axis-aligned ellipsoid."""

    centre_mm: Point
    radii_mm: Point


class Tube(NamedTuple):
    """Polyline of constant radius with round ends."""

    radius_mm: float
    points_mm: tuple[Point, ...]


def _solids(text: str) -> tuple[Ball | Tube, ...]:
    """Solids from ``word numbers; word numbers``; the words ``balls`` and ``tubes`` add the mirror image."""
    solids: list[Ball | Tube] = []
    for word, *values in (item.replace(",", " ").split() for item in text.split(";")):
        numbers = [float(value) for value in values]
        for side in (1, -1) if word.endswith("s") else (1,):
            radius = numbers[: len(numbers) % 3]
            points = [(side * x, y, z) for x, y, z in zip(*[iter(numbers[len(radius) :])] * 3, strict=True)]
            solids.append(Tube(radius[0], tuple(points)) if radius else Ball(points[0], tuple(map(abs, points[1]))))
    return tuple(solids)


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


LONG = 1e4  # a radius that turns an ellipsoid into a cylinder
CT_FOV_MM = (336.0, 336.0, 288.0)
HEAD_FOV_MM = (104.0, 104.0, 104.0)
ADULT_SCALE = 1.85  # adult brain against fetal brain of about 30 weeks

# BTCV id | name | HU before and after contrast agent | ball: centre, radii; tube: radius, points (mm).
# Painted top to bottom; small organs come last so that no large neighbour can swallow them.
ORGANS = _rows("""
6  | liver                    | 60 110 | ball 68 2 28, 66 74 66; ball 6 42 44, 62 34 34
1  | spleen                   | 50 118 | ball -98 -36 38, 27 40 50
7  | stomach                  | 45 80  | ball -60 4 58, 36 38 36; ball -58 30 22, 28 28 42; ball -22 44 -4, 40 18 18
2  | right kidney             | 32 170 | ball 62 -44 -34, 27 24 50
3  | left kidney              | 32 170 | ball -62 -44 -22, 27 24 52
11 | pancreas                 | 40 95  | ball 26 10 -16, 15 14 24; tube 11, 24 12 -6, 6 22 6, -28 8 14, -72 -22 30
4  | gallbladder              | 8 12   | ball 50 46 -20, 14 18 27
5  | esophagus                | 35 55  | tube 8, 2 -14 150, -4 -12 112, -14 -6 88, -36 0 68
8  | aorta                    | 42 185 | tube 11.5, -16 -28 150, -10 -22 70, -8 -20 -20, -4 -20 -92
9  | inferior vena cava       | 40 150 | tube 11.5, 22 -20 -94, 22 -18 0, 26 -10 48, 22 4 92, 16 10 108
10 | portal and splenic veins | 42 160 | tube 6.5, -84 -28 32, -50 -20 22, -20 -6 12, 10 8 10, 34 14 34, 64 10 46
12 | right adrenal gland      | 25 70  | tube 4.5, 34 -41 21, 37 -33 42, 49 -47 21
13 | left adrenal gland       | 25 70  | tube 4.5, -27 -43 23, -33 -32 43, -48 -40 23
""")
COLON = _solids("tube 20, 98 -16 -140, 98 -8 -58, 66 56 -62, 0 62 -72, -66 54 -50, -100 0 -30, -102 -14 -140")
DOMES = _solids("ball 62 -2 -22, 78 88 112; ball -62 -2 -22, 78 88 100")
HEART = _solids("ball -26 28 128, 52 40 44")

# Tissue: FeTA id, then intensity in fetal T2 and in the adult contrasts t1, t1ce, t2, flair.
TISSUES = {
    "external cerebrospinal fluid": (1, 900, 170, 175, 960, 110),
    "grey matter": (2, 400, 430, 440, 580, 590),
    "white matter": (3, 650, 720, 725, 400, 440),
    "ventricles": (4, 960, 150, 150, 1000, 100),
    "cerebellum": (5, 440, 570, 580, 500, 510),
    "deep grey matter": (6, 490, 570, 575, 470, 520),
    "brainstem": (7, 520, 640, 645, 440, 460),
}
ARTERY = (0, 250, 420, 1150, 200, 180)
HEAD = {
    name: _solids(text)
    for name, text in _rows("""
hemispheres       | balls 14 3 8, 22 43 31; balls 22 4 -6, 13 24 13
hull              | ball 0 2 7, 38 46 34; balls 21 5 -9, 16 27 14
callosum          | tube 3.2, 0 20 8, 0 16 15, 0 0 19, 0 -14 15
deep grey         | balls 8 -2 4, 6.5 10 7; balls 14 9 5, 5 11 8
lateral ventricle | tubes 3.4, 6 22 9, 7 6 15, 10 -10 15, 16 -21 9, 21 -12 -2, 23 2 -8
third ventricle   | ball 0 2 3, 1.5 10 6
fourth ventricle  | ball 0 -17 -19, 3 2.5 5
brainstem         | tube 5, 0 -5 -4, 0 -10 -16, 0 -14 -36; ball 0 -7 -16, 8 7 7
cerebellum        | balls 11 -27 -19, 17 13 11; ball 0 -28 -18, 6 12 10
""")
}


class _Canvas:
    """Multi-channel image and label map on a randomly rotated, scaled and warped grid of millimetre coordinates."""

    def __init__(self, rng: np.random.Generator, shape: int, fov_mm: Sequence[float], channels: int, warp_mm: float):
        self.rng, self.shape, self.fov_mm = rng, shape, fov_mm
        self.spacing_mm = tuple(fov / shape for fov in fov_mm)
        self.voxel_mm = max(self.spacing_mm)
        self.axes_mm = [
            ((np.arange(shape) + 0.5) * step - fov / 2).astype(np.float32)
            for fov, step in zip(fov_mm, self.spacing_mm, strict=True)
        ]
        # Cayley's formula makes a rotation from a skew matrix without sines; six decimals hide the matrix product.
        a, b, c = rng.uniform(-0.03, 0.03, 3)
        skew = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
        rotation = np.eye(3) + 2 / (1 + a * a + b * b + c * c) * (skew + skew @ skew)
        matrix = np.round(rotation / rng.uniform(0.94, 1.04), 6).tolist()
        x, y, z = np.meshgrid(*self.axes_mm, indexing="ij", sparse=True)
        self.xyz_mm = [row[0] * x + row[1] * y + row[2] * z + warp_mm * self.noise(4) for row in matrix]
        # How far a structure may have moved: windows are enlarged by this much before a solid is evaluated.
        self.margin_mm = 0.13 * max(fov_mm) + 2 * warp_mm
        self.image = np.zeros((channels, *[shape] * 3), np.float32)
        self.label = np.zeros([shape] * 3, np.uint8)

    def noise(self, cells: int) -> np.ndarray:
        """Smooth field of about zero mean and unit deviation: a cubic B-spline over ``cells`` random cells per axis."""
        field = self.rng.standard_normal([cells + 3] * 3, dtype=np.float32) * np.float32(3)
        position = (np.arange(self.shape) + 0.5) / self.shape * cells
        knot = position.astype(int)
        t = (position - knot).astype(np.float32)
        s = 1 - t
        weights = [
            s * s * s / 6,
            (4 - 6 * t * t + 3 * t * t * t) / 6,
            (4 - 6 * s * s + 3 * s * s * s) / 6,
            t * t * t / 6,
        ]
        for axis in (2, 1, 0):  # last axis first, so that the largest gather copies whole slices
            along = [-1 if other == axis else 1 for other in range(3)]
            field = sum(w.reshape(along) * np.take(field, knot + tap, axis) for tap, w in enumerate(weights))
        return field

    def curves(self, cells: int, radius_mm: float) -> np.ndarray:
        """Depth inside random vessels: two noise fields vanish together along winding curves."""
        a, b = self.noise(cells), self.noise(cells)
        return radius_mm - 0.4 * self.fov_mm[0] / cells * np.sqrt(a * a + b * b)

    def jitter(self, solids: Sequence[Ball | Tube], shift_mm: float, scale: float) -> list[Ball | Tube]:
        """The solids moved together by up to ``shift_mm`` and thickened or thinned by up to the fraction ``scale``."""
        move = self.rng.uniform(-shift_mm, shift_mm, 3).tolist()
        grow = self.rng.uniform(1 - scale, 1 + scale)

        def moved(point: Point) -> Point:
            x, y, z = (p + m for p, m in zip(point, move, strict=True))
            return x, y, z

        def grown(radii: Point) -> Point:
            x, y, z = (radius * grow for radius in radii)
            return x, y, z

        return [
            Ball(moved(solid.centre_mm), grown(solid.radii_mm))
            if isinstance(solid, Ball)
            else Tube(solid.radius_mm * grow, tuple(map(moved, solid.points_mm)))
            for solid in solids
        ]

    def depth(self, solids: Sequence[Ball | Tube]) -> np.ndarray:
        """Approximate distance in mm to the surface of the union of solids, positive inside."""
        depth = np.full([self.shape] * 3, OUTSIDE_MM, np.float32)
        for solid in solids:
            if isinstance(solid, Ball):
                self._ball(depth, solid)
            else:
                for start, end in zip(solid.points_mm, solid.points_mm[1:], strict=False):
                    self._segment(depth, start, end, max(solid.radius_mm, 1.05 * self.voxel_mm))
        return depth

    def _window(self, low_mm: Sequence[float], high_mm: Sequence[float]) -> tuple[slice, ...]:
        bounds = zip(self.axes_mm, low_mm, high_mm, strict=True)
        return tuple(
            slice(*np.searchsorted(axis, (low - self.margin_mm, high + self.margin_mm))) for axis, low, high in bounds
        )

    def _ball(self, depth: np.ndarray, ball: Ball) -> None:
        radii = [max(radius, 0.75 * self.voxel_mm) for radius in ball.radii_mm]
        centre = ball.centre_mm
        window = self._window(
            [c - r for c, r in zip(centre, radii, strict=True)], [c + r for c, r in zip(centre, radii, strict=True)]
        )
        # First-order distance q (1 - q) / |grad q| for q = |p / r|.
        unit = [(p[window] - c) / r for p, c, r in zip(self.xyz_mm, centre, radii, strict=True)]
        q = np.sqrt(sum(u * u for u in unit))
        slope = np.sqrt(sum((u / r) * (u / r) for u, r in zip(unit, radii, strict=True))) + 1e-6
        depth[window] = np.maximum(depth[window], q * (1 - q) / slope)

    def _segment(self, depth: np.ndarray, start: Sequence[float], end: Sequence[float], radius_mm: float) -> None:
        ends = list(zip(start, end, strict=True))
        window = self._window([min(pair) - radius_mm for pair in ends], [max(pair) + radius_mm for pair in ends])
        along = [b - a for a, b in ends]
        offset = [p[window] - a for p, a in zip(self.xyz_mm, start, strict=True)]
        share = sum(o * d for o, d in zip(offset, along, strict=True)) / sum(d * d for d in along)
        share = np.minimum(np.maximum(share, 0), 1)
        gaps = [o - share * d for o, d in zip(offset, along, strict=True)]
        depth[window] = np.maximum(depth[window], radius_mm - np.sqrt(sum(gap * gap for gap in gaps)))

    def paint(
        self,
        depth_mm: np.ndarray,
        values: float | np.ndarray | Sequence[float | np.ndarray],
        label: int | None = None,
    ) -> None:
        """Blend ``values`` (one per channel) in where the depth is positive, with a one-voxel soft edge."""
        cover = np.minimum(np.maximum(depth_mm / self.voxel_mm + 0.5, 0), 1)
        for channel, value in zip(self.image, values if isinstance(values, tuple | list) else [values], strict=True):
            channel += cover * (value - channel)
        if label is not None:
            self.label[depth_mm > 0] = label

    def affine(self) -> np.ndarray:
        """RAS+ voxel-to-world matrix that puts the centre of the volume at the origin."""
        affine = np.diag([*self.spacing_mm, 1.0])
        affine[:3, 3] = [(step - fov) / 2 for step, fov in zip(self.spacing_mm, self.fov_mm, strict=True)]
        return affine


def _check(subject: int, shape: int, seed: int) -> None:
    for name, value, low in (("subject", subject, 0), ("shape", shape, MIN_SHAPE), ("seed", seed, 0)):
        if value < low:
            raise BadInput(f"{name} must be at least {low}, got {value}.")


def abdomen_ct(subject: int, shape: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one contrast-enhanced abdominal CT with the 13 organs of BTCV.

    Args:
        subject: Number of the subject, from 0. Odd subjects are stored in LPS+ order, even ones in RAS+.
        shape: Voxels along each axis, at least 32; the field of view stays 336 x 336 x 288 mm.
        seed: Non-negative seed of the whole data set.

    Returns:
        Image in HU (int16, ``(shape, shape, shape)``, -1024 to about 1000), label (uint8, same shape, 0 to 13) and the
        4 x 4 voxel-to-world matrix in mm (float64).

    Raises:
        BadInput: If an argument is below its minimum.
    """
    _check(subject, shape, seed)
    rng = np.random.default_rng([seed, KINDS.index("ct"), subject])
    canvas = _Canvas(rng, shape, CT_FOV_MM, channels=1, warp_mm=3.5)
    x, y, z = canvas.xyz_mm
    paint, depth, vary = canvas.paint, canvas.depth, rng.uniform
    canvas.image += -1000

    # Trunk: skin, fat, muscle wall, then the cavity filled with visceral fat.
    girth = vary(0.94, 1.0)
    body = depth([Ball((0, -2, 0), (158 * girth, 113 * girth, LONG))])
    wall = depth([Ball((0, -4, 0), (138 * girth, 95 * girth, LONG))])
    cavity = depth([Ball((0, 6, 0), (124 * girth, 80 * girth, LONG))])
    mottle, loops, (lumpy, fine) = canvas.noise(shape // 3), canvas.noise(15), (canvas.noise(20), canvas.noise(6))
    vessels = canvas.curves(15, 3.2)
    paint(body, 20)
    paint(body - 3, -105 + 6 * fine)
    paint(wall, 55)
    paint(2 - abs(wall - 7 - 2 * fine), -60)  # fat plane between the muscle layers
    paint(cavity, -98 + 6 * fine)
    paint(depth(_solids(f"balls 36 -82 0, 29 17 {LONG}")), 58 + 8 * lumpy)  # back muscles
    paint(depth(_solids("tubes 15, 26 -50 10, 36 -44 -60, 48 -26 -150")), 60)  # psoas

    # Bowel loops below the diaphragm, and lungs above its two domes.
    below = np.minimum(cavity - 4, 12 - z)
    loop_depth = np.minimum(9 * (loops + 0.45), np.minimum(below, y + 18))
    paint(loop_depth, 65)
    paint(loop_depth - 5, 18 + 25 * lumpy)
    paint(np.minimum(loop_depth - 6, 14 * (loops - 1.6)), -750)
    colon = np.minimum(depth(canvas.jitter(COLON, 6, 0.12)) + 3 * fine, cavity - 1)
    paint(colon, 60)
    paint(colon - 4, -60 + 90 * lumpy)
    paint(np.minimum(colon - 5, 8 * fine), -850)
    dome = depth(canvas.jitter(DOMES, 5, 0.03))
    lungs = np.minimum(np.minimum(cavity - 2, z - 22 + 0.2 * y), np.minimum(abs(x + 3) - 24, -dome))
    paint(lungs, -860 + 25 * fine)
    paint(np.minimum(vessels, lungs), 60)
    heart = depth(canvas.jitter(HEART, 6, 0.08))
    paint(np.minimum(depth([Ball((0, 0, 150), (24, 60, 60))]), cavity), -75)  # mediastinal fat
    paint(np.minimum(heart, cavity), 80)
    paint(np.minimum(heart - 9, cavity), 150 + 12 * lumpy)

    # Skeleton: each bone is a bright shell around marrow. Ribs slope forward and down.
    level = (z + vary(0, 36)) % 36 - 18
    vertebra = 13.5 - abs(level)
    column = depth([Ball((0, -54, 0), (23, 17, LONG))])
    slope = z + 0.5 * y
    rib = np.minimum(4.5 - abs(cavity + 6.5), 6 - abs((slope + vary(0, 33)) % 33 - 16.5))
    rib = np.minimum(np.minimum(rib, slope + 48), 64 - y)
    processes = np.minimum(depth(_solids(f"ball 0 -98 0, 5 14 {LONG}; balls 22 -76 0, 19 6 {LONG}")), 7 - abs(level))
    ilium = np.minimum(4 - abs(depth(_solids("balls 66 -20 -156, 52 66 56"))), np.minimum(20 - y, abs(x) - 52))
    paint(column, 95)
    for bone in (np.minimum(column, vertebra), rib, processes, ilium, depth([Ball((0, -79, 0), (15, 13, LONG))])):
        paint(bone, 620)
        paint(bone - 2.6, 230 + 45 * mottle)
    paint(depth([Ball((0, -79, 0), (10, 8, LONG))]), 25)  # spinal canal

    # Organs, from the table; contrast phase and each organ's own uptake differ between subjects.
    phase = vary(0.7, 1.0)
    for number, name, attenuation, text in ORGANS:
        label, solids = int(number), canvas.jitter(_solids(text), 1.5 if "adrenal" in name else 4, 0.08)
        plain_hu, contrast_hu = map(float, attenuation.split())
        hu = plain_hu + phase * vary(0.93, 1.07) * (contrast_hu - plain_hu)
        inside = depth(solids)
        if name in ("liver", "spleen", "stomach"):
            inside = np.minimum(inside + 1.5 * fine, cavity - 1)
        paint(inside + 1.5, -95)  # a thin fat plane keeps neighbours apart
        paint(inside, hu, label)
        if name == "liver":
            paint(np.minimum(vessels + 0.4, inside - 4), hu + 55)
        elif name == "stomach":
            paint(inside - 5, 30 + 15 * lumpy)
            paint(np.minimum(inside - 6, y - vary(14, 34)), -900)  # gas rises to the front of a supine patient
        elif "kidney" in name:
            paint(np.minimum(inside - 7, 7 * (lumpy + 0.2)), hu - 45)  # pyramids
            x_mm, _, z_mm = next(solid.centre_mm for solid in solids if isinstance(solid, Ball))
            sinus = np.minimum(inside + 3, depth([Ball((0.76 * x_mm, -40, z_mm), (11, 9, 22))]))
            canvas.label[(sinus > 0) & (canvas.label == label)] = 0
            paint(sinus, -70)
        elif name == "pancreas":
            paint(np.minimum(inside, 3 * (mottle - 1.2)), 10)  # fatty lobulation
        elif name == "esophagus":
            paint(inside - 5, -150)

    image = canvas.image[0] + (body > 0) * (5 * mottle) + vary(9, 15) * rng.standard_normal(body.shape, np.float32)
    image = np.rint(np.minimum(np.maximum(image, -1024), 3000)).astype(np.int16)
    affine, label_map = canvas.affine(), canvas.label
    if subject % 2:
        affine[:2, 3] += (shape - 1) * affine.diagonal()[:2]
        affine[:2, :2] *= -1
        image, label_map = image[::-1, ::-1].copy(), label_map[::-1, ::-1].copy()
    return image, label_map, affine


def _head(
    rng: np.random.Generator, shape: int, scale: float, channels: Sequence[int], lesion: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Skull-stripped head.

    Args:
        rng: Source of everything random.
        shape: Voxels along each axis.
        scale: Size against the fetal anatomy of the tables; above 1 also draws finer folds.
        channels: Columns of ``TISSUES`` to draw, as registered channels.
        lesion: Whether to add a tumour with necrotic core, enhancing rim and oedema.

    Returns:
        Images (int16, ``(channels, shape, shape, shape)``), label (uint8) and affine (mm).
    """
    # Drawn at fetal size: millimetres are stretched by ``scale`` only in the affine.
    canvas = _Canvas(rng, shape, HEAD_FOV_MM, len(channels), warp_mm=1.6)
    depth, vary, adult = canvas.depth, rng.uniform, scale > 1
    names = list(TISSUES)
    gain = {name: vary(0.95, 1.05, len(channels)).tolist() for name in names}

    def paint(depth_mm: np.ndarray, name: str, factor: float | np.ndarray = 1.0) -> None:
        values = [TISSUES[name][column] * g * factor for column, g in zip(channels, gain[name], strict=True)]
        canvas.paint(depth_mm, values, TISSUES[name][0])

    x = canvas.xyz_mm[0]
    csf, grey, white, ventricles, cerebellum, deep_grey, brainstem = names
    mottle, patchy, folds = canvas.noise(shape // 3), canvas.noise(7), canvas.noise(19 if adult else 13)
    vessels = canvas.curves(9, 0.7)

    hemispheres = depth(canvas.jitter(HEAD["hemispheres"], 0.8, 0.03))
    trunk = depth(canvas.jitter(HEAD["brainstem"], 0.8, 0.06))
    lobes = depth(canvas.jitter(HEAD["cerebellum"], 0.8, 0.07))
    hull = np.maximum(np.maximum(hemispheres, lobes), trunk) + 1.4
    if not adult:
        hull = np.maximum(hull, depth(HEAD["hull"]))
    paint(hull, csf)

    # Sulci are valleys where a noise field crosses zero; grey matter follows the folded surface.
    gap_mm = 0.4 if adult else 0.9
    sulci = np.maximum(0, 1 - abs(folds) / 0.9) * (7 if adult else vary(5, 7))
    surface = np.minimum(hemispheres - (0 if adult else vary(0, 1.2)) - sulci, abs(x) - gap_mm - 0.4 * sulci)
    ribbon_mm = 3.6 if adult else 2.4
    paint(surface, grey)
    paint(surface - ribbon_mm, white, 1 + 0.03 * patchy)
    if not adult:  # the cell-rich intermediate zone is a darker band within fetal white matter
        paint(1.5 - abs(surface - 7.5), white, 0.88)
    paint(depth(HEAD["callosum"]), white, 0.95)
    paint(depth(canvas.jitter(HEAD["deep grey"], 0.6, 0.07)), deep_grey, 1 + 0.03 * patchy)
    lateral = depth(canvas.jitter(HEAD["lateral ventricle"], 0.6, 0.22)) - (0.8 if adult else 0)
    if not adult:  # germinal matrix
        paint(np.minimum(lateral + 1.6, abs(x) - 2), deep_grey, 0.75)
    paint(np.minimum(lateral, abs(x) - 1.2), ventricles)
    paint(depth(HEAD["third ventricle"]), ventricles)

    # Folia of the cerebellum are stripes parallel to its surface.
    paint(np.maximum(lobes, trunk) + 1.4, csf)
    paint(lobes, cerebellum, 1 + 0.22 * (abs((lobes + 0.5 * folds) % 4 - 2) - 1))
    paint(lobes - 5, cerebellum, 1.12)
    paint(trunk, brainstem, 1 + 0.03 * patchy)
    paint(depth(HEAD["fourth ventricle"]), ventricles)

    image = canvas.image
    artery = np.minimum(vessels, np.minimum(hull, 5 - surface))
    canvas.paint(artery, [ARTERY[column] for column in channels])
    if lesion:
        side = 1 if vary(0, 1) < 0.5 else -1
        tumour = depth([Ball((side * vary(17, 22), vary(-20, 20), vary(6, 18)), tuple(vary(7, 9.5, 3).tolist()))])
        tumour = tumour + 1.5 * patchy
        inner = np.minimum(hemispheres, abs(x) - gap_mm) - 1.5
        for grown_mm, values in (
            (4.5 + 2.5 * patchy, (560, 560, 800, 860)),
            (0, (520, 1100, 690, 760)),
            (-2.4, (260, 280, 930, 420)),
        ):
            canvas.paint(np.minimum(tumour + grown_mm, inner), values)

    head = hull > 0
    canvas.label[~head] = 0
    bias = 1 + 0.1 * np.minimum(np.maximum(canvas.noise(2), -2.5), 2.5)
    image *= vary(0.85, 1.15) * bias * (1 + 0.02 * mottle)
    for channel in image:  # Rician: the magnitude of a complex signal with Gaussian noise in both parts
        real, imaginary = vary(12, 22) * rng.standard_normal([2, *channel.shape], np.float32)
        real += channel
        # At least 1 inside the head, so that exactly 0 means background.
        channel[...] = np.maximum(np.rint(np.sqrt(real * real + imaginary * imaginary)), 1) * head
    affine = canvas.affine()
    affine[:3] *= scale
    return image.astype(np.int16), canvas.label, affine


def fetal_head(subject: int, shape: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw one skull-stripped fetal T2 volume with the seven tissues of FeTA.

    Args:
        subject: Number of the subject, from 0.
        shape: Voxels along each axis, at least 32; the field of view stays 104 mm.
        seed: Non-negative seed of the whole data set.

    Returns:
        Image (int16, ``(shape, shape, shape)``, background exactly 0, head 1 to about 1800), label (uint8, same shape,
        0 to 7) and the 4 x 4 RAS+ voxel-to-world matrix in mm (float64).

    Raises:
        BadInput: If an argument is below its minimum.
    """
    _check(subject, shape, seed)
    rng = np.random.default_rng([seed, KINDS.index("fetal"), subject])
    image, label, affine = _head(rng, shape, 1.0, [1], lesion=False)
    return image[0], label, affine


def brain(subject: int, shape: int = 96, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draw one adult brain with a tumour, seen in four registered MRI contrasts.

    Args:
        subject: Number of the subject, from 0.
        shape: Voxels along each axis, at least 32; the field of view stays 192 mm.
        seed: Non-negative seed of the whole data set.

    Returns:
        Image for each of ``t1``, ``t1ce``, ``t2`` and ``flair`` (int16, ``(shape, shape, shape)``, background exactly
        0, head 1 to about 2000) and the 4 x 4 RAS+ voxel-to-world matrix in mm (float64) they share.

    Raises:
        BadInput: If an argument is below its minimum.
    """
    _check(subject, shape, seed)
    rng = np.random.default_rng([seed, KINDS.index("brain"), subject])
    images, _, affine = _head(rng, shape, ADULT_SCALE, [2, 3, 4, 5], lesion=True)
    return dict(zip(CONTRASTS, images, strict=True)), affine


def _save(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    nifti = nib.Nifti1Image(array, affine)
    nifti.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(nifti.to_bytes(), compresslevel=5, mtime=0))  # no time stamp: same bytes each run


def write(out_dir: str | Path, subjects: int = 6, shape: int = 96, seed: int = 0, kinds: Sequence[str] = KINDS) -> None:
    """Write the data set: NIfTI volumes, and a Decathlon-style ``dataset.json`` for the labelled kinds.

    The last fifth of the labelled subjects (at least one of two or more) is for validation.

    Args:
        out_dir: Folder to fill; made if missing. Files of the same name are replaced.
        subjects: Subjects of each kind, at least 1.
        shape: Voxels along each axis, at least 32.
        seed: Non-negative seed.
        kinds: Any of ``ct``, ``fetal`` and ``brain``.

    Raises:
        BadInput: If an argument is out of range, or ``out_dir`` is not a folder.
    """
    out_dir = Path(out_dir)
    if subjects < 1:
        raise BadInput(f"subjects must be at least 1, got {subjects}.")
    _check(0, shape, seed)
    if unknown := set(kinds) - set(KINDS):
        raise BadInput(f"kinds must be among {', '.join(KINDS)}, got {', '.join(sorted(unknown))}.")
    if out_dir.exists() and not out_dir.is_dir():
        raise BadInput(f"{out_dir} is a file; give a folder to write to.")

    for kind, subject in tqdm(
        [(k, s) for k in dict.fromkeys(kinds) for s in range(subjects)], "drawing", unit="subject"
    ):
        folder, stem = out_dir / kind, f"{kind}_{subject:03d}"
        if kind == "brain":
            images, affine = brain(subject, shape, seed)
            for contrast, image in images.items():
                _save(image, affine, folder / "images" / f"{stem}_{contrast}.nii.gz")
        else:
            image, label, affine = (abdomen_ct if kind == "ct" else fetal_head)(subject, shape, seed)
            _save(image, affine, folder / "images" / f"{stem}.nii.gz")
            _save(label, affine, folder / "labels" / f"{stem}.nii.gz")

    held_out = max(1, subjects // 5) if subjects > 1 else 0
    organs = sorted((int(number), name) for number, name, *_ in ORGANS)
    tissues = [(row[0], name) for name, row in TISSUES.items()]
    for kind, modality, labels in (("ct", "CT", organs), ("fetal", "MRI", tissues)):
        if kind not in kinds:
            continue
        names = [f"{kind}_{subject:03d}.nii.gz" for subject in range(subjects)]
        pairs = [{"image": f"images/{name}", "label": f"labels/{name}"} for name in names]
        listing = {
            "name": f"phantom {kind}",
            "modality": {"0": modality},
            "labels": {"0": "background"} | {str(number): name for number, name in labels},
            "training": pairs[: subjects - held_out],
            "validation": pairs[subjects - held_out :],
        }
        (out_dir / kind / "dataset.json").write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")


def arguments(add: Callable) -> None:
    add("out_dir", type=Path, metavar="OUT_DIR", help="folder to write to")
    add("--subjects", type=int, default=6, help="subjects of each kind (%(default)s)")
    add("--shape", type=int, default=96, help=f"voxels along each axis, at least {MIN_SHAPE} (%(default)s)")
    add("--seed", type=int, default=0, help="another seed draws other subjects (%(default)s)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to draw (all)")


def run(options: argparse.Namespace) -> None:
    """Draw, and print what was drawn and the next command."""
    write(options.out_dir, options.subjects, options.shape, options.seed, options.kinds)
    out, sources = options.out_dir, []
    folders = {"ct": ["ct"], "fetal": ["t2"], "brain": []}
    for kind in dict.fromkeys(options.kinds):
        extra = "" if kind == "brain" else ", labels and dataset.json"
        print(f"{out / kind}: {options.subjects} subjects of {options.shape}^3 voxels, images{extra}")
        sources += [f"{modality}={out / kind / 'images'}" for modality in folders[kind]]
        if kind == "brain":
            sources += [f"{contrast}={out / kind / 'images' / f'*_{contrast}.nii.gz'}" for contrast in CONTRASTS]
    print("Next, list the volumes for pre-training:")
    print("  " + shlex.join(["python", "-m", "tools.datalist", str(out / "datalist.json"), *sources]))


main = tool("phantom", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
