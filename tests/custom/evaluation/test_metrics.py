import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler

from custom.evaluation.metrics import HausdorffDistance, SegmentationReport, SurfaceDistance

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
    cases = [("a.nii.gz", 0), ("b.nii.gz", 2)]
    engine = Engine(lambda engine, batch: [{"pred": label_map(shift=batch[0]["shift"]), "label": label_map()}])
    both = {"output_transform": lambda output: ([output[0]["pred"]], [output[0]["label"]])}
    IgniteMetricHandler(HausdorffDistance(4), **both).attach(engine, "hausdorff_mm")
    SegmentationReport(str(tmp_path), LABELS).attach(engine)
    engine.run([[{"case": case, "shift": shift}] for case, shift in cases])
    rows = [line.split(",") for line in (tmp_path / "hausdorff_mm_raw.csv").read_text().splitlines()]
    assert rows[0] == ["filename", "square", "dot", "absent", "mean"]
    assert [row[0] for row in rows[1:]] == ["a.nii.gz", "b.nii.gz"]
    assert [float(value) for value in rows[2][1:3]] == [2, 0] and rows[2][3] == "nan" and float(rows[2][4]) == 1
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in (tmp_path / "summary.md").open()]
    assert table[0] == ["class", "hausdorff_mm", ""] or table[0][:2] == ["class", "hausdorff_mm"]
    body = {row[0]: row[1] for row in table[2:]}
    # Mean over cases of 0 and 2, of 0 and 0, of none; of the cases' own means 0 and 1.
    assert body == {"square": "1.000 ± 1.000", "dot": "0.000 ± 0.000", "absent": "-", "**mean**": "0.500 ± 0.500"}
    assert "| square" in capsys.readouterr().out
