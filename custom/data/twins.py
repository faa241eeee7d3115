"""Find scans that are listed twice: one file under two paths, or the same voxels in two files."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import nibabel
import numpy as np
from nibabel.openers import ImageOpener

from custom.data.cases import is_nifti

ROUNDS = (0, 1 << 15, 1 << 20, 1 << 62)  # voxels read of those that are alike so far
THREADS = 8


def twins(files: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of a file and another that are one file, by their links, or hold the same voxels.

    Of most files no more than the header and the first voxels are read. A file that can't be read is no twin: whoever
    loads it says what is wrong. The answer for a file is kept as long as the process.
    """
    groups: dict[Hashable, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, names in enumerate((files, others)):
        for name in dict.fromkeys(names):
            groups[os.path.realpath(name)][side].append(name)
    pairs = [(a, b) for one in groups.values() for a in one[0] for b in one[1]]
    paired = {name for pair in pairs for name in pair}
    mine, theirs = ([name for name in dict.fromkeys(names) if name not in paired] for names in (files, others))
    alike = [(mine, theirs)]
    with ThreadPoolExecutor(THREADS) as pool:
        for count in ROUNDS:
            alike = [one for group in alike if all(group) for one in _parted(group, count, pool)]
    return pairs + [(a, b) for one in alike if all(one) for a in one[0] for b in one[1]]


def _parted(group: tuple[list[str], list[str]], count: int, pool: ThreadPoolExecutor) -> list[tuple]:
    """Part files that were alike so far by what their first voxels are."""
    parts: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    names = [(name, side) for side in (0, 1) for name in group[side]]
    for (name, side), mark in zip(names, pool.map(lambda pair: _mark(pair[0], count), names), strict=True):
        if mark:
            parts[mark][side].append(name)
    return list(parts.values())


def _mark(file: str, count: int) -> str:
    """Return a digest of a file's shape and first voxels, whatever type stores them; "" if it can't be read."""
    try:
        status = os.stat(file)
        return _digest(file, count, status.st_size, status.st_mtime_ns)
    except Exception:  # readers raise whatever a damaged file leads to
        return ""


@cache
def _digest(file: str, count: int, *_: int) -> str:
    if not is_nifti(file):
        return ""
    voxels = nibabel.load(file).dataobj
    shape = tuple(voxels.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    digest = VoxelDigest(shape)
    if count:
        with ImageOpener(file) as stream:
            stream.seek(voxels.offset)
            content = stream.read(min(count, int(np.prod(shape))) * voxels.dtype.itemsize)
        digest.add(np.frombuffer(content, voxels.dtype) * np.float64(voxels.slope) + np.float64(voxels.inter))
    return digest.text()


class VoxelDigest:
    """A digest of a scan's shape and voxels as float32, slab by slab."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.hash = hashlib.blake2b(repr(shape).encode(), digest_size=16)

    def add(self, slab: np.ndarray) -> None:
        self.hash.update(np.ascontiguousarray(slab, "<f4").data)

    def text(self) -> str:
        return self.hash.hexdigest()
