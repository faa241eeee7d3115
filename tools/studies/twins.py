"""Measure how many transformed copies of scans curation finds as near twins, and how many scans of others it takes so.

    python -m tools.studies.twins SCAN_OR_FOLDER...

Each SCAN is a NIfTI volume of another patient; a folder is searched for them. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from custom.data.cases import SUFFIX, stem
from custom.errors import BadInput
from custom.text import markdown_table
from tools._cli import say, tool
from tools.curate.parallel import Failed, parallel
from tools.curate.rules import Rules
from tools.curate.twins import Fingerprint, fingerprint, near_twins

Scan = tuple[np.ndarray, np.ndarray]  # voxels and affine


def window(scan: Scan) -> Scan:
    """Return a scan of 8 bits: a CT from -160 to 240 HU, others from their 2nd to their 98th percentile."""
    voxels, affine = scan
    low, high = (-160, 240) if voxels.min() < -500 else np.percentile(voxels, (2, 98))
    return np.round((np.clip(voxels, low, high) - low) / max(high - low, 1e-6) * 255).astype(np.uint8), affine


def resampled(scan: Scan, mm: float) -> Scan:
    """Return a scan of another spacing, linear."""
    voxels, affine = scan
    zoom = np.linalg.norm(affine[:3, :3], axis=0) / mm
    return ndimage.zoom(voxels.astype(np.float32), zoom, order=1), affine @ np.diag([*(1 / zoom), 1])


def cropped(scan: Scan, share: float) -> Scan:
    """Return the middle of a scan, a share of each side."""
    voxels, affine = scan
    edges = [round(n * (1 - share) / 2) for n in voxels.shape]
    return voxels[tuple(slice(edge, n - edge) for edge, n in zip(edges, voxels.shape, strict=True))], affine


def mirrored(scan: Scan) -> Scan:
    return scan[0][::-1], scan[1]


COPIES: dict[str, Callable[[Scan], Scan]] = {
    "mirrored": mirrored,
    "other type and scale": lambda scan: (scan[0] * np.float32(3.7) + 11, scan[1]),
    "resampled to 1.5 mm": lambda scan: resampled(scan, 1.5),
    "resampled to 2 mm": lambda scan: resampled(scan, 2.0),
    "window of 8 bits (CT: -160 to 240 HU)": window,
    "cropped to 70 % of each side": lambda scan: cropped(scan, 0.7),
    "cropped to 50 % of each side": lambda scan: cropped(scan, 0.5),
    "window, 2 mm, cropped to 80 %, mirrored": lambda scan: mirrored(cropped(resampled(window(scan), 2.0), 0.8)),
}


def prints_of(path: Path) -> list[str]:
    """Return the fingerprints of a scan and of its copies."""
    image = nibabel.load(path)
    scan = np.asanyarray(image.dataobj), image.affine
    return [fingerprint(*made).to_text() for made in (scan, *(copy(scan) for copy in COPIES.values()))]


def arguments(add: Callable) -> None:
    add("scan", type=Path, nargs="+", metavar="SCAN_OR_FOLDER")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def run(options: argparse.Namespace) -> None:
    """Print how many copies are found, and the pairs of scans that are taken for twins."""
    paths = [file for path in options.scan for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    paths = [path for path in paths if SUFFIX.search(path.name)]
    prints: dict[Path, list[Fingerprint]] = {}
    made = parallel(prints_of, paths, options.workers, Rules().timeout_s)
    for path, texts in tqdm(made, "copying", len(paths), unit="scan"):
        if isinstance(texts, Failed):
            raise BadInput(f"{path}: {texts}; leave it out.")
        prints[path] = [Fingerprint.from_text(text) for text in texts]
    own = [prints[path][0] for path in paths]
    table: list[tuple[str, str]] = [("copy", f"{len(paths)} scans, found")]
    for number, copy in enumerate(COPIES, 1):
        copies = [prints[path][number] for path in paths]
        found = sum(one == two for one, two, _ in near_twins(own, Rules(), copies))
        table.append((copy, f"{found / len(paths):.0%}"))
    say(markdown_table(table))
    false = [(stem(str(paths[one])), stem(str(paths[two])), votes) for one, two, votes in near_twins(own, Rules())]
    say(f"{len(false)} of {len(list(combinations(paths, 2)))} pairs of scans are taken for near twins:")
    say("\n".join(f"{one}, {two}: {votes} landmarks" for one, two, votes in false))


main = tool("studies.twins", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
