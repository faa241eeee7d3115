import torch
from monai.data import MetaTensor

from custom.evaluation.pictures import draw


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
