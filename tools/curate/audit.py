"""Say what of a test set a pre-training has seen: the same scan, its near twin, or its patient."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from custom.data.cases import CONTRASTS, stem
from custom.errors import BadInput
from custom.files import read_json
from tools.curate.parallel import Failed, parallel
from tools.curate.rules import Rules
from tools.curate.twins import Fingerprint, fingerprint, near_twins

CONTRAST = re.compile(rf"(?:^|[_.\-])(?:{'|'.join(CONTRASTS)})$", re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """A scan of a data list: absolute path, as written in the list, section, and patient ("" if it is not told)."""

    path: str
    name: str
    section: str
    patient: str


@dataclass(frozen=True)
class Seen:
    """A test case that was seen: how ("exact", "near", "patient" or "name"), and by which scan of the pre-training."""

    case: str
    how: str
    by: str


def read_list(file: str) -> list[Entry]:
    """Return the scans of a Decathlon data list, of all its sections.

    Raises:
        BadInput: for a file that is no such list, or a scan that does not exist.
    """
    lists = read_json(file)
    entries = []
    for section in ("training", "validation", "test"):
        items = lists.get(section, [])
        for number, item in enumerate(items if isinstance(items, list) else [None]):
            item = {"image": item} if isinstance(item, str) else item if isinstance(item, dict) else {}
            images = item.get("image")
            for image in images if isinstance(images, list) and images else [images]:
                if not isinstance(image, str) or not image:
                    raise BadInput(f'{file}: entry {number} of "{section}" has no "image".')
                path = os.path.abspath(Path(file).parent / image)
                if not os.path.isfile(path):
                    raise BadInput(f"{path} of {file} does not exist; relative paths start from the list's folder.")
                entries.append(Entry(path, image, section, str(item.get("patient") or "")))
    if not entries:
        raise BadInput(f"The data list {file} names no scan.")
    return entries


def print_of(path: str) -> str:
    """Return the fingerprint of a file as text, "" for one that can't be read."""
    try:
        image = nibabel.load(path)
        voxels = np.asanyarray(image.dataobj)
        if voxels.ndim == 4 and voxels.shape[3] == 1:
            voxels = voxels[..., 0]
        return fingerprint(voxels, image.affine).to_text() if voxels.ndim == 3 and voxels.dtype.kind in "iuf" else ""
    except Exception:  # whatever the damage leads to concerns this file only
        return ""


def prints_of(
    entries: Sequence[Entry], workers: int, rules: Rules, progress: bool = True
) -> tuple[list[Entry], list[Fingerprint], list[Entry]]:
    """Return the entries that can be read, their fingerprints, and those that can't."""
    paths = sorted({entry.path for entry in entries})
    found: dict[str, str] = {}
    for path, text in tqdm(
        parallel(print_of, paths, workers, rules.timeout_s),
        "reading",
        len(paths),
        unit="scan",
        disable=None if progress else True,
    ):
        found[path] = "" if isinstance(text, Failed) else text
    readable = [entry for entry in entries if found[entry.path]]
    return (
        readable,
        [Fingerprint.from_text(found[entry.path]) for entry in readable],
        [e for e in entries if not found[e.path]],
    )


def audit(
    pretrain: str, tests: Sequence[str], workers: int, rules: Rules, progress: bool = True
) -> tuple[list[Seen], int, list[str]]:
    """Compare test sets with what was pre-trained on.

    Args:
        pretrain: data list of the pre-training; all its sections count, since validation chooses weights.
        tests: data lists of test sets.
        workers: processes.
        rules: when two volumes are near twins.
        progress: whether to draw bars.

    Returns:
        The cases that were seen, each once by the plainest way, how many cases there are, and which scans could not be
        read and so not be compared.

    Raises:
        BadInput: see `read_list`.
    """
    own = read_list(pretrain)
    others = [entry for file in tests for entry in read_list(file)]
    own, own_prints, bad = prints_of(own, workers, rules, progress)
    others_readable, other_prints, other_bad = prints_of(others, workers, rules, progress)
    digests = {one.digest: entry for entry, one in zip(own, own_prints, strict=True)}
    near = {two: own[one] for one, two, _ in near_twins(own_prints, rules, other_prints)}
    told = {entry.patient: entry for entry in own if entry.patient}
    named = _by_name(own)
    seen = []
    for number, (entry, one) in enumerate(zip(others_readable, other_prints, strict=True)):
        if one.digest in digests:
            seen.append(Seen(entry.name, "exact", digests[one.digest].name))
        elif number in near:
            seen.append(Seen(entry.name, "near", near[number].name))
        elif entry.patient in told and entry.patient:
            seen.append(Seen(entry.name, "patient", told[entry.patient].name))
        elif (key := _key(entry)) in named:
            seen.append(Seen(entry.name, "name", named[key].name))
    return seen, len(others), [entry.name for entry in bad + other_bad]


def _key(entry: Entry) -> str:
    """Return the name of a scan without its contrast, which tells the patient if it is not too short to tell one."""
    key = CONTRAST.sub("", stem(entry.path))
    return key if len(key) > 4 and any(letter.isdigit() for letter in key) else ""


def _by_name(entries: Sequence[Entry]) -> dict[str, Entry]:
    return {key: entry for entry in entries if (key := _key(entry))}


def describe(seen: Sequence[Seen], cases: int, unread: Sequence[str]) -> str:
    """Return the report as text: a line a case, and the counts."""
    words = {"exact": "the same voxels as", "near": "near twin of", "patient": "same patient as", "name": "named as"}
    lines = [f"{one.case}: {words[one.how]} {one.by}" for one in seen]
    lines += [f"{name}: can't be read, so that it was not compared" for name in unread]
    lines.append(f"{len(seen)} of {cases} test scans were seen in pre-training.")
    return "\n".join(lines)
