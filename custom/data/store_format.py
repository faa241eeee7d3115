"""The file of a prepared volume: compressed in chunks with checksums, of which a crop reads what it needs."""

import contextlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.meta_obj import MetaObj
from monai.utils import optional_import

from custom.errors import BadInput
from custom.files import replacing

blosc2, has_blosc2 = optional_import("blosc2")

# Sides in voxels: of what has a checksum, and of what is decompressed by itself.
SIDES = {"chunks": 64, "blocks": 16}
MOST_VALUES = 2**16


class Crop(MetaTensor):
    """What a slice of a `StoredVolume` gives: MONAI's crop adds itself to the meta data of a volume that has none."""

    def copy_meta_from(self, other: MetaObj, *args, **kwargs) -> MetaTensor:
        return MetaTensor(self.as_tensor(), affine=self.affine, applied_operations=other.applied_operations)


class StoredVolume:
    """A volume in a file, of which slicing reads what it needs: MONAI's crops take it for a tensor.

    Nothing is kept open, so that memory does not grow with their number.

    Args:
        file: written by `write`.

    Shapes:
        shape: (C, D, H, W); a slice is a `MetaTensor` with the affine of its corner.

    Raises:
        BadInput: for a damaged file, when it is opened, or a damaged chunk, when it is read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        array = self._open()
        self.about = self._meta(array, "about", json.loads)
        self.shape = tuple(self.about["shape"])
        if [getattr(array, name, None) for name in ("shape", "chunks")] != [self.shape, tuple(self.about["chunks"])]:
            raise self._damaged("its header is another")
        self.whole = bytearray(self._meta(array, "checksums", len) // 4)  # of each chunk: 1 once its checksum was right

    def __getitem__(self, index: tuple[slice, ...]) -> Crop:
        return self.read(index, Crop)

    def read(self, index: tuple[slice, ...], kind: type[MetaTensor] = MetaTensor) -> MetaTensor:
        """Return what slices contain, as a kind of tensor."""
        array = self._open()
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True)]
        self._check(array, bounds)
        try:
            codes = array[tuple(slice(*bound) for bound in bounds)]
        except Exception as error:  # blosc2 raises whatever the damage leads to
            raise self._damaged(f"at {bounds}") from error
        values = self._meta(array, "values", lambda content: np.frombuffer(content, self.about["dtype"]))
        affine = np.array(self.about["affine"])
        affine[:3, 3] += affine[:3, :3] @ [start for start, _ in bounds[1:]]
        volume = np.empty(codes.shape, values.dtype)
        for row in np.ndindex(codes.shape[:2]):  # NumPy makes 8 bytes of each code: a slice of them stays in the cache
            values.take(codes[row], out=volume[row], mode="clip")
        return kind(torch.from_numpy(volume), affine=torch.from_numpy(affine))

    def _open(self):
        try:
            return blosc2.open(str(self.file), mode="r", dparams={"nthreads": 1})
        except Exception as error:
            raise self._damaged("its header can't be read") from error

    def _meta(self, array, name: str, decode: Callable[[bytes], Any]) -> Any:
        """Return what `write` noted under a name."""
        try:
            content = array.schunk.vlmeta[name]
            if zlib.crc32(content[4:]) == int.from_bytes(content[:4], "little"):
                return decode(content[4:])
        except Exception as error:
            raise self._damaged(f"its {name} can't be read") from error
        raise self._damaged(f"its {name} differ from their checksum")

    def _check(self, array, bounds: Sequence[tuple[int, int]]) -> None:
        """Compare the chunks that a slice touches with their checksums, each once: it costs as much as to read it."""
        checksums = self._meta(array, "checksums", lambda content: np.frombuffer(content, np.uint32))
        ranges = [
            range(start // side, -(-stop // side)) for (start, stop), side in zip(bounds, array.chunks, strict=True)
        ]
        grid = [-(-size // side) for size, side in zip(self.shape, array.chunks, strict=True)]
        for place in product(*ranges):
            number = int(np.ravel_multi_index(place, grid))
            if self.whole[number]:
                continue
            with contextlib.suppress(Exception):  # blosc2 raises whatever the damage leads to
                self.whole[number] = bool(checksum(array.schunk.get_chunk(number)) == checksums[number])
            if not self.whole[number]:
                corner = [at * side for at, side in zip(place[1:], array.chunks[1:], strict=True)]
                raise self._damaged(f"chunk {number}, which starts at voxel {corner}, differs from its checksum")

    def _damaged(self, what: str) -> BadInput:
        return BadInput(f"{self.file} is damaged: {what}; delete it and run `python -m tools.prepare` again.")


def write(file: Path, volume: torch.Tensor, about: Mapping[str, Any]) -> None:
    """Write a volume whole or not at all.

    Args:
        volume: (C, D, H, W); a `MetaTensor`'s affine is kept.
        about: what to note with it, for `json`.

    Raises:
        OSError: when the disk is full.
    """
    array = np.ascontiguousarray(torch.as_tensor(volume).numpy())
    codes, values = encode(array)
    affine = np.asarray(volume.affine if isinstance(volume, MetaTensor) else np.eye(4), float)
    settings = {
        "codec": blosc2.Codec.LZ4HC,  # ZSTD makes a file of 96 % of its size, and takes half as long again to read
        "clevel": 9,
        "filters": [blosc2.Filter.BITSHUFFLE],
        "filters_meta": [0],
        "nthreads": 1,
    }
    sides = {name: (1, *(min(side, size) for size in codes.shape[1:])) for name, side in SIDES.items()}
    about = {**about, "shape": codes.shape, "chunks": sides["chunks"]}
    about |= {"dtype": values.dtype.str, "affine": affine.tolist()}
    try:
        with replacing(file) as part:
            stored = blosc2.asarray(codes, urlpath=str(part), mode="w", contiguous=True, cparams=settings, **sides)
            chunks = stored.schunk
            checksums = np.array([checksum(chunks.get_chunk(number)) for number in range(chunks.nchunks)], np.uint32)
            notes = {"values": values.tobytes(), "checksums": checksums.tobytes(), "about": json.dumps(about).encode()}
            for name, content in notes.items():
                chunks.vlmeta[name] = zlib.crc32(content).to_bytes(4, "little") + content
            del stored, chunks
    except RuntimeError as error:  # what blosc2 says of a disk
        raise OSError(f"{error}; is the disk full?") from error


def checksum(content: bytes) -> int:
    """Return the CRC-32 of the sums of 512 bytes each, which costs a quarter of that of all bytes."""
    whole = len(content) // 512 * 512
    sums = np.frombuffer(content, np.uint64, whole // 8).reshape(-1, 64).sum(1)
    return zlib.crc32(content[whole:], zlib.crc32(sums))


def encode(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn a volume into small integers and the values that they stand for.

    A scan of integers keeps few values under any function of a voxel, and comes back to the bit. Of more than 65 536,
    as resampling makes them, it comes back to half of 1/65535 of its range.

    Returns:
        codes of the volume's shape, uint8 or uint16, and values, sorted.
    """
    values = np.empty(0, volume.dtype)
    for slab in np.array_split(volume, max(1, volume.shape[1] // 16), axis=1):
        values = np.union1d(values, slab)
        if len(values) > MOST_VALUES:
            low, high = float(volume.min()), float(volume.max())
            values = np.linspace(low, high, MOST_VALUES).astype(volume.dtype)
            return np.rint((volume - low) * ((MOST_VALUES - 1) / (high - low))).astype(np.uint16), values
    return np.searchsorted(values, volume).astype(np.uint8 if len(values) <= 256 else np.uint16), values
