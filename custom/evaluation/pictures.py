"""Pictures of restorations and segmentations, for people who would rather look than read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.data import MetaTensor
from monai.transforms import Orientation

from custom.data.cases import output_names
from custom.data.datalist import case_name

# A row's normal axis in RAS and, of the other two, the one across and the one up the picture.
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}


def draw(
    volumes: Mapping[str, torch.Tensor],
    label_maps: Mapping[str, torch.Tensor] | None = None,
    labels: Sequence[str] = (),
    title: str = "",
) -> Figure:
    """Draw slices of volumes side by side, all in the grey window of the first.

    The slices are the middle ones, or those with the most labelled voxels of the first label map.

    Args:
        volumes: title of each column and its volume (1, D, H, W). A `MetaTensor` is turned to RAS and drawn by its
            spacing; anything else counts as RAS with cubic voxels.
        label_maps: of some columns, (1, D, H, W), painted over the volume.
        labels: names of the classes, background first; those on the picture are explained below it.
        title: of the picture.

    Returns:
        A matplotlib figure with a row for each of the axial, coronal and sagittal planes.
    """
    arrays = {name: _ras(volume) for name, volume in volumes.items()}
    # The z-score of the non-zero voxels leaves the air around a head at zero, in the middle of its greys.
    arrays = {name: np.where(array == 0, array.min(), array) for name, array in arrays.items()}
    maps = {name: _ras(label_map) for name, label_map in (label_maps or {}).items()}
    first = next(iter(volumes.values()))
    if isinstance(first, MetaTensor):
        pixdim_mm = np.asarray(Orientation("RAS", labels=None)(first).pixdim, float)
    else:
        pixdim_mm = np.ones(3)
    reference = next(iter(arrays.values()))
    low, high = np.percentile(reference, (0.5, 99.5))
    labelled = next((label_map > 0 for label_map in maps.values() if label_map.any()), None)
    size_mm = np.array(reference.shape) * pixdim_mm
    heights = [size_mm[up] / size_mm[across] for _, across, up in PLANES.values()]
    figure = Figure(figsize=(3 * len(arrays), 3 * sum(heights) + 1), layout="constrained", facecolor="black")
    figure.suptitle(title, color="white", fontsize=10)
    axes = figure.subplots(3, len(arrays), squeeze=False, height_ratios=heights)
    colours = matplotlib.colormaps["gist_rainbow"].resampled(max(len(labels), 2))
    shown: set[int] = set()
    for line, (plane, (normal, across, up)) in zip(axes, PLANES.items(), strict=True):
        place = reference.shape[normal] // 2
        if labelled is not None:
            place = int(labelled.sum(axis=(across, up)).argmax())
        for axis, (name, array) in zip(line, arrays.items(), strict=True):
            look = {"origin": "lower", "aspect": pixdim_mm[up] / pixdim_mm[across], "interpolation": "nearest"}
            axis.imshow(array.take(place, normal).T, cmap="gray", vmin=low, vmax=high, **look)
            if name in maps:
                painted = maps[name].take(place, normal).T
                shown |= set(np.unique(painted[painted > 0]).astype(int).tolist())
                painted = np.ma.masked_equal(painted, 0)
                axis.imshow(painted, cmap=colours, vmin=0, vmax=colours.N - 1, alpha=0.6, **look)
            axis.set_axis_off()
            axis.set_title(f"{name}, {plane}", color="white", fontsize=9)
    if shown:
        figure.legend(
            handles=[Patch(color=colours(number), label=labels[number]) for number in sorted(shown)],
            loc="outside lower center", ncols=2 * len(arrays), fontsize=7, facecolor="black", labelcolor="white",
        )  # fmt: skip
    return figure


def _ras(volume: torch.Tensor) -> np.ndarray:
    if isinstance(volume, MetaTensor):
        volume = Orientation("RAS", labels=None)(volume)
    return np.asarray(torch.as_tensor(volume[0]).detach().cpu().float())


class Pictures:
    """Draw an evaluator's cases, into a folder and into TensorBoard.

    Args:
        output_dir: where to write a PNG per case, named as `output_names` names its scan; None for none.
        summary_writer: TensorBoard writer to show them in, None for none.
        cases: draw only so many; None for all.
    """

    kind = "case"  # its group in TensorBoard

    def __init__(self, output_dir: str | None = None, summary_writer=None, cases: int | None = None) -> None:
        self.output_dir = output_dir
        self.summary_writer = summary_writer
        self.cases = cases
        self.drawn = 0
        self.names: dict[str, str] = {}  # of each case's picture

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        self.drawn = 0
        items = engine.state.dataloader.dataset.data
        files = [item["image"] if isinstance(item["image"], str) else item["image"][0] for item in items]
        self.names = dict(zip(map(case_name, items), output_names(files), strict=True))

    def figure(self, item: Mapping[str, Any], output: Mapping[str, torch.Tensor]) -> Figure:
        """Draw a case: its item of the batch, and the evaluator's output for it."""
        raise NotImplementedError

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            if self.cases is not None and self.drawn >= self.cases:
                return
            self.drawn += 1
            figure = self.figure(item, output)
            if self.output_dir is not None:
                file = Path(self.output_dir, f"{self.names[item['case']]}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(file, dpi=80)
            if self.summary_writer is not None:
                self.summary_writer.add_figure(f"{self.kind}/{item['case']}", figure, engine.state.epoch, close=False)


class RestorationPictures(Pictures):
    """Draw an item's "original", and "image" and "pred" of its output: the disrupted and the restored scan."""

    kind = "restoration"

    def figure(self, item: Mapping[str, Any], output: Mapping[str, torch.Tensor]) -> Figure:
        volumes = {"original": item["original"], "disrupted": output["image"], "restored": output["pred"]}
        return draw(volumes, title=f"{Path(item['case']).name} ({item['modality']})")


class SegmentationPictures(Pictures):
    """Draw the scan, its true label map if there is one, and the segmentation: "image", "label", "pred" of an output.

    Args:
        labels: names of the classes, background first.
        kwargs: see `Pictures`.
    """

    kind = "segmentation"

    def __init__(self, labels: Sequence[str], **kwargs) -> None:
        super().__init__(**kwargs)
        self.labels = labels

    def figure(self, item: Mapping[str, Any], output: Mapping[str, torch.Tensor]) -> Figure:
        image = output["image"][:1]  # of several channels the first
        known = {"label": output.get("label"), "segmentation": output["pred"]}
        maps = {name: label_map for name, label_map in known.items() if label_map is not None}
        return draw(dict.fromkeys(["scan", *maps], image), maps, self.labels, title=Path(item["case"]).name)
