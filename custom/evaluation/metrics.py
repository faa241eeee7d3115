"""Metrics of a segmentation: distances in millimetres, their means, and a report with the names of the classes."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler, write_metrics_reports
from monai.metrics import CumulativeIterationMetric, HausdorffDistanceMetric, SurfaceDistanceMetric
from monai.networks import one_hot
from monai.utils import string_list_all_gather

from custom.text import markdown_table

LEARNT = 0.1  # Dice


class _LabelMapMetric(CumulativeIterationMetric):
    """Let a distance metric take label maps (1, D, H, W), and give millimetres by the spacing of the true one."""

    def __init__(self, num_classes: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes

    def _compute_tensor(self, y_pred: torch.Tensor, y: MetaTensor) -> torch.Tensor:
        maps = (one_hot(torch.as_tensor(label_map), self.num_classes) for label_map in (y_pred, y))
        distances = super()._compute_tensor(*maps, spacing=y.pixdim.tolist())
        # An absent class gives NaN or infinity, by the metric; neither is a distance, and one infinity ruins a mean.
        return distances.where(distances.isfinite(), torch.nan)


class HausdorffDistance(_LabelMapMetric, HausdorffDistanceMetric):
    """MONAI's `HausdorffDistanceMetric` of label maps, in millimetres; NaN for a class that either map lacks.

    Args:
        num_classes: with background, which is left out.
        kwargs: see `HausdorffDistanceMetric`, such as percentile=95.
    """


class SurfaceDistance(_LabelMapMetric, SurfaceDistanceMetric):
    """MONAI's `SurfaceDistanceMetric` of label maps, in millimetres; see `HausdorffDistance`."""


class Means(IgniteMetricHandler):
    """MONAI's `IgniteMetricHandler`, which gives both means of a metric, and NaN where nothing could be measured.

    What can't be measured, such as a class that a case lacks, counts in neither mean. They differ when cases lack
    different classes. Where MONAI's mean of nothing is 0, the best or the worst of all, this one is NaN.

    Its values in `engine.state.metrics`: NAME, the mean over cases of each case's mean over its classes;
    NAME_over_classes, the mean over classes of each class's mean over the cases that have it.

    Args: see `IgniteMetricHandler`.
    """

    def compute(self) -> float:
        super().compute()
        values = self._engine.state.metric_details[self._name]
        self._engine.state.metrics[f"{self._name}_over_classes"] = values.nanmean(0).nanmean().item()
        return values.nanmean(1).nanmean().item()


class SegmentationReport:
    """Write the metrics of every case and class of an evaluation, and a summary table, which is printed too.

    Files: `NAME_raw.csv` of each metric (a row per case, a column per class), `NAME_summary.csv`, `metrics.csv`, and
    `summary.md`, the mean and standard deviation over cases of each class, and those of both means, see `Means`. A
    class that a case lacks does not count; the column of cases says how many the first metric has of it.

    Args:
        output_dir: where to write.
        labels: names of the classes, background first.
    """

    def __init__(self, output_dir: str, labels: Sequence[str]) -> None:
        self.output_dir = Path(output_dir)
        self.classes = list(labels)[1:]
        self.cases: list[str] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.cases.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note_cases)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _note_cases(self, engine: Engine) -> None:
        self.cases += [item["case"] for item in engine.state.batch]

    def __call__(self, engine: Engine) -> None:
        several = idist.get_world_size() > 1
        cases = string_list_all_gather(self.cases) if several else self.cases
        if idist.get_rank() > 0:
            return
        details = {name: values.cpu().numpy() for name, values in engine.state.metric_details.items()}
        write_metrics_reports(
            str(self.output_dir),
            list(map(_csv_field, cases)),
            engine.state.metrics,
            details,
            summary_ops=["mean", "std", "median", "min", "max", "notnans"],
            deli=",",
            class_labels=list(map(_csv_field, self.classes)),
        )
        table = self._table(details)
        (self.output_dir / "summary.md").write_text(table)
        print(f"\n{len(cases)} cases\n{table}\nPer case: {self.output_dir}")

    def _table(self, details: dict[str, np.ndarray]) -> str:
        ends = ("**mean over classes**", "**mean over cases**")
        rows = [["class", "cases", *details], *([name] for name in (*self.classes, *ends))]
        first = np.isfinite(next(iter(details.values())))
        for row, count in zip(rows[1:], [*first.sum(0), *[first.any(1).sum()] * 2], strict=True):
            row.append(str(count))
        for values in details.values():
            known = np.ma.masked_invalid(values)
            for row, column in zip(rows[1:], [*known.T, known.mean(axis=0), known.mean(axis=1)], strict=True):
                row.append(f"{column.mean():.3f} ± {column.std():.3f}" if column.count() else "-")
        return markdown_table(rows) + "\n"


def _csv_field(text: str) -> str:
    """Return a name as one field of a CSV file, which MONAI does not see to."""
    field = io.StringIO()
    csv.writer(field, lineterminator="").writerow([text])
    return field.getvalue()


def not_learnt(dice: np.ndarray, classes: Sequence[str]) -> str:
    """Name the classes whose mean Dice is below `LEARNT`, with it, and what to change, and those that no case has.

    Args:
        dice: (cases, classes), NaN where a case lacks a class.
        classes: their names, without background.
    """
    means = list(zip(classes, np.ma.masked_invalid(dice).mean(0).filled(np.nan), strict=True))
    absent = [name for name, mean in means if np.isnan(mean)]
    told = f"Not measured, since no label map to validate on has it: {', '.join(absent)}.\n" if absent else ""
    if not (missed := [f"{name} ({mean:.3f})" for name, mean in means if mean < LEARNT]):
        return told
    return (
        f"{told}Not learnt, by a Dice below {LEARNT} in the last validation: {', '.join(missed)}. Train longer "
        f"(--max_epochs), at a finer spacing (--pixdim_mm), or with crops and loss of configs/field.json, which "
        f"small classes need; python -m tools.adapt chooses all of these.\n"
    )
