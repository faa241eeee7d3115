"""Whether the voxels of a scan are what its modality should have: Hounsfield units, and more than one value."""

from collections import Counter

import numpy as np

MOST_OF_ONE_VALUE = 0.98  # share; of the real scans that were looked at a small fetal brain in air has most, 0.972
LEAST_SHARE = 0.001  # of voxels, below which there is none of a tissue


class Values:
    """Counts over the voxels of a scan, slab by slab; `note` says what can't be.

    A CT in Hounsfield units has air near -1000 and fat near -100, and the larger part of what is above 300 is no
    soft tissue with 1024 added. Clipping to a window that shows an abdomen, such as [-175, 250], leaves the fat.
    """

    def __init__(self) -> None:
        self.voxels = self.fat = self.lung = self.dense = self.shifted = 0
        self.low, self.high = np.inf, -np.inf
        self.most: Counter[float] = Counter()  # of the values that fill most of a slab

    def add(self, slab: np.ndarray) -> "Values":
        """Count voxels, at least one, in units of the scan."""
        slab = slab.reshape(-1)
        self.voxels += slab.size
        self.low, self.high = min(self.low, float(slab.min())), max(self.high, float(slab.max()))
        self.lung += np.count_nonzero(slab < -500)
        self.fat += np.count_nonzero(slab < -50)
        self.dense += np.count_nonzero(slab > 300)
        self.shifted += np.count_nonzero((slab > 900) & (slab < 1200))
        middle = np.sort(slab[:: max(1, slab.size // 1001)])
        middle = middle[middle.size // 2]
        self.most[float(middle)] += np.count_nonzero(slab == middle)
        return self

    def note(self, modality: str | None) -> str:
        """Return what is odd about the values of a scan of a modality, None if that is not known; "" for nothing."""
        value, count = self.most.most_common(1)[0]
        if count > MOST_OF_ONE_VALUE * self.voxels:
            return f"{count / self.voxels:.1%} of the voxels are {value:g}"
        span = f"values from {self.low:g} to {self.high:g}"
        if modality == "ct" and self.fat < LEAST_SHARE * self.voxels:
            return f"{span}, not HU: no air near -1000, no fat near -100"
        if modality == "ct" and self.dense > 0.05 * (self.voxels - self.lung) and self.shifted > self.dense / 2:
            return f"{span}, not HU: soft tissue near 1000, as if 1024 was added"
        if modality not in (None, "ct") and self.lung > LEAST_SHARE * self.voxels:
            return f"{span}, as of a CT in HU"
        return ""
