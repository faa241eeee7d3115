from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from custom.evaluation.pictures import RestorationPictures, SegmentationPictures, draw
from tests.pictures import panels


def test_rows_are_planes_and_columns_volumes_with_right_and_up_where_they_belong():
    array = torch.zeros(1, 4, 6, 8)
    array[:, -1] = 1  # the patient's right, in RAS the end of the first axis
    volume = MetaTensor(array, affine=torch.diag(torch.tensor([1.0, 2, 3, 1])))
    figure = draw({"original": volume, "restored": 2 * volume}, title="title")
    assert [axis.get_title() for axis in figure.axes] == [
        f"{name}, {plane}" for plane in ("axial", "coronal", "sagittal") for name in ("original", "restored")
    ]
    shapes = [axis.images[0].get_array().shape for axis in figure.axes[::2]]
    assert shapes == [(6, 4), (8, 4), (8, 6)]  # rows go up the picture: anterior, superior, superior
    axial = figure.axes[0]
    assert (axial.images[0].get_array()[:, -1] == 1).all() and axial.images[0].origin == "lower"
    assert axial.get_aspect() == 2 and figure.axes[2].get_aspect() == 3
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim()


def test_a_volume_that_runs_to_the_left_is_drawn_as_others_are():
    array = torch.zeros(1, 4, 6, 8)
    array[:, 0] = 1  # the patient's right again: the first axis runs to the left
    volume = MetaTensor(array, affine=torch.diag(torch.tensor([-1.0, 2, 3, 1])))
    axial = draw({"scan": volume}).axes[0]
    assert (axial.images[0].get_array()[:, -1] == 1).all() and axial.get_aspect() == 2


def test_a_label_map_is_painted_where_most_of_it_is_and_explained():
    scan, label = torch.rand(1, 4, 6, 8), torch.zeros(1, 4, 6, 8)
    label[0, 1:3, 2:5, 6] = 2
    figure = draw({"scan": scan, "segmentation": scan}, {"segmentation": label}, ["background", "a", "b"])
    scan_axis, painted_axis = figure.axes[:2]
    assert len(scan_axis.images) == 1
    grey, painted = painted_axis.images
    assert torch.equal(torch.as_tensor(grey.get_array().data), scan[0, :, :, 6].T)
    assert painted.get_array().count() == 6 and set(painted.get_array().compressed()) == {2}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b"]


# Of a volume (1, D, H, W), the slice of each plane at a place, rows going up.
PLANES = {
    "axial": lambda volume, place: volume[0, :, :, place].T.numpy(),
    "coronal": lambda volume, place: volume[0, :, place].T.numpy(),
    "sagittal": lambda volume, place: volume[0, place].T.numpy(),
}


def noise(count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, 1, 5, 6, 7, generator=torch.Generator().manual_seed(0)))


def grey(values: np.ndarray, reference: torch.Tensor) -> np.ndarray:
    """The colours (..., 3) of voxels in the grey window of a volume: half a per cent cut off at either end."""
    low, high = np.percentile(reference, (0.5, 99.5))
    return ((values - low) / (high - low)).clip(0, 1)[..., None].repeat(3, -1)


def draw_case(handler, item, output, tmp_path):
    """Let a handler draw a case, and return what its PNG shows and the figure."""
    engine = Engine(lambda engine, batch: [output])
    handler.output_dir = str(tmp_path)
    handler.attach(engine)
    engine.run([[item]])
    figure = handler.figure(item, output)
    return panels(tmp_path / "folder_a.png", figure), figure


def test_a_restoration_shows_the_original_the_disrupted_and_the_restored_scan(tmp_path):
    original, disrupted, restored = noise(3)
    item = {"original": original, "case": "folder/a.nii.gz", "modality": "ct"}
    shown, figure = draw_case(RestorationPictures(), item, {"image": disrupted, "pred": restored}, tmp_path)
    for name, volume in {"original": original, "disrupted": disrupted, "restored": restored}.items():
        for (plane, cut), place in zip(PLANES.items(), (3, 3, 2), strict=True):
            np.testing.assert_allclose(shown[f"{name}, {plane}"], grey(cut(volume, place), original), atol=0.01)
    assert len(shown) == 9 and figure.get_suptitle() == "a.nii.gz (ct)"


@pytest.mark.parametrize("labelled", [True, False])
def test_a_segmentation_shows_the_scan_the_label_and_the_segmentation(labelled, tmp_path):
    """Painted where their own label maps are, in the colours of the legend; the scan is the first channel."""
    (scan,) = noise(1)
    label, pred = torch.zeros_like(scan), torch.zeros_like(scan)
    label[0, 1, 2:4, 3:5], pred[0, 3, 3:5, 4:6] = 1, 2
    output = {"image": torch.cat([scan, -scan]), "pred": pred} | ({"label": label} if labelled else {})
    handler = SegmentationPictures(["background", "one", "two"])
    shown, figure = draw_case(handler, {"case": "folder/a.nii.gz"}, output, tmp_path)
    legend = figure.legends[0]
    colours = {
        text.get_text(): patch.get_facecolor()[:3]
        for text, patch in zip(legend.texts, legend.get_patches(), strict=True)
    }
    assert colours.keys() <= {"one", "two"} and len(set(colours.values())) == len(colours)
    maps = {"scan": torch.zeros_like(scan), "segmentation": pred} | ({"label": label} if labelled else {})
    for name, label_map in maps.items():
        for (plane, cut), place in zip(PLANES.items(), (3, 2, 1) if labelled else (4, 3, 3), strict=True):
            ids, expected = cut(label_map, place), grey(cut(scan, place), scan)
            for number, title in enumerate(["one", "two"], 1):
                if (ids == number).any():
                    expected[ids == number] = 0.4 * expected[ids == number] + 0.6 * np.array(colours[title])
            np.testing.assert_allclose(shown[f"{name}, {plane}"], expected, atol=0.01)
    assert len(shown) == 3 * len(maps) and figure.get_suptitle() == "a.nii.gz"


def test_as_many_cases_are_drawn_as_asked_for_in_every_epoch_and_in_tensorboard(tmp_path):
    (volume,) = noise(1)
    batches = [[{"original": volume, "case": f"{name}.nii", "modality": "t1"}] for name in "abc"]
    engine = Engine(lambda engine, batch: [{"image": volume, "pred": volume}])
    drawn = []
    writer = SimpleNamespace(add_figure=lambda tag, figure, step, close: drawn.append((tag, step)))
    RestorationPictures(output_dir=str(tmp_path / "new"), summary_writer=writer, cases=2).attach(engine)
    engine.run(batches, max_epochs=2)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a.png", "b.png"}
    assert drawn == [(f"restoration/{name}.nii", step) for step in (1, 2) for name in "ab"]
