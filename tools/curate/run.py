"""The run: find files, read headers, make volumes, judge, leave twins out, split; a row for each series says how."""

import contextlib
import fcntl
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from custom.errors import BadInput
from tools.curate import modality, quality, twins
from tools.curate.find import Source, find
from tools.curate.parallel import Failed, parallel
from tools.curate.privacy import Pseudonyms, read_salt
from tools.curate.rules import Rules
from tools.curate.series import Stack, stacks
from tools.curate.state import State
from tools.curate.work import Headers, Making, make, read_headers
from tools.datalist import split

VERSION = 2  # of records and measures; those of another one are made anew
CHUNK = 64  # files whose headers are read at once
OWN = ("volumes", "datalist.json", "report.csv", "page.html", "salt", "state.sqlite", ".work", ".lock")


@dataclass
class Row:
    """What was decided of a series, a file, or files of one kind: a line of the report."""

    id: str
    source: str
    status: str  # used, uncertain, twin, refused, left out, no image
    reason: str = ""
    modality: str = ""
    confidence: float = 0.0
    told_by: str = ""
    patient: str = ""
    split: str = ""
    format: str = ""
    images: int = 1
    twin_of: str = ""
    measures: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder of a set and keep other runs out of it; the lock ends with the process, however that ends.

    Raises:
        BadInput: when another run is at work there, or the folder can't be written or is something else's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = sorted(set(os.listdir(out)) - set(OWN))
        if foreign and not (out / "state.sqlite").exists():
            raise BadInput(f"{out} holds other things, such as {foreign[0]}; name an empty or new folder.")
        (out / "volumes").mkdir(exist_ok=True)
        (out / ".work").mkdir(mode=0o700, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise BadInput(f"The folder {out} can't be written ({error.strerror}); name another.") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"Another run is at work in {out}; wait for it, or name another folder.") from error
        yield


def curate(
    out: Path, sources: Sequence[Source], rules: Rules, workers: int, salt: str | None = None,
    named: dict[str, str] | None = None, progress: bool = True,
) -> list[Row]:  # fmt: skip
    """Make a pre-training set of sources.

    Args:
        out: folder of the set.
        sources: where scans are.
        rules: limits.
        workers: processes.
        salt: file with the secret of the pseudonyms; None takes or makes the set's own.
        named: modality of volumes that were uncertain, by id.
        progress: whether to draw bars.

    Returns:
        The rows of the report. Written are volumes and state; list, report and page are written by the caller.

    Raises:
        BadInput: for folders that can't be, or a disk that is full. What was done is kept.
    """
    for source in sources:
        if out.resolve().is_relative_to(Path(source.path).resolve()):
            raise BadInput(
                f"{out} lies in the source {source.path}, which nothing is written into; name another folder."
            )
        if Path(source.path).resolve().is_relative_to(out.resolve()):
            raise BadInput(f"The source {source.path} lies in {out}; name another folder for the set.")
    pseudonyms = Pseudonyms(read_salt(out, salt))
    state = State(out / "state.sqlite")
    for part in (out / "volumes").glob("*.part"):  # of a run that was killed
        part.unlink()
    for left in (out / ".work").glob("tmp*"):
        shutil.rmtree(left, ignore_errors=True)
    bar = _bars(progress)
    paths = _read(state, sources, out, pseudonyms, rules, workers, bar)
    held = list(_stacks(state, paths, rules, pseudonyms))
    by_id = {stack.id: stack for stack, *_ in held}
    _make(state, held, paths, out, rules, workers, bar)
    done = state.volumes()
    rows = _judge(held, done, {source.name: source for source in sources}, rules, named or {})
    prints = {row.id: twins.Fingerprint.from_text(done[row.id][2]) for row in rows if row.measures and done[row.id][2]}
    pairs = _twins(rows, prints, rules)
    _patients(rows, by_id, pairs)
    _split(rows, rules)
    # The folder holds what the list names and nothing else; what is used again after a change of rules is made again.
    used = {row.id for row in rows if row.status == "used"}
    lost = [item for item in held if item[0].id in used and not (out / "volumes" / f"{item[0].id}.nii.gz").is_file()]
    _make(state, lost, paths, out, rules, workers, bar, again=True)
    for file in (out / "volumes").glob("*.nii.gz"):
        if file.name.removesuffix(".nii.gz") not in used:
            file.unlink()
    state.close()
    shutil.rmtree(out / ".work", ignore_errors=True)
    return rows


def _bars(progress: bool):
    def bar(things: Iterable, text: str, total: int | None, unit: str) -> tqdm:
        return tqdm(things, text, total, unit=unit, disable=None if progress else True, smoothing=0.05)

    return bar


def _read(state: State, sources, out: Path, pseudonyms: Pseudonyms, rules: Rules, workers: int, bar):
    """Find all files and read the headers of those that are new; return (path, stamp, source) by id."""
    known, paths = state.stamps(), {}

    def new() -> Iterator[Headers]:
        batch = []
        for source in sources:
            for found in bar(find(source, out / ".work", pseudonyms, rules), f"finding {source.name}", None, "file"):
                id_ = pseudonyms("file", found.place)
                stamp = found.reason or _stamp(found.path)
                paths[id_] = (found.path, stamp, source.name)
                if known.get(id_) != stamp:
                    batch.append((id_, stamp, found))
                    if len(batch) == CHUNK:
                        yield Headers(tuple(batch), pseudonyms)
                        batch = []
        if batch:
            yield Headers(tuple(batch), pseudonyms)

    again = []
    for task, result in parallel(read_headers, new(), workers, rules.timeout_s):
        if isinstance(result, Failed):  # one of many: which one, the second pass tells
            again += [Headers((file,), pseudonyms) for file in task.files]
        else:
            state.keep_records(result)
    for task, result in parallel(read_headers, again, workers, rules.timeout_s):
        if isinstance(result, Failed):
            id_, stamp, _ = task.files[0]
            result = [(id_, stamp, {"kind": "refused", "reason": str(result)})]
        state.keep_records(result)
    return paths


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except OSError:  # removed since it was found, which its reader will tell
        return "gone"
    return f"{VERSION}:{status.st_size}:{status.st_mtime_ns}"


def _stacks(state: State, paths: dict, rules: Rules, pseudonyms: Pseudonyms) -> Iterator[tuple[Stack, str, str]]:
    """Yield (stack, source, stamp) of all that was found: volumes to make, and what is left out."""
    alike: Counter = Counter()
    records = (item for item in state.records() if item[0] in paths)
    for series, items in groupby(records, key=lambda item: item[1]):
        if series:
            files = [(id_, record) for id_, _, record in items]
            for stack in stacks(files, rules, pseudonyms):
                source = paths[stack.members[0][0]][2]
                yield stack, source, pseudonyms("stamp", *(paths[file][1] for file, _ in stack.members))
            continue
        for id_, _, record in items:
            _, stamp, source = paths[id_]
            kind = record["kind"]
            if kind == "image":
                reason = _left_out(record)
                yield Stack(pseudonyms("volume", id_), [(id_, 0)], record, reason, images=1), source, stamp
            else:
                reason = record.get("reason") or f"no image: {record.get('suffix', 'voxels of another file')}"
                alike[source, "refused" if kind == "refused" else "other", reason] += 1
    for (source, kind, reason), count in sorted(alike.items()):
        yield Stack("", [], {"kind": kind}, reason, images=count), source, ""


def _left_out(record: dict[str, Any]) -> str:
    """Return why a file is left out by its name, "" if it is not."""
    if "mask" in record["words"] or "mask" in record["folder_words"]:
        return "mask or label map, by its name"
    if "phantom" in record["words"]:
        return "phantom, by its name"
    if "animal" in record["words"] or "animal" in record["folder_words"]:
        return "animal or specimen, by its name"
    return ""


def _make(state: State, held, paths: dict, out: Path, rules: Rules, workers: int, bar, again: bool = False) -> None:
    """Make the volumes that are missing."""
    done = {} if again else {id_: stamp for id_, (stamp, *_) in state.volumes().items()}
    todo = [(stack, stamp) for stack, _, stamp in held if not stack.reason and done.get(stack.id) != stamp]

    def tasks() -> Iterator[Making]:
        for stack, stamp in todo:
            files = tuple((paths[file][0], frame) for file, frame in stack.members)
            copies = tuple((paths[one][0], paths[two][0]) for one, two in stack.copies)
            yield Making(stack.id, stamp, files, copies, stack.record, stack.affine, str(out), rules)

    if not todo:
        return
    try:
        for task, result in bar(
            # The converter itself ends after timeout_s; it is run twice at the most.
            parallel(make, tasks(), workers, 3 * rules.timeout_s),
            "making volumes",
            len(todo),
            "volume",
        ):
            if isinstance(result, Failed):  # without a stamp, so that the next run tries again
                state.keep_volume(task.id, "", {"reason": str(result)}, "", b"")
            else:
                state.keep_volume(task.id, task.stamp, *result)
    except OSError as error:
        raise BadInput(
            f"{out} can't be written ({error.strerror}); make room, then the same command goes on."
        ) from error


def _judge(held, done: dict, sources: dict[str, Source], rules: Rules, named: dict[str, str]) -> list[Row]:
    """Decide on each stack by its header, its measures and the rules; twins come later."""
    if unknown := set(named) - {stack.id for stack, *_ in held}:
        raise BadInput(f"--name {sorted(unknown)[0]}: there is no volume of this id; ids stand in report.csv.")
    rows = []
    for stack, source, _ in held:
        record = stack.record
        if not stack.id:
            rows.append(
                Row(
                    "",
                    source,
                    "no image" if record["kind"] == "other" else "refused",
                    stack.reason,
                    images=stack.images,
                )
            )
            continue
        row = Row(stack.id, source, "left out", stack.reason, images=stack.images)
        row.format = "DICOM" if record["kind"] == "dicom" else record["format"]
        rows.append(row)
        if stack.reason:
            row.modality = (record.get("modality") or "").lower()
            continue
        result = done[stack.id][1]
        if result["reason"]:
            row.status, row.reason = "refused", result["reason"]
            continue
        row.measures = result
        row.modality, row.confidence, row.told_by = modality.decide(record, sources[source].modality)
        if stack.id in named:
            row.modality, row.confidence, row.told_by = named[stack.id], 1.0, "named"
        if reasons := quality.judge(result, row.modality, rules):
            row.status, row.reason = "refused", "; ".join(reasons)
        elif not row.modality or row.confidence < rules.min_confidence:
            row.status, row.reason = "uncertain", f"modality: {row.told_by}"
        else:
            row.status = "used"
    return rows


def _twins(rows: list[Row], prints: dict[str, twins.Fingerprint], rules: Rules) -> list[tuple[str, str]]:
    """Leave out all but the best of twins; return the pairs of all twins, of any modality.

    Near twins of different modalities, such as T1 and T1ce of one head, are of one patient, but both are used.
    """
    own = {row.id: row for row in rows if row.id in prints}
    first: dict[str, str] = {}  # volume that stands for those with the same voxels, by their digest
    pairs = []
    for id_, fingerprint in prints.items():
        if first.setdefault(fingerprint.digest, id_) != id_:
            pairs.append((first[fingerprint.digest], id_))
    digests = list(first)
    near: dict[str, set[str]] = defaultdict(set)
    for one, two, _ in twins.near_twins([prints[first[digest]] for digest in digests], rules):
        near[digests[one]].add(digests[two])
        near[digests[two]].add(digests[one])
        pairs.append((first[digests[one]], first[digests[two]]))

    def worth(row: Row) -> tuple:
        extent = [n * mm for n, mm in zip(row.measures["shape"], row.measures["spacing_mm"], strict=True)]
        return row.status != "used", -round(math.prod(extent), -3), -math.prod(row.measures["shape"]), row.id

    kept: dict[str, Row] = {}  # by digest
    for row in sorted((row for row in own.values() if row.status in ("used", "uncertain")), key=worth):
        digest = prints[row.id].digest
        alike = sorted(
            kept[other].id for other in near[digest] if other in kept and kept[other].modality == row.modality
        )
        if digest in kept:
            row.status, row.twin_of, row.reason = "twin", kept[digest].id, f"exact twin of {kept[digest].id}"
        elif alike:
            row.status, row.twin_of, row.reason = "twin", alike[0], f"near twin of {alike[0]}"
        else:
            kept[digest] = row
    return pairs


def _patients(rows: list[Row], stacks_: dict[str, Stack], pairs: list[tuple[str, str]]) -> None:
    """Name the patient of each volume: one for all that an identifier, a series, a name or a twin joins."""
    volumes = [row for row in rows if row.measures]
    by_id = {row.id: number for number, row in enumerate(volumes)}
    marks: dict[str, int] = {}
    links = [(by_id[one], by_id[two]) for one, two in pairs]
    dicom = [stacks_[row.id].record for row in volumes if row.format == "DICOM"]
    known = {record["patient"] for record in dicom}
    owners: dict[str, set[str]] = defaultdict(set)  # a bad anonymiser gives one series to many patients
    for record in dicom:
        owners[record["series"]].add(record["patient"])
    names = []
    for number, row in enumerate(volumes):
        record = stacks_[row.id].record
        series = record["series"] if row.format == "DICOM" else record["series_uid"]
        # A part of a file's name is a patient's only where some DICOM says so.
        own = (
            [record["patient"]] if row.format == "DICOM" else [record["group"], *known.intersection(record["patients"])]
        )
        own += [f"series {series}"] if len(owners[series]) == 1 else []
        names.append(own[0])
        links += [(marks.setdefault(mark, number), number) for mark in own]
    for row, group in zip(volumes, twins.joined(len(volumes), links), strict=True):
        row.patient = names[group]


def _split(rows: list[Row], rules: Rules) -> None:
    """Put patients on one side each."""
    groups: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.status == "used":
            groups[row.patient].add(row.modality)
    held_out = split(groups, rules.validation_share, 0)
    for row in rows:
        if row.status == "used":
            row.split = "validation" if row.patient in held_out else "training"


def where(out: Path, id_: str, sources: Sequence[Source], rules: Rules) -> list[str]:
    """Return the files of a volume, found by their hashes in the sources that it was made of.

    Raises:
        BadInput: for an id that the set does not have.
    """
    pseudonyms, state = Pseudonyms(read_salt(out, None)), State(out / "state.sqlite")
    places = {}
    work = out / ".work"
    try:
        for source in sources:
            for found in find(source, work, pseudonyms, rules):
                places[pseudonyms("file", found.place)] = (found, source.name)
        paths = {file: (found.path, found.reason or "", source) for file, (found, source) in places.items()}
        for stack, *_ in _stacks(state, paths, rules, pseudonyms):
            if stack.id == id_:
                return list(dict.fromkeys(places[file][0].place for file, _ in stack.members))
    finally:
        state.close()
        shutil.rmtree(work, ignore_errors=True)
    raise BadInput(f"No volume of {out} and these sources has the id {id_}; ids stand in its report.csv.")
