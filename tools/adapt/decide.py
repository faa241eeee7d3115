"""What is decided by the measures, each value with its reason, and what a training step costs on this machine."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser

from custom.data.dataset import memory_bytes
from custom.engine.checkpoint import read_weights, training_of, weights_file
from custom.engine.config_check import unused_ids
from custom.errors import BadInput
from custom.speed.malloc import keep_freed_memory
from tools.adapt.measure import Case, sides
from tools.resenc import architecture, bare, is_resenc
from tools.verify import ENTRY_POINTS

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
ONE_COMPONENT = 0.9  # share of a class in its largest component
LEAST_WEIGHT = 0.02  # of a class in the loss; the largest is 1
RATE = 0.036  # learning rate times feature size
OVERLAP = 0.25  # of windows
START_SECONDS = 20  # from the command to the first scan
TRAINING = 0.85  # share of the time; the rest is loading and saving
VALIDATIONS = 0.1  # share of it


class Task(NamedTuple):
    """What is to be decided for: the bundle, its start, the cases to train on and to validate, what the user said."""

    bundle: Path
    start: dict[str, Any]
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

    def shares(self, crop_mm: np.ndarray) -> dict[int, float]:
        """Return about which share of a crop (3,) near it each class is: the median of the cases that have it.

        It is that of the box around all classes, or of the crop where that is larger.
        """
        found: dict[int, list[float]] = {}
        for case in self.cases:
            box_mm3 = max(case.labelled_mm.prod(), np.minimum(crop_mm, case.extent_mm).prod())
            for id, structure in case.classes.items():
                found.setdefault(id, []).append(structure.components.sum() * case.spacing_mm.prod() / box_mm3)
        return {id: float(np.median(shares)) for id, shares in sorted(found.items())}

    def values(self) -> dict[int, np.ndarray]:
        """Return values of each class that is there."""
        found: dict[int, list[np.ndarray]] = {}
        for case in self.cases:
            for id, structure in case.classes.items():
                found.setdefault(id, []).append(structure.values)
        return {id: np.concatenate(values) for id, values in sorted(found.items())}


def middle(components: np.ndarray) -> float:
    """Return the size of the component that the middle voxel of a class is in, of the sizes: specks do not count."""
    sizes = np.sort(components)
    return float(sizes[np.searchsorted(np.cumsum(sizes), sizes.sum() / 2)])


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
    """Ids of training and inference, and of the ensemble, with the reasons in the order in which they were decided.

    Args:
        given: ids that the user has decided.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.ids = dict(given)
        self.ensemble: dict[str, Any] = {}
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


def recipe(bundle: Path, start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training config of a bundle with its preset for any task, and without what that leaves unused.

    Args:
        start: see `start_of`; the bundle has its network.
    """
    parser = ConfigParser()
    overlays = ("train", "field", *(["resenc"] if "n_blocks_per_stage" in start else []))
    parser.read_config([str(bundle / f"configs/{name}.json") for name in overlays])
    config = {id: value for id, value in parser.get().items() if id != "_meta_"}
    return {id: config[id] for id in config.keys() - (unused_ids(config) - ENTRY_POINTS)}


def cost(config: dict[str, Any], ids: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds and the bytes that a training step takes, for each voxel of its crops."""
    parser = ConfigParser(config)
    parser.update(ids)
    network, loss, device = (parser.get_parsed_content(name) for name in ("network", "loss", "device"))
    image = torch.rand(1, parser["in_channels"], *parser["patch_size"], device=device)
    precision = {"dtype": parser.get_parsed_content("amp_dtype"), "enabled": parser.get_parsed_content("amp")}
    if device.type == "cpu":
        keep_freed_memory()  # as a training does
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


def patches(extent: np.ndarray, x_first: bool = False) -> Iterator[list[int]]:
    """Yield patches that grow by 32 voxels, each time where they hold least of an extent (3,), until they hold all.

    They grow along x first where that tells one side from the other.
    """
    patch = np.array([32, 32, 32])
    patch[0 if x_first else np.argmax(extent)] += 32
    yield patch.tolist()
    while (patch < extent).any():
        patch[np.argmax(extent / patch)] += 32
        yield patch.tolist()


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
    """Return what pre-trained weights fix: feature_size, pixdim_mm and ct where they are known, and their network.

    That is the window_size of a Swin UNETR, or the n_blocks_per_stage of a residual-encoder U-Net. "ct" is what CT was
    scaled by.

    Raises:
        BadInput: for a file without the weights of either.
    """
    if pretrained is None:
        return {}
    weights = read_weights(pretrained)
    settings = (training_of(weights_file(pretrained)) or {}).get("settings") or {}
    known = {"pixdim_mm": settings.get("pixdim_mm"), "ct": (settings.get("modalities") or {}).get("ct")}
    if is_resenc(weights):
        sizes = architecture({bare(name): value for name, value in weights.items()})
        return known | {
            "feature_size": sizes["features_per_stage"][0],
            "n_blocks_per_stage": sizes["n_blocks_per_stage"],
        }
    lengths = {name.rpartition("layers1.0.blocks.0.")[2]: len(value) for name, value in weights.items()}
    try:
        width, offsets = lengths["norm1.weight"], lengths["attn.relative_position_bias_table"]
    except KeyError:
        raise BadInput(
            f"{pretrained} has neither a Swin transformer nor a residual-encoder U-Net; name the model.pt of a "
            "pre-training."
        ) from None
    window = (round(offsets ** (1 / 3)) + 1) // 2  # each axis has 2 * window - 1 offsets
    return known | {"feature_size": width, "window_size": window}


def decide(task: Task) -> Plan:
    """Decide the ids of a bundle for a task."""
    plan = Plan(task.options.ids)
    plan.set("labels", task.labels, "the ids in the label maps, with the names that the data list has for them")
    plan.set("modality", task.modality, "as the data list says, or the values of the scans tell")
    plan.set("in_channels", task.channels, "files of a case, or channels of its file")
    decide_intensity(plan, task)
    decide_flips(plan, task)
    budget = decide_network(plan, task)
    decide_length(plan, task, budget, decide_grid(plan, task, budget))
    decide_ensemble(plan, task)
    note_classes(plan, task)
    return plan


def decide_intensity(plan: Plan, task: Task) -> None:
    """Decide the window of a CT; an MRI has the bundle's z-score.

    Of three classes or more, the one that reaches lowest and the one that reaches highest may leave the window: that
    tells them from the others, which have all of its range.
    """
    lows, highs = np.sort([np.quantile(values, [0.1, 0.9]) for values in task.values().values()], axis=0).T
    but = int(len(lows) > 2)
    low, high = lows[but], highs[-1 - but]
    if task.modality == "ct":
        all_but = f"of all classes{' but one on each side' * but}"
        why = f"80 % {all_but} lie in {low:.0f} to {high:.0f} HU; {MARGIN_HU} are added"
        plan.set("intensity#a_min", 25 * math.floor(low / 25) - MARGIN_HU, why)
        plan.set("intensity#a_max", 25 * math.ceil(high / 25) + MARGIN_HU, "as above")
        window = [plan.ids["intensity#a_min"], plan.ids["intensity#a_max"]]
        scaling = task.start.get("ct") or {}
        seen = [value for name in ("a_min", "a_max") if isinstance(value := scaling.get(name), int | float)]
        if len(seen) == 2 and seen != window:
            plan.notes.append(
                f"The pre-training saw {seen[0]:g} to {seen[1]:g} HU, and this training sees {window[0]:g} to "
                f"{window[1]:g}. To pre-train for it: --modalities#ct#a_min {window[0]:g} --modalities#ct#a_max "
                f"{window[1]:g}."
            )
    else:
        why = "values of MRI have no unit"
        plan.tell("intensity", "z-score of what is not zero", why)


def decide_flips(plan: Plan, task: Task) -> None:
    """Decide along which axes crops may be flipped."""
    pairs = ", ".join(f"{task.labels[one]} and {task.labels[two]}" for one, two in sides(task.cases, task.labels))
    why = f"a flip along x would swap {pairs}" if pairs else "no two classes differ by side alone"
    plan.set("flip_axes", [1, 2] if pairs else [0, 1, 2], why)


def decide_network(plan: Plan, task: Task) -> Budget:
    """Decide batch, width and window or depth of the network, and return what its training may take."""
    known, start = recipe(task.bundle, task.start), task.start
    config = ConfigParser(known)
    gpu = torch.device(config.get_parsed_content("device")).type == "cuda"
    minutes, memory = task.options.minutes, task.options.memory * 2**30
    loading = sum(case.seconds for case in [*task.cases, *task.held_out])
    seconds = TRAINING * max(60 * minutes - START_SECONDS - loading, 6 * minutes)
    why = "many small updates are ahead of few large ones, and crops of two cases of twice as many of one"
    crops = plan.set("batch_size", 2, why) * plan.set("crops_per_volume", 1, "as above")
    if "n_blocks_per_stage" in start:
        size = {"network_def#n_blocks_per_stage": start["n_blocks_per_stage"]}
        why = "the pre-training's, a residual-encoder U-Net"
    else:
        size = {"network_def#window_size": start.get("window_size", 7 if gpu else 4)}
        why = "7 takes three times as long as 4 with small patches; on a GPU patches are large"
        why = "the pre-training's" if start else why
    for id, value in size.items():
        plan.set(id, value, why)
    fixed = plan.given.get("feature_size", start.get("feature_size"))
    found: list[tuple[int, Budget]] = []
    for width in [fixed] if fixed else WIDTHS:
        ids = {"labels": task.labels, "in_channels": task.channels, "feature_size": width, **size}
        ids["patch_size"] = [96, 96, 96] if gpu else SMALLEST
        budget = Budget(seconds, memory, *cost(known, ids), crops)
        if found and budget.iterations(SMALLEST) < WIDE_ENOUGH:
            break
        found.append((width, budget))
    width, budget = found[-1]
    reached = f"it reaches {budget.iterations(SMALLEST):.0f} iterations of the smallest patch in {minutes:g} minutes"
    why = f"the widest of {WIDTHS} that reaches {WIDE_ENOUGH}, or the first; {reached}"
    plan.set("feature_size", width, f"the pre-training's; {reached}" if start else why)
    return budget


def decide_grid(plan: Plan, task: Task, budget: Budget) -> np.ndarray:
    """Decide spacing and patch, and return the extent (3,) of a scan in voxels."""
    spacing_mm = np.median([case.spacing_mm for case in task.cases], axis=0)
    extent_mm = np.quantile([case.extent_mm for case in task.cases], LARGE, axis=0)
    x_first = 0 not in plan.ids["flip_axes"]
    growing = list(patches(extent_mm / spacing_mm, x_first))
    most = max(math.prod(patch) for patch in growing if budget.allows(patch) or patch == growing[0])
    components = task.sizes_mm3(middle)
    pixdim_mm = coarsened(spacing_mm, extent_mm, PATCHES_PER_SCAN * most, min(components.values()))
    why = f"the scans' median is {_mm(spacing_mm)}, at which a large one has {_by(extent_mm / spacing_mm)} voxels"
    if (pixdim_mm > spacing_mm).any():
        why += f", more than {PATCHES_PER_SCAN} of the largest patches that the budget allows"
    patch = [patch for patch in patches(extent_mm / pixdim_mm, x_first) if math.prod(patch) <= most][-1]
    least_mm = extent_mm / (np.array(patch) - 0.5)  # rounded, a scan still fits into a patch
    if (pixdim_mm < least_mm).any() and (least_mm < FITS * pixdim_mm).all():
        pixdim_mm, why = np.maximum(pixdim_mm, least_mm), f"{why}; here a patch holds a whole one"
    known = task.start.get("pixdim_mm")
    if known and max(abs(np.log(np.divide(known, pixdim_mm)))) < np.log(NEAR):
        pixdim_mm, why = np.array(known), f"the pre-training's, near {_mm(pixdim_mm)}; {why}"
    elif task.start:
        plan.notes.append(f"The pre-training's spacing, {known or 'that of each scan'}, does not fit, and is left.")
    spacing = plan.set("pixdim_mm", [float(f"{mm:.3g}") for mm in pixdim_mm], why) or spacing_mm
    extent = extent_mm / spacing
    why = f"a scan is {_by(extent)} voxels; the largest patch with {ENOUGH} iterations in the time, or the smallest"
    why += f"; this one has {budget.iterations(patch):.0f} and takes {budget.size(patch) / 2**30:.2g} GiB"
    patch = plan.set("patch_size", patch, why)
    thin = max(spacing) / min(spacing) > ANISOTROPIC
    angles = [0.5 * (not thin or axis == np.argmax(spacing)) for axis in range(3)]
    why = "about the axis of the thick slices alone: other turns shear their voxels" if thin else "about each axis"
    plan.set("rotation_radians", angles, why)
    smallest = min(components, key=lambda id: components[id])
    share = components[smallest] / np.prod(spacing) / math.prod(patch)
    why = f"the smallest class, {task.labels[smallest]}, has components of {share:.2%} of a patch"
    plan.tell("crops", f"each class is the middle of 1 in {len(task.labels)}", why)
    decide_weights(plan, task, np.multiply(spacing, patch))
    return extent


def decide_weights(plan: Plan, task: Task, crop_mm: np.ndarray) -> None:
    """Decide the weight of each class in the loss: the inverse root of its share of a crop, the largest is 1."""
    shares = task.shares(crop_mm)
    shares[0] = max(1 - sum(shares.values()), min(shares.values()))
    weights = [1.0] * len(task.labels)
    for id, share in shares.items():
        weights[id] = float(f"{max(LEAST_WEIGHT, math.sqrt(min(shares.values()) / share)):.2g}")
    why = f"the inverse root of a class's share of a crop, {shares[0]:.0%} of which is background"
    plan.set("loss#weight", weights, why)


def decide_length(plan: Plan, task: Task, budget: Budget, extent: np.ndarray) -> None:
    """Decide how long and how fast to train, and how to validate."""
    patch, minutes = plan.ids["patch_size"], task.options.minutes
    rate = RATE / plan.ids["feature_size"]
    why = f"{RATE} by the feature size; lower ones do not end higher, also from a start"
    plan.set("learning_rate", float(f"{rate:.2g}"), why)
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
    why = f"a validation takes about {validation:.0f} s, {math.prod(windows)} windows a scan"
    plan.set("val_interval", interval, why)
    size = len(task.cases) * extent.prod() * (4 * task.channels + 1)
    half = memory_bytes() / 2
    why = f"the prepared scans take {size / 2**30:.2g} GiB, half of the machine's memory is {half / 2**30:.3g}"
    plan.set("cache_rate", math.floor(100 * min(1, half / size)) / 100, why)


def decide_ensemble(plan: Plan, task: Task) -> None:
    """Decide which mirrored copies an ensemble sees, and of which classes it keeps the largest component alone."""
    axes = plan.ids["flip_axes"] if plan.ids["strength"] else []
    mirror = {"_target_": "RandFlipd", "keys": "image", "prob": 0.5, "spatial_axis": axes}
    plan.ensemble = {"inferer#transform": mirror} if 0 < len(axes) < 3 else {}
    plan.ensemble["test_time_examples"] = 8 if axes else 0
    plan.tell(
        "test_time_examples", str(plan.ensemble["test_time_examples"]), "mirrored as in training, by ensemble.json"
    )
    found = {id: [case.classes[id].components for case in task.cases if id in case.classes] for id in task.values()}
    single = [id for id, sizes in found.items() if min(s.max() / s.sum() for s in sizes) > ONE_COMPONENT]
    step = "postprocessing#transforms#4"
    plan.ensemble |= {f"{step}#applied_labels": single, f"{step}#independent": True}
    why = (
        f"their largest component has more than {ONE_COMPONENT:.0%} of them in every case; an ensemble keeps that alone"
    )
    plan.tell("applied_labels", json.dumps([task.labels[id] for id in single]), why)


def strength_of(minutes: float) -> tuple[float, str]:
    """Return how strong the augmentation is, in [0, 1], and why."""
    value = round(min(1.0, max(0.0, math.log(minutes / 10) / math.log(24))), 2)
    return value, "none up to 10 minutes, all of it from 4 hours on"


def note_classes(plan: Plan, task: Task) -> None:
    """Note classes that cases lack, and empty label maps."""
    for id, name in enumerate(task.labels[1:], 1):
        train, validate = (sum(id in case.classes for case in cases) for cases in (task.cases, task.held_out))
        if train < len(task.cases) or validate < len(task.held_out):
            plan.notes.append(
                f"{name} ({id}) is in {train} of {len(task.cases)} cases to train on and in {validate} of "
                f"{len(task.held_out)} to validate. "
                + (
                    "Where it is in a scan but not labelled, it is taken for background."
                    if train
                    else "It can't be learnt."
                )
            )
    if empty := sum(not case.classes for case in [*task.cases, *task.held_out]):
        plan.notes.append(f"{empty} label maps are empty; they teach what is background.")


def _by(numbers: np.ndarray) -> str:
    return " x ".join(f"{number:.0f}" for number in numbers)


def _mm(numbers: np.ndarray) -> str:
    return f"{' x '.join(f'{number:.3g}' for number in numbers)} mm"
