"""A store of scans that went through their deterministic transforms once, from which crops are read in milliseconds."""

import glob
import hashlib
import json
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import Compose, MapTransform, Transform
from monai.utils import ensure_tuple

from custom.data.datalist import case_name
from custom.data.store_format import StoredVolume, has_blosc2, write
from custom.errors import BadInput


class Stored(MapTransform):
    """Deterministic transforms, the first of a pipeline, whose results may be read from a folder made beforehand.

    Without a store they are run. With one, each volume is a `StoredVolume`: the crop that follows reads nothing but
    the chunks that it needs. `tools.prepare` fills a store by `prepare`. The name of a file in it tells the case and
    its modality, the size and time of its source and these transforms, so that nothing stale is read.

    Args:
        keys: the volumes; those of a data list are paths.
        transforms: the transforms, all deterministic.
        store: folder, None to run the transforms.
        whole: keys whose volumes are read as a whole, such as a label map that a crop looks for its classes.

    Shapes:
        a path becomes a (C, D, H, W) `MetaTensor` or `StoredVolume`.

    Raises:
        BadInput: for a case that the store lacks or holds in another version; for what the transforms raise.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transforms: Sequence[Transform],
        store: str | None = None,
        whole: KeysCollection = (),
    ) -> None:
        super().__init__(keys)
        self.transforms = Compose(transforms)
        self.store = Path(store) if store else None
        self.whole = ensure_tuple(whole)
        self.description = describe(self.transforms.transforms)
        if store and not has_blosc2:
            raise BadInput('A --store needs the package blosc2: `pip install "blosc2>=3.0"`.')
        if self.store and not self.store.is_dir():
            raise BadInput(f"There is no folder {store}, which --store names; `python -m tools.prepare` makes it.")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.store is None:
            return self.transforms(data, threading=True)  # `CacheDataset` may do so in several threads
        output = dict(data)
        for key, file in self.files(data).items():
            if not file.is_file():
                raise BadInput(self.complaint(data, file))
            volume = StoredVolume(file)
            output[key] = volume.read((slice(None),) * 4) if key in self.whole else volume
        return output

    def files(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Path]:
        """Return the file in the store of each volume of a case, whether it is there or not."""
        if self.store is None:
            raise ValueError("Without a store a volume has no file in it.")
        case = case_name(data)
        name = Path(case).name.removesuffix(".gz").removesuffix(".nii")[:80]
        version = digest([case, self.origin(data), self.description])
        return {key: self.store / f"{name}-{digest(case)[:8]}-{version[:16]}-{key}.b2nd" for key in self.keys}

    def origin(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return what the data list says of a case, such as its modality, and what its files tell: for `json`."""
        said = {name: value for name, value in data.items() if name not in self.keys}
        return {**said, "sources": sources(data, self.keys)}

    def prepare(self, data: Mapping[Hashable, Any]) -> bool:
        """Run the transforms of a case and write the results, each beside and then moved into place.

        Returns:
            whether there was anything to do.
        """
        files = self.files(data)
        if all(file.is_file() for file in files.values()):
            return False
        about = {"origin": self.origin(data), "transforms": self.description}
        volumes = self.transforms(data)
        for key, file in files.items():
            write(file, volumes[key], about)
            for old in self.others(file):
                old.unlink()
        return True

    def others(self, file: Path) -> list[Path]:
        """Return the files of the same volume in another version."""
        name, case, _, key = file.name.rsplit("-", 3)
        return [other for other in file.parent.glob(f"{glob.escape(name)}-{case}-*-{key}") if other != file]

    def complaint(self, data: Mapping[Hashable, Any], file: Path) -> str:
        mend = "run `python -m tools.prepare` as for this store, with this run's settings; it does what is missing."
        for other in self.others(file):
            about = StoredVolume(other).about
            if about["origin"] != self.origin(data):
                return f"{case_name(data)} has changed since it was put into the store {self.store}; {mend}"
            then, now = (dict(flatten(what)) for what in (about["transforms"], self.description))
            name = next(name for name in [*then, *now] if then.get(name) != now.get(name))
            return (
                f"{case_name(data)} was put into the store {self.store} by other transforms, where {name} was "
                f"{then.get(name)} and is {now.get(name)} now; {mend}"
            )
        return f"{case_name(data)} is not in the store {self.store}; {mend}"


def sources(data: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> list[list[int]]:
    """Return size (bytes) and time (whole seconds, as some file systems keep it) of each file of a case."""
    files = [file for key in keys for file in ([data[key]] if isinstance(data[key], str) else data[key])]
    return [[os.stat(file).st_size, int(os.stat(file).st_mtime)] for file in files]


def describe(value: Any) -> Any:
    """Return what a transform is and was made with, for `json`; attributes that start with _ do not count.

    Of a function its name is all that is seen.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): describe(content) for key, content in value.items()}
    if isinstance(value, Sequence):
        return [describe(content) for content in value]
    if isinstance(value, Transform):
        public = {name: content for name, content in vars(value).items() if not name.startswith("_")}
        return {"_target_": type(value).__name__, **describe(public)}
    return getattr(value, "__qualname__", str(value) if isinstance(value, torch.dtype) else type(value).__qualname__)


def flatten(value: Any, name: str = "transforms") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a description with their ids."""
    if isinstance(value, dict | list):
        for key, content in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(content, f"{name}#{key}")
    else:
        yield name, value


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
