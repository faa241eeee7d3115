"""Write damaged and odd scans, and see that each is loaded or refused in a sentence: none hangs or ends the process.

python -m tools.studies.damaged OUT_DIR
"""

from __future__ import annotations

import argparse
import gzip
import multiprocessing
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Compose, Orientationd, Spacingd
from nibabel.imageglobals import LoggingOutputSuppressor
from tqdm import tqdm

from custom.data.loading import LoadScand
from custom.errors import user_message
from custom.text import markdown_table
from tools._cli import tool
from tools.datalist_check import inspect_file

SHAPE = (36, 34, 33)
# Field of a NIfTI-1 header: offset in bytes, and how it is packed (https://nifti.nimh.nih.gov/nifti-1).
SIZE_OF_HEADER, DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, INTERCEPT, SFORM_CODE, SROW, MAGIC = (
    (0, "<i"), (40, "<8h"), (70, "<h"), (72, "<h"), (76, "<8f"), (108, "<f"), (112, "<f"), (116, "<f"), (254, "<h"),
    (280, "<12f"), (344, "<4s"),
)  # fmt: skip


def volume(seed: int = 0, dtype: str = "int16", affine: np.ndarray | None = None) -> bytes:
    """Return a small NIfTI file of noise (about 0 to 1000)."""
    array = np.random.default_rng(seed).integers(1, 1000, SHAPE).astype(dtype)
    return nib.Nifti1Image(array, np.diag([2, 2, 2, 1.0]) if affine is None else affine, dtype=dtype).to_bytes()


def patched(data: bytes, field: tuple[int, str], *values) -> bytes:
    """Return a file with other values in a field of its header."""
    offset, form = field
    content = bytearray(data)
    struct.pack_into(form, content, offset, *values)
    return bytes(content)


def saved(array: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    return nib.Nifti1Image(array, np.eye(4) if affine is None else affine, dtype=array.dtype).to_bytes()


def contents() -> Iterator[tuple[str, str, bytes]]:
    """Yield the kind, the name and the bytes of each file."""
    whole = volume()
    packed = gzip.compress(whole, mtime=0)
    random = np.random.default_rng(1)
    for number, cut in enumerate(random.integers(1, len(whole), 40)):
        yield "truncated .nii", f"truncated_{number}.nii", whole[:cut]
    for number, cut in enumerate(random.integers(1, len(packed), 40)):
        yield "truncated .nii.gz", f"truncated_{number}.nii.gz", packed[:cut]
    for number in range(40):
        damaged = bytearray(packed)
        damaged[random.integers(18, len(packed))] ^= 1 << random.integers(8)
        yield "one bit flipped in .nii.gz", f"flipped_{number}.nii.gz", bytes(damaged)
    for number in range(40):
        damaged = bytearray(whole)
        damaged[random.integers(0, 352)] = random.integers(256)
        yield "one byte of the header changed", f"header_{number}.nii", bytes(damaged)
    for number, size in enumerate(random.integers(0, 4000, 10)):
        yield "random bytes", f"random_{number}.nii", random.bytes(size)
    yield "zero length", "empty.nii", b""
    yield "zero length", "empty.nii.gz", b""
    yield "zero length", "empty_inside.nii.gz", gzip.compress(b"", mtime=0)
    for number, magic in enumerate((b"n+9\0", b"ni1\0", b"\0\0\0\0", b"DICM")):
        yield "wrong magic", f"magic_{number}.nii", patched(whole, MAGIC, magic)
    for number, dims in enumerate(
        [(3, 32767, 32767, 32767), (3, -36, 34, 33), (3, 0, 34, 33), (3, 36, 34, 30000), (7, 9, 9, 9, 9, 9, 9, 9),
         (0, 36, 34, 33), (9, 36, 34, 33), (-3, 36, 34, 33), (3, 1, 1, 1), (3, 36, 34, 32)]
    ):  # fmt: skip
        dims = (*dims, *[1] * (8 - len(dims)))
        yield "huge, negative or odd dimensions", f"dims_{number}.nii", patched(whole, DIM, *dims)
        yield "huge, negative or odd dimensions", f"dims_{number}.nii.gz", gzip.compress(patched(whole, DIM, *dims))
    base = np.random.default_rng(2).normal(100, 30, SHAPE).astype(np.float32)
    for number, value in enumerate((np.nan, np.inf, -np.inf)):
        for share, where in (("one", (3, 4, 5)), ("all", ...)):
            array = base.copy()
            array[where] = value
            yield "NaN or infinity", f"value_{number}_{share}.nii.gz", gzip.compress(saved(array))
    yield "all voxels equal", "zero.nii", saved(base * 0)
    yield "all voxels equal", "constant.nii", saved(base * 0 - 1024)
    yield "2D, 4D or colour", "plane.nii", saved(base[0])
    yield "2D, 4D or colour", "slice.nii", saved(base[:1])
    yield "2D, 4D or colour", "line.nii", saved(base[0, 0])
    yield "2D, 4D or colour", "series.nii", saved(np.stack([base, base], -1))
    yield "2D, 4D or colour", "vector.nii", saved(np.stack([base] * 3, -1)[:, :, :, None])
    colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    yield "2D, 4D or colour", "colour.nii", saved(colour)
    yield "complex numbers", "complex.nii", saved(base.astype(np.complex64))
    for number, (code, bits) in enumerate([(0, 0), (1, 1), (9999, 16), (4, 64), (1536, 128), (255, 8)]):
        yield "unknown or odd voxel type", f"type_{number}.nii", patched(patched(whole, DATATYPE, code), BITPIX, bits)
    for number, slope in enumerate((0.0, np.nan, np.inf, 1e38, -1.0)):
        yield "slope and intercept", f"slope_{number}.nii", patched(patched(whole, SLOPE, slope), INTERCEPT, 5.0)
    for number, offset in enumerate((0.0, -4.0, 1e9, np.nan, 353.0)):
        yield "offset of the voxels", f"offset_{number}.nii", patched(whole, VOX_OFFSET, offset)
    rows = np.array([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]], float)
    singular = [rows * 0, rows * [[1], [1], [0]], rows * np.nan, rows * 1e30, rows[[0, 0, 2]]]
    singular += [rows + [0, 0, 0, value] for value in (np.nan, np.inf)]  # places it nowhere
    for number, matrix in enumerate(singular):
        turned = patched(patched(whole, SFORM_CODE, 1), SROW, *matrix.ravel())
        yield "singular or senseless affine", f"affine_{number}.nii", turned
    for number, zoom in enumerate((np.nan, 1e-30, 1e30, 0.0, -1.0)):
        patch = patched(patched(whole, PIXDIM, 1, zoom, 2, 2, 0, 0, 0, 0), SFORM_CODE, 0)
        # Nibabel reads the last two as 1 mm, which training cannot tell from a spacing.
        kind = "singular or senseless affine" if number < 3 else "no spacing"
        yield kind, f"spacing_{number}.nii", patch
    yield "other format by that name", "dicom.nii", b"\0" * 128 + b"DICM" + random.bytes(900)
    yield "other format by that name", "packed_twice.nii.gz", gzip.compress(packed, mtime=0)
    yield "other format by that name", "not_packed.nii.gz", whole
    yield "other format by that name", "packed.nii", packed
    yield "other format by that name", "text.nii", b"patient,scan\n1,2\n"
    yield "sound, but uncommon", "int64.nii", volume(dtype="int64")
    yield "sound, but uncommon", "float64.nii", volume(dtype="float64")
    yield "sound, but uncommon", "uint8.nii", volume(dtype="uint8")
    big = nib.Nifti1Header(endianness=">")
    yield "sound, but uncommon", "big_endian.nii", nib.Nifti1Image(base, np.eye(4), big).to_bytes()
    yield "sound, but uncommon", "nifti2.nii", nib.Nifti2Image(base, np.eye(4)).to_bytes()
    yield "sound, but uncommon", "oblique.nii", volume(affine=_oblique())
    yield "sound, but uncommon", "trailing.nii", whole + b"more"


def _oblique() -> np.ndarray:
    turn = np.array([[0.8, -0.6, 0, 4], [0.6, 0.8, 0, -7], [0, 0, 1, 1], [0, 0, 0, 1]])
    return turn @ np.diag([-1, 1.5, 3, 1])


def write(folder: str | Path) -> list[tuple[str, Path]]:
    """Write the files and return the kind and the path of each; the same bytes every time.

    Args:
        folder: to fill; made if missing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, name, content in tqdm(contents(), "writing", unit="file", disable=None):
        (folder / name).write_bytes(content)
        written.append((kind, folder / name))
    for name, target in (("loop.nii", "loop.nii"), ("dangling.nii", "nowhere.nii")):
        (folder / name).unlink(missing_ok=True)
        os.symlink(target, folder / name)
        written.append(("link, folder or missing", folder / name))
    (folder / "folder.nii").mkdir(exist_ok=True)
    written += [("link, folder or missing", folder / name) for name in ("folder.nii", "missing.nii")]
    (folder / "forbidden.nii").write_bytes(volume())
    (folder / "forbidden.nii").chmod(0)
    written.append(("no permission to read", folder / "forbidden.nii"))
    return written


def outcome(path: Path) -> tuple[str, str]:
    """Return what training says of a file and what `tools.datalist` does; "" where it is taken.

    Raises:
        RuntimeError: for a file that leads to an error without a sentence.
    """
    load = Compose([LoadScand("image"), Orientationd("image", "RAS", labels=None), Spacingd("image", (2, 2, 2))])
    message = ""
    with LoggingOutputSuppressor(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load({"image": str(path)})
        except Exception as error:
            if (told := user_message(error)) is None:
                raise RuntimeError(f"{path} leads to an error without a sentence: {error!r}") from None
            message = told
    return message, inspect_file(path).reason


def outcomes(written: list[tuple[str, Path]], limit_s: float = 60) -> list[tuple[str, Path, str, str]]:
    """Try the files one after the other, in a process of its own; return the kind, the path and its `outcome`.

    Raises:
        RuntimeError: for a file without an outcome: the time is over, or the process was ended.
    """
    told = []
    # As a DataLoader's worker: with one thread.
    with multiprocessing.Pool(1, torch.set_num_threads, (1,)) as pool:
        for kind, path in tqdm(written, "loading", unit="file", disable=None):
            try:
                told.append((kind, path, *pool.apply_async(outcome, (path,)).get(limit_s)))
            except multiprocessing.TimeoutError:
                raise RuntimeError(f"{path} hangs for {limit_s:g} s, or ends the process.") from None
    return told


def table(told: list[tuple[str, Path, str, str]]) -> str:
    """Return a Markdown table of how many files of each kind were refused and how many were loaded."""
    rows: list[list] = [["kind", "files", "refused by training", "by tools.datalist", "loaded"]]
    for kind in [*dict.fromkeys(kind for kind, *_ in told), "**all**"]:
        found = [(bool(message), bool(reason)) for other, _, message, reason in told if kind in (other, "**all**")]
        refused, listed = map(sum, zip(*found, strict=True))
        rows.append([kind, len(found), refused, listed, len(found) - refused])
    return markdown_table(rows)


def arguments(add: Callable) -> None:
    add("out_dir", type=Path, metavar="OUT_DIR", help="folder to write to")


def run(options: argparse.Namespace) -> None:
    """Write, load and print."""
    print(table(outcomes(write(options.out_dir))))


main = tool("studies.damaged", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
