"""Turn folders of 3D scans into one checked, split data list for self-supervised pre-training or segmentation.

    python -m tools.datalist OUT.json ct=/data/ct t1='/data/brain/**/*_t1.nii.gz' more.json
    python -m tools.datalist OUT.json ct=/btcv/imagesTr --labels imagesTr=labelsTr img=label --folds 5

Every file is opened before it is listed, since one broken file ends a training run hours after its start.
"""

from __future__ import annotations

import argparse
import csv
import glob
import hashlib
import io
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

from tqdm import tqdm

from custom.data.cases import is_nifti, patients
from custom.data.datalist import files_of
from custom.errors import BadInput
from custom.files import read_json, write_json, write_text
from custom.text import did_you_mean
from tools._cli import ROOT, near, say, tool
from tools.datalist_check import FileReport, inspect_file

MODALITIES = ("ct", "t1", "t1ce", "t2", "flair")
VALIDATION = 0.05  # share held out if neither --validation nor --folds is given
SHOWN = 5  # file names printed per kind of refusal
SHOWN_IDS = 50  # label ids printed; a scan taken for a label has thousands


@dataclass(frozen=True, order=True)
class Scan:
    """One scan to list: absolute path (links kept), modality, path below its source's root, absolute label, patient.

    Label and patient are "" where no source names them. A scan of several channels may have further files.
    """

    path: str
    modality: str
    place: str
    label: str = ""
    patient: str = ""
    others: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Of all channels."""
        return (self.path, *self.others)


def read_source(source: str, modalities: Iterable[str], labelled: bool = False) -> list[Scan]:
    """List the scans of one SOURCE of the command line: `modality=path`, or `path` of a Decathlon JSON.

    Of a JSON for a labelled list, the "test" entries without a label are left out, which is said.

    Raises:
        BadInput: unknown modality, missing path, no file there, or a JSON that is no Decathlon list.
    """
    name, sign, path = source.partition("=")
    if not sign or "/" in name:  # a path may hold "=" too
        name, path = "", source
    if not path:
        raise BadInput(f"'{source}' names no path.")
    if name:
        _known(name, modalities, f"'{source}'")
    path = os.path.abspath(os.path.expanduser(path))  # the shell leaves the ~ of ct=~/data alone
    if path.lower().endswith(".json") and os.path.isfile(path):
        found = _decathlon(Path(path), name, modalities, labelled)
        root = os.path.dirname(path)
    elif not name:
        raise BadInput(f"'{source}' needs a modality: write modality={source}.")
    else:
        root, files = _files(path, source)
        found = [(file, name, "", "", ()) for file in files]
    if not found:
        raise BadInput(f"'{source}' has no .nii or .nii.gz file.")
    return [
        Scan(file, kind, Path(os.path.relpath(file, root)).as_posix(), label, patient, others)
        for file, kind, label, patient, others in found
    ]


def _known(name: object, modalities: Iterable[str], where: str) -> str:
    """Return a modality name that is one of the known ones."""
    known = list(modalities)
    if name in known:
        return str(name)
    hint = did_you_mean(name, known) or "."
    raise BadInput(f"{where}: unknown modality '{name}'{hint} Known are {', '.join(known)}, or use --modalities.")


def _files(path: str, source: str) -> tuple[str, list[str]]:
    """Root and scans of a folder, a file or a pattern; a path that exists is never taken for a pattern."""
    if os.path.isdir(path):
        return path, _walk(path)
    if os.path.lexists(path):
        if not is_nifti(path):
            raise BadInput(f"'{source}' is neither a folder nor a .nii, .nii.gz or .json file.")
        return os.path.dirname(path), [path]
    if not glob.has_magic(path):
        raise BadInput(f"'{source}' does not exist.")
    root = path
    while glob.has_magic(root):
        root = os.path.dirname(root)
    found: set[str] = set()
    for match in glob.glob(path, recursive=True):
        found.update(_walk(match) if os.path.isdir(match) else [match] * is_nifti(match))
    return root, sorted(found)


def _walk(folder: str) -> list[str]:
    """Scans below a folder, through links but each real folder once; hidden files (macOS "._x.nii.gz") are none."""
    found: list[str] = []
    seen: set[str] = set()

    def closed(error: OSError) -> None:
        found.append(error.filename)  # a folder that cannot be listed gets a row, too

    for here, folders, names in os.walk(folder, followlinks=True, onerror=closed):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        scans = [n for n in names if is_nifti(n) and real not in seen]
        # Some archives unpack to x.nii/x.nii; a folder of that name without a scan is a mistake to report.
        found += [os.path.join(here, n) for n in scans] or [here] * is_nifti(here)
        seen.add(real)
    return found


def _decathlon(
    path: Path, modality: str, modalities: Iterable[str], labelled: bool
) -> list[tuple[str, str, str, str, tuple[str, ...]]]:
    """(absolute file, modality, absolute label, patient, further files) of all entries; a modality given wins."""
    lists = read_json(path)
    found, left_out = [], 0
    for key in ("training", "validation", "test"):
        entries = lists.get(key) if lists.get(key) is not None else []
        if not isinstance(entries, list):
            raise BadInput(f"{path} is not a Decathlon data list: '{key}' is not a list.")
        for number, entry in enumerate(entries):
            entry = entry if isinstance(entry, dict) else {"image": entry}
            if labelled and key == "test" and entry.get("label") is None:
                left_out += 1
                continue
            own, label, patient = map(entry.get, ("modality", "label", "patient"))
            where = f"{path}, '{key}' entry {number}"
            images = files_of(entry)
            if not images:
                raise BadInput(f"{where} has no 'image' that is a file name, or a list of them.")
            if label is not None and (not isinstance(label, str) or "\0" in label):
                raise BadInput(f"{where} has a 'label' that is not one file name: mend it or take it out.")
            if not modality and own is None:
                raise BadInput(f"{where} has no 'modality': add it, or write modality={path}.")
            label = os.path.abspath(path.parent / label) if label else ""
            kind = modality or _known(own, modalities, where)
            first, *others = (os.path.abspath(path.parent / image) for image in images)
            found.append((first, kind, label, "" if patient is None else str(patient), tuple(others)))
    if left_out:
        say(f"Note: {left_out} 'test' entries of {path} have no label and are left out.")
    return found


def class_names(sources: Iterable[str]) -> dict[str, dict]:
    """Return {"labels": ids and names of the classes}, where Decathlon sources have them and agree; else nothing."""
    files = [path for source in sources if os.path.isfile(path := source.partition("=")[2] or source)]
    named = [read_json(file).get("labels") for file in files if file.lower().endswith(".json")]
    agree = named and isinstance(named[0], dict) and all(names == named[0] for names in named)
    return {"labels": named[0]} if agree else {}


def add_files(scans: Iterable[Scan], label_pairs: list[str], channel_pairs: Sequence[str] = ()) -> list[Scan]:
    """Give each scan a label and the files of further channels, unless it has them by its JSON.

    The label is the scan's path with the last FROM of each pair FROM=TO replaced, one after the other. Each pair of a
    channel gives a file. Files that belong to another scan are left out. Without pairs, no further scan gets a file.

    Raises:
        BadInput: a pair has no FROM, a FROM is not in a path, or a scan's files are not all different.
    """
    found: list[tuple[Scan, str]] = []  # with what is wrong, which is no error if the file proves to be of another scan
    for scan in scans:
        own = [("labels", label_pairs)] * (not scan.label and bool(label_pairs))
        own += [("channels", [pair]) for pair in channel_pairs if not scan.others]
        made = [(option, *_replaced(scan.path, pairs, option)) for option, pairs in own]
        wrong = next((wrong for *_, wrong in made if wrong), "")
        label = next((path for option, path, _ in made if option == "labels"), scan.label)
        others = tuple(path for option, path, _ in made if option == "channels") or scan.others
        if not wrong and label and os.path.realpath(label) in map(os.path.realpath, (scan.path, *others)):
            origin = "its JSON entry" if scan.label else f"--labels '{' '.join(label_pairs)}'"
            wrong = f"{scan.path} would be its own label by {origin}; name another file."
        if not wrong and len(set(map(os.path.realpath, (scan.path, *others)))) <= len(others):
            origin = "its JSON entry" if scan.others else f"--channels '{' '.join(channel_pairs)}'"
            wrong = f"{scan.path} would have one file as two channels by {origin}; name another file."
        found.append((replace(scan, label=label, others=others), wrong))
    further = {
        os.path.realpath(file) for scan, wrong in found if not wrong for file in (scan.label, *scan.others) if file
    }
    found = [(scan, wrong) for scan, wrong in found if os.path.realpath(scan.path) not in further]
    if mistakes := [wrong for _, wrong in found if wrong]:
        raise BadInput(mistakes[0])
    return [scan for scan, _ in found]


def _replaced(path: str, pairs: Iterable[str], option: str) -> tuple[str, str]:
    """Return a path with the last FROM of each pair FROM=TO replaced, and what is wrong, "" for nothing."""
    result, wrong = path, ""
    for pair in pairs:
        old, sign, new = pair.partition("=")
        if not old or not sign:
            raise BadInput(f"--{option} '{pair}' is not of the form FROM=TO.")
        if old not in result and not wrong:
            wrong = f"--{option} '{pair}': no '{old}' to replace in {path}; mend the pair or narrow the sources."
        result = os.path.abspath(new.join(result.rsplit(old, 1)))
    return result, wrong


def unique(scans: Iterable[Scan]) -> tuple[list[Scan], list[Scan]]:
    """Sort scans and part them into those to keep and further names (links, spellings) of the same files.

    Raises:
        BadInput: one file is given under two modalities or with two labels.
    """
    by_file: dict[tuple[str, ...], list[Scan]] = {}
    for scan in sorted(scans, key=lambda scan: (not scan.label, scan)):  # of two names, that with a label is kept
        by_file.setdefault(tuple(map(os.path.realpath, scan.files)), []).append(scan)
    for first, *others in by_file.values():
        for other in others:
            both = first.path if first.path == other.path else f"{first.path} (also {other.path})"
            if other.modality != first.modality:
                raise BadInput(f"{both} is given both as {first.modality} and as {other.modality}.")
            if other.label and os.path.realpath(other.label) != os.path.realpath(first.label):
                raise BadInput(f"{both} is given with two labels, {first.label} and {other.label}: leave out one.")
    return sorted(s[0] for s in by_file.values()), sorted(scan for same in by_file.values() for scan in same[1:])


def group_keys(scans: Sequence[Scan], pattern: str | None = None, modalities: Iterable[str] = ()) -> dict[Scan, str]:
    """Name the patient of each scan: whose scans must not lie on both sides of the split.

    Args:
        scans: files with their place below the source's root, so that moving the data changes nothing.
        pattern: regular expression for the full path; its first group, or the whole match, is the patient. Else it is
            the one whom a JSON source names, or whom `custom.data.cases.patients` finds.
        modalities: names that end a contrast's file name, in addition to the usual ones.

    Raises:
        BadInput: the pattern is no regular expression or does not match a file.
    """
    if pattern is None:
        found = patients([scan.place for scan in scans], [scan.modality for scan in scans], modalities)
        return {
            scan: scan.patient or patient or Path(scan.path).parent.name
            for scan, patient in zip(scans, found, strict=True)
        }
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise BadInput(f"--patient '{pattern}' is not a regular expression: {error}.") from None
    keys = {}
    for scan in scans:
        match = regex.search(Path(scan.path).as_posix())
        if match is None or match[min(1, regex.groups)] is None:
            raise BadInput(f"--patient '{pattern}' does not match {scan.path}.")
        keys[scan] = match[min(1, regex.groups)]
    return keys


def join_twins(keys: Mapping[Scan, str], reports: Sequence[FileReport]) -> tuple[dict[Scan, str], list[list[Scan]]]:
    """Make one patient of those who have scans with the same voxels, and return such scans too."""
    same: dict[str, list[Scan]] = defaultdict(list)
    for scan, report in zip(keys, reports, strict=True):
        if report.digest and not report.reason:
            same[report.digest].append(scan)
    groups = [scans for scans in same.values() if len(scans) > 1]
    first = {key: key for key in keys.values()}  # of those who are one

    def find(key: str) -> str:
        while first[key] != key:
            key = first[key]
        return key

    for scans in groups:
        for scan in scans[1:]:
            one, other = sorted((find(keys[scans[0]]), find(keys[scan])))
            first[other] = one
    return {scan: find(key) for scan, key in keys.items()}, groups


def _ranked(groups: Mapping[str, Iterable[str]], seed: int) -> list[list[str]]:
    """Strata (groups with the same set of modalities), each ranked by a hash of seed and key."""
    strata: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, modalities in groups.items():
        strata[tuple(sorted(set(modalities)))].append(key)
    for keys in strata.values():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}:{key}".encode("utf-8", "surrogateescape")).digest())
    return [strata[kind] for kind in sorted(strata)]


def fold_groups(groups: Mapping[str, Iterable[str]], count: int, seed: int) -> dict[str, int]:
    """Deal the groups to folds in turn, so that folds differ by one group at most, in all and in each stratum."""
    return {key: number % count for number, key in enumerate(sum(_ranked(groups, seed), []))}


def split(groups: Mapping[str, Iterable[str]], fraction: float, seed: int) -> set[str]:
    """Choose the groups that go to validation.

    As they are ranked by a hash, a group's side depends neither on the order of the groups nor (but for those next
    to the border) on which others there are.

    Args:
        groups: the modalities of each group; each set of modalities is a stratum of its own.
        fraction: share of a stratum's groups for validation, 0 <= fraction < 1. Rounded, yet at least one group
            (unless fraction is 0) and never all of them.
        seed: another seed, another split.
    """
    chosen: set[str] = set()
    for keys in _ranked(groups, seed):
        count = min(max(round(len(keys) * fraction), fraction > 0), len(keys) - 1)
        chosen.update(keys[:count])
    return chosen


def check_files(
    scans: list[Scan], headers_only: bool, strict: bool, workers: int, channels: int = 1
) -> list[FileReport]:
    """Inspect scans and their labels in parallel processes, in order, with a progress bar on a terminal."""
    look = partial(_inspect_unless_stopped, headers_only=headers_only, strict=strict, channels=channels)
    workers = min(workers, len(scans))
    bar = partial(tqdm, total=len(scans), desc="checking", unit="file", disable=None)
    if workers <= 1:
        return list(map(look, bar(scans)))
    stop = multiprocessing.Event()
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(stop,)) as pool:
        try:
            return list(bar(pool.map(look, scans, chunksize=max(1, min(16, len(scans) // (4 * workers))))))
        except BrokenProcessPool:
            raise BadInput("A checking process was ended from outside (memory?): use fewer --workers.") from None
        finally:
            stop.set()  # after Ctrl-C the pool waits for what its workers have begun: no more than a file each


_stop: Event | None = None  # in a worker


def _start_worker(stop: Event) -> None:
    """Leave Ctrl-C to the main process (each worker would print a traceback), which then sets `stop`."""
    global _stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _stop = stop


def _inspect_unless_stopped(scan: Scan, headers_only: bool, strict: bool, channels: int) -> FileReport:
    if _stop is not None and _stop.is_set():
        return FileReport(scan.path, reason="stopped")
    return inspect_file(scan.path, headers_only, scan.label, scan.modality, strict, scan.others, channels)


def _span(rows: list[tuple[float, ...]]) -> str:
    """Range of each axis over files: "64-128 x 64 x 20-30"."""
    ends = [(f"{min(axis):.4g}", f"{max(axis):.4g}") for axis in zip(*rows, strict=True)]
    return " x ".join(low if low == high else f"{low}-{high}" for low, high in ends)


def _few(names: list[str]) -> str:
    """The first few names, a line each."""
    more = [f"... and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "".join(f"\n    {name}" for name in names[:SHOWN] + more)


def _print_report(rows: list[tuple[Scan, FileReport, str]], twice: list[Scan], twins: list[list[Scan]]) -> None:
    """Print what each modality has, the ids of all labels, what is there twice or odd, what was refused and why."""
    table = [("modality", "training", "validation", "voxels", "spacing (mm)", "voxels in all")]
    for modality in sorted({scan.modality for scan, report, _ in rows if not report.reason}):
        mine = [(r, side) for scan, r, side in rows if scan.modality == modality and not r.reason]
        sides = Counter(side for _, side in mine)
        total = f"{sum(math.prod(r.shape) for r, _ in mine):,}"
        spans = _span([r.shape[:3] for r, _ in mine]), _span([r.spacing for r, _ in mine])
        table.append((modality, str(sides["training"]), str(sides["validation"]), *spans, total))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if len(table) > 1 else ():
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if labelled := [report.ids for _, report, _ in rows if report.ids]:
        ids = [str(number) for number in sorted(set().union(*labelled))]
        more = f" ... {ids[-1]}" if len(ids) > SHOWN_IDS else ""
        say(f"labels found: {' '.join(ids[:SHOWN_IDS])}{more} (in {len(labelled)} scans)")
    if twice:
        say(f"Given more than once, listed once: {len(twice)}{_few([scan.path for scan in twice])}")
    for group in twins[:SHOWN]:
        say(f"Note: the same voxels, so on one side:{_few([scan.path for scan in group])}")
    if len(twins) > SHOWN:
        say(f"Note: ... and {len(twins) - SHOWN} more groups of scans with the same voxels")
    if odd := [f"{scan.path} ({scan.modality}: {r.values})" for scan, r, _ in rows if r.values and not r.reason]:
        say(f"Note: values that can't be, which --strict refuses: {len(odd)}{_few(odd)}")
    refused = defaultdict(list)
    for scan, report, _ in rows:
        if report.reason:
            kind, _, detail = report.reason.partition(": ")
            refused[kind].append(f"{scan.path} ({detail})" if detail else scan.path)
    for kind, names in sorted(refused.items(), key=lambda item: (-len(item[1]), item[0])):
        say(f"Refused, {kind}: {len(names)}{_few(names)}")


def build(options: argparse.Namespace) -> None:
    """Collect, check, split and write.

    Raises:
        BadInput: wrong arguments, or no file was accepted; nothing is written then.
    """
    out = Path(os.path.abspath(options.out))
    if out.suffix != ".json" or out.is_dir() or not out.parent.is_dir():
        raise BadInput(f"'{options.out}' must be a .json file in a folder that exists.")
    if not os.access(out.parent, os.W_OK):
        raise BadInput(f"'{out.parent}' cannot be written to.")
    share = VALIDATION if options.validation is None else options.validation
    if not 0 <= share < 1:
        raise BadInput(f"--validation must be at least 0 and less than 1, not {share}.")
    if options.folds is not None and (options.folds < 2 or options.validation is not None):
        raise BadInput("--folds must be at least 2 and, as fold 0 is held out, come without --validation.")
    if options.workers < 1:
        raise BadInput(f"--workers must be at least 1, not {options.workers}.")
    channels = options.in_channels or 1 + len(options.channels)
    if channels < 1 or options.channels and channels != 1 + len(options.channels):
        raise BadInput(
            f"--in_channels {channels} and the {1 + len(options.channels)} files of --channels do not agree."
        )
    if channels > 1 and options.labels is None:
        raise BadInput("Pre-training takes one channel; for a segmentation of several give --labels too.")
    if any(os.path.realpath(s.partition("=")[2] or s) == os.path.realpath(out) for s in options.source):
        raise BadInput(f"'{options.out}' is also a source and would be overwritten.")

    def name(path: str) -> str:
        return Path(path).relative_to(out.parent).as_posix() if Path(path).is_relative_to(out.parent) else path

    given = [
        scan
        for source in options.source
        for scan in read_source(source, options.modalities, options.labels is not None)
    ]
    if options.labels is None:  # pre-training needs none of the labels that a JSON names, not even that they exist
        given = [replace(scan, label="") for scan in given]
    scans, twice = unique(add_files(given, options.labels or [], options.channels))
    keys = group_keys(scans, options.patient, options.modalities)
    reports = check_files(scans, options.headers_only, options.strict, options.workers, channels)
    keys, twins = join_twins(keys, reports)
    accepted = [scan for scan, report in zip(scans, reports, strict=True) if not report.reason]
    groups: dict[str, set[str]] = defaultdict(set)
    for scan in accepted:
        groups[keys[scan]].add(scan.modality)
    folds = fold_groups(groups, options.folds, options.seed) if options.folds else {}
    held_out = {key for key in folds if not folds[key]} if folds else split(groups, share, options.seed)
    sides = {scan: "validation" if keys[scan] in held_out else "training" for scan in accepted}
    rows = [(scan, report, sides.get(scan, "")) for scan, report in zip(scans, reports, strict=True)]
    _print_report(rows, twice, twins)
    if not groups:
        raise BadInput(f"None of the {len(scans)} files can be used, so nothing was written.")
    if len(groups) < (options.folds or 0):
        raise BadInput(f"--folds {options.folds} is more than the {len(groups)} patients: use fewer.")

    lists: dict[str, list[dict[str, str | int | list[str]]]] = {"training": [], "validation": []}
    for scan in sorted(accepted, key=lambda scan: name(scan.path)):
        image = list(map(name, scan.files)) if scan.others else name(scan.path)
        entry: dict[str, str | int | list[str]] = {"image": image, "label": name(scan.label), "modality": scan.modality}
        entry |= {"patient": keys[scan], "fold": folds.get(keys[scan], "")}
        lists[sides[scan]].append({key: value for key, value in entry.items() if value != ""})
    bare = sum(not scan.label for scan in accepted)
    purpose = "self-supervised pre-training" if bare else "segmentation"
    held = f"{options.folds} folds, fold 0" if folds else f"{share:g}"
    about = f"{len(groups)} patients' 3D scans for {purpose}, {held} held out"
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("path", "label", "modality", "split", "shape", "spacing_mm", "status", "reason", "values"))
    for scan, report, side in rows:
        sizes = ("x".join(map(str, report.shape)), "x".join(f"{s:g}" for s in report.spacing))
        status = "refused" if report.reason else "accepted"
        writer.writerow(
            (name(scan.path), name(scan.label), scan.modality, side, *sizes, status, report.reason, report.values)
        )
    for scan in twice:
        writer.writerow((name(scan.path), name(scan.label), scan.modality, "", "", "", "duplicate", "listed once", ""))
    report_file = out.with_name(f"{out.stem}_report.csv")
    write_text(report_file, table.getvalue())
    named = {} if options.labels is None else class_names(options.source)
    write_json(out, {"name": out.stem, "description": about, "seed": options.seed, **named, **lists})
    if 0 < bare < len(accepted):
        say(f"Note: {bare} of {len(accepted)} scans have no label, so this is no list for segmentation.")
    if share and not lists["validation"]:
        say("Note: nothing is held out, as there is one patient of each kind.")
    labels = sum("label" in Path(scan.place).parent.as_posix().lower() for scan in scans)
    if labels:
        say(f"Note: {labels} files lie in folders named like labels; are they scans?")
    say(f"All files, one per row: {report_file}\nData list: {out}\nNext:")
    bundle, file = shlex.quote(near(ROOT / "bundles/dae_pretraining")), shlex.quote(str(out))
    train = (
        f"python -m monai.bundle run --config_file {bundle}/configs/train.json --bundle_root {bundle} --datalist {file}"
    )
    say(train if bare else f"python -m tools.adapt {file} adapted")


def arguments(add: Callable) -> None:
    add("out", metavar="OUT.json", help="data list to write; OUT_report.csv beside it gets one row per file")
    add("source", metavar="SOURCE", nargs="+", help="modality=path: a folder, a quoted pattern (** goes into folders), "
        "a file, or a Decathlon JSON, which needs no 'modality=' if its entries have a modality")  # fmt: skip
    add("--labels", nargs="*", metavar="FROM=TO", help="for segmentation (write it after the sources): a scan's label "
        "is the one named in its JSON source, else its path with the last FROM replaced by TO, pair by pair, say "
        "'imagesTr=labelsTr img=label' or '_T2w=_dseg'; a label is never listed as a scan")  # fmt: skip
    add("--channels", nargs="+", metavar="FROM=TO", default=[], help="files of a scan's further channels, one by each "
        "pair, as --labels makes that of its label, say '_t1=_t1ce _t1=_t2'; a JSON source may list them")  # fmt: skip
    add("--in_channels", type=int, metavar="N", help="channels of each scan: the volumes of a 4D file, or files; by "
        "default one, and one by each pair of --channels")  # fmt: skip
    add("--validation", type=float, metavar="SHARE", help=f"share of the patients to hold out ({VALIDATION})")
    add("--folds", type=int, metavar="K", help="share the patients out to K folds and hold out fold 0, not a share")
    add("--seed", type=int, default=0, help="another seed gives another split (%(default)s)")
    add("--patient", metavar="REGEX", help="its first group in a file's full path names the patient, never split; by "
        'default the "patient" of a JSON source, or what a path tells, such as sub-01 or TCGA-02-0006')  # fmt: skip
    add("--strict", action="store_true", help="refuse scans with values that their modality can't have, such as a CT "
        "that is not in HU, which else are noted")  # fmt: skip
    add("--headers-only", action="store_true", help="do not read the voxels: quick, but misses broken files")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    known = f"all allowed names ({' '.join(MODALITIES)}); pre-training needs a JSON entry for each further one"
    add("--modalities", nargs="+", default=MODALITIES, metavar="NAME", help=known)


main = tool("datalist", __doc__, arguments, build)

if __name__ == "__main__":
    sys.exit(main())
