"""A label map lies exactly on its scan, whichever way a program reads where the scan lies."""

import json

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImage

from custom.data.datalist import find_scans
from custom.data.loading import LoadScand
from custom.data.nifti import PLACE
from custom.data.saving import MARK, PlaceWriter, name_by_case
from custom.errors import BadInput
from tests.conftest import SEGMENTATION

BTCV, FETA = SEGMENTATION
SHAPE = (12, 9, 7)


def rotation(*degrees) -> np.ndarray:
    turned = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        across, up = (axis + 1) % 3, (axis + 2) % 3
        one = np.eye(3)
        one[[across, up], [across, up]] = np.cos(angle)
        one[across, up], one[up, across] = -np.sin(angle), np.sin(angle)
        turned = one @ turned
    return turned


def affine(linear, offset=(-31.5, 12.25, 400.0)) -> np.ndarray:
    return np.block([[np.asarray(linear, float), np.reshape(offset, (3, 1))], [0, 0, 0, 1]])


SPACING = np.diag([0.7, 1.1, 2.5])
OBLIQUE = affine(rotation(12, -25, 40) @ SPACING)
SHEAR = affine(SPACING + np.array([[0, 0, 0], [0, 0, 0.6], [0, 0, 0]]))  # as of a tilted gantry
LPS = np.diag([-1, -1, 1])
# Name: (sform, its code, qform, its code).
HEADERS = {
    "both the same": (OBLIQUE, 1, OBLIQUE, 1),
    "sform only": (OBLIQUE, 2, None, 0),
    "qform only": (None, 0, OBLIQUE, 1),
    "neither": (None, 0, None, 0),
    "qform elsewhere": (affine(rotation(0, 20, 0) @ SPACING, (9, 8, 7)), 4, OBLIQUE, 1),
    "qform elsewhere, sform of the scanner": (OBLIQUE, 1, affine(SPACING), 2),
    "left-handed": (affine(np.diag([-1, 1, 1]) @ SPACING), 1, affine(np.diag([-1, 1, 1]) @ SPACING), 1),
    "left-handed qform only": (None, 0, affine(rotation(5, 6, 7) @ np.diag([1, 1, -1]) @ SPACING), 3),
    "sagittal": (affine(SPACING[[2, 0, 1]]), 1, affine(SPACING[[2, 0, 1]]), 1),
    "sheared sform beside a qform": (SHEAR, 1, affine(SPACING), 1),
    "sheared sform only": (SHEAR, 1, None, 0),
    "patient's axes": (affine(LPS @ SPACING), 3, affine(LPS @ SPACING), 3),
}


@pytest.fixture(scope="module")
def segment():
    """What inference of the bundles does with a file, but with a network that finds what is brighter than average."""
    chains = {}

    def run(bundle, scan, out, **overrides):
        key = (bundle, str(overrides))
        if key not in chains:
            parser = ConfigParser(json.loads((bundle / "configs/inference.json").read_text()))
            parser.update(overrides)
            chains[key] = [parser.get_parsed_content(name) for name in ("dataset#transform", "label_maps", "save")]
        before, after, save = chains[key]
        save.saver.folder_layout.output_dir = str(out)
        item = before(find_scans(str(scan))[0])
        bright = (item["image"] - item["image"].mean()).sign() * 50
        others = torch.full((len(json.loads((bundle / "configs/inference.json").read_text())["labels"]) - 2,
                             *bright.shape[1:]), -1e4)  # fmt: skip
        pred = MetaTensor(torch.cat([-bright, bright, others])).copy_meta_from(item["image"])
        after({**item, "pred": pred})
        name = scan.name.partition(".nii")[0]
        return out / f"{name}_seg.nii.gz"

    return run


def place_by_itk(file) -> np.ndarray | None:
    """Affine by which ITK, and so 3D Slicer and ITK-SNAP, places a file; None for what it can't read."""
    try:
        image = SimpleITK.ReadImage(str(file))
    except RuntimeError:
        return None
    linear = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    return np.diag([-1, -1, 1, 1]) @ affine(linear, image.GetOrigin())


def assert_on_scan(label_map, scan) -> None:
    of_map, of_scan = (nibabel.load(file) for file in (label_map, scan))
    assert of_map.shape == of_scan.shape[:3]
    assert np.array_equal(of_map.affine, of_scan.affine)
    for name in PLACE:
        count = 4 if name == "pixdim" else None
        assert np.array_equal(np.ravel(of_map.header[name])[:count], np.ravel(of_scan.header[name])[:count]), name
    by_itk = place_by_itk(scan)  # it takes neither NIfTI-2 nor what is sheared and has no qform
    assert by_itk is None or np.array_equal(place_by_itk(label_map), by_itk)


def write(path, sform, sform_code, qform, qform_code, kind=nibabel.Nifti1Image, endianness="<"):
    voxels = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(np.float32)
    header.set_xyzt_units("mm", "sec")
    image = kind(voxels, None, header)
    image.header["pixdim"][1:4] = SPACING.diagonal()
    image.header["descrip"] = b"who the patient is"
    if qform is not None:
        image.header.set_qform(qform, qform_code)
    if sform is not None:
        image.header.set_sform(sform, sform_code)
        image.header["pixdim"][1:4] = SPACING.diagonal()
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("pixdim_mm", [None, [1.5, 1.5, 2.0]], ids=["own spacing", "resampled"])
def test_a_label_map_has_the_scan_s_place(kind, pixdim_mm, segment, tmp_path):
    scan = write(tmp_path / "scan.nii.gz", *HEADERS[kind])
    label_map = segment(FETA, scan, tmp_path, pixdim_mm=pixdim_mm)
    assert_on_scan(label_map, scan)
    saved = nibabel.load(label_map)
    assert saved.get_data_dtype() == np.uint8 and saved.header["descrip"].item() == MARK
    if pixdim_mm is None:
        voxels = nibabel.load(scan).get_fdata()
        normalised = voxels - voxels.mean()
        assert np.array_equal(np.asarray(saved.dataobj), normalised > 0)


@pytest.mark.parametrize("kind, endianness", [(nibabel.Nifti1Image, ">"), (nibabel.Nifti2Image, "<")])
def test_so_it_has_of_a_big_endian_scan_and_of_nifti_2(kind, endianness, segment, tmp_path):
    scan = write(tmp_path / "scan.nii.gz", *HEADERS["qform elsewhere"], kind=kind, endianness=endianness)
    label_map = segment(FETA, scan, tmp_path)
    of_map, of_scan = (nibabel.load(file).header for file in (label_map, scan))
    for form in ("get_sform", "get_qform"):
        mine, own = getattr(of_map, form)(coded=True), getattr(of_scan, form)(coded=True)
        assert mine[1] == own[1] and np.allclose(mine[0], own[0], atol=1e-4)


ODD = [
    *("nifti_reader_js/avg152T1_LR_nifti.nii.gz", "nifti_reader_js/avg152T1_LR_nifti2.nii.gz"),
    *("nifti_reader_js/big.nii.gz", "nifti_reader_js/little.nii.gz", "nifti_reader_js/with_extension.nii.gz"),
    *("niivue/avg152T1_RL_nifti.nii.gz", "niivue/minimal.nii.gz", "niivue/shear.nii.gz", "niivue/CT_pitch.nii.gz"),
    *("niivue/hippo.nii.gz", "niivue/low_res.nii.gz", "niivue/fslmean.nii.gz", "niivue/labels256.nii.gz"),
]


@pytest.mark.parametrize("name", ODD)
def test_so_it_has_of_real_odd_files(name, real_data, segment, tmp_path):
    scan = real_data / "odd_nifti" / name
    assert_on_scan(segment(FETA, scan, tmp_path), scan)


def test_so_it_has_in_all_48_orders_of_the_axes(real_data, segment, tmp_path):
    scans = sorted((real_data / "odd_nifti/niivue_48_orientations").iterdir())
    assert len(scans) == 48
    for scan in scans:
        assert_on_scan(segment(FETA, scan, tmp_path), scan)


@pytest.mark.parametrize("classes, dtype", [(256, np.uint8), (257, np.int16), (300, np.int16)])
def test_the_last_of_many_classes_keeps_its_id(classes, dtype, tmp_path):
    """From the class scores to the file."""
    parser = ConfigParser(json.loads((FETA / "configs/inference.json").read_text()))
    parser.update({"labels": [f"class {number}" for number in range(classes)], "output_dir": str(tmp_path)})
    (scan,) = find_scans(str(write(tmp_path / "a.nii", *HEADERS["neither"])))
    item = parser.get_parsed_content("dataset#transform")(scan)
    pred = torch.zeros(classes, *SHAPE)
    pred[-1, :, :4] = 1
    parser.get_parsed_content("label_maps")({**item, "pred": MetaTensor(pred)})
    saved = nibabel.load(tmp_path / "a_seg.nii.gz")
    assert saved.get_data_dtype() == dtype and set(np.unique(saved.dataobj)) == {0, classes - 1}


def test_what_is_not_on_the_scan_is_not_saved(tmp_path):
    image = nibabel.load(write(tmp_path / "a.nii", *HEADERS["both the same"]))
    place = {name: image.header[name] for name in PLACE}
    meta = {"place": place, "affine": torch.as_tensor(image.affine) * 2}
    with pytest.raises(RuntimeError, match="is not on its scan"):
        SaveImage(tmp_path, writer=PlaceWriter, print_log=False)(MetaTensor(torch.zeros(1, *SHAPE), meta=meta))


CASES = {"p1/t2.nii.gz": "p1/t2", "a/../b.nii": "b", "..c.nii.gz": "..c", "./d, e.nii": "d, e", "": "x"}


@pytest.mark.parametrize(
    "case", [*CASES, "/elsewhere/x.nii.gz", "../x.nii.gz", "a/../../x.nii", "..", "../out/../x.nii"]
)
def test_a_case_is_saved_in_the_output_folder_whatever_its_name(case, tmp_path):
    out = tmp_path / "out"
    save = SaveImage(out, "seg", separate_folder=False, data_root_dir=".", output_name_formatter=name_by_case,
                     writer=PlaceWriter, print_log=False)  # fmt: skip
    save(MetaTensor(torch.zeros(1, *SHAPE), meta={"case": case, "filename_or_obj": str(tmp_path / "in/x.nii.gz")}))
    (saved,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert saved == out / f"{CASES.get(case, f'{tmp_path}/in/x'.lstrip('/'))}_seg.nii.gz"


def test_what_somebody_else_wrote_is_not_overwritten_and_a_link_leads_nowhere(tmp_path):
    (tmp_path / "out").mkdir()
    scan, label = (write(tmp_path / f"{name}.nii.gz", *HEADERS["neither"]) for name in ("scan", "label"))
    save = SaveImage(tmp_path / "out", "seg", separate_folder=False, data_root_dir=".", writer=PlaceWriter,
                     output_name_formatter=name_by_case, print_log=False)  # fmt: skip
    meta = LoadScand("image")({"image": str(scan), "case": "scan.nii.gz"})["image"].meta
    saved, ours = tmp_path / "out/scan_seg.nii.gz", tmp_path / "ours.nii.gz"
    before = label.read_bytes()
    for make in (saved.symlink_to, saved.hardlink_to):
        make(label)
        with pytest.raises(RuntimeError, match="scan_seg.nii.gz is there already and was not written by this program"):
            save(MetaTensor(torch.zeros(1, *SHAPE), meta=meta))
        saved.unlink()
    assert label.read_bytes() == before
    for value in (0, 1):
        save(MetaTensor(torch.full((1, *SHAPE), float(value)), meta=meta))
        assert (nibabel.load(saved).get_fdata() == value).all()
    saved.rename(ours)
    saved.symlink_to(ours)
    save(MetaTensor(torch.zeros(1, *SHAPE), meta=meta))
    assert nibabel.load(ours).get_fdata().all() and not nibabel.load(saved).get_fdata().any()
    (tmp_path / "out/p1").symlink_to(tmp_path)
    with pytest.raises(BadInput, match=f"p1/scan.nii.gz would be written to {tmp_path}, by a link in"):
        save(MetaTensor(torch.zeros(1, *SHAPE), meta={**meta, "case": "p1/scan.nii.gz"}))


def test_a_restored_volume_has_the_scan_s_place(tmp_path):
    """By the pre-training bundle's own way of saving."""
    bundle = BTCV.parent / "dae_pretraining"
    parser = ConfigParser(json.loads((bundle / "configs/inference.json").read_text()))
    parser.update({"output_dir": str(tmp_path), "patch_size": [64, 32, 32]})
    scan = write(tmp_path / "scan.nii.gz", *HEADERS["qform elsewhere"])
    item = parser.get_parsed_content("preprocessing")({**find_scans(str(scan))[0], "modality": "t1"})
    Compose(parser.get_parsed_content("postprocessing").transforms)({**item, "pred": item["original"].clone()})
    assert_on_scan(tmp_path / "scan_restored.nii.gz", scan)
