"""Read what the user lists: the cases of a data list, or the scans to infer."""

import json
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.cases import BIDS, OUTPUT, SUFFIX, is_nifti, output_names, patients, standard_patient, stem
from custom.data.twins import twins
from custom.errors import BadInput
from custom.files import read_json
from custom.text import did_you_mean

logger = logging.getLogger(__name__)
SECTIONS = ("training", "validation")


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
    apart: bool = True,
) -> list[dict]:
    """Read one section of a Decathlon data list.

    MONAI's `load_decathlon_datalist` turns any value that happens to be the name of an existing path into that path, a
    modality "ct" beside a folder `ct` for one; here only images and labels are paths.

    Args:
        datalist: JSON file, `{"training": [{"image": path}, ...], "validation": [...]}`, each entry with "modality",
            "label" or "fold" where those are asked for. An image of several channels is a list of paths. "patient" says
            whose it is; without it, its path does: see `custom.data.cases.patients`.
        section: "training" or "validation".
        dataset_dir: folder that relative paths start from.
        modalities: the known names; None asks for no modality.
        labelled: whether each entry needs a "label".
        fold: None takes the list's own sections. A number takes the entries of all sections that have a "fold": those
            of this fold to validate, the others to train.
        fraction: share of the entries to take, in (0, 1]; chosen at random, a smaller share out of a larger one.
        seed: of that choice.
        repeat: how often each entry comes in the list returned, so that an epoch takes as many crops of each scan.
        apart: False lets a scan or patient be on both sides: for curves of how well a training learns its own cases.

    Returns:
        A list of {"image": absolute path or paths, "case": path as written in the list}, and "modality" and "label" as
        asked for.

    Raises:
        BadInput: for a list that is missing, unreadable or empty; an entry that lacks what is asked for or what others
            have, with an unknown modality, or whose file does not exist; a fold that the list does not have; a scan to
            validate that is listed twice; a scan or a patient on both sides, see `check_sides`; a fraction out of
            range.
    """
    if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise BadInput(f"--label_fraction is a share above 0 and up to 1, got {fraction!r}.")
    datalist, dataset_dir = path_of(datalist, "--datalist"), os.path.abspath(path_of(dataset_dir, "--dataset_dir"))
    if not os.path.isfile(datalist):
        raise BadInput(
            f"The data list {datalist} can't be read (no such file); make one with `python -m tools.datalist`, or "
            f"name yours with --datalist."
        )
    content = read_json(datalist)
    other = "validation" if section == "training" else "training"
    sides = {name: entries_of(content, name, datalist) for name in (section, other)}
    if fold is not None:
        sides = dict(zip(SECTIONS, by_fold(sides, fold, datalist), strict=True))
    if not sides.get(section):
        raise BadInput(
            f'The data list {datalist} has no entries under "{section}"; it needs at least one '
            f"(`python -m tools.datalist` splits scans into training and validation)."
        )
    needed = ["image"] + ["modality"] * (modalities is not None) + ["label"] * labelled
    items, missing, seen = [], [], set()
    for where, entry in sides[section]:
        item: dict[str, Any] = {name: entry.get(name) for name in needed}
        check_entry(entry, needed, f"{datalist}: {where}")
        if modalities is not None:
            check_modality(entry["modality"], modalities, f"{datalist}: {entry['image']}")
        item["case"] = files_of(entry)[0]
        for name in {"image", "label"} & item.keys():
            paths = [item[name]] if isinstance(item[name], str) else item[name]
            paths = [os.path.join(dataset_dir, path) for path in paths]
            missing += [path for path in paths if not os.path.isfile(path)]
            item[name] = paths[0] if isinstance(item[name], str) else paths
        if str(item) in seen and section != "training":
            raise BadInput(f"{datalist}: {where} is listed twice, so that its metrics would count twice; take it out.")
        seen.add(str(item))
        items.append(item)
    if missing:
        raise BadInput(
            f"{missing[0]} of the data list {datalist} does not exist ({len(missing)} are missing); "
            f"relative paths start from --dataset_dir, which is {dataset_dir}."
        )
    if apart:
        check_sides(sides, datalist, dataset_dir)
    chosen = np.random.RandomState(seed).permutation(len(items))[: max(1, round(fraction * len(items)))]
    return [items[number] for number in sorted(chosen)] * repeat


Entries = list[tuple[str, dict]]  # each with where it stands


def path_of(value: Any, id: str) -> str:
    """Return a path given as an id; the command line makes a number of a folder's name such as 2026.

    Raises:
        BadInput: for what is neither.
    """
    if isinstance(value, str | Path) or type(value) is int:
        return str(value)
    raise BadInput(f"{id} is the path of a file or folder, got {value!r}; write it with a /, such as ./{value}.")


def entries_of(content: dict, section: str, datalist: str) -> Entries:
    """Return the entries of a section of a data list, none where it lacks the section or has null there.

    Raises:
        BadInput: for a section that is no list of objects, or in which some entries lack the patient that others have.
    """
    entries = content.get(section)
    entries = [] if entries is None else entries
    if not isinstance(entries, list):
        raise BadInput(f'{datalist}: "{section}" should be a list of entries, it is {entries!r:.60}.')
    found = [(f'entry {number} of "{section}"', entry) for number, entry in enumerate(entries)]
    for where, entry in found:
        if not isinstance(entry, dict):
            raise BadInput(
                f'{datalist}: {where} should be an object such as {{"image": "scan.nii.gz"}}, it is {entry!r}.'
            )
    check_all_have(found, "patient", datalist)
    return found


def check_all_have(entries: Entries, name: str, datalist: str) -> None:
    """Raise `BadInput` for an entry without what others have, such as a misspelt "fold"."""
    having = sum(entry.get(name) is not None for _, entry in entries)
    for where, entry in entries if having else ():
        if entry.get(name) is None:
            raise BadInput(
                f'{datalist}: {where} has no "{name}", which {having} others have'
                f"{did_you_mean(name, entry) or f'; it holds {entry}.'}"
            )


def check_entry(entry: dict, needed: Sequence[str], where: str) -> None:
    """Raise `BadInput` for an entry that lacks what is needed, or has something else there than text."""
    if missing := [name for name in needed if name not in entry]:
        hint = did_you_mean(missing[0], entry) or "."
        raise BadInput(f"{where} needs {' and '.join(map(json.dumps, needed))}, found {entry}{hint}")
    for name in needed:
        value = entry[name]
        texts = value if name == "image" and isinstance(value, list) and value else [value]
        if not all(isinstance(text, str) and text and "\0" not in text for text in texts):
            kind = "a file name, or a list of them" if name == "image" else "text"
            raise BadInput(f"{where} has the {name} {json.dumps(value)}, which should be {kind}; correct the list.")


def files_of(entry: dict) -> list[str]:
    """Return the images of an entry as written in the list, of a wrong entry none."""
    image = entry.get("image")
    image = image if isinstance(image, list) else [image]
    return image if all(isinstance(name, str) and name and "\0" not in name for name in image) else []


def number_of(value: Any) -> int | None:
    """Return a fold as a number, also of text and of what pandas makes of it; None for what is no whole number."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    return (
        int(value) if isinstance(value, int | float) and value == value // 1 and not isinstance(value, bool) else None
    )


def by_fold(sections: Mapping[str, Entries], fold: Any, datalist: str) -> tuple[Entries, Entries]:
    """Return the entries of all folds but one, and of that one.

    Raises:
        BadInput: for a fold that the list does not have, or entries without one beside others that have it.
    """
    entries: Entries = []
    for name, section in sections.items():
        check_all_have(section, "fold", datalist)
        if section and section[0][1].get("fold") is None:
            warn_once(f'{datalist}: the {len(section)} entries of "{name}" have no "fold", so --fold leaves them out.')
        else:
            entries += section
    folds = set()
    for where, entry in entries:
        if (number := number_of(entry["fold"])) is None:
            raise BadInput(f"{datalist}: {where} has the fold {entry['fold']!r}; it should be a whole number.")
        folds.add(number)
    if number_of(fold) not in folds:
        raise BadInput(
            f"The data list {datalist} has the folds {sorted(folds)}, not {fold}; give --fold one of them, or leave it "
            f'out for the list\'s own "training" and "validation" (`python -m tools.datalist --folds 5` makes folds).'
        )
    entries.sort(key=lambda pair: pair[0].endswith('"validation"'))  # whichever section was asked for
    held_out = [number_of(entry["fold"]) == number_of(fold) for _, entry in entries]
    trained = [pair for pair, held in zip(entries, held_out, strict=True) if not held]
    return trained, [pair for pair, held in zip(entries, held_out, strict=True) if held]


def check_sides(sides: Mapping[str, Entries], datalist: str, dataset_dir: str) -> None:
    """Check that no scan and no patient is on both sides, of which each is given with its entries.

    A patient whom names suggest, and who may be two, is noted in the log.

    Raises:
        BadInput: for a scan that is, by its path, a link or its voxels; or a patient by "patient" or by a name that
            leaves no doubt.
    """
    mend = (
        "it would be trained on and validated; move it to one side (`python -m tools.datalist` makes a list that keeps "
        'a patient together), or say whose each scan is by its "patient"'
    )
    known = [[pair for pair in entries if files_of(pair[1])] for entries in sides.values()]
    full = [[os.path.join(dataset_dir, file) for _, entry in side for file in files_of(entry)] for side in known]
    for one, two in twins(*full):
        kind = "are one file" if os.path.realpath(one) == os.path.realpath(two) else "hold the same voxels"
        names = [
            f'{os.path.relpath(file, dataset_dir)} of "{name}"' for file, name in zip((one, two), sides, strict=True)
        ]
        raise BadInput(f"{datalist}: {names[0]} and {names[1]} {kind}; {mend}.")
    entries = [entry for side in known for _, entry in side]
    whose = whose_are(entries, dataset_dir)
    ours, theirs = whose[: len(known[0])], whose[len(known[0]) :]
    for number, (patient, sure) in enumerate(ours):
        if (patient, sure) in theirs:
            pair = (files_of(entries[at])[0] for at in (number, len(ours) + theirs.index((patient, sure))))
            names = [f'{file} of "{name}"' for file, name in zip(pair, sides, strict=True)]
            said = f"{datalist}: {names[0]} and {names[1]} are of one patient, {patient}"
            if sure:
                raise BadInput(f"{said}; {mend}.")
            return warn_once(f"{said}, if their names tell it; {mend}.")


def whose_are(entries: Sequence[dict], dataset_dir: str) -> list[tuple[str, bool]]:
    """Return the patient of each entry of a data list and whether that is sure: by "patient", or by a standard name."""
    if entries and all(entry.get("patient") is not None for entry in entries):
        return [(str(entry["patient"]), True) for entry in entries]
    paths = [files_of(entry)[0] for entry in entries]
    if any(map(os.path.isabs, paths)):
        paths = [os.path.abspath(os.path.join(dataset_dir, path)) for path in paths]
        root = os.path.commonpath(list(map(os.path.dirname, paths)))
        if bids := BIDS.search(root):
            root = root[: bids.start(1)]
        paths = [os.path.relpath(path, root) for path in paths]
    found = patients(paths, [str(entry.get("modality")) for entry in entries])
    return [(patient, bool(standard_patient(path))) for patient, path in zip(found, paths, strict=True)]


@cache
def warn_once(message: str) -> None:
    """Note in the log, once in a process."""
    logger.warning(message)


def find_scans(
    images: str | Sequence, modality: str | None = None, modalities: Sequence[str] | None = None
) -> list[dict]:
    """List scans for inference.

    Args:
        images: a folder with .nii or .nii.gz files, one such file, or a list of files; a scan of several channels is a
            list of files in that list. In a folder `x_seg.nii` beside `x.nii` is no scan, as the log says. Scans of one
            name are told apart by their folders, as "case" and in what is written of them.
        modality: of all of them.
        modalities: the known names; None asks for no modality.

    Returns:
        As `read_datalist`.

    Raises:
        BadInput: when there is none, a file does not exist, or the modality is unknown.
    """
    if modalities is not None:
        check_modality(modality, modalities, "--modality")
    if not isinstance(images, list | tuple):
        folder = path_of(images, "--dataset_dir")
        images = [folder]
        if os.path.isdir(folder):
            names = [name for name in sorted(os.listdir(folder)) if is_nifti(name)]
            scans = set(map(stem, names))
            results = [name for name in names if (scan := OUTPUT.sub("", stem(name))) != stem(name) and scan in scans]
            if results:
                names = [name for name in names if name not in results]
                warn_once(f"{folder}: {results[0]} and {len(results) - 1} more are named as outputs, and left out.")
            images = [path for name in names if not os.path.isdir(path := os.path.join(folder, name))]
        if not images:
            raise BadInput(f"There is no .nii or .nii.gz file in the folder {folder}; name another with --dataset_dir.")
    items: list[dict[str, Any]] = []
    for image in images:
        several = isinstance(image, list | tuple)
        paths = [os.path.abspath(path_of(path, "--dataset_dir")) for path in (image if several else [image])]
        for path in paths:
            if not os.path.isfile(path):
                raise BadInput(f"The scan {path} does not exist; name a file or a folder with --dataset_dir.")
        if not paths:
            raise BadInput("A scan in the list of --dataset_dir has no file.")
        items.append({"image": paths if several else paths[0], "case": paths[0]})
        items[-1] |= {} if modalities is None else {"modality": modality}
    names = output_names([item["case"] for item in items])
    outputs: dict[str, str] = {}
    for item, name in zip(items, names, strict=True):
        file, suffix = item["case"], SUFFIX.search(item["case"])
        name = SUFFIX.sub("", name)
        if name in outputs:
            raise BadInput(f"{outputs[name]} and {file} would both be written as {name}; leave one of them out.")
        outputs[name] = file
        item["case"] = name + (suffix[0].lower() if suffix else os.path.splitext(file)[1])
    return items


def case_name(item: Mapping[Hashable, Any]) -> str:
    """Return the name of a case: its "case" or, where a program such as MONAI Label gives none, its (first) file."""
    if "case" in item:
        return item["case"]
    return item["image"] if isinstance(item["image"], str) else item["image"][0]


def check_modality(name: str | None, known: Sequence[str], where: str) -> None:
    """Raise `BadInput` that says where, for a modality that is not known."""
    if name not in known:
        raise BadInput(
            f"{where} has the modality {name!r}, which is not one of {list(known)}"
            + (did_you_mean(name, known) or ".")
            + ' A further modality is one entry of "modalities" in the config.'
        )
