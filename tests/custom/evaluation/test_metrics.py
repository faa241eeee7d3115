import csv

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import DiceMetric
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

from custom.evaluation.metrics import HausdorffDistance, Means, SegmentationReport, SurfaceDistance, not_learnt

LABELS = ["background", "square", "dot", "absent"]


def label_map(pixdim_mm=(1, 1, 1), shift=0, **squares):
    array = torch.zeros(1, 20, 20, 20)
    array[:, 4 + shift : 8 + shift, 4:8, 4:8] = 1
    array[:, 15, 15, 15] = squares.get("dot", 2)
    return MetaTensor(array, affine=torch.diag(torch.tensor([*pixdim_mm, 1.0])))


@pytest.mark.parametrize("pixdim_mm", [(1.0, 1.0, 1.0), (0.5, 1.0, 2.0), (3.0, 1.0, 1.0)])
def test_distances_are_in_millimetres(pixdim_mm):
    """A cube of 4 voxels shifted by two along the first axis: its far face is two voxels off, by hand."""
    true, predicted = label_map(pixdim_mm), label_map(pixdim_mm, shift=2)
    far, full = HausdorffDistance(4, percentile=95), HausdorffDistance(4)
    for metric in (far, full):
        (distances,) = metric([predicted], [true])
        assert distances.tolist()[:2] == pytest.approx([2 * pixdim_mm[0], 0], abs=1e-5)
        assert np.isnan(distances[2])
    assert full.aggregate().item() == pytest.approx(pixdim_mm[0], abs=1e-5)


def test_mean_surface_distance_counts_both_surfaces():
    """One voxel against one three voxels away: 3 mm each way, so 3 mm."""
    true, predicted = (MetaTensor(torch.zeros(1, 9, 9, 9), affine=torch.eye(4)) for _ in range(2))
    true[:, 2, 4, 4] = 1
    predicted[:, 5, 4, 4] = 1
    assert SurfaceDistance(2, symmetric=True)([predicted], [true]).item() == pytest.approx(3)


def test_a_class_that_is_missed_is_no_number():
    (distances,) = HausdorffDistance(4)([label_map(dot=0)], [label_map()])
    assert np.isnan(distances[1]) and distances[0] == 0


def test_report_has_a_row_for_each_case_and_a_column_for_each_class(tmp_path, capsys):
    cases, labels = [("a.nii.gz", 0), ('b, "c".nii.gz', 2)], ["background", "square, left", "dot", "absent"]
    engine = Engine(lambda engine, batch: [{"pred": label_map(shift=batch[0]["shift"]), "label": label_map()}])
    both = {"output_transform": lambda output: ([output[0]["pred"]], [output[0]["label"]])}
    IgniteMetricHandler(HausdorffDistance(4), **both).attach(engine, "hausdorff_mm")
    SegmentationReport(str(tmp_path), labels).attach(engine)
    engine.run([[{"case": case, "shift": shift}] for case, shift in cases])
    rows = list(csv.reader((tmp_path / "hausdorff_mm_raw.csv").open()))
    assert rows[0] == ["filename", "square, left", "dot", "absent", "mean"]
    assert [row[0] for row in rows[1:]] == ["a.nii.gz", 'b, "c".nii.gz']
    assert [row[0] for row in csv.reader((tmp_path / "hausdorff_mm_summary.csv").open())][1:3] == labels[1:3]
    assert [float(value) for value in rows[2][1:3]] == [2, 0] and rows[2][3] == "nan" and float(rows[2][4]) == 1
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in (tmp_path / "summary.md").open()]
    assert table[0][:3] == ["class", "cases", "hausdorff_mm"]
    assert [row[1] for row in table[2:]] == ["2", "2", "0", "2", "2"]
    body = {row[0]: row[2] for row in table[2:]}
    # Mean over cases of 0 and 2, of 0 and 0, of none; of the classes' means 1 and 0; of the cases' own means 0 and 1.
    means = {"**mean over classes**": "0.500 ± 0.500", "**mean over cases**": "0.500 ± 0.500"}
    assert body == {"square, left": "1.000 ± 1.000", "dot": "0.000 ± 0.000", "absent": "-", **means}
    assert "| square" in capsys.readouterr().out


def test_classes_that_are_not_learnt_are_named_with_the_remedy():
    dice = np.array([[0.5, 0.02, np.nan, 0.2], [0.7, np.nan, np.nan, 0.0]])
    told = not_learnt(dice, ["liver", "pancreas", "absent", "spleen"])
    assert "in the last validation: pancreas (0.020). Train longer" in told
    assert told.startswith("Not measured, since no label map to validate on has it: absent.\n")
    assert not_learnt(dice[:, [0]], ["liver"]) == ""


def ball(*centre, radius=3.0, shape=(14, 12, 10)) -> np.ndarray:
    return sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)) <= radius**2


def box(*slices, shape=(14, 12, 10)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


EVERYWHERE, NOWHERE = box(slice(None)), box(slice(0, 0))
# Name: (what was found, the truth, spacing in mm).
ODD_CASES = {
    "two balls": (ball(6, 6, 5), ball(7, 5, 5), (1, 1, 1)),
    "anisotropic spacing": (ball(6, 6, 5), ball(7, 5, 4, radius=2.5), (0.7, 1.3, 5)),
    "one voxel each": (box(2, 3, 4), box(11, 8, 1), (1, 2, 3)),
    "one voxel in a ball": (box(6, 6, 5), ball(6, 6, 5), (1, 1, 2)),
    "touching the border": (ball(0, 0, 0), ball(13, 11, 9, radius=4), (1.5, 1, 1)),
    "class missed": (NOWHERE, ball(6, 6, 5), (1, 1, 1)),
    "class invented": (ball(6, 6, 5), NOWHERE, (1, 1, 1)),
    "all background": (NOWHERE, NOWHERE, (1, 1, 1)),
    "all foreground": (EVERYWHERE, EVERYWHERE, (1, 1, 3)),
    "all foreground found": (EVERYWHERE, ball(6, 6, 5), (2, 1, 1)),
    "two parts": (ball(3, 3, 3, radius=2) | ball(10, 8, 7, radius=2), ball(3, 3, 3, radius=2), (1, 1, 1)),
    "a hole": (ball(6, 6, 5, radius=4) & ~ball(6, 6, 5, radius=1), ball(6, 6, 5, radius=4), (0.5, 0.5, 0.9)),
    "a plane": (box(slice(None), 5), box(slice(None), 8), (1, 2.5, 1)),
    "the same": (ball(6, 6, 5), ball(6, 6, 5), (3, 1, 2)),
}


def by_scipy(found: np.ndarray, true: np.ndarray, spacing_mm) -> dict[str, float]:
    """Dice, and the distances from each surface's voxels to the nearest of the other, by a search tree."""
    dice = 2 * (found & true).sum() / (found.sum() + true.sum()) if true.any() else np.nan
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * spacing_mm for mask in (found, true)]
    if not all(map(len, surfaces)):
        return {"dice": dice, "hausdorff": np.nan, "hausdorff_95": np.nan, "surface": np.nan}
    to, fro = (KDTree(b).query(a)[0] for a, b in (surfaces, surfaces[::-1]))
    return {
        "dice": dice,
        "hausdorff": max(to.max(), fro.max()),
        "hausdorff_95": max(np.percentile(to, 95), np.percentile(fro, 95)),
        "surface": np.concatenate([to, fro]).mean(),
    }


@pytest.mark.filterwarnings("ignore:the .* of class")
@pytest.mark.parametrize("kind", ODD_CASES)
def test_metrics_are_those_of_an_independent_implementation(kind):
    found, true, spacing_mm = ODD_CASES[kind]
    affine = torch.diag(torch.tensor([*spacing_mm, 1.0]))
    maps = [[MetaTensor(torch.as_tensor(mask[None]).to(torch.uint8), affine)] for mask in (found, true)]
    metrics = {
        "dice": DiceMetric(include_background=False, num_classes=2),
        "hausdorff": HausdorffDistance(2),
        "hausdorff_95": HausdorffDistance(2, percentile=95),
        "surface": SurfaceDistance(2, symmetric=True),
    }
    mine = {name: float(metric(*maps).squeeze()) for name, metric in metrics.items()}
    assert mine == pytest.approx(by_scipy(*ODD_CASES[kind]), abs=1e-4, nan_ok=True)


def measured(*values) -> Engine:
    """An engine after an epoch in which a metric had these values, a row for each case, a column for each class."""

    class Given(DiceMetric):
        def _compute_tensor(self, y_pred, y):
            return y_pred.flatten(1)

    engine = Engine(lambda engine, batch: batch)
    Means(Given(), output_transform=lambda output: (output, output)).attach(engine, "val_dice")
    engine.run([torch.tensor(row)[None, :, None] for row in values])
    return engine


def test_both_means_are_given_and_what_can_t_be_measured_counts_in_neither():
    """Two classes, the second in the first case alone: (0.2 + 0.9) / 2 and 0.8 by case; 0.5 and 0.9 by class."""
    nan = float("nan")
    metrics = measured([0.2, 0.9], [0.8, nan], [nan, nan]).state.metrics
    assert metrics == pytest.approx({"val_dice": 0.675, "val_dice_over_classes": 0.7})


def test_the_mean_of_nothing_is_no_number():
    """Where MONAI gives 0."""
    nan = float("nan")
    assert np.isnan(list(measured([nan, nan], [nan, nan]).state.metrics.values())).all()
