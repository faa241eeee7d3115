"""From a data list to reproducible samples.

datalist: reads Decathlon data lists, finds scans for inference.
nifti: checks of NIfTI headers.
loading: loads scans and label maps and checks them, normalises by modality.
dataset: samples that depend on the seed, the epoch and the case alone.
store, store_format: scans that were prepared once, from which crops are read in milliseconds.
"""

import importlib

_MODULES = {"datalist": ("find_scans", "read_datalist"), "loading": ("ByModalityd", "LoadLabeld", "LoadScand")}
__all__ = [name for names in _MODULES.values() for name in names]  # noqa: PLE0604


def __getattr__(name: str):
    """Import a module when one of its names is used: tools that check headers alone start without MONAI and torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
