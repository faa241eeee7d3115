"""Write a bundle for any labelled data list: measure the data, decide the settings, and say why in configs/plan.md.

    python -m tools.adapt DATALIST.json OUT_BUNDLE --minutes 60
    python -m tools.adapt DATALIST.json OUT_BUNDLE --pretrained runs/pretraining --learning_rate 0.001

The bundle is btcv_ct_segmentation (CT) or feta_mri_segmentation (MRI), with the recipe of configs/field.json and what
was decided. Each decision is an id: one that is given, as `--id value`, stays as it is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, Orientationd
from scipy import ndimage
from tqdm import tqdm

from custom.data import LoadLabeld, LoadScand, read_datalist
from custom.data.datalist import SECTIONS
from custom.data.values import Values
from custom.engine.checkpoint import read_weights, training_of, weights_file
from custom.engine.run_bundle import apply, copy_bundle
from custom.errors import BadInput
from custom.files import read_json, write_json, write_text
from custom.text import did_you_mean, markdown_table
from tools._cli import ROOT, near, say, tool
from tools.verify import quiet

MOST_ID = 255  # of a class
SAMPLED = 2000  # voxels of a class in a case whose values are looked at
AIR_HU = -500  # below is no body
SHOWN = 60  # characters of a value in the plan
MARGIN_HU = 100  # of the window, on both sides of what is labelled
SMALLEST = (64, 32, 32)  # patch
WIDTHS = (12, 24, 48)  # feature sizes
WIDE_ENOUGH = 4000  # iterations of the smallest patch, for which a wider network is taken
ENOUGH = 2000  # iterations, for which a larger patch is taken
PATCHES_PER_SCAN = 16  # a scan of more voxels is made coarser
LEAST_VOXELS = 27  # of the components of the smallest class, in doing so
LARGE = 0.9  # share of the cases that are smaller than what is taken for the size of a scan
FITS = 1.3  # an axis is made coarser by so much at most, for a patch to hold it
NEAR = 1.5  # ratio of two spacings that count as alike
ANISOTROPIC = 3  # ratio of spacings
RATE = 0.036  # learning rate times feature size
OVERLAP = 0.25  # of windows
START_SECONDS = 20  # from the command to the first scan
TRAINING = 0.85  # share of the time; the rest is loading and saving
VALIDATIONS = 0.1  # share of it


class Structure(NamedTuple):
    """A class in a case: voxels of each component, centre (3,) in mm, and some of its values in the first channel."""

    components: np.ndarray
    centre_mm: np.ndarray
    values: np.ndarray


class Case(NamedTuple):
    """A case, turned to RAS: spacing and extent (3,) of what is not background, in mm, and its classes by id."""

    spacing_mm: np.ndarray
    extent_mm: np.ndarray
    in_hu: bool
    classes: dict[int, Structure]
    seconds: float


class Task(NamedTuple):
    """What is to be decided for: the bundle, the cases to train on and to validate, and what the user said."""

    bundle: Path
    cases: list[Case]
    held_out: list[Case]
    labels: list[str]
    modality: str
    channels: int
    options: argparse.Namespace

    def sizes_mm3(self, number: Callable[[np.ndarray], float]) -> dict[int, float]:
        """Return a number of the components' sizes for each class: the median of the cases that have it."""
        found: dict[int, list[float]] = {}
        for case in self.cases:
            for id, structure in case.classes.items():
                found.setdefault(id, []).append(number(structure.components) * case.spacing_mm.prod())
        return {id: float(np.median(sizes)) for id, sizes in sorted(found.items())}

    def values(self) -> dict[int, np.ndarray]:
        """Return values of each class that is there."""
        found: dict[int, list[np.ndarray]] = {}
        for case in self.cases:
            for id, structure in case.classes.items():
                found.setdefault(id, []).append(structure.values)
        return {id: np.concatenate(values) for id, values in sorted(found.items())}


class Budget(NamedTuple):
    """What a training may take, and what a voxel of its crops takes in a step."""

    seconds: float
    bytes: float
    second_per_voxel: float
    byte_per_voxel: float
    crops: int

    def iterations(self, patch: Sequence[int]) -> float:
        return self.seconds / (self.second_per_voxel * math.prod(patch) * self.crops)

    def size(self, patch: Sequence[int]) -> float:
        return self.byte_per_voxel * math.prod(patch) * self.crops

    def allows(self, patch: Sequence[int]) -> bool:
        return self.iterations(patch) >= ENOUGH and self.size(patch) <= self.bytes


class Plan:
    """Ids with their values and reasons, in the order in which they were decided.

    Args:
        given: ids that the user has decided.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.ids = dict(given)
        self.lines: list[str] = []
        self.notes: list[str] = []

    def set(self, id: str, value: Any, why: str) -> Any:
        """Decide an id, unless it was given, and return its value."""
        if id in self.given:
            why = f"given. It would have been {json.dumps(value)}: {why}"
        self.ids.setdefault(id, value)
        self.tell(id, json.dumps(self.ids[id]), why)
        return self.ids[id]

    def tell(self, id: str, value: str, why: str) -> None:
        """Tell of what was decided, or is decided by the recipe."""
        self.lines.append(f"- `{id}` {value if len(value) <= SHOWN else value[:SHOWN] + ' ...'}: {why}.")


def recipe(bundle: Path) -> dict[str, Any]:
    """Return the training config of a bundle with its preset for any task."""
    parser = ConfigParser()
    parser.read_config([str(bundle / f"configs/{name}.json") for name in ("train", "field")])
    return parser.get()


def measure(item: dict, channels: int) -> Case:
    """Load a case as a training does, and measure it.

    Raises:
        BadInput: for what a training refuses, and ids above `MOST_ID`.
    """
    started = time.monotonic()
    names = [str(number) for number in range(MOST_ID + 1)]
    turn = Orientationd(["image", "label"], "RAS", labels=None)
    data = Compose([LoadScand("image", channels), LoadLabeld("label", names), turn])(item)
    seconds, spacing_mm = time.monotonic() - started, data["image"].pixdim.numpy()
    image, label = (data[key].numpy()[0] for key in ("image", "label"))
    in_hu = not Values().add(image).note("ct")
    body = ndimage.find_objects((image > AIR_HU if in_hu else image != 0).astype(np.int8))[0]
    extent_mm = spacing_mm * [part.stop - part.start for part in body]
    classes = {}
    for id, box in enumerate(ndimage.find_objects(label), 1):
        if box is not None:
            inside = label[box] == id
            sizes = np.bincount(ndimage.label(inside)[0].ravel())[1:]
            centre_mm = spacing_mm * (np.argwhere(inside).mean(0) + [part.start for part in box])
            classes[id] = Structure(sizes, centre_mm, image[box][inside][:: max(1, sizes.sum() // SAMPLED)])
    return Case(spacing_mm, extent_mm, in_hu, classes, seconds)


def channels_of(item: dict) -> int:
    """Return how many channels a case has: its files, or the images in its file."""
    if not isinstance(item["image"], str):
        return len(item["image"])
    return (*nibabel.load(item["image"]).shape, 1)[3]


def names_of(content: dict, present: set[int], given: Sequence[str] | None = None) -> list[str]:
    """Return the names of the classes by their ids, background first: as given, as in the list's "labels", or numbers.

    Raises:
        BadInput: where no label map has a class, or fewer names are given than ids are there, or most ids up to the
            last are not there.
    """
    if not present:
        raise BadInput("No label map has any class, so there is nothing to learn; correct the data list.")
    if given is not None:
        if len(given) <= max(present):
            raise BadInput(f"--labels has {len(given)} names with the background, but the ids go up to {max(present)}.")
        return list(given)
    named = {0: "background"}
    for pair in dict(content.get("labels") or {}).items():  # {"1": "liver"}, or as nnU-Net has it {"liver": 1}
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


def cost(config: dict[str, Any], ids: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds and the bytes that a training step takes, for each voxel of its crops."""
    parser = ConfigParser(config)
    parser.update(ids)
    network, loss, device = (parser.get_parsed_content(name) for name in ("network", "loss", "device"))
    image = torch.rand(1, parser["in_channels"], *parser["patch_size"], device=device)
    precision = {"dtype": parser.get_parsed_content("amp_dtype"), "enabled": parser.get_parsed_content("amp")}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    times = []
    for _ in range(3):  # the first is slower, and others may use the machine
        started = time.monotonic()
        with torch.autocast(device.type, **precision), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            value = loss(network(image), torch.zeros_like(image[:, :1]))
        size = sum(kept.values())
        value.backward()
        value.item()  # a GPU is done when this is
        kept.clear()
        times.append(time.monotonic() - started)
    voxels = image[0, 0].numel()
    return min(times) / voxels, size / voxels


def patches(extent: np.ndarray) -> Iterator[list[int]]:
    """Yield patches that grow by 32 voxels, each time where they hold least of an extent (3,), until they hold all."""
    patch = np.array([32, 32, 32])
    while True:
        patch[np.argmax(extent / patch)] += 32
        yield patch.tolist()
        if (patch >= extent).all():
            return


def coarsened(spacing_mm: np.ndarray, extent_mm: np.ndarray, most: float, component_mm3: float) -> np.ndarray:
    """Return a spacing (3,) at which an extent has no more than so many voxels: the finest axes are made coarser.

    But a component of so many mm3 keeps `LEAST_VOXELS`.
    """
    found = spacing_mm.copy()
    for finest in np.geomspace(spacing_mm.min(), 10 * spacing_mm.max(), 100):
        tried = np.maximum(spacing_mm, finest)
        if (extent_mm / found).prod() <= most or component_mm3 / tried.prod() < LEAST_VOXELS:
            break
        found = tried
    return found


def start_of(pretrained: str | None) -> dict[str, Any]:
    """Return what pre-trained weights fix: feature_size, window_size, and pixdim_mm where that is known.

    Raises:
        BadInput: for a file without the weights of a Swin transformer.
    """
    if pretrained is None:
        return {}
    sizes = {name.rpartition("layers1.0.blocks.0.")[2]: len(value) for name, value in read_weights(pretrained).items()}
    try:
        width, offsets = sizes["norm1.weight"], sizes["attn.relative_position_bias_table"]
    except KeyError:
        raise BadInput(f"{pretrained} has no Swin transformer; name the model.pt of a pre-training.") from None
    settings = (training_of(weights_file(pretrained)) or {}).get("settings") or {}
    window = (round(offsets ** (1 / 3)) + 1) // 2  # each axis has 2 * window - 1 offsets
    return {"feature_size": width, "window_size": window, "pixdim_mm": settings.get("pixdim_mm")}


def decide(task: Task) -> Plan:
    """Decide the ids of a bundle for a task; see `start_of` for what it raises."""
    plan = Plan(task.options.ids)
    plan.set("labels", task.labels, "the ids in the label maps, with the names that the data list has for them")
    plan.set("modality", task.modality, "as the data list says, or the values of the scans tell")
    plan.set("in_channels", task.channels, "files of a case, or channels of its file")
    decide_intensity(plan, task)
    decide_flips(plan, task)
    start = start_of(task.options.pretrained)
    budget = decide_network(plan, task, start)
    decide_length(plan, task, budget, decide_grid(plan, task, budget, start))
    note_classes(plan, task)
    return plan


def decide_intensity(plan: Plan, task: Task) -> None:
    """Decide the window of a CT; an MRI has the bundle's z-score."""
    spans = np.array([np.quantile(values, [0.1, 0.9]) for values in task.values().values()])
    low, high = spans[:, 0].min(), spans[:, 1].max()
    if task.modality == "ct":
        why = f"of each class 80 % lie in {low:.0f} to {high:.0f} HU; {MARGIN_HU} are added on both sides"
        plan.set("intensity#a_min", 25 * math.floor(low / 25) - MARGIN_HU, why)
        plan.set("intensity#a_max", 25 * math.ceil(high / 25) + MARGIN_HU, "as above")
    else:
        why = f"values of MRI have no unit; of each class 80 % lie in {low:.4g} to {high:.4g}"
        plan.tell("intensity", "z-score of what is not zero", why)


def decide_flips(plan: Plan, task: Task) -> None:
    """Decide along which axes crops may be flipped."""
    pairs = ", ".join(f"{task.labels[one]} and {task.labels[two]}" for one, two in sides(task.cases, task.labels))
    why = f"a flip along x would swap {pairs}" if pairs else "no two classes differ by side alone"
    plan.set("flip_axes", [1, 2] if pairs else [0, 1, 2], why)


def decide_network(plan: Plan, task: Task, start: dict[str, Any]) -> Budget:
    """Decide batch, width and window of the network, and return what its training may take."""
    config = ConfigParser(recipe(task.bundle))
    gpu = torch.device(config.get_parsed_content("device")).type == "cuda"
    minutes, memory = task.options.minutes, task.options.memory * 2**30
    loading = sum(case.seconds for case in [*task.cases, *task.held_out])
    seconds = TRAINING * max(60 * minutes - START_SECONDS - loading, 6 * minutes)
    why = "many small updates are ahead of few large ones, and crops of two cases of twice as many of one"
    crops = plan.set("batch_size", 2, why) * plan.set("crops_per_volume", 1, "as above")
    window = start.get("window_size", 7 if gpu else 4)
    why = (
        "the pre-training's" if start else "7 takes three times as long with small patches; on a GPU patches are large"
    )
    plan.set("network_def#window_size", window, why)
    fixed = plan.given.get("feature_size", start.get("feature_size"))
    found: list[tuple[int, Budget]] = []
    for width in [fixed] if fixed else WIDTHS:
        known = {"labels": task.labels, "in_channels": task.channels, "feature_size": width}
        known |= {"network_def#window_size": window, "patch_size": [96, 96, 96] if gpu else SMALLEST}
        budget = Budget(seconds, memory, *cost(recipe(task.bundle), known), crops)
        if found and budget.iterations(SMALLEST) < WIDE_ENOUGH:
            break
        found.append((width, budget))
    width, budget = found[-1]
    reached = f"it reaches {budget.iterations(SMALLEST):.0f} iterations of the smallest patch in {minutes:g} minutes"
    why = f"the widest of {WIDTHS} that reaches {WIDE_ENOUGH}, or the first; {reached}"
    plan.set("feature_size", width, f"the pre-training's; {reached}" if start else why)
    return budget


def decide_grid(plan: Plan, task: Task, budget: Budget, start: dict[str, Any]) -> np.ndarray:
    """Decide spacing and patch, and return the extent (3,) of a scan in voxels."""
    spacing_mm = np.median([case.spacing_mm for case in task.cases], axis=0)
    extent_mm = np.quantile([case.extent_mm for case in task.cases], LARGE, axis=0)
    growing = list(patches(extent_mm / spacing_mm))
    most = max(math.prod(patch) for patch in growing if budget.allows(patch) or patch == growing[0])
    components = task.sizes_mm3(np.median)
    pixdim_mm = coarsened(spacing_mm, extent_mm, PATCHES_PER_SCAN * most, min(components.values()))
    why = f"the scans' median is {_mm(spacing_mm)}, at which a large one has {_by(extent_mm / spacing_mm)} voxels"
    if (pixdim_mm > spacing_mm).any():
        why += f", more than {PATCHES_PER_SCAN} of the largest patches that the budget allows"
    patch = [patch for patch in patches(extent_mm / pixdim_mm) if math.prod(patch) <= most][-1]
    for axis, extent in enumerate(extent_mm / pixdim_mm):
        if patch[axis] < extent <= FITS * patch[axis]:
            pixdim_mm[axis] = extent_mm[axis] / (patch[axis] - 0.5)  # rounded, it still fits
            why += f"; along {'xyz'[axis]} a patch then holds it"
    known = start.get("pixdim_mm")
    if known and max(abs(np.log(np.divide(known, pixdim_mm)))) < np.log(NEAR):
        pixdim_mm, why = np.array(known), f"the pre-training's, near {_mm(pixdim_mm)}; {why}"
    elif start:
        plan.notes.append(f"The pre-training's spacing, {known or 'that of each scan'}, does not fit, and is left.")
    spacing = plan.set("pixdim_mm", [float(f"{mm:.3g}") for mm in pixdim_mm], why) or spacing_mm
    extent = extent_mm / spacing
    why = f"a scan is {_by(extent)} voxels; the largest patch with {ENOUGH} iterations in the time, or the smallest"
    why += f"; this one has {budget.iterations(patch):.0f} and takes {budget.size(patch) / 2**30:.2g} GiB"
    patch = plan.set("patch_size", patch, why)
    thin = max(spacing) / min(spacing) > ANISOTROPIC
    angles = [0.5 * (not thin or axis == np.argmax(spacing)) for axis in range(3)]
    why = (
        "about the thick slices' axis alone: other turns would shear the voxels"
        if thin
        else "half a radian about each axis"
    )
    plan.set("rotation_radians", angles, why)
    smallest = min(components, key=lambda id: components[id])
    share = components[smallest] / np.prod(spacing) / math.prod(patch)
    why = f"the smallest class, {task.labels[smallest]}, has components of {share:.2%} of a patch"
    plan.tell("crops", f"each class is the middle of 1 in {len(task.labels)}", why)
    return extent


def decide_length(plan: Plan, task: Task, budget: Budget, extent: np.ndarray) -> None:
    """Decide how long and how fast to train, and how to validate."""
    patch, minutes = plan.ids["patch_size"], task.options.minutes
    rate = RATE / plan.ids["feature_size"]
    plan.set(
        "learning_rate",
        float(f"{rate:.2g}"),
        f"{RATE} by the feature size; lower ones do not end higher, also from a start",
    )
    plan.set("strength", *strength_of(minutes))
    plan.set("overlap", OVERLAP, "of windows in validation and inference; 0.5 takes up to 3.4 times as long")
    windows = [max(1, math.ceil((n / p - 1) / (1 - OVERLAP)) + 1) for n, p in zip(extent, patch, strict=True)]
    step = budget.seconds / budget.iterations(patch)
    validation = len(task.held_out) * (1 + math.prod(windows) * step / budget.crops / 3)
    count = min(10, max(1, int(VALIDATIONS * budget.seconds / validation)))
    steps = math.ceil(len(task.cases) / plan.ids["batch_size"])
    iterations = max(steps, (budget.seconds - count * validation) / step)
    interval = max(1, round(iterations / steps / count))
    why = f"{iterations:.0f} iterations in {minutes:g} minutes: a step takes {step:.3g} s, an epoch has {steps}"
    plan.set("max_epochs", interval * count, why)
    plan.set(
        "val_interval", interval, f"a validation takes about {validation:.0f} s, {math.prod(windows)} windows a scan"
    )
    size = len(task.cases) * extent.prod() * (4 * task.channels + 1)
    why = f"the prepared scans take {size / 2**30:.2g} GiB, half of the machine's memory is {ram() / 2**31:.3g}"
    plan.set("cache_rate", math.floor(100 * min(1, ram() / 2 / size)) / 100, why)


def note_classes(plan: Plan, task: Task) -> None:
    """Note classes that cases lack, and empty label maps."""
    for id, name in enumerate(task.labels[1:], 1):
        train, validate = (sum(id in case.classes for case in cases) for cases in (task.cases, task.held_out))
        if train < len(task.cases) or validate < len(task.held_out):
            said = "" if train else " It can't be learnt."
            plan.notes.append(
                f"{name} ({id}) is in {train} of {len(task.cases)} cases to train on and in {validate} of "
                f"{len(task.held_out)} to validate.{said}"
            )
    if empty := sum(not case.classes for case in [*task.cases, *task.held_out]):
        plan.notes.append(f"{empty} label maps are empty; they teach what is background.")
    if plan.notes and any("It can" not in note for note in plan.notes):
        plan.notes.append(
            "Where a class is in a scan but not in its label map, training and validation take it for background."
        )


def strength_of(minutes: float) -> tuple[float, str]:
    """Return how strong the augmentation is, in [0, 1], and why."""
    value = round(min(1.0, max(0.0, math.log(minutes / 10) / math.log(24))), 2)
    return value, "none up to 10 minutes, all of it from 4 hours on"


def ram() -> float:
    """Return the bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _by(numbers: np.ndarray) -> str:
    return " x ".join(f"{number:.0f}" for number in numbers)


def _mm(numbers: np.ndarray) -> str:
    return f"{' x '.join(f'{number:.3g}' for number in numbers)} mm"


def load(options: argparse.Namespace) -> Task:
    """Read the data list and measure all of its cases.

    Raises:
        BadInput: for a list or a case that training would refuse, and see `names_of`.
    """
    folder = os.path.dirname(os.path.abspath(options.datalist))
    items = {name: read_datalist(options.datalist, name, folder, labelled=True) for name in SECTIONS}
    content = read_json(options.datalist)
    channels = options.ids.get("in_channels") or channels_of(items["training"][0])
    bar = tqdm(sum(items.values(), []), "measuring", unit="case", disable=None)
    cases = [measure(item, channels) for item in bar]
    listed = {str(entry.get("modality", "")).lower() for name in SECTIONS for entry in content[name]} - {""}
    listed = listed or {str(name).lower() for name in dict(content.get("modality") or {}).values()}
    listed = listed or {"ct" if all(case.in_hu for case in cases) else "mri"}
    if "ct" in listed and len(listed) > 1:
        raise BadInput(f"{options.datalist} has CT and {', '.join(listed - {'ct'})}; make a list of each.")
    modality = options.ids.get("modality") or sorted(listed)[0]
    present = {id for case in cases for id in case.classes}
    labels = names_of(content, present, options.ids.get("labels"))
    bundle = ROOT / "bundles" / ("btcv_ct_segmentation" if modality == "ct" else "feta_mri_segmentation")
    count = len(items["training"])
    return Task(bundle, cases[:count], cases[count:], labels, modality, channels, options)


README = """# {name}

A Swin UNETR that segments {classes} in {modality}. It was adapted to its data by `tools.adapt` of DAE Bundles;
[the plan](../configs/plan.md) says what was measured and decided. Where the bundle has weights, in `models/`,
`docs/training.json` says how they were trained. Research only, not for clinical use.

| id | class |
|---|---|
{rows}

## Commands

In the bundle's folder. Train, evaluate, and segment a scan or a folder of scans:

    python -m monai.bundle run --config_file configs/train.json --datalist LIST.json --output_dir runs/a
    python -m monai.bundle run --config_file "['runs/a/configs/train.json','runs/a/configs/evaluate.json']" \\
        --bundle_root runs/a
    python -m monai.bundle run --config_file runs/a/configs/inference.json --bundle_root runs/a \\
        --dataset_dir scan.nii.gz

## License

The bundle: Apache-2.0. The data has its own: `docs/data_license.txt`.
"""


def write(task: Task, plan: Plan, out: Path) -> None:
    """Write the bundle: configs, plan, metadata, documentation and licence."""
    copy_bundle(task.bundle, out, ROOT / "custom")
    shutil.rmtree(out / "docs")
    for name in ("datalist.json", "configs/few_labels.json", "configs/field.json", "configs/published.json"):
        (out / name).unlink(missing_ok=True)
    preset = read_json(task.bundle / "configs/field.json")
    single = [
        id
        for id in range(1, len(task.labels))
        if all(len(c.classes[id].components) == 1 for c in task.cases if id in c.classes)
    ]
    mirror = {"_target_": "RandFlipd", "keys": "image", "prob": 0.5, "spatial_axis": plan.ids["flip_axes"]}
    ensemble = {"postprocessing#transforms#4#applied_labels": single, "postprocessing#transforms#4#independent": True}
    if plan.ids["flip_axes"] != [0, 1, 2]:
        ensemble["inferer#transform"] = mirror
    apply(preset | plan.ids, out, ensemble)
    file = out / "configs/metadata.json"
    metadata = read_json(file)
    classes = ", ".join(task.labels[1:])
    metadata |= {
        "name": out.name,
        "task": f"Segmentation of {classes} in {task.modality.upper()}",
        "description": f"A Swin UNETR that segments {classes} in {task.modality.upper()}",
        "data_source": "see docs/data_license.txt",
        "image_classes": f"{task.channels} channel(s) of {task.modality.upper()}",
        "references": metadata["references"][1:],
    }
    write_json(file, metadata)
    rows = "\n".join(f"| {id} | {name} |" for id, name in enumerate(task.labels))
    words = {"name": out.name, "classes": classes, "modality": task.modality.upper(), "rows": rows}
    write_text(out / "docs/README.md", README.format(**words))
    write_text(
        out / "docs/data_license.txt", "The data is not part of this bundle. Name its source and licence here.\n"
    )
    write_text(out / "configs/plan.md", plan_text(task, plan, out.name))


def plan_text(task: Task, plan: Plan, name: str) -> str:
    """Return the plan: what was measured, decided and noted."""
    total, component = task.sizes_mm3(np.sum), task.sizes_mm3(np.median)
    rows = [["id", "class", "cases", "ml", "components", "ml of a component", "values"]]
    for id, values in task.values().items():
        counts = [len(case.classes[id].components) for case in task.cases if id in case.classes]
        sizes = [f"{total[id] / 1e3:.3g}", f"{np.median(counts):.0f}", f"{component[id] / 1e3:.3g}"]
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        rows.append([str(id), task.labels[id], str(len(counts)), *sizes, f"{low:.4g}, {middle:.4g}, {high:.4g}"])
    lines = "\n".join(plan.lines)
    notes = "".join(f"- {note}\n" for note in plan.notes) or "- Nothing.\n"
    return f"""# Plan of {name}

Measured on {len(task.cases)} cases to train on; {len(task.held_out)} more validate. The numbers are medians of the
cases. The values are the 10th, 50th and 90th percentile of the labelled voxels.

{markdown_table(rows)}

## Decisions

Each is an id of `train.json`. Change it there, or on the command line: `--learning_rate 0.001`.

{lines}

## Look at

{notes}"""


@quiet()
def adapt(options: argparse.Namespace) -> None:
    """Measure, decide and write.

    Raises:
        BadInput: for a folder that is in use, ids that the bundles do not have, and see `load` and `decide`.
    """
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{options.out} is not empty; name another folder, or remove it.")
    known = recipe(ROOT / "bundles/btcv_ct_segmentation")
    for id in options.ids:
        if id.partition("#")[0] not in known:
            raise BadInput(f"The bundles have no id `{id}`{did_you_mean(id, known) or '.'}")
    task = load(options)
    plan = decide(task)
    write(task, plan, out)
    say((out / "configs/plan.md").read_text())
    start = ["--pretrained", options.pretrained] if options.pretrained else []
    command = ["--config_file", f"{near(out)}/configs/train.json", "--bundle_root", near(out)]
    command += ["--datalist", options.datalist, *start, "--output_dir", f"runs/{out.name}"]
    say(f"Bundle: {options.out}\nNext:\npython -m monai.bundle run {shlex.join(command)}")


def arguments(add: Callable) -> None:
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else ram() / 2
    add("datalist", metavar="DATALIST.json", help="labelled cases to train on and to validate, of tools.datalist")
    add("out", type=Path, metavar="OUT_BUNDLE", help="folder to write; its name is the bundle's")
    add("--minutes", type=float, default=60, help="that the training may take on this machine (%(default)s)")
    add("--memory", type=float, default=memory / 2**30, metavar="GIB", help="that it may take (%(default).0f)")
    add("--pretrained", metavar="FILE", help="weights of a pre-training, or the folder of its run")


main = tool("adapt", __doc__, arguments, adapt, takes_ids=True)

if __name__ == "__main__":
    sys.exit(main())
