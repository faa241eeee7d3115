from collections import Counter
from pathlib import Path
from unittest.mock import MagicMock

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.data import DataLoader
from monai.transforms import Compose, EnsureTyped, Lambdad, RandGaussianNoised, Spacingd

from custom.data.dataset import CaseDataset, EpochSampler, derive_seed, memory_bytes
from custom.data.loading import LoadScand
from custom.data.store import Stored
from custom.errors import BadInput, user_message


def fail_on_negative(value):
    if value.min() < 0:
        raise BadInput("negative.nii is negative.")
    return value


def dataset(values, seed: int = 0, **options) -> CaseDataset:
    """One case a value, with noise of a thousandth."""
    transforms = [EnsureTyped("image"), Lambdad("image", fail_on_negative), RandGaussianNoised("image", 1, std=1e-3)]
    data = [{"image": torch.tensor([value]), "case": f"{value}.nii"} for value in values]
    options = {"progress": False, "num_workers": 0, **options}
    return CaseDataset(data, Compose(transforms), seed, **options)


def epoch_of(data: CaseDataset, epoch: int = 1, start: int = 0, num_workers: int = 0, **options) -> list[float]:
    sampler = EpochSampler(data, seed=data.seed)
    sampler.set_epoch(epoch)
    sampler.start = start
    loader = DataLoader(data, batch_size=2, sampler=sampler, num_workers=num_workers, **options)
    return torch.cat([batch["image"].as_tensor().flatten() for batch in loader]).tolist()


@pytest.mark.parametrize("options", [{"cache_rate": 0}, {"cache_rate": 1}, {"cache_rate": 0.5}])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_samples_depend_on_seed_epoch_and_item_alone(options, num_workers):
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    reference = epoch_of(dataset(values))
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    assert epoch_of(dataset(values, **options), **workers) == reference
    assert epoch_of(dataset(values, **options), start=4, **workers) == reference[4:]
    assert sorted(map(round, reference)) == values and reference != sorted(reference)
    for other in (epoch_of(dataset(values), epoch=2), epoch_of(dataset(values, seed=1))):
        assert not set(other) & set(reference) and list(map(round, other)) != list(map(round, reference))


def test_persistent_workers_draw_anew_in_every_epoch():
    data = dataset([1.0, 2.0, 3.0])
    sampler = EpochSampler(data)
    loader = DataLoader(data, sampler=sampler, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        epochs.append(torch.cat([batch["image"].as_tensor().flatten() for batch in loader]).tolist())
    assert epochs == [epoch_of(data, 1), epoch_of(data, 2)]


@given(items=st.integers(1, 30), ranks=st.integers(1, 8), epoch=st.integers(0, 9))
@example(items=10_001, ranks=8, epoch=0)
@settings(deadline=None)
def test_ranks_share_the_items_in_equal_parts(items, ranks, epoch):
    """None is lost, and only what is missing to equal shares is read twice."""
    shares = []
    for rank in range(ranks):
        sampler = EpochSampler(list(range(items)))
        sampler.num_replicas, sampler.rank = ranks, rank
        sampler.num_samples = -(-items // ranks)
        sampler.total_size = sampler.num_samples * ranks
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    assert {len(share) for share in shares} == {len(sampler)}
    times = Counter(index for share in shares for _, index in share)
    assert times.keys() == set(range(items))
    assert max(times.values()) <= -(-sampler.total_size // items) and sampler.total_size - items < ranks
    assert {number for share in shares for number, _ in share} == {epoch}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cache_rate", [0, 1])
def test_bad_cases_stop_or_are_replaced_and_told_once(caplog, num_workers, cache_rate):
    values = [1.0, -2.0, 3.0, 4.0, -2.0]  # one case comes twice
    options = {"cache_rate": cache_rate, "hash_as_key": True}
    with pytest.raises(RuntimeError) as caught:
        epoch_of(dataset(values, **options), num_workers=num_workers)
    assert user_message(caught.value) == "negative.nii is negative."
    data = dataset(values, bad_cases="skip", max_bad_share=0.4, **options)
    for epoch in (1, 2):
        found = list(map(round, epoch_of(data, epoch, num_workers=num_workers)))
        assert sorted(found) == [1, 1, 3, 3, 4]
    if num_workers == 0:  # what workers log does not reach this process's handlers
        assert caplog.text.count("Left out: negative.nii is negative.") == 1


def test_a_bad_case_without_a_name_is_that_of_its_file(caplog):
    data = [{"image": name} for name in ("bad.nii", "good.nii", "bad.nii")]
    load = Lambdad("image", lambda name: fail_on_negative(torch.tensor([-1.0 if name == "bad.nii" else 1.0])))
    skip = {"bad_cases": "skip", "max_bad_share": 0.7, "num_workers": 0, "progress": False}
    assert epoch_of(CaseDataset(data, Compose([load]), **skip)) == [1, 1, 1]


def test_too_many_bad_cases_stop(caplog):
    with pytest.raises(BadInput, match=r"2 of 5 items can't be read, more than --max_bad_share 0\.3; the last: negat"):
        epoch_of(dataset([1.0, -2.0, 3.0, 4.0, -5.0], bad_cases="skip", max_bad_share=0.3, cache_rate=0))
    with pytest.raises(BadInput, match='--bad_cases is "stop" or "skip", got \'ignore\''):
        dataset([1.0], bad_cases="ignore")


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_mix_is_a_seed(numbers):
    assert 0 <= derive_seed(*numbers) < 2**32 and derive_seed(*numbers) == derive_seed(*numbers)


@pytest.fixture
def large_scans(tmp_path) -> list[dict]:
    """Two scans of 10 x 20 x 30 voxels of 1 x 2 x 3 mm, the first of which is listed twice."""
    paths = [str(tmp_path / f"{n}.nii.gz") for n in range(2)]
    for n, path in enumerate(paths):
        image = np.random.default_rng(n).integers(-9, 9, (10, 20, 30)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(image, np.diag([1, 2, 3, 1])), path)
    return [{"image": path, "modality": "ct"} for path in (paths[0], *paths)]


@pytest.mark.parametrize(
    ("steps", "rate", "processes", "values"),
    [
        ([], 1.0, 1, 2 * 10 * 20 * 30),
        ([], 0.5, 3, 3 * 10 * 20 * 30),
        ([Spacingd("image", (2, 2, 2))], 1.0, 1, 2 * 5 * 20 * 45),
    ],
)
def test_a_cache_that_can_not_fit_is_refused_before_a_scan_is_read(
    steps, rate, processes, values, large_scans, monkeypatch
):
    """The bytes are those that the cached volumes have, or after resampling less by a voxel of a side."""
    transform = Compose([Stored("image", [LoadScand("image"), *steps])])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr("custom.data.dataset.memory_bytes", lambda: int(4.1 * values))
    cached = CaseDataset(large_scans, transform, cache_rate=rate, progress=False, num_workers=0, hash_as_key=True)
    found = sum(item["image"].numel() * item["image"].element_size() for item in cached._cache)
    assert found == pytest.approx(4 * values / processes, rel=0.2 if steps else 0) or rate < 1
    monkeypatch.setattr("custom.data.dataset.memory_bytes", lambda: int(3.8 * values))
    monkeypatch.setattr(LoadScand, "load", MagicMock(side_effect=AssertionError("a scan was read")))
    with pytest.raises(BadInput, match=r"of the 2 scans .+ GiB.+ tools\.prepare"):
        CaseDataset(large_scans, transform, cache_rate=rate, progress=False, num_workers=0, hash_as_key=True)
    CaseDataset(large_scans, transform, cache_rate=0, progress=False, num_workers=0)


def test_a_damaged_header_is_left_to_the_loader(large_scans, tmp_path, monkeypatch):
    """It says that the scan has 2 ** 45 voxels."""
    path = tmp_path / "damaged.nii"
    nibabel.save(nibabel.load(large_scans[0]["image"]), path)
    damaged = bytearray(path.read_bytes())
    damaged[42:48] = np.array([2**14, 2**15 - 1, 2**15 - 1], "<i2").tobytes()
    path.write_bytes(damaged)
    transform = Compose([Stored("image", [LoadScand("image")])])
    with pytest.raises(RuntimeError) as error:
        CaseDataset([{"image": str(path), "modality": "ct"}], transform, progress=False, num_workers=0)
    assert "damaged.nii can't be read" in user_message(error.value)


def test_memory_is_this_machine_s():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 2**10
    assert 2**28 < memory_bytes() <= total * 1.01
