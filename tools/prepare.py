"""Run a data list's deterministic transforms once and keep the results in a store, from which training reads crops.

    python -m tools.prepare LIST.json STORE --bundle bundles/dae_pretraining --pixdim_mm "[2,2,2]"

Arguments that are not listed here are ids of the bundle's train.json, as in the training that is to read the store.
What the store has already is left as it is, so that the same command goes on where it was stopped or killed, and does
no more than what is new after the list, a scan or a setting has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from custom.data.store import Stored
from custom.engine.config_check import check_ids, declared_ids
from custom.errors import BadInput, user_message
from tools._cli import tool

SECTIONS = ("train", "validate")


class Preparation(Dataset):
    """Prepare a case when it is asked for, so that a `DataLoader`'s processes share the work."""

    def __init__(self, work: Sequence[tuple[Stored, dict]]) -> None:
        self.work = work

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> tuple[bool, str]:
        """Return whether there was anything to do, and why it failed ("" if it did not)."""
        stored, item = self.work[index]
        try:
            return stored.prepare(item), ""
        except Exception as error:
            if isinstance(error, OSError):  # the store's disk is full: no other case will do better
                raise BadInput(f"The store {stored.store} can't be written: {error}.") from error
            return True, user_message(error) or f"{item['case']}: {type(error).__name__}: {error}"


def work_of(parser: ConfigParser) -> list[tuple[Stored, dict]]:
    """Return each case of a config's sections once, with the transforms that the store is for."""
    work: dict[tuple[Path, ...], tuple[Stored, dict]] = {}
    for section in SECTIONS:
        transforms = parser.get_parsed_content(f"{section}#preprocessing").transforms
        for stored in [transform for transform in transforms if isinstance(transform, Stored)]:
            for item in parser.get_parsed_content(f"{section}#dataset#data"):
                work.setdefault(tuple(stored.files(item).values()), (stored, item))
    return list(work.values())


def read_config(bundle: Path, settings: dict[str, Any]) -> ConfigParser:
    """Return a bundle's train.json with settings.

    Raises:
        BadInput: for a folder without one, or an id that nothing uses.
    """
    parser, file = ConfigParser(), bundle / "configs/train.json"
    if not file.is_file():
        raise BadInput(f"{bundle} is no bundle's folder, it has no configs/train.json.")
    parser.read_config(str(file))
    parser.update(settings)
    check_ids(parser.config, declared_ids(file.parent))
    return parser


@contextlib.contextmanager
def alone(store: Path) -> Iterator[None]:
    """Make the folder of a store and keep other runs out of it; a lock ends with its process, however that ends.

    Raises:
        BadInput: when another run is at work there, or the folder can't be written.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        (store / ".lock").touch()
    except OSError as error:
        raise BadInput(f"The store {store} can't be written ({error.strerror}); name another folder.") from error
    with open(store / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"Another run is at work in the store {store}; wait for it, or name another.") from error
        yield


def run(options: argparse.Namespace) -> None:
    """Prepare what is missing, and print a report and the next command.

    Raises:
        BadInput: for wrong arguments, or a case that fails without --skip; what was done stays.
    """
    own = {"datalist": os.path.abspath(options.datalist), "store": os.path.abspath(options.store)}
    with alone(Path(options.store)):
        work = work_of(read_config(Path(options.bundle), {**options.ids, **own}))
        if not work:
            raise BadInput(f"{options.bundle} reads nothing from a store: it has no custom.data.store.Stored.")
        for part in Path(options.store).glob("*.part"):  # of a run that was killed
            part.unlink()
        done, failed = prepare(work, min(options.processes, len(work)), options.skip)
    size = sum(file.stat().st_size for stored, item in work for file in stored.files(item).values() if file.is_file())
    print(f"{done} prepared, {len(work) - done - len(failed)} were there, {len(failed)} failed; {size / 1e9:.3g} GB.")
    print("".join(f"Left out: {why}\n" for why in failed) + "Next:")
    skip = ["--bad_cases", "skip"] if failed else []
    given = [text for name, value in {**own, **options.ids}.items() for text in (f"--{name}", str(value))]
    config = ["--config_file", f"{options.bundle}/configs/train.json", "--bundle_root", options.bundle]
    print(shlex.join(["python", "-m", "monai.bundle", "run", *config, *given, *skip]))


def prepare(work: Sequence[tuple[Stored, dict]], processes: int, skip: bool) -> tuple[int, list[str]]:
    """Prepare what is missing; return how many cases were, and why others failed.

    Raises:
        BadInput: for a case that fails, unless such cases are to be skipped.
    """
    torch.set_num_threads(1)
    loader: Iterable = DataLoader(Preparation(work), None, num_workers=processes, in_order=False)
    done, failed = 0, []
    try:
        for new, why in tqdm(loader, "preparing", len(work), unit="case"):
            if why and not skip:
                raise BadInput(f"{why} (With --skip such a case is left out; what was done is kept.)")
            done += new and not why
            failed += [why] if why else []
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or user_message(error) is not None:
            raise
        raise BadInput(
            "A process was killed, perhaps for want of memory; the same command goes on, with fewer --processes."
        ) from error
    return done, failed


def arguments(add: Callable) -> None:
    add("datalist", metavar="LIST.json", help="data list, as the training's --datalist")
    add("store", metavar="STORE", help="folder to write to, made if missing; the training's --store")
    add("--bundle", required=True, metavar="DIR", help="whose training is to read the store")
    add("--skip", action="store_true", help="leave out a case that fails, and say so; else it ends the run")
    add("--processes", type=int, default=os.cpu_count(), metavar="N", help="at work (%(default)s); each holds a volume "
        "several times over, so that fewer need less memory")  # fmt: skip


main = tool("prepare", __doc__, arguments, run, "the same command goes on from here", takes_ids=True)

if __name__ == "__main__":
    sys.exit(main())
