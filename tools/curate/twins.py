"""Find exact and near duplicates among thousands of volumes by their content.

Exact twins have the same digest of voxels. Near twins (resampled, cropped, flipped, of another window or type) share
landmarks: extrema of a difference of Gaussians on a grid of 3 mm, each with a descriptor of what surrounds it, as in
SIFT (Lowe, IJCV 2004) but upright, since scans are not turned, and free of mirroring. Two volumes are near twins if
enough of their descriptors match *and* the matches lie alike in both, shifted or mirrored.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel
import numpy as np
from scipy import fft, ndimage

from tools.curate.rules import Rules

GRID_MM = 3.0
LANDMARKS = 96  # of a volume, the strongest
WEAKEST = 0.005  # strength of a landmark, of a range of grey values of 1
SMALL = 20  # grid steps; sides that are shorter have landmarks up to their ends
REACH = 3  # grid steps from a landmark to the side of its surroundings
WAVES = 4  # of the cosine transform, along each axis
LENGTH = WAVES**3 - 1
DISTINCT = 0.95  # cosine of two descriptors of one volume from which on neither is used
NEAR_MM = 4.5  # matches that lie alike within this
FEW, FEWEST = 24, 5  # volumes with fewer landmarks than FEW need half of them, and FEWEST, to match
TABLES, BITS = 10, 20  # of the index
CROWD = 100  # descriptors of one code that are compared with each other
CHUNK = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """What a volume is told by: digest of its voxels, landmarks (n, 3) in mm, descriptors (n, LENGTH) of length 1."""

    digest: str
    places_mm: np.ndarray
    descriptors: np.ndarray

    def to_text(self) -> str:
        """Return it as text; descriptors have 8 bits a number, places 0.1 mm."""
        places = np.round(self.places_mm * 10).astype(np.int16).tobytes()
        return ":".join((self.digest, *(base64.b64encode(part).decode() for part in (places, self._bytes()))))

    def _bytes(self) -> bytes:
        return np.round(self.descriptors * 127).astype(np.int8).tobytes()

    @staticmethod
    def from_text(text: str) -> "Fingerprint":
        digest, places, descriptors = text.split(":")
        numbers = np.frombuffer(base64.b64decode(descriptors), np.int8).reshape(-1, LENGTH).astype(np.float32)
        lengths = np.linalg.norm(numbers, axis=1, keepdims=True)
        return Fingerprint(
            digest,
            np.frombuffer(base64.b64decode(places), np.int16).reshape(-1, 3).astype(np.float32) / 10,
            numbers / np.maximum(lengths, 1e-6),
        )


def fingerprint(voxels: np.ndarray, affine: np.ndarray) -> Fingerprint:
    """Return the fingerprint of a volume, the same for all orders of its axes.

    Args:
        voxels: (x, y, z) of any type of number.
        affine: voxel to RAS, mm.
    """
    turn = nibabel.io_orientation(affine)
    upright = nibabel.orientations.apply_orientation(voxels, turn)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(turn[:, 0])]
    whole = np.ascontiguousarray(upright, np.float32)
    digest = hashlib.blake2b(whole.data, digest_size=12, person=str(whole.shape).encode()[:16]).hexdigest()
    grid = _resample(whole, spacing)
    places, descriptors = _landmarks(grid)
    return Fingerprint(digest, (places * GRID_MM).astype(np.float32), descriptors)


def _resample(voxels: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Return the volume on the grid, smoothed to a resolution that all scans of at most 6 mm have."""
    for axis in range(3):
        n, mm = voxels.shape[axis], spacing_mm[axis]
        count = max(1, int((n - 1) * mm / GRID_MM) + 1)
        width = max(2 * GRID_MM, mm)
        offset = ((n - 1) * mm - (count - 1) * GRID_MM) / 2  # centred, so that mirroring gives the same grid
        apart = np.abs((np.arange(count) * GRID_MM + offset)[:, None] - np.arange(n) * mm)
        weights = np.clip(1 - apart / width, 0, None).astype(np.float32)
        weights /= weights.sum(axis=1, keepdims=True)
        voxels = np.moveaxis(np.tensordot(weights, voxels, (1, axis)), 0, axis)
    return voxels


def _landmarks(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places (n, 3) in grid steps, and the descriptors (n, LENGTH), of the strongest landmarks."""
    none = np.zeros((0, 3), np.float32), np.zeros((0, LENGTH), np.float32)
    if min(grid.shape) < 3:
        return none
    grid = _equalise(grid)
    band = ndimage.gaussian_filter(grid, 1.0) - ndimage.gaussian_filter(grid, 1.6)
    strength = np.abs(band)
    peak = (band == ndimage.maximum_filter(band, 3)) | (band == ndimage.minimum_filter(band, 3))
    margin = np.zeros(grid.shape, bool)
    # What surrounds a landmark is inside of the volume, but for small ones, which would have no landmark then.
    edges = [REACH if n >= SMALL else 1 for n in grid.shape]
    margin[tuple(slice(edge, -edge) for edge in edges)] = True
    peak &= margin & (strength > WEAKEST)
    places = np.argwhere(peak)
    places = places[np.argsort(-strength[peak], kind="stable")[: 3 * LANDMARKS]]
    if not len(places):
        return none
    places = _refine(band, places)
    descriptors, good = _describe(grid, places)
    # A landmark that looks like another one of its own volume (a smooth edge, a row of ribs) tells nothing apart.
    alike = descriptors @ descriptors.T - np.eye(len(descriptors))
    good &= alike.max(axis=1) < DISTINCT
    return places[good][:LANDMARKS], descriptors[good][:LANDMARKS]


def _equalise(grid: np.ndarray) -> np.ndarray:
    """Return grey values from 0 to 1 that are used about equally often, so that windows make no difference."""
    low, high = np.percentile(grid, (1, 99))
    counts, edges = np.histogram(np.clip(grid, low, high), 256, (low, high) if high > low else (low, low + 1))
    counts = np.minimum(counts, 0.02 * counts.sum())  # the background is to take no more of the range than others
    return np.interp(grid, edges, np.append(0, np.cumsum(counts)) / counts.sum()).astype(np.float32)


def _describe(grid: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the descriptors of places, and which of them have anything to describe."""
    around = np.stack(np.meshgrid(*[np.arange(-REACH, REACH + 1)] * 3, indexing="ij"), axis=-1)
    points = places[:, None, None, None, :] + around
    patches = ndimage.map_coordinates(grid, np.moveaxis(points, -1, 0), order=1, mode="nearest")
    for axis in range(1, 4):  # mirrored so that the brighter half comes first, whichever way the scan lies
        weight = np.arange(-REACH, REACH + 1).reshape([-1 if a == axis else 1 for a in range(4)])
        mirrored = (patches * weight).sum(axis=(1, 2, 3)) > 0
        patches[mirrored] = np.flip(patches[mirrored], axis=axis)
    waves = fft.dctn(patches, axes=(1, 2, 3), norm="ortho")[:, :WAVES, :WAVES, :WAVES].reshape(len(places), -1)[:, 1:]
    lengths = np.linalg.norm(waves, axis=1)
    good = lengths > 1e-3
    return (waves / np.maximum(lengths, 1e-9)[:, None]).astype(np.float32), good


def _refine(band: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the tops of the parabolas through extrema (n, 3) and their neighbours, within half a step."""
    refined = places.astype(float)
    for axis, step in enumerate(np.eye(3, dtype=int)):
        before, here, after = (band[tuple((places + s * step).T)] for s in (-1, 0, 1))
        bend = before - 2 * here + after
        top = np.divide(before - after, 2 * bend, out=np.zeros_like(bend), where=bend != 0)
        refined[:, axis] += np.clip(top, -0.5, 0.5)
    return refined


def near_twins(
    prints: Sequence[Fingerprint], rules: Rules, others: Sequence[Fingerprint] | None = None
) -> list[tuple[int, int, int]]:
    """Find the near twins among volumes, or between these and others.

    Returns:
        (number, number, votes) of each pair; votes are the matches that lie alike in both.
    """
    both = list(prints) + list(others or [])
    owner = np.repeat(np.arange(len(both)), [len(p.descriptors) for p in both])
    if not len(owner):
        return []
    descriptors = np.concatenate([p.descriptors for p in both])
    places = np.concatenate([p.places_mm for p in both])
    ends = _matches(descriptors, owner, rules.twin_cosine)
    if others is not None:
        ends = ends[(owner[ends[:, 0]] < len(prints)) & (owner[ends[:, 1]] >= len(prints))]
    # Most pairs have a match or two: they are left out before any is looked at by itself.
    _, starts, counts = np.unique(owner[ends] @ (len(both), 1), return_index=True, return_counts=True)
    many = counts >= min(FEWEST, rules.twin_votes)
    found = []
    for start, count in zip(starts[many].tolist(), counts[many].tolist(), strict=True):
        own = ends[start : start + count]
        one, two = owner[own[0]].tolist()
        fewest = min(len(both[one].descriptors), len(both[two].descriptors))
        needed = max(rules.twin_votes, rules.twin_share * fewest) if fewest >= FEW else max(FEWEST, fewest / 2)
        if len(own) >= needed and (votes := _alike(places[own[:, 0]], places[own[:, 1]], own)) >= needed:
            found.append((one, two - (len(prints) if others is not None else 0), votes))
    return found


def _matches(descriptors: np.ndarray, owner: np.ndarray, cosine: float) -> np.ndarray:
    """Return the pairs (n, 2) of descriptors of different volumes whose cosine is high, in the order of their owners.

    Locality-sensitive hashing (Charikar, STOC 2002): a code is made of the sides of random planes that a descriptor
    lies on; those with the same code in one of several tables are compared. So the time grows with the number of
    descriptors, not its square. A pair of cosine 0.99 has a common code with a probability of 0.99.
    """
    planes = np.random.default_rng(0).standard_normal((TABLES, LENGTH, BITS)).astype(np.float32)
    found = np.zeros(0, np.int64)  # each pair as one number
    for table in planes:
        here = [found]
        codes = (descriptors @ table > 0) @ (1 << np.arange(BITS))
        order = np.lexsort((owner, codes))
        for lag in range(1, CROWD):
            same = codes[order[:-lag]] == codes[order[lag:]]
            if not same.any():
                break
            one, two = order[:-lag][same], order[lag:][same]
            for start in range(0, len(one), CHUNK):
                first, second = one[start : start + CHUNK], two[start : start + CHUNK]
                apart = owner[first] != owner[second]
                first, second = first[apart], second[apart]
                near = np.einsum("ij,ij->i", descriptors[first], descriptors[second]) > cosine
                first, second = first[near], second[near]
                here.append(np.minimum(first, second) * len(descriptors) + np.maximum(first, second))
        found = np.sort(np.concatenate(here))  # np.unique of NumPy 2.4 takes minutes for such numbers
        found = found[np.append(np.diff(found) > 0, True)[: len(found)]]
    ends = np.stack(np.divmod(found, len(descriptors)), axis=1)  # descriptors lie in the order of their owners
    return ends[np.lexsort((owner[ends[:, 1]], owner[ends[:, 0]]))]


def _alike(places: np.ndarray, others: np.ndarray, ends: np.ndarray) -> int:
    """Return how many matches agree on one shift, each axis mirrored or not."""
    best = 0
    for signs in np.ndindex(2, 2, 2):
        shifts = places - others * (1 - 2 * np.array(signs))
        for shift in shifts:
            near = np.abs(shifts - shift).max(axis=1) < NEAR_MM
            if near.sum() > best:  # each landmark votes once
                best = max(best, min(len(set(ends[near, 0])), len(set(ends[near, 1]))))
    return best


def joined(count: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Return for each of `count` things the lowest number of the group that pairs join it to."""
    parent = list(range(count))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    for one, two in pairs:
        low, high = sorted((root(one), root(two)))
        parent[high] = low
    return [root(one) for one in range(count)]
