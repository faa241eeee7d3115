"""Read what the user lists: the cases of a data list, or the scans to infer."""

import glob
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from custom.errors import BadInput
from custom.text import did_you_mean


def read_datalist(
    datalist: str | Path,
    section: str,
    dataset_dir: str | Path,
    modalities: Sequence[str] | None = None,
    labelled: bool = False,
    fold: int | None = None,
    fraction: float = 1,
    seed: int = 0,
    repeat: int = 1,
) -> list[dict]:
    """Read one section of a Decathlon data list.

    MONAI's `load_decathlon_datalist` turns any value that happens to be the name of an existing path into that path, a
    modality "ct" beside a folder `ct` for one; here only images and labels are paths.

    Args:
        datalist: JSON file, `{"training": [{"image": path}, ...], "validation": [...]}`, each entry with "modality",
            "label" or "fold" where those are asked for. An image of several channels is a list of paths.
        section: "training" or "validation".
        dataset_dir: folder that relative paths start from.
        modalities: the known names; None asks for no modality.
        labelled: whether each entry needs a "label".
        fold: None takes the list's own sections. A number takes all entries that have a "fold" instead: those of this
            fold to validate, the others to train.
        fraction: share of the entries to take, in (0, 1]; chosen at random, a smaller share out of a larger one.
        seed: of that choice.
        repeat: how often each entry comes in the list returned, so that an epoch takes as many crops of each scan.

    Returns:
        A list of {"image": absolute path or paths, "case": path as written in the list}, and "modality" and "label" as
        asked for.

    Raises:
        BadInput: for a list that is missing, unreadable or empty; an entry that lacks what is asked for, with an
            unknown modality, or whose file does not exist; a fold that the list does not have; a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise BadInput(f"--label_fraction is a share above 0 and up to 1, got {fraction}.")
    try:
        content = json.loads(Path(datalist).read_text())
        entries = content.get(section, [])
    except OSError as error:
        raise BadInput(
            f"The data list {datalist} can't be read ({error.strerror}); make one with `python -m tools.datalist`, or "
            f"name yours with --datalist."
        ) from error
    except (ValueError, AttributeError) as error:
        raise BadInput(f"The data list {datalist} is not a JSON object: {error}.") from error
    needed = ["image"] + ["modality"] * (modalities is not None) + ["label"] * labelled
    if fold is not None:
        entries = [e for name in ("training", "validation") for e in content.get(name, []) if "fold" in e]
        folds = sorted({entry["fold"] for entry in entries})
        if fold not in folds:
            raise BadInput(
                f"The data list {datalist} has the folds {folds}, not {fold}; give --fold one of them, or leave it out "
                f'for the list\'s own "training" and "validation" (`python -m tools.datalist --folds 5` makes folds).'
            )
        entries = [entry for entry in entries if (entry["fold"] == fold) is (section == "validation")]
    if not entries:
        raise BadInput(
            f'The data list {datalist} has no entries under "{section}"; it needs at least one '
            f"(`python -m tools.datalist` splits scans into training and validation)."
        )
    items, missing = [], []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.keys() >= set(needed):
            raise BadInput(
                f'{datalist}: entry {number} of "{section}" needs {" and ".join(map(json.dumps, needed))}, '
                f"found {entry}."
            )
        item = {name: entry[name] for name in needed}
        if modalities is not None:
            check_modality(entry["modality"], modalities, f"{datalist}: {entry['image']}")
        item["case"] = entry["image"] if isinstance(entry["image"], str) else entry["image"][0]
        for name in {"image", "label"} & item.keys():
            paths = [item[name]] if isinstance(item[name], str) else item[name]
            paths = [os.path.join(os.path.abspath(dataset_dir), path) for path in paths]
            missing += [path for path in paths if not os.path.isfile(path)]
            item[name] = paths[0] if isinstance(item[name], str) else paths
        items.append(item)
    if missing:
        raise BadInput(
            f"{missing[0]} of the data list {datalist} does not exist ({len(missing)} are missing); "
            f"relative paths start from --dataset_dir, which is {os.path.abspath(dataset_dir)}."
        )
    chosen = np.random.RandomState(seed).permutation(len(items))[: max(1, round(fraction * len(items)))]
    return [items[number] for number in sorted(chosen)] * repeat


def find_scans(
    images: str | Sequence, modality: str | None = None, modalities: Sequence[str] | None = None
) -> list[dict]:
    """List scans for inference.

    Args:
        images: a folder with .nii or .nii.gz files, one such file, or a list of files; a scan of several channels is a
            list of files in that list.
        modality: of all of them.
        modalities: the known names; None asks for no modality.

    Returns:
        As `read_datalist`.

    Raises:
        BadInput: when there is none, a file does not exist, or the modality is unknown.
    """
    if modalities is not None:
        check_modality(modality, modalities, "--modality")
    if isinstance(images, str):
        folder = images
        images = sorted(glob.glob(os.path.join(folder, "*.nii*"))) if os.path.isdir(folder) else [folder]
        if not images:
            raise BadInput(f"There is no .nii or .nii.gz file in the folder {folder}; name another with --dataset_dir.")
    items = []
    for image in images:
        paths = [os.path.abspath(path) for path in ([image] if isinstance(image, str) else image)]
        for path in paths:
            if not os.path.isfile(path):
                raise BadInput(f"The scan {path} does not exist; name a file or a folder with --dataset_dir.")
        item = {"image": paths[0] if isinstance(image, str) else paths, "case": os.path.basename(paths[0])}
        items.append(item if modalities is None else {**item, "modality": modality})
    return items


def case_name(item: Mapping[Hashable, Any]) -> str:
    """Return the name of a case: its "case" or, where a program such as MONAI Label gives none, its (first) file."""
    if "case" in item:
        return item["case"]
    return item["image"] if isinstance(item["image"], str) else item["image"][0]


def check_modality(name: str, known: Sequence[str], where: str) -> None:
    """Raise `BadInput` that says where, for a modality that is not known."""
    if name not in known:
        raise BadInput(
            f"{where} has the modality {name!r}, which is not one of {list(known)}"
            + (did_you_mean(name, known) or ".")
            + ' A further modality is one entry of "modalities" in the config.'
        )
