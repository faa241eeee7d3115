"""From a data list to reproducible samples.

datalist: reads Decathlon data lists, finds scans for inference.
nifti: checks of NIfTI headers.
loading: loads scans and label maps and checks them, normalises by modality.
dataset: samples that depend on the seed, the epoch and the case alone.
store, store_format: scans that were prepared once, from which crops are read in milliseconds.
"""

from custom.data.datalist import find_scans, read_datalist
from custom.data.loading import ByModalityd, LoadLabeld, LoadScand

__all__ = ["ByModalityd", "LoadLabeld", "LoadScand", "find_scans", "read_datalist"]
