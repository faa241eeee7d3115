"""Samples that depend on the seed, the epoch and the case alone, and a policy for cases that can't be read."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import CacheDataset, DistributedSampler
from monai.transforms import CropForegroundd, Spacingd

from custom.data.datalist import case_name
from custom.data.nifti import fault_of_header, read_header
from custom.data.store import Stored
from custom.errors import BadInput, user_message

SAMPLED = 200  # headers that are read to estimate a cache
MOST_PACKED = 1032  # bytes that gzip can make of one
logger = logging.getLogger(__name__)


class EpochSampler(DistributedSampler):
    """Order the items of an epoch at random, as a function of the seed and the epoch, in equal shares for the ranks.

    MONAI's engines tell it the epoch, as they do every `DistributedSampler`.

    Args:
        dataset: a `CaseDataset`.
        seed: the same on all ranks.

    Yields:
        (epoch, index of an item).
    """

    def __init__(self, dataset: "CaseDataset", seed: int = 0) -> None:
        ranks = {"num_replicas": idist.get_world_size(), "rank": idist.get_rank()}
        super().__init__(dataset, shuffle=True, seed=seed, **ranks)
        self.start = 0  # items of this rank that an interrupted epoch has had

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in super().__iter__()][self.start :])


class CaseDataset(CacheDataset):
    """MONAI's `CacheDataset`, whose random transforms depend on the seed, the epoch and the item alone.

    So a run is the same with any number of workers, and after an interruption. A case that can't be loaded or
    transformed can be left out: the next one that can takes its place.

    Args:
        data: items; those of the same name, see `case_name`, are one case.
        transform: a MONAI `Compose`.
        seed: of the random transforms.
        bad_cases: "stop" at a case that fails, or "skip" it and say so once.
        max_bad_share: with "skip", the share of all items above which the run stops nevertheless, in [0, 1].
        kwargs: see `CacheDataset`.

    Raises:
        BadInput: for an unknown policy, for a cache that can't fit (see `check_cache`), or when too many cases fail;
            with "stop" also what the transform raises.
    """

    def __init__(
        self,
        data: Sequence[dict],
        transform: Any,
        seed: int = 0,
        bad_cases: str = "stop",
        max_bad_share: float = 0.05,
        **kwargs,
    ) -> None:
        if bad_cases not in ("stop", "skip"):
            raise BadInput(f'--bad_cases is "stop" or "skip", got {bad_cases!r}.')
        self.seed = seed
        self.skip = bad_cases == "skip"
        self.max_bad_share = max_bad_share
        # In shared memory, so that what one worker finds all know, and in the next epoch too.
        self.bad = torch.zeros(len(data), dtype=torch.bool).share_memory_()
        self.lock = torch.multiprocessing.Lock()
        check_cache(data, transform, kwargs.get("cache_rate", 1.0))
        super().__init__(data, transform, **kwargs)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, index = item
        for other in range(index, index + len(self)):
            other %= len(self)
            if not self.bad[other]:
                self.transform.set_random_state(seed=derive_seed(self.seed, epoch, index))
                try:
                    return self._transform(other)
                except Exception as error:
                    self._report(other, error)
        raise BadInput("No case can be read.")

    def left_out(self) -> str:
        """Say how many cases failed in this process and its workers; "" for none."""
        cases = {case_name(item) for item in self.data}
        failed = {case_name(item) for item, bad in zip(self.data, self.bad.tolist(), strict=True) if bad}
        return f"Left out: {len(failed)} of {len(cases)} cases, each of which is named in the log\n" if failed else ""

    def _load_cache_item(self, idx: int) -> Any:
        try:
            return super()._load_cache_item(idx)
        except Exception as error:
            self._report(idx, error)

    def _report(self, index: int, error: Exception) -> None:
        """Mark all items of the case that failed, or stop."""
        if not self.skip:
            raise error
        case = case_name(self.data[index])
        with self.lock:  # two workers may meet the case at once
            if not self.bad[index]:
                logger.warning(f"Left out: {user_message(error) or f'{case}: {error}'}")
            self.bad |= torch.tensor([case_name(other) == case for other in self.data])
        if self.bad.sum() > self.max_bad_share * len(self):
            raise BadInput(
                f"{int(self.bad.sum())} of {len(self)} items can't be read, more than --max_bad_share "
                f"{self.max_bad_share:g}; the last: {user_message(error) or f'{case}: {error}'}"
            ) from error


def check_cache(data: Sequence[dict], transform: Any, rate: float) -> None:
    """Refuse to cache scans that the machine's memory can't hold, before the first of them is read.

    The least that they take is known from their headers: 4 bytes for each voxel after resampling, in each process of
    the machine. Of scans from a store, or whose foreground is cropped, it is not.

    Args:
        data: items, whose "image" is a file or several.
        transform: of them, which begins with `Stored`.
        rate: share of the scans that is cached.

    Raises:
        BadInput: for more than the machine's memory.
    """
    first = next(iter(getattr(transform, "transforms", ())), None)
    scans = list(
        {str(item["image"]): item["image"] for item in data if isinstance(item.get("image"), str | list)}.values()
    )
    if not (isinstance(first, Stored) and first.store is None and scans and rate):
        return
    steps = first.transforms.transforms
    if any(isinstance(step, CropForegroundd) for step in steps):
        return
    pixdims = [step.spacing_transform.pixdim for step in steps if isinstance(step, Spacingd)]
    some = scans[:: len(scans) // SAMPLED + 1]
    size = sum(bytes_of(scan, pixdims) for scan in some) / len(some) * len(scans) * rate
    size *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size > memory_bytes():
        raise BadInput(
            f"{rate:.0%} of the {len(scans)} scans would be kept in memory, {size / 2**30:,.1f} GiB in all processes "
            f"here; this machine has {memory_bytes() / 2**30:,.1f} GiB: make a store by `python -m tools.prepare` and "
            f"give --store, or give --cache_rate {rate * memory_bytes() / size / 2:.1g} or less."
        )


def bytes_of(scan: str | Sequence[str], pixdims: Sequence[Any]) -> float:
    """Return what a scan takes in memory, by its header: 0 for a damaged one, which the loader tells better."""
    files = [scan] if isinstance(scan, str) else scan
    try:
        header = read_header(files[0])
        voxels = np.prod(header.get_data_shape(), dtype=float)
        if fault_of_header(header) or voxels > MOST_PACKED * os.path.getsize(files[0]):
            return 0
    except Exception:
        return 0
    return float(4 * len(files) * voxels * (np.prod(header.get_zooms()[:3]) / np.prod(pixdims[0]) if pixdims else 1))


def memory_bytes() -> int:
    """Return the memory of the machine, or what a container may take of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def derive_seed(*numbers: int) -> int:
    """Return a seed in [0, 2^32) that is a function of numbers, such as a seed, an epoch and an index."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
