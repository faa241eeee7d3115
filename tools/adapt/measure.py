"""What is measured of labelled cases: sizes, classes and their components, values, sides."""

import time
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import nibabel
import numpy as np
from monai.transforms import Compose, Orientationd
from scipy import ndimage

from custom.data import LoadLabeld, LoadScand
from custom.data.values import Values
from custom.errors import BadInput

MOST_ID = 255  # of a class
SAMPLED = 2000  # voxels of a class in a case whose values are looked at
AIR_HU = -500  # below is no body


class Structure(NamedTuple):
    """A class in a case: voxels of each component, centre (3,) in mm, and some of its values in the first channel."""

    components: np.ndarray
    centre_mm: np.ndarray
    values: np.ndarray


class Case(NamedTuple):
    """A case, turned to RAS: spacing (3,), extents (3,) of what is not air and of what is labelled, classes by id."""

    spacing_mm: np.ndarray
    extent_mm: np.ndarray
    labelled_mm: np.ndarray
    in_hu: bool
    classes: dict[int, Structure]
    seconds: float


def measure(item: dict, channels: int) -> Case:
    """Load a case as a training does, and measure it.

    Raises:
        BadInput: for what a training refuses, ids above `MOST_ID`, and a CT of air alone.
    """
    started = time.monotonic()
    names = [str(number) for number in range(MOST_ID + 1)]
    turn = Orientationd(["image", "label"], "RAS", labels=None)
    data = Compose([LoadScand("image", channels), LoadLabeld("label", names), turn])(item)
    seconds, spacing_mm = time.monotonic() - started, data["image"].pixdim.numpy()
    image, label = (data[key].numpy()[0] for key in ("image", "label"))
    in_hu = not Values().add(image).note("ct")
    extent_mm, labelled_mm = (
        spacing_mm * extent(mask) for mask in (image > AIR_HU if in_hu else image != 0, label > 0)
    )
    if not extent_mm.any():
        raise BadInput(
            f"{item['image']} has no voxel above {AIR_HU} HU, so that no body is in it; take it out of the list."
        )
    classes = {}
    for id, box in enumerate(ndimage.find_objects(label), 1):
        if box is not None:
            inside = label[box] == id
            sizes = np.bincount(ndimage.label(inside)[0].ravel())[1:]
            centre_mm = spacing_mm * (np.argwhere(inside).mean(0) + [part.start for part in box])
            classes[id] = Structure(sizes, centre_mm, image[box][inside][:: max(1, sizes.sum() // SAMPLED)])
    return Case(spacing_mm, extent_mm, labelled_mm, in_hu, classes, seconds)


def extent(mask: np.ndarray) -> np.ndarray:
    """Return the size (3,), in voxels, of the box around what is true in a mask of three axes; 0 where nothing is."""
    boxes = ndimage.find_objects(mask.astype(np.int8))
    return np.array([part.stop - part.start for part in boxes[0]]) if boxes else np.zeros(3)


def channels_of(item: dict) -> int:
    """Return how many channels a case has: its files, or the images in its file."""
    if not isinstance(item["image"], str):
        return len(item["image"])
    return (*nibabel.load(item["image"]).shape, 1)[3]


def names_of(content: dict, present: set[int], given: Sequence[str] | None = None) -> list[str]:
    """Return the names of the classes by their ids, background first: as given, as in the list's "labels", or numbers.

    Raises:
        BadInput: where fewer names are given than ids are there, or most ids up to the last are not there.
    """
    if given is not None:
        if len(given) <= max(present):
            raise BadInput(f"--labels has {len(given)} names with the background, but the ids go up to {max(present)}.")
        return list(given)
    named = {0: "background"}
    listed = content.get("labels")
    for pair in listed.items() if isinstance(listed, dict) else ():  # {"1": "liver"}, or as nnU-Net has it {"liver": 1}
        named |= {int(key): str(name) for key, name in (pair, pair[::-1]) if str(key).isdecimal()}
    known = present | named.keys()
    if max(known) >= 2 * len(known):
        raise BadInput(
            f"The label maps have the ids {', '.join(map(str, sorted(present)))}, and a network has a channel for each "
            f"id up to the last; renumber them from 1."
        )
    return [named.get(id, f"class {id}" if id in present else f"unused {id}") for id in range(max(known) + 1)]


def sides(cases: Sequence[Case], labels: Sequence[str]) -> list[tuple[int, int]]:
    """Return the pairs of classes that differ by side alone, by name or in all cases that have both, two or more.

    There one is always on the same side of the other, more than twice as far along x as along y and z, at most twice as
    large, and has a median value among the other's.
    """

    def swapped(name: str) -> str:
        words = name.lower().replace("_", " ").split()
        return " ".join({"left": "right", "right": "left", "l": "r", "r": "l"}.get(word, word) for word in words)

    def mirrored(one: Structure, two: Structure) -> bool:
        x, y, z = abs(one.centre_mm - two.centre_mm)
        low, high = np.quantile(two.values, [0.1, 0.9])
        alike = 0.5 < one.components.sum() / two.components.sum() < 2 and low <= np.median(one.values) <= high
        return alike and x > 2 * max(y, z)

    def differ_by_side(one: int, two: int) -> bool:
        if swapped(labels[one]) == labels[two].lower().replace("_", " ") != labels[one].lower():
            return True
        both = [(case.classes[one], case.classes[two]) for case in cases if {one, two} <= case.classes.keys()]
        orders = {a.centre_mm[0] < b.centre_mm[0] for a, b in both}
        return len(both) > 1 and len(orders) == 1 and all(mirrored(*pair) for pair in both)

    return [pair for pair in combinations(range(1, len(labels)), 2) if differ_by_side(*pair)]
