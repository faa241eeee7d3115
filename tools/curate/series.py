"""Put DICOM images together to volumes, and check by rule that they can be one.

The images of a series are told apart by what makes them different volumes (type, size, orientation, echo, phase, b
value, time), then put in order along the normal of their planes. What the converter does is compared with this later.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.curate.privacy import Pseudonyms
from tools.curate.rules import Rules

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass
class Stack:
    """Images that make a volume, or are left out together.

    Args:
        id: pseudonym, lasting over runs.
        members: (file, frame) of each slice, in order along the normal.
        record: header of the first of them.
        reason: why it is left out, "" if it is not.
        affine: voxel (column, row, slice) to RAS in mm, by the headers.
        copies: pairs of files with one SOPInstanceUID; the second is left out if both are alike.
        images: how many images there are.
    """

    id: str
    members: list[tuple[str, int]]
    record: dict[str, Any]
    reason: str = ""
    affine: list[list[float]] | None = None
    copies: list[tuple[str, str]] = field(default_factory=list)
    images: int = 0


def stacks(files: Iterable[tuple[str, dict[str, Any]]], rules: Rules, pseudonyms: Pseudonyms) -> list[Stack]:
    """Part the images of one series into volumes.

    Args:
        files: (file, record of `read_record`) of all images with one SeriesInstanceUID, from wherever they lie.
        rules: limits.
        pseudonyms: for the volumes' names.

    Returns:
        The volumes and what is left out, each image in exactly one of them (or a copy of one).
    """
    left_out: dict[str, list] = defaultdict(list)
    groups: dict[tuple, list] = defaultdict(list)
    copies: dict[tuple, list[tuple[str, str]]] = defaultdict(list)
    known: dict[tuple, str] = {}
    axes: list[np.ndarray] = []
    for file, record in sorted(files, key=lambda item: item[0]):
        if record.get("reason"):
            left_out[record["reason"]].append((file, record))
            continue
        owner = (record["patient"], record["study"])  # a bad anonymiser gives one series to several
        head = (*owner, record["number"], record["modality"], record["type"], record["mosaic"])
        same = (*head, record["instance"])
        if record["instance"] and known.setdefault(same, file) != file:
            copies[head].append((known[same], file))
            continue
        for frame in record["frames"]:
            spacing = tuple(round(s, 3) for s in frame["spacing"] or ())
            kinds = (frame["kinds"], frame["component"], frame["echo"], frame["b"], frame["stack"])
            key = (*head, *kinds, _axis(frame["orientation"], axes))
            groups[key].append((file, record, frame, (tuple(record["size"]), spacing)))

    found = [
        Stack(
            _name(members, reason, pseudonyms), [(f, 0) for f, _ in members], members[0][1], reason, images=len(members)
        )
        for reason, members in left_out.items()
    ]
    diffusion = any(key[9] for key in groups)
    for key, images in groups.items():
        made = _volumes(images, key, diffusion, rules, pseudonyms)
        for stack in made:
            held = {file for file, _ in stack.members}
            stack.copies = [pair for pair in copies[key[:6]] if pair[0] in held]
        found += made
    return found


def _name(members: Iterable[tuple], salt: str, pseudonyms: Pseudonyms) -> str:
    return pseudonyms(
        "volume", salt, *sorted({(member[0], member[2]["index"] if len(member) > 2 else 0) for member in members})
    )


def _axis(orientation: list[float] | None, axes: list[np.ndarray]) -> int:
    """Return the number of an orientation among those met so far; small differences don't make another one."""
    if orientation is None:
        return -1
    own = np.array(orientation)
    for number, axis in enumerate(axes):
        if np.abs(axis - own).max() < 0.005:
            return number
    axes.append(own)
    return len(axes) - 1


def _volumes(images: list, key: tuple, diffusion: bool, rules: Rules, pseudonyms: Pseudonyms) -> list[Stack]:
    """Part images that differ in nothing but place and time into volumes."""
    record = images[0][1]

    def out(reason: str, members: list = images) -> Stack:
        kept = [(file, frame["index"]) for file, _, frame, _ in members]
        return Stack(_name(members, "", pseudonyms), kept, record, reason, images=len(members))

    words = set(record["words"])
    component = images[0][2]["component"]
    if diffusion or "diffusion" in words and record["modality"] == "MR":
        return [out("diffusion")]
    if component != "MAGN":
        return [out(f"no magnitude image: {'phase' if component == 'PHAS' else 'real or imaginary part'}")]
    if "phantom" in {*words, *record["study_words"]}:
        return [out("phantom, by its name")]
    if "animal" in {*words, *record["study_words"]}:
        return [out("animal or specimen, by its name")]
    if record["mosaic"]:
        if len(images) > rules.max_repetitions:
            return [out(f"4D: {len(images)} repetitions")]
        return [out("", [image]) for image in images]
    if any(frame["position"] is None or frame["orientation"] is None for _, _, frame, _ in images):
        if len(images) < rules.min_slices:
            return [out(f"too few slices: {len(images)}, min_slices is {rules.min_slices}")]
        return [out("no position or orientation in the headers")]
    if any(frame["spacing"] is None or min(frame["spacing"]) <= 0 for _, _, frame, _ in images):
        return [out("no pixel spacing above 0 in the headers")]
    sizes = {image[3] for image in images}
    if len(sizes) > 1:
        return [out(f"images of {len(sizes)} sizes or spacings in one series")]
    repetitions = _repetitions(images)
    if len(repetitions) > rules.max_repetitions:
        return [out(f"4D: {len(repetitions)} repetitions")]
    made = []
    for members in repetitions:
        members, affine, reason = _place(members, rules)
        stack = out(reason, members)
        stack.affine = affine
        made.append(stack)
    return made


def _along(images: list) -> np.ndarray:
    """Return the images' positions along the normal of their planes, in mm."""
    row, column = np.reshape(images[0][2]["orientation"], (2, 3))
    return np.array([image[2]["position"] for image in images]) @ np.cross(row, column)


def _repetitions(images: list) -> list[list]:
    """Part images that share positions by the first mark of time that makes each position unique; else return all."""
    where = np.round(_along(images), 2).tolist()
    counts = Counter(where)
    times = max(counts.values())
    if times == 1:
        return [images]
    for mark in range(4):
        parts = defaultdict(list)
        for image, place in zip(images, where, strict=True):
            time = (*image[2]["time"], None)[mark]
            parts[time].append((place, image))
        whole = all(len({place for place, _ in part}) == len(part) for part in parts.values())
        if whole and len({len(part) for part in parts.values()}) == 1:
            return [[image for _, image in part] for _, part in sorted(parts.items(), key=lambda item: str(item[0]))]
    order = {(image[2]["instance"], image[2]["index"]) for image in images}
    # Each position equally often: by the order of the images, if they have one.
    if len(set(counts.values())) == 1 and len(counts) > 1 and len(order) == len(images):
        turns = defaultdict(list)
        met: Counter = Counter()
        for image, place in sorted(zip(images, where, strict=True), key=lambda pair: pair[0][2]["instance"]):
            turns[met[place]].append(image)
            met[place] += 1
        return list(turns.values())
    return [images]


def _place(images: list, rules: Rules) -> tuple[list, list[list[float]] | None, str]:
    """Put images in order; return them, the affine, and why they make no volume ("" if they do)."""
    row, column = np.reshape(images[0][2]["orientation"], (2, 3))
    if abs(np.linalg.norm(row) - 1) > 0.01 or abs(np.linalg.norm(column) - 1) > 0.01 or abs(row @ column) > 0.01:
        return images, None, "orientation in the headers that is not orthogonal"
    along = _along(images)
    order = np.argsort(along, kind="stable")
    images, along = [images[i] for i in order], along[order]
    if len(images) < rules.min_slices:
        return images, None, f"too few slices: {len(images)}, min_slices is {rules.min_slices}"
    positions = np.array([image[2]["position"] for image in images])
    steps = np.diff(along)
    step = float(np.median(steps)) if len(steps) else images[0][2]["thickness"] or 0
    if len(steps):
        doubled = int((steps < 0.01).sum())
        if doubled:
            return images, None, f"doubled slices: {doubled} of {len(images)}"
        slack = rules.slice_tolerance * step + 0.01
        wide = steps > 1.5 * step
        if wide.any():
            missing = int(np.round(steps[wide] / step - 1).sum())
            return images, None, f"missing slices: {missing} beside {len(images)}"
        if (np.abs(steps - step) > slack).any() or np.abs(
            along - np.linspace(along[0], along[-1], len(along))
        ).max() > 4 * slack:
            return images, None, f"unequal distances of the slices: {steps.min():.3g} to {steps.max():.3g} mm"
        line = np.linspace(positions[0], positions[-1], len(positions))
        if np.linalg.norm(positions - line, axis=1).max() > 4 * slack + 0.5:
            return images, None, "slices that are shifted sideways"
        way = (positions[-1] - positions[0]) / (len(positions) - 1)
        tilt = np.degrees(np.arccos(np.clip(way @ np.cross(row, column) / np.linalg.norm(way), -1, 1)))
        if tilt > rules.max_tilt_deg:
            return images, None, f"gantry tilt of {tilt:.3g} degrees"
    elif step <= 0:
        return images, None, "no thickness of the single slice in its header"
    else:
        way = np.cross(row, column) * step
    spacing = images[0][2]["spacing"]
    affine = np.eye(4)
    affine[:3] = np.column_stack([row * spacing[1], column * spacing[0], way, positions[0]])
    return images, (LPS_TO_RAS @ affine).tolist(), ""
