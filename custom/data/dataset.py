"""Samples that depend on the seed, the epoch and the case alone, and a policy for cases that can't be read."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import CacheDataset, DistributedSampler

from custom.data.datalist import case_name
from custom.errors import BadInput, user_message

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
        BadInput: for an unknown policy, or when too many cases fail; with "stop" also what the transform raises.
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


def derive_seed(*numbers: int) -> int:
    """Return a seed in [0, 2^32) that is a function of numbers, such as a seed, an epoch and an index."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
