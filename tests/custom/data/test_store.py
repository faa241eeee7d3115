"""Crops out of a store are those of the plain path, and what is stale or damaged is said so."""

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose, NormalizeIntensityd, Orientationd, RandSpatialCropd, Spacingd, SpatialPadd

from custom.data.loading import LoadScand
from custom.data.store import Stored
from custom.data.store_format import StoredVolume, encode
from custom.errors import BadInput
from tests.conftest import PRETRAINING, SEGMENTATION

PATCH = (40, 40, 32)


@pytest.fixture
def item(tmp_path) -> dict:
    """A case of whole numbers, wider than a patch in two directions and than a chunk in one."""
    values = np.random.default_rng(0).integers(-1000, 1000, (90, 50, 20)).astype(np.int16)
    affine = np.array([[-2, 0, 0, 7], [0, 2, 0, -5], [0, 0, 3, 11], [0, 0, 0, 1]])
    nibabel.Nifti1Image(values, affine).to_filename(tmp_path / "scan.nii.gz")
    return {"image": str(tmp_path / "scan.nii.gz"), "case": "scan.nii.gz", "modality": "t1"}


@pytest.fixture
def folder(tmp_path) -> str:
    (tmp_path / "store").mkdir()
    return str(tmp_path / "store")


def stored(store: str | None = None, pixdim_mm=None) -> Stored:
    steps = [LoadScand("image", patch_size=PATCH), Orientationd("image", "RAS", labels=None)]
    steps += [Spacingd("image", pixdim_mm)] if pixdim_mm else []
    return Stored("image", [*steps, NormalizeIntensityd("image", nonzero=True)], store)


def crop(first: Stored, item: dict, seed: int, size=PATCH) -> torch.Tensor:
    pipeline = Compose([first, RandSpatialCropd("image", size), SpatialPadd("image", PATCH)])
    return pipeline.set_random_state(seed)(item)["image"]


def only_file(store: str) -> Path:
    (file,) = Path(store).iterdir()
    return file


@pytest.mark.parametrize("seed", range(6))
def test_crops_are_those_of_the_plain_path_to_the_bit(item, folder, seed):
    assert stored(folder).prepare(item) and not stored(folder).prepare(item)
    plain, read = (crop(stored(store), item, seed) for store in (None, folder))
    assert read.shape == (1, *PATCH) and read.std() > 0.5
    assert torch.equal(read.as_tensor(), plain.as_tensor()) and read.dtype == plain.dtype
    assert torch.allclose(read.affine, plain.affine)


def test_a_crop_of_no_size_is_the_whole_volume(item, folder):
    stored(folder).prepare(item)
    assert torch.equal(crop(stored(folder), item, 0, -1).as_tensor(), crop(stored(), item, 0, -1).as_tensor())


def test_resampled_volumes_come_back_to_half_a_step(item, folder):
    stored(folder, (0.7, 1.3, 1.1)).prepare(item)
    plain, read = (crop(stored(store, (0.7, 1.3, 1.1)), item, 0, -1).as_tensor() for store in (None, folder))
    step = (plain.max() - plain.min()) / 65535
    assert 0.3 * step < (read - plain).abs().max() < 0.51 * step


@pytest.mark.parametrize("values", [2, 256, 257, 65536, 65537])
def test_up_to_65536_values_are_kept_to_the_bit(values):
    volume = np.random.default_rng(0).permutation(np.arange(3 * 65537) % values).reshape(1, 3, 1, 65537)
    volume = np.sqrt(volume.astype(np.float32))
    codes, kept = encode(volume)
    assert codes.dtype == (np.uint8 if values <= 256 else np.uint16) and kept.dtype == volume.dtype
    assert np.array_equal(kept[codes], volume) is (values <= 65536)
    assert np.abs(kept[codes] - volume).max() <= 0.51 * volume.max() / 65535


def test_nothing_stale_is_read(item, folder):
    stored(folder).prepare(item)
    with pytest.raises(
        BadInput, match=r"where transforms#2#_target_ was NormalizeIntensityd and is Spacingd now; run `"
    ):
        stored(folder, (1, 1, 1))(item)
    with pytest.raises(BadInput, match=r"other\.nii is not in the store .*; run `python -m tools\.prepare`"):
        stored(folder)({**item, "case": "other.nii"})
    with pytest.raises(BadInput, match=r"scan\.nii\.gz has changed since it was put into the store"):
        stored(folder)({**item, "modality": "ct"})
    os.utime(item["image"], (0, 0))
    with pytest.raises(BadInput, match=r"scan\.nii\.gz has changed since it was put into the store"):
        stored(folder)(item)
    before = only_file(folder)
    assert stored(folder).prepare(item)
    assert only_file(folder) != before  # the old version makes room
    stored(folder)(item)


@pytest.mark.parametrize("place", np.linspace(0.01, 0.97, 13))
def test_damage_anywhere_is_noticed_and_named(item, folder, place):
    """Either the volume can't be read or it is right; nothing wrong comes back, whichever bytes are hit."""
    stored(folder).prepare(item)
    whole = stored(folder)(item)["image"][(slice(None),) * 4]
    file = only_file(folder)
    content = bytearray(file.read_bytes())
    start = int(place * len(content))
    content[start : start + 16] = bytes(byte ^ 255 for byte in content[start : start + 16])
    file.write_bytes(content)
    try:
        read = stored(folder)(item)["image"][(slice(None),) * 4]
    except BadInput as error:
        assert str(file) in str(error) and "delete it and run `python -m tools.prepare` again" in str(error)
    else:
        assert torch.equal(read.as_tensor(), whole.as_tensor())
        pytest.fail("a byte of a chunk was not noticed")


def test_a_damaged_chunk_is_named_and_the_others_are_read(item, folder):
    stored(folder).prepare(item)
    file = only_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 5] ^= 1  # in the first of two chunks
    file.write_bytes(content)
    volume = StoredVolume(file)
    with pytest.raises(BadInput, match=r"chunk 0, which starts at voxel \[0, 0, 0\], differs from its checksum"):
        volume[:1, :8, :8, :8]
    assert volume[:1, 70:80, :8, :8].shape == (1, 10, 8, 8)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="is damaged"):
        StoredVolume(file)


def test_a_store_that_is_not_there_is_told(tmp_path):
    with pytest.raises(BadInput, match=r"There is no folder .*elsewhere, which --store names; `python -m tools\.prep"):
        stored(str(tmp_path / "elsewhere"))


def batches(bundle: Path, section: str, store: str | None, **settings) -> list[dict]:
    """An epoch of a bundle's loader; with a store, that is made first."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    parser.update({"patch_size": [64, 32, 32], "num_workers": 0, "store": store, **settings})
    parser[f"{section}#dataset#progress"] = False
    if store:
        first = parser.get_parsed_content(f"{section}#preprocessing").transforms[0]
        for item in parser.get_parsed_content(f"{section}#dataset#data"):
            first.prepare(item)
    return list(parser.get_parsed_content(f"{section}#dataloader"))


@pytest.mark.parametrize("section", ["train", "validate"])
def test_the_bundle_s_pipelines_give_the_same_samples_with_a_store(section, phantom_list, folder):
    """All five modalities, validation's disruptions included; the store does not depend on the patch."""
    pairs = [batches(PRETRAINING, section, store, datalist=str(phantom_list)) for store in (None, folder)]
    assert sum(len(batch["case"]) for batch in pairs[0]) == 6
    for plain, read in zip(*pairs, strict=True):
        assert plain["case"] == read["case"]
        for key in {"image", "label"} & plain.keys():
            assert torch.equal(torch.as_tensor(plain[key]), torch.as_tensor(read[key])), plain["case"]
    for file in Path(folder).iterdir():
        assert "patch_size" not in json.dumps(StoredVolume(file).about)


@pytest.mark.parametrize("bundle", SEGMENTATION, ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("pixdim_mm", [None, [1.5, 2, 2.5]], ids=str)
def test_labelled_crops_are_those_without_a_store(bundle, pixdim_mm, labelled_lists, folder):
    """Smaller than the patch in some directions; the label map, resampled to the nearest, to the bit in any case."""
    settings = {"datalist": str(labelled_lists["ct" if "ct" in bundle.name else "fetal"]), "pixdim_mm": pixdim_mm}
    (plain,), (read,) = (batches(bundle, "train", store, **settings) for store in (None, folder))
    assert plain["image"].shape == read["image"].shape == (4, 1, 64, 32, 32)
    assert len(plain["label"].unique()) > 2 and torch.equal(plain["label"], read["label"])
    step = 0 if pixdim_mm is None else (plain["image"].max() - plain["image"].min()).item() / 65535
    assert (plain["image"] - read["image"]).abs().max() <= 2 * step
