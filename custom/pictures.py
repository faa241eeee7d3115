"""Pictures of restorations, for people who would rather look than read."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

COLUMNS = {"original": "label", "disrupted": "image", "restored": "pred"}


def draw(volumes: Mapping[str, torch.Tensor], title: str = "", pixdim_mm: tuple[float, ...] = (1, 1, 1)) -> Figure:
    """Draw the middle slices of volumes side by side, all in the grey window of the first.

    Args:
        volumes: title of each column and its volume (D, H, W) in RAS orientation.
        title: of the picture.
        pixdim_mm: spacing of the voxels.

    Returns:
        A matplotlib figure with a row for each of the axial, coronal and sagittal planes.
    """
    arrays = [np.asarray(torch.as_tensor(volume).detach().cpu().float()) for volume in volumes.values()]
    low, high = np.percentile(arrays[0], (0.5, 99.5))
    size_mm = np.array(arrays[0].shape) * pixdim_mm
    # A row's normal axis and, of the other two, the one across and the one up the picture.
    rows = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}
    heights = [size_mm[up] / size_mm[across] for _, across, up in rows.values()]
    figure = Figure(figsize=(3 * len(arrays), 3 * sum(heights) + 1), layout="constrained", facecolor="black")
    figure.suptitle(title, color="white", fontsize=10)
    axes = figure.subplots(3, len(arrays), squeeze=False, height_ratios=heights)
    for line, (plane, (normal, across, up)) in zip(axes, rows.items(), strict=True):
        for axis, name, array in zip(line, volumes, arrays, strict=True):
            axis.imshow(
                array.take(array.shape[normal] // 2, normal).T,
                cmap="gray",
                vmin=low,
                vmax=high,
                origin="lower",
                aspect=pixdim_mm[up] / pixdim_mm[across],
            )
            axis.set_axis_off()
            axis.set_title(f"{name}, {plane}", color="white", fontsize=9)
    return figure


class RestorationPictures:
    """Draw the original, the disrupted and the restored scan of an evaluator's cases.

    Args:
        output_dir: where to write a PNG per case, None for none.
        summary_writer: TensorBoard writer to show them in, None for none.
        cases: draw only so many; None for all.

    Attach it to an evaluator with `decollate=True`, whose output has "image", "label" and "pred", each (1, D, H, W).
    """

    def __init__(self, output_dir: str | None = None, summary_writer=None, cases: int | None = None) -> None:
        self.output_dir = output_dir
        self.summary_writer = summary_writer
        self.cases = cases
        self.drawn = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def start(self, engine: Engine) -> None:
        self.drawn = 0

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            if self.cases is not None and self.drawn >= self.cases:
                return
            self.drawn += 1
            pixdim_mm = tuple(float(size) for size in getattr(output["label"], "pixdim", (1, 1, 1)))
            volumes = {name: output[key][0] for name, key in COLUMNS.items()}
            figure = draw(volumes, f"{Path(item['case']).name} ({item['modality']})", pixdim_mm)
            if self.output_dir is not None:
                name = item["case"].removesuffix(".gz").removesuffix(".nii").strip("/").replace("/", "_")
                Path(self.output_dir).mkdir(parents=True, exist_ok=True)
                figure.savefig(Path(self.output_dir) / f"{name}.png", dpi=80)
            if self.summary_writer is not None:
                self.summary_writer.add_figure(f"restoration/{item['case']}", figure, engine.state.epoch, close=False)
