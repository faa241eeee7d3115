"""Find the files of the sources: folders of any depth, links, and what zip, tar and gz files hold.

Nothing is written beside the sources. What an archive holds is unpacked into a working folder, which is removed at the
end, under names made of hashes: a member named "../../x" can't leave it, and no name is too long for a disk.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from custom.errors import BadInput
from tools.curate.privacy import Pseudonyms
from tools.curate.rules import MODALITIES, Rules

# Suffixes that say how to read a file; others tell nothing and are dropped in the working folder.
SUFFIXES = (
    *(".nii.gz", ".hdr.gz", ".img.gz", ".nii", ".hdr", ".img", ".mhd", ".mha", ".zraw", ".raw", ".nrrd", ".nhdr"),
    *(".mgz", ".mgh", ".dcm", ".gz", ".zip", ".tar", ".tgz"),
)
ARCHIVE_DEPTH = 3  # archives in archives
PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
POINTER = re.compile(rb"^(ElementDataFile\s*=\s*|data ?file:\s*)(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
DAMAGE = (
    *(OSError, EOFError, RuntimeError, NotImplementedError, ValueError),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
)


@dataclass(frozen=True)
class Source:
    """One SOURCE of the command line: its folder or file, the name that reports show, and the modality if given."""

    name: str
    path: str
    modality: str = ""


@dataclass(frozen=True)
class Found:
    """A file: where it is, its place ("source/path below it", which is kept as a hash only), and why it is none."""

    path: str
    place: str
    source: str
    reason: str = ""


def read_sources(arguments: list[str]) -> list[Source]:
    """Read the sources of the command line, each `path`, `name=path` or `name,modality=path`.

    A name that is a modality is one. Without a name a source is called by its number: the folder of an archive may be
    named by a patient.

    Raises:
        BadInput: for a path that does not exist, or a name given twice for different paths.
    """
    sources: list[Source] = []
    for number, argument in enumerate(arguments, 1):
        name, sign, path = argument.partition("=")
        if not sign or "/" in name or os.path.lexists(argument):
            name, path = f"source{number}", argument
        name, _, modality = name.partition(",")
        if name in MODALITIES and not modality:
            modality = name
        if modality and modality not in MODALITIES:
            raise BadInput(f"{argument}: there is no modality {modality}; known are {', '.join(MODALITIES)}.")
        if not re.fullmatch(r"[\w.+-]+", name):
            raise BadInput(f"{argument}: a source's name has letters, digits and . + - _ only.")
        path = os.path.abspath(os.path.expanduser(path))
        if not os.path.exists(path):
            raise BadInput(f"The source {path} does not exist.")
        if any(name == other.name for other in sources):
            name = f"{name}{number}"
        sources.append(Source(name, path, modality))
    return sources


def find(source: Source, scratch: Path, pseudonyms: Pseudonyms, rules: Rules) -> Iterator[Found]:
    """Yield the files of a source in a lasting order, those in archives too, each real folder once.

    Args:
        source: where to look.
        scratch: working folder for what archives hold; what is unpacked already is not unpacked again.
        pseudonyms: that name it there.
        rules: limits against archives that would fill the disk.

    Yields:
        One `Found` a file. A file that can't be one (empty, a dangling link, no permission, an archive that is
        damaged or unsafe) is yielded with its reason.
    """
    top = source.path
    if os.path.isfile(top):
        yield from _entry(top, f"{source.name}/{os.path.basename(top)}", source.name, scratch, pseudonyms, rules, 0)
    else:
        yield from _folder(top, source.name, source.name, scratch, pseudonyms, rules, 0)


def _folder(top: str, place: str, source: str, scratch: Path, pseudonyms: Pseudonyms, rules: Rules, depth: int):
    # Of its own stack instead of recursion: archives are nested very deep.
    seen: set[tuple[int, int]] = set()
    waiting = [(top, place)]
    while waiting:
        here, where = waiting.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                names = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            yield Found(here, where, source, f"can't be opened: {error.strerror}")
            continue
        folders = []
        for entry in names:
            its = f"{where}/{entry.name}"
            if entry.name.startswith("._") or entry.name == "__MACOSX":  # what macOS leaves behind
                continue
            try:
                if entry.is_dir():
                    folders.append((entry.path, its))
                    continue
            except OSError:
                pass  # told by the next step
            yield from _entry(entry.path, its, source, scratch, pseudonyms, rules, depth)
        waiting += reversed(folders)


def _entry(path: str, place: str, source: str, scratch: Path, pseudonyms: Pseudonyms, rules: Rules, depth: int):
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            yield Found(path, place, source, "not a regular file")
            return
        if not status.st_size:
            yield Found(path, place, source, "empty file")
            return
        if status.st_size > rules.max_file_gb * 1e9:
            yield Found(path, place, source, f"larger than max_file_gb = {rules.max_file_gb:g}")
            return
        kind = _archive_kind(path)
    except FileNotFoundError:
        yield Found(path, place, source, "missing file or dangling link")
        return
    except OSError as error:
        yield Found(path, place, source, f"can't be opened: {error.strerror}")
        return
    if not kind:
        yield Found(path, place, source)
        return
    if depth == ARCHIVE_DEPTH:
        yield Found(path, place, source, f"archives in archives, more than {ARCHIVE_DEPTH} deep")
        return
    folder = scratch / pseudonyms("archive", place, status.st_size, status.st_mtime_ns)
    done, notes = folder / "done", folder / "refused"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        refused = _unpack(path, kind, folder, status.st_size, pseudonyms, rules)
        notes.write_text("\n".join(refused))
        done.touch()
    for number, reason in enumerate(filter(None, notes.read_text().split("\n"))):
        yield Found(path, f"{place}!refused{number}", source, reason)
    lines = (folder / "names").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    names = dict(line.split("\0") for line in filter(None, lines))
    for name in sorted(names):
        file = folder / "files" / name
        yield from _entry(str(file), f"{place}!{names[name]}", source, scratch, pseudonyms, rules, depth + 1)


def _archive_kind(path: str) -> str:
    """Return "zip", "tar", "packed" (one file) or "": told by the content, as names are anything."""
    lower = path.lower()
    with open(path, "rb") as stream:
        head = stream.read(264)
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return (
            "" if lower.endswith((".docx", ".xlsx", ".pptx", ".odt", ".ods", ".odp", ".jar", ".whl", ".npz")) else "zip"
        )
    if head[257:262] == b"ustar":
        return "tar"
    opener = _opener(head)
    if opener is None or lower.endswith((".nii.gz", ".mgz", ".hdr.gz", ".img.gz")):
        return ""
    try:
        with opener(path) as stream:
            return "tar" if stream.read(264)[257:262] == b"ustar" else "packed"
    except DAMAGE:
        return "packed"


def _opener(head: bytes):
    return next((opener for magic, opener in PACKED.items() if head.startswith(magic)), None)


def _unpack(path: str, kind: str, folder: Path, packed: int, pseudonyms: Pseudonyms, rules: Rules) -> list[str]:
    """Unpack an archive under hashed names; return why members were refused. The names' meaning is in "names"."""
    files = folder / "files"
    refused: list[str] = []
    names: list[str] = []
    files.mkdir()
    most = min(packed * rules.max_unpacking, shutil.disk_usage(folder).free * 0.9) + 64e6
    total = 0
    try:
        for name, stream in _members(path, kind, refused):
            clean = PurePosixPath(name.replace("\\", "/"))
            if clean.is_absolute() or ".." in clean.parts or re.match(r"[A-Za-z]:", name):
                refused.append("unsafe path in an archive")
                continue
            if clean.name.startswith("._") or "__MACOSX" in clean.parts:
                continue
            hashed = _hashed(clean, pseudonyms)
            target = files / hashed
            target.parent.mkdir(exist_ok=True)
            if target.exists():  # two members of one name, as tar allows
                hashed, target = f"{hashed}-{len(names)}", target.with_name(f"{target.name}-{len(names)}")
            limit = int(min(rules.max_file_gb * 1e9, max(most - total, 0) + 1))
            size = _copy(stream, target, limit, clean, pseudonyms)
            total += size
            if size > limit:
                target.unlink()
                refused.append(
                    "a member of an archive that unpacks to more than max_unpacking, max_file_gb or the disk allow"
                )
            if total > most:  # what follows is not even read
                refused.append("an archive that unpacks to more than max_unpacking or the disk allow")
                break
            if size > limit:
                continue
            names.append(f"{hashed}\0{name.replace(chr(0), ' ')}".replace("\n", " "))
    except DAMAGE as error:
        encrypted = "password" in str(error) or "encrypted" in str(error)
        refused.append("encrypted archive" if encrypted else f"damaged archive: {type(error).__name__}")
    (folder / "names").write_text("\n".join(names), encoding="utf-8", errors="surrogateescape")
    return refused


def _members(path: str, kind: str, refused: list[str]):
    """Yield (name, stream) of the regular files of an archive."""
    if kind == "zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir():
                    continue
                try:
                    with archive.open(info) as stream:
                        yield info.filename, stream
                except DAMAGE as error:
                    if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the member's
                        raise
                    encrypted = "password" in str(error) or "encrypted" in str(error)
                    refused.append(
                        "encrypted archive" if encrypted else f"damaged member of an archive: {type(error).__name__}"
                    )
    elif kind == "tar":
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, archive.extractfile(member)
                elif not member.isdir():
                    refused.append("a link or device in an archive")
    else:
        with open(path, "rb") as raw:
            opener = _opener(raw.read(6))
        with opener(path) as stream:
            yield re.sub(r"\.(gz|bz2|xz)$", "", os.path.basename(path), flags=re.IGNORECASE), stream


def _hashed(name: PurePosixPath, pseudonyms: Pseudonyms) -> str:
    """Return "folder/name" made of hashes; the suffix stays, and so do pairs such as x.hdr and x.img."""
    lower = name.name.lower()
    suffix = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")
    stem = name.name[: len(name.name) - len(suffix)]
    return f"{pseudonyms('member', name.parent)}/{pseudonyms('member', stem)}{suffix}"


def _copy(stream, target: Path, limit: int, name: PurePosixPath, pseudonyms: Pseudonyms) -> int:
    """Write a member, up to one byte more than the limit, and return its size."""
    size = 0
    header = target.name.endswith((".mhd", ".nhdr"))
    with open(target, "wb") as copy:
        while size <= limit and (block := stream.read(1 << 20)):
            size += len(block)
            if header:  # the name of the voxels' file is in the text
                block = POINTER.sub(lambda found: found[1] + _renamed(found[2], name, pseudonyms), block)
            copy.write(block)
    return size


def _renamed(pointed: bytes, name: PurePosixPath, pseudonyms: Pseudonyms) -> bytes:
    text = pointed.decode("utf-8", "surrogateescape")
    if text.upper() in ("LOCAL", "LIST") or "/" in text:
        return pointed
    return _hashed(name.parent / text, pseudonyms).rpartition("/")[2].encode()
