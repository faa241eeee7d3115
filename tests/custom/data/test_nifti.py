"""What a NIfTI header says of where a scan lies, up to three times."""

from itertools import permutations

import nibabel
import numpy as np
import pytest

from custom.data.loading import LoadLabeld, LoadScand
from custom.data.nifti import check_header, corner_distance_mm, turn
from custom.errors import BadInput

SHAPE = (8, 9, 10)


def write(path, sform=None, qform=None, pixdim=None, units=None, voxels=None, **fields):
    """A scan with these forms, and other fields of its header set at last."""
    voxels = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) if voxels is None else voxels
    image = nibabel.Nifti1Image(voxels, None)
    if qform is not None:
        image.header.set_qform(qform, 1)
    if sform is not None:
        image.header.set_sform(sform, 1)
    if pixdim is not None:
        image.header["pixdim"][1:4] = pixdim
    for name, value in ({"xyzt_units": units} | fields).items():
        if value is not None:
            image.header[name] = value
    path.write_bytes(bytes(image.to_bytes()))
    return str(path)


TWO, ONE = np.diag([2.0, 2, 2, 1]), np.eye(4)
SHEARED = TWO + np.eye(4, k=1) * [[1], [0], [0], [0]]
FAULTS = {
    "spacing of the sform": ({"sform": TWO, "qform": ONE}, "two spacings in its header: 2 x 2 x 2 mm .* 1 x 1 x 1 mm"),
    "no pixdim": ({"sform": TWO, "pixdim": 0}, "two spacings in its header"),
    "neither form nor pixdim": ({"pixdim": [1, 0, 1]}, "has two spacings in its header|bad affine"),
    "one axis": ({"sform": np.diag([1, 1, 1.2, 1]), "pixdim": 1}, "two spacings"),
    "micrometres": ({"sform": TWO, "pixdim": 2, "units": 3}, "its spacing in micrometres"),
    "metres and seconds": ({"sform": TWO, "pixdim": 2, "units": 9}, "its spacing in metres"),
    "singular": ({"sform": np.diag([2.0, 2, 0, 1]), "pixdim": 2}, "bad affine"),
    "not finite": ({"sform": np.diag([2.0, 2, np.nan, 1]), "pixdim": 2}, "bad affine"),
    "out of range": ({"sform": TWO * 1000, "pixdim": 2000}, "bad affine"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_scan_whose_spacing_is_in_doubt_is_refused(kind, tmp_path):
    header, sentence = FAULTS[kind]
    with pytest.raises(BadInput, match=f"scan.nii .*({sentence}).*; correct the header or take it out"):
        check_header(write(tmp_path / "scan.nii", **header))


DOUBTS = {
    "neither": ({"pixdim": 2}, "neither sform nor qform"),
    "moved": ({"sform": TWO, "qform": TWO + [[0, 0, 0, 5], [0] * 4, [0] * 4, [0] * 4]}, "a corner 5 mm apart"),
    "flipped": ({"sform": np.diag([-2.0, 2, 2, 1]), "qform": TWO}, "a corner 32 mm apart"),
    "no rotation": ({"sform": TWO, "qform": TWO, "quatern_b": 2.0}, "a corner inf mm apart"),
    "not finite": ({"sform": TWO, "qform": TWO, "qoffset_x": np.nan}, "a corner nan mm apart"),
    "sheared": ({"sform": SHEARED, "qform": TWO}, "a corner 9 mm apart"),
}


@pytest.mark.parametrize("kind", DOUBTS)
def test_where_programs_differ_about_the_place_it_is_said_once(kind, tmp_path, caplog):
    header, sentence = DOUBTS[kind]
    for _ in range(3):
        check_header(write(tmp_path / "scan.nii", **header))
    assert len(caplog.records) == 1 and sentence in caplog.text and "scan.nii" in caplog.text


SOUND = {
    "sform only": {"sform": TWO, "pixdim": 2},
    "qform only": {"qform": TWO},
    "rounded spacing": {"sform": np.diag([0.9765625, 0.9765625, 3, 1]), "pixdim": [0.977, 0.977, 3]},
    "rounded place": {"sform": TWO, "qform": TWO + [[0, 0, 0, 0.1], [0] * 4, [0] * 4, [0] * 4]},
    "gantry, from slice to slice": {"sform": SHEARED, "pixdim": 2},
    "gantry, along the axis": {"sform": SHEARED, "pixdim": [2, np.sqrt(5), 2]},
    "no unit": {"sform": TWO, "pixdim": 2, "units": 0},
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_sound_header_is_not_remarked_upon(kind, tmp_path, caplog):
    check_header(write(tmp_path / "scan.nii", **SOUND[kind]))
    assert not caplog.records


@pytest.mark.parametrize("kind", ["rounded spacing", "gantry, from slice to slice"])
def test_a_scan_lies_where_its_sform_says_also_where_pixdim_is_rounded(kind, tmp_path):
    """Not where MONAI takes it to: to a qform that does not count, which is here the identity."""
    (tmp_path / "rounded").mkdir()
    scan = write(tmp_path / "rounded" / "scan.nii", **SOUND[kind])
    assert np.array_equal(LoadScand("image")({"image": scan})["image"].affine, nibabel.load(scan).affine)


def oblique():
    turned = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    return np.block([[turned @ np.diag([1, 2, 3]), np.array([[5], [6], [7]])], [0, 0, 0, 1]])


@pytest.mark.parametrize("place", [np.diag([1.0, 2, 3, 1]), np.diag([-1.0, 2, 3, 1]), oblique()], ids=str)
def test_a_label_map_in_any_of_48_orders_of_the_axes_is_turned_to_its_scan(place, tmp_path):
    """By nibabel's own reorientation, which leaves each voxel where it is in mm."""
    ids = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)
    scan = LoadScand("image")({"image": write(tmp_path / "scan.nii", sform=place, pixdim=[1, 2, 3])})
    orders = [np.transpose([axes, flips]) for axes in permutations(range(3)) for flips in np.ndindex(2, 2, 2)]
    for number, order in enumerate(orders):
        order[:, 1] = 1 - 2 * order[:, 1]
        turned = nibabel.Nifti1Image(ids, place).as_reoriented(order)
        nibabel.save(turned, tmp_path / f"{number}.nii")
        label = LoadLabeld("label", ["a", "b", "c"])({**scan, "label": str(tmp_path / f"{number}.nii")})["label"]
        assert np.array_equal(label[0], ids) and np.array_equal(label.affine, scan["image"].affine)
    assert len(orders) == 48


def test_turning_leaves_each_voxel_where_it_is():
    volume = np.random.default_rng(0).normal(size=(2, *SHAPE))
    turned, affine = turn(volume, oblique(), np.diag([-2.0, -1, 3, 1])[[0, 2, 1, 3]])
    for voxel in ((0, 0, 0), (7, 8, 9), (3, 1, 4)):
        there = np.linalg.solve(affine, oblique() @ [*voxel, 1])[:3].round().astype(int)
        assert np.array_equal(turned[(slice(None), *there)], volume[(slice(None), *voxel)])


def test_channels_have_to_lie_on_each_other_and_are_turned_so(tmp_path):
    first, second = (np.random.default_rng(n).normal(size=SHAPE).astype(np.float32) for n in range(2))
    paths = [str(tmp_path / name) for name in ("a.nii", "b.nii", "c.nii")]
    nibabel.save(nibabel.Nifti1Image(first, ONE), paths[0])
    nibabel.save(nibabel.Nifti1Image(second, ONE).as_reoriented([[1, -1], [0, 1], [2, 1]]), paths[1])
    nibabel.save(nibabel.Nifti1Image(second, corner := ONE + np.eye(4, k=3)), paths[2])
    loaded = LoadScand("image", channels=2)({"image": paths[:2]})["image"]
    assert np.array_equal(loaded[0], first) and np.array_equal(loaded[1], second)
    assert corner_distance_mm(ONE, corner, SHAPE) == 1
    with pytest.raises(BadInput, match="c.nii lies elsewhere than its first channel .*a.nii: .* 1 mm apart"):
        LoadScand("image", channels=2)({"image": [paths[0], paths[2]]})


def test_four_channels_may_be_one_file_of_four_dimensions(tmp_path):
    """As the Medical Segmentation Decathlon has its brain tumours."""
    voxels = np.random.default_rng(0).normal(size=(*SHAPE, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, TWO), tmp_path / "scan.nii")
    image = LoadScand("image", channels=4)({"image": str(tmp_path / "scan.nii")})["image"]
    assert np.array_equal(image, np.moveaxis(voxels, -1, 0)) and np.array_equal(image.affine, TWO)


def test_a_surface_is_no_volume(real_data):
    file = real_data / "odd_nifti/niivue/Conte69.MyelinAndCorrThickness.32k_fs_LR.dtseries.nii"
    with pytest.raises(BadInput, match="is no volume but a Cifti2Image"):
        check_header(str(file))
