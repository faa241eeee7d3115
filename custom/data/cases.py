"""Who is who: which files are scans, whose they are, and what is written of them. The one rule for all of these."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

SUFFIX = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
OUTPUT = re.compile("_(?:seg|restored)$")  # ends the names of what is written of a scan
CONTRASTS = (
    *("ct", "t1", "t1c", "t1ce", "t1gd", "t1n", "t1post", "t1w", "t2", "t2f", "t2w", "t2star", "flair", "pd", "pdw"),
    *("dwi", "adc", "swi", "mra", "pet", "mprage", "bold"),
)
# What tells a scan of a patient from another: BIDS entities, numbered words, words, dates.
VISIT = re.compile(
    r"(?:^|(?<=[_\-. ]))(?:"
    r"(?:ses|acq|run|rec|ce|dir|echo|desc|space|res)-[a-z0-9]+"
    r"|(?:session|visit|timepoint|time|tp|scan|study|exam|series|week|month|day|year|followup|fu|frame|phase|m|v)"
    r"[-_ ]?\d+[a-z]?"
    r"|baseline|follow-?up|bl|pre-?op|post-?op|pre|post"
    r"|(?:19|20)\d\d([-_.]?)[01]\d\1[0-3]\d"
    r")(?=$|[_\-. ])",
    re.IGNORECASE,
)
# What names no patient: words whose number counts something else, and folders of a whole set.
COLLECTION = re.compile(
    r"(?:^|[/_\-. ])(?:(?:site|cent(?:er|re)|hospital|institution|scanner|vendor|cohort|group|task|(?:data|sub)?set|"
    r"part|batch|fold|split|round|release|version|chunk)[_\-. ]?\d*"
    r"|(?:train|val|test)[a-z]*|images?[a-z]*|labels?[a-z]*|data|scans|nifti)$",
    re.IGNORECASE,
)
# Names that follow a standard: BIDS, those of archives (TCIA, BraTS, ADNI), and a number after a word for a patient.
BIDS = re.compile(r"(?:^|[/_])(sub-[A-Za-z0-9]+)")
ARCHIVE = re.compile(
    r"(?:^|/)((?:[A-Za-z]+_)*(?:TCGA-\w\w-\w{4}"
    r"|[A-Za-z][A-Za-z0-9]*-(?:[A-Za-z0-9]+-)*?(?!(?:19|20)\d\d(?!\d))\d{3,}(?:-\d{4,})*"
    r"|\d{3}_S_\d{4}))(?=$|[/_.\- ])"
)
PERSON = re.compile(
    r"(?:^|[/_\- ])((?:patient|participant|person|subject|subj|sub|pat|pt|p)"
    r"(?:[_\- ]?[a-z]{0,3}\d+|[_\- ]?[A-Z]))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
PLACES = re.compile(
    r"(?:^|/)(?:derivatives/[^/]+|rawdata|sourcedata|(?:images?|train|val|test)[^/]*|(?:anat|func|dwi|perf|pet)\d*)"
    r"(?=/|$)",
    re.IGNORECASE,
)
# What counts in a name: a number, or a pseudonym such as "0011f3deaf", in which numbers and letters take turns.
COUNT = re.compile(
    r"(?<![A-Za-z0-9])(?=[A-Za-z]*\d+[A-Za-z]+\d|(?:[A-Fa-f]+\d|\d+[A-Fa-f])[A-Fa-f0-9]{4})[A-Za-z0-9]+|\d+"
)
CHANNEL = re.compile(r"_000\d$")  # "_0000", "_0001": one channel of a patient


def is_nifti(name: str) -> bool:
    """Tell by a file's name whether it is a NIfTI volume that is not hidden (macOS leaves "._x.nii.gz")."""
    return bool(SUFFIX.search(name)) and not os.path.basename(name).startswith(".")


def stem(path: str) -> str:
    """Return the name of a scan's file without .nii or .nii.gz, or what other suffix it has."""
    name = os.path.basename(path)
    return SUFFIX.sub("", name) if SUFFIX.search(name) else os.path.splitext(name)[0]


def output_names(files: Sequence[str]) -> list[str]:
    """Return the name of what is written for each scan: that of its file, and of its folders where several share it.

    Args:
        files: paths of scans.

    Returns:
        paths without suffix, all different for different files. Those of `patient1/t2.nii.gz` and `patient2/t2.nii.gz`
        keep their folder; `x.nii` beside `x.nii.gz` keeps its suffix.
    """
    names: dict[str, str] = {}
    same: dict[str, list[str]] = defaultdict(list)
    for file in dict.fromkeys(files):
        same[stem(file)].append(file)
    for group in same.values():
        for name in (stem, os.path.basename):
            parts = {file: [*os.path.abspath(file).split(os.sep)[1:-1], name(file)] for file in group}
            lengths = range(1, max(map(len, parts.values())) + 1)
            tried = ({file: "/".join(part[-length:]) for file, part in parts.items()} for length in lengths)
            if told := next((names for names in tried if len(set(names.values())) == len(group)), None):
                names |= told
                break
    return [names[file] for file in files]


def standard_patient(path: str) -> str:
    """Return the patient whom a path names in a way that leaves no doubt, such as `sub-01` of BIDS; "" for none."""
    path = SUFFIX.sub("", path.replace(os.sep, "/"))
    if bids := BIDS.search(path):
        own = re.compile(rf"(?<![A-Za-z0-9]){bids[1][4:]}(?![A-Za-z0-9])")  # a folder of one visit of the patient
        parents = _parents(PLACES.sub("", path[: bids.start(1)]))
        return "/".join([*(part for part in parents if not own.search(part)), bids[1]])
    found = [match for kind in (ARCHIVE, PERSON) if (match := kind.search(path)) and not COLLECTION.search(match[1])]
    if not found:
        return ""
    first = min(found, key=lambda match: match.start(1))
    inside = path[: first.start(1)].rpartition("/")  # "ms_patient01": the words in front are part of the name
    return "/".join(filter(None, (*_parents(inside[0]), inside[2] + first[1])))


def patients(paths: Sequence[str], modalities: Sequence[str | None] = (), contrasts: Iterable[str] = ()) -> list[str]:
    """Name the patient of each scan by its path: what must not lie on both sides of a split.

    A patient is what `standard_patient` finds. In other names it is the shortest part up to a number, or a folder, by
    which there are at least as many patients as any of them has scans: `training01_02` is the second scan of
    `training01`, a folder `site2` with a hundred scans is no patient. Contrasts, visits, acquisitions and dates do not
    count, whether they name files or folders.

    Args:
        paths: of the scans, below a folder common to all.
        modalities: of each scan; "_0001" at the end of a name is a channel unless one modality has several of them.
        contrasts: names that end a contrast's file name, in addition to the usual ones.

    Returns:
        their names; "" for a file that is named by its contrast alone and lies in no folder.
    """
    names = "|".join(map(re.escape, sorted({*CONTRASTS, *contrasts}, key=len, reverse=True)))
    contrast = re.compile(rf"(?:^|[_.\-])(?:{names})$", re.IGNORECASE)
    modalities = modalities or [None] * len(paths)
    plain = [_plain(path, contrast) for path in paths]
    # A channel's number, unless it counts patients.
    counted: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for key, modality in zip(plain, modalities, strict=True):
        counted[CHANNEL.sub("", key), modality].add(key)
    several = {key for (key, _), full in counted.items() if len(full) > 1}
    plain = [key if (short := CHANNEL.sub("", key)) in several else short for key in plain]
    sure = [standard_patient(path) for path in paths]
    open_ = sorted({key for key, known in zip(plain, sure, strict=True) if not known})
    guessed = dict(zip(open_, _guess(open_), strict=True))
    return [known or guessed[key] for known, key in zip(sure, plain, strict=True)]


def _parents(folder: str) -> list[str]:
    """Return the folders above a patient that may tell patients of one name apart: no visits, no contrasts."""
    usual = re.compile(rf"(?:^|[_.\-])(?:{'|'.join(CONTRASTS)})$", re.IGNORECASE)
    return [part for whole in folder.split("/") if (part := usual.sub("", VISIT.sub("", whole)).strip("_-. "))]


def _plain(path: str, contrast: re.Pattern) -> str:
    """Return a path without suffix, contrasts and visits; of a file's name something is kept, if it is no contrast."""
    *folders, name = SUFFIX.sub("", path.replace(os.sep, "/")).split("/")
    name = contrast.sub("", name)
    kept = [part for folder in folders if (part := VISIT.sub("", contrast.sub("", folder)).strip("_-. "))]
    kept = [re.sub(r"[_\-]{2,}", "_", part) for part in kept]
    short = re.sub(r"[_\-]{2,}", "_", VISIT.sub("", name).strip("_-. "))
    short = contrast.sub("", short)
    return "/".join(filter(None, [*kept, short or name]))


def _cuts(path: str) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of a path that may be a patient, each with what is alike in those of the other patients."""
    for end in re.finditer(r"(?<=[^_\-/ ])(?=[_\-/ ]|$)", path):
        begin = path[: end.start()]
        if COLLECTION.search(begin):
            continue
        last = re.split(r"[_\-/ ]", begin)[-1]
        if any(letter.isdigit() for letter in last):
            yield begin, COUNT.sub("#", begin)
        elif path[end.start() : end.start() + 1] == "/":
            yield begin, f"{begin.rpartition('/')[0]}/*"


def _guess(paths: Sequence[str]) -> Iterator[str]:
    """Yield the patient of each path by comparing all of them; see `patients`."""
    scans: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path in paths:
        for begin, kind in _cuts(path):
            scans[kind][begin].add(path[len(begin) :])
    fits = set()
    for kind, by_patient in scans.items():
        rest = set().union(*by_patient.values())
        # A part that all names share, such as "BraTS2021", tells nobody.
        enough = max(map(len, by_patient.values())) <= len(by_patient) and (len(by_patient) > 1 or rest == {""})
        if kind.endswith("/*"):  # folders without a number are patients where they hold the same files
            enough &= len(rest) <= len(by_patient) and sum(map(len, by_patient.values())) > len(rest)
        if enough:
            fits.add(kind)
    for path in paths:
        yield next((begin for begin, kind in _cuts(path) if kind in fits), path)
