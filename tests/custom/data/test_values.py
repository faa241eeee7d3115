"""What values a scan of a modality can have, on CT and MRI made up and real."""

import nibabel
import numpy as np
import pytest

from custom.data.values import Values

RANDOM = np.random.default_rng(0)
AIR, FAT, MUSCLE, BONE = (RANDOM.normal(mean, 20, 20_000) for mean in (-990, -100, 50, 700))
CT = np.concatenate([AIR, FAT, MUSCLE, MUSCLE, BONE[:3000]]).astype(np.float32)
MRI = np.concatenate([np.zeros(9000), RANDOM.gamma(4, 100, 40_000)]).astype(np.float32)
FEW = np.where(np.arange(CT.size) < 300, CT, -1024)
NOT_HU = {
    "eight bits": (CT.clip(-160, 240) + 160) / 400 * 255,
    "unsigned": CT + 1024,
    "unsigned, noise cut": (CT + 1000).clip(0),
    "padded with -2000, 1024 added": np.concatenate([np.full(30_000, -2000), CT]) + 1024,
    "thousandths": CT / 1000,
    "from -1 to 1": CT.clip(-1000, 1000) / 1000,
    "z-score": (CT - CT.mean()) / CT.std(),
    "brain window": CT.clip(0, 80),
    "MRI": MRI,
    "MRI, z-score": (MRI - MRI.mean()) / MRI.std(),
}


def note(voxels, modality, slabs=3) -> str:
    values = Values()
    for slab in np.array_split(np.asarray(voxels, np.float32), slabs):
        values.add(slab)
    return values.note(modality)


@pytest.mark.parametrize("kind", NOT_HU)
def test_a_ct_that_is_not_in_hu(kind):
    assert ", not HU: " in note(NOT_HU[kind], "ct")
    assert not note(NOT_HU[kind], None)


@pytest.mark.parametrize("low, high", [(-5000, 5000), (-1000, 1000), (-175, 250), (-125, 275)])
def test_a_ct_in_hu_whatever_its_window(low, high):
    assert not note(CT.clip(low, high), "ct")


def test_an_mri_and_a_ct_called_one():
    assert not note(MRI, "t1") and not note((MRI - 300) / 90, "flair")
    assert note(CT, "t2").endswith(", as of a CT in HU")


@pytest.mark.parametrize("slabs", [1, 7])
def test_mostly_one_value(slabs):
    assert "voxels are -1024" in note(FEW, "ct", slabs) and "99.6% of" in note(FEW, None, slabs)
    assert not note(np.where(np.arange(CT.size) < 3500, CT, -1024), "ct", slabs)


@pytest.mark.parametrize(
    "pattern, modality, odd",
    [("ct/images/*", "ct", 0), ("head_neck_ct/images/*1.nii.gz", "ct", 0), ("unlabelled_pool/ct/*", "ct", 2),
     ("fetal_mri/images/*", "t2", 0), ("brain_mri/images/*", "t1", 0), ("hippocampus_mri/images/*7.nii.gz", "t1", 0)],
)  # fmt: skip
def test_real_scans(pattern, modality, odd, real_data):
    """Of the pool's CT, the two mouse skulls of 8 bits are odd, which they are."""
    files = sorted(real_data.glob(pattern))
    notes = {file.name: note(nibabel.load(file).get_fdata().ravel(), modality) for file in files}
    assert len(files) > 2 and sum(map(bool, notes.values())) == odd, notes
    assert all("mouse" in name for name, told in notes.items() if told)
