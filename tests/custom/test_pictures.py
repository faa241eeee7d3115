import torch

from custom.pictures import draw


def test_rows_are_planes_and_columns_volumes_with_right_and_up_where_they_belong():
    volume = torch.zeros(4, 6, 8)
    volume[-1] = 1  # the patient's right, in RAS the end of the first axis
    figure = draw({"original": volume, "restored": 2 * volume}, "title", pixdim_mm=(1, 2, 3))
    assert [axis.get_title() for axis in figure.axes] == [
        f"{name}, {plane}" for plane in ("axial", "coronal", "sagittal") for name in ("original", "restored")
    ]
    shapes = [axis.images[0].get_array().shape for axis in figure.axes[::2]]
    assert shapes == [(6, 4), (8, 4), (8, 6)]  # rows go up the picture: anterior, superior, superior
    axial = figure.axes[0]
    assert (axial.images[0].get_array()[:, -1] == 1).all() and axial.images[0].origin == "lower"
    assert axial.get_aspect() == 2 and figure.axes[2].get_aspect() == 3
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim()
