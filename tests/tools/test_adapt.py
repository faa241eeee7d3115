"""Bundles for data that nobody has built against: measured, decided, and ready to train, verify and package."""

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import SwinUNETR

from custom.files import read_json
from tests.conftest import autoencoder, folders, metrics, monai_bundle
from tools import verify
from tools.adapt import decide, measure
from tools.adapt.__main__ import main


def write_cases(
    folder, count=3, shape=(20, 18, 12), spacing_mm=(1, 1, 1), ids=(1,), ct=False, lacking=(), dtype=np.uint8, **more
):
    """Write cases with a cube for each id, in a row along y; the last validates. Return the data list."""
    random, entries = np.random.default_rng(0), []
    for number in range(count):
        image, label = random.normal(40 if ct else 400, 20, shape), np.zeros(shape, np.uint8)
        image[0] = -1000 if ct else 0
        for place, id in enumerate(ids):
            if (number, id) not in lacking:
                first = 1 + place * (shape[1] - 2) // len(ids)
                box = np.s_[4:12, first : max(first + 1, first + (shape[1] - 2) // len(ids) - 1), 1:-1]
                image[box] += 30 * (place + 1)
                label[box] = id
        entry = {}
        for name, array in (("image", image.astype(np.int16)), ("label", label.astype(dtype))):
            entry[name] = f"{name}_{number}.nii.gz"
            nibabel.Nifti1Image(array, np.diag([*spacing_mm, 1])).to_filename(folder / entry[name])
        entries.append(entry)
    file = folder / "list.json"
    file.write_text(json.dumps({"training": entries[:-1], "validation": entries[-1:], **more}))
    return file


@pytest.fixture
def quick(monkeypatch):
    """No network is timed: a voxel of a step takes 10 microseconds and 1 kB."""
    monkeypatch.setattr(decide, "cost", lambda *_: (1e-5, 1e3))


def adapted(datalist, out, *arguments):
    """Run the tool, and return the training config that it has written, and the plan."""
    assert main([str(datalist), str(out), *arguments]) == 0
    return read_json(out / "configs/train.json"), (out / "configs/plan.md").read_text()


def test_a_bundle_is_written_and_trained(labelled_lists, tmp_path):
    """tests/integration/test_adapted.py packages and serves one."""
    out, run = tmp_path / "organs", tmp_path / "run"
    config, plan = adapted(labelled_lists["ct"], out, "--minutes", "0.1", "--pixdim_mm", "[10,10,10]")
    assert config["labels"] == ["background", *(f"class {id}" for id in range(1, 14))]
    assert config["pixdim_mm"] == [10, 10, 10] and "given. It would have been [5.25, 5.25, 4.5]: " in plan
    assert config["network_def"]["window_size"] == 4 and config["loss"]["batch"] is True
    verify.check_ids(out)
    data = {"datalist": labelled_lists["ct"], "patch_size": config["patch_size"], "val_interval": 1}
    done = monai_bundle("train", bundle=out, max_epochs=1, **data, **folders(run))
    assert done.returncode == 0, done.stderr
    assert "Not learnt, by a Dice below 0.1 in the last validation: " in done.stdout
    assert np.isfinite(metrics(run)[0]["loss"])


ODD = {
    "one class, 0.15 mm": {"spacing_mm": (0.15, 0.15, 0.15)},
    "37 classes": {"shape": (20, 80, 12), "ids": range(1, 38)},
    "three slices of 8 mm": {"shape": (40, 40, 3), "spacing_mm": (0.5, 0.5, 8)},
    "an empty label map": {"lacking": [(0, 1)]},
    "ids with a gap": {"ids": (1, 3)},
    "a float label map of few voxels": {"shape": (14, 9, 8), "dtype": np.float32},
    "CT without a modality": {"ct": True},
    "two classes, one in a single case": {"ids": (1, 2), "lacking": [(1, 2), (2, 2)]},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_data_is_adapted_to_and_trained_on(name, quick, tmp_path):
    datalist = write_cases(tmp_path, **ODD[name])
    config, plan = adapted(datalist, tmp_path / "out")
    verify.check_agreement(tmp_path / "out")
    assert (config["modality"] == "ct") == ("CT" in name)
    assert len(config["labels"]) == 1 + max(ODD[name].get("ids", (1,)))
    assert ("1 label maps are empty" in plan) == ("empty" in name)
    assert ("class 2 (2) is in 1 of 2 cases to train on and in 0 of 1 to validate." in plan) == ("single" in name)
    assert ("unused 2" in plan) == ("gap" in name)
    assert (config["rotation_radians"] == [0, 0, 0.5]) == ("8 mm" in name)
    parser = ConfigParser(config)
    parser.update({"datalist": str(datalist), "cache_rate": 0, "num_workers": 0, "feature_size": 12, "strength": 1})
    batch = next(iter(parser.get_parsed_content("train#dataloader")))
    loss = parser.get_parsed_content("loss")(parser.get_parsed_content("network")(batch["image"]), batch["label"])
    assert list(batch["image"].shape) == [2, 1, *config["patch_size"]] and torch.isfinite(loss)


def test_every_class_is_the_middle_of_as_many_crops(quick, tmp_path):
    config, _ = adapted(write_cases(tmp_path, ids=(1, 2), shape=(64, 64, 64)), tmp_path / "out")
    crops = ConfigParser(config).get_parsed_content("crops")
    label = torch.zeros(1, 100, 100, 100)
    label[0, 50, 50, 50], label[0, 20:80, 20:80, 70:90] = 1, 2
    data, found = {"image": label, "label": label}, []
    for seed in range(60):
        crops[1].set_random_state(seed)
        found.append(1 in crops[1](crops[0](data))[0]["label"])
    assert np.mean(found) > 0.3


def test_classes_that_differ_by_side_are_not_flipped(quick, tmp_path):
    """Two cubes of one size and value, one on the right and one on the left; then one behind the other."""

    def case(centres):
        one, two = (measure.Structure(np.array([500]), np.array(c), np.arange(100.0)) for c in centres)
        return measure.Case(np.ones(3), np.full(3, 90.0), np.full(3, 90.0), False, {1: one, 2: two}, 0)

    labels = ["background", "one", "two"]
    beside, behind = [(20.0, 40, 40), (70.0, 45, 38)], [(40.0, 20, 40), (45.0, 70, 38)]
    assert measure.sides([case(beside), case(beside)], labels) == [(1, 2)]
    assert measure.sides([case(behind), case(behind)], labels) == []
    assert measure.sides([case(beside), case(beside[::-1])], labels) == []
    assert measure.sides([case(behind)], ["background", "left kidney", "Right_kidney"]) == [(1, 2)]
    named = {"labels": {"1": "left eye", "2": "right eye"}}
    config, plan = adapted(write_cases(tmp_path, ids=(1, 2), **named), tmp_path / "out")
    assert config["flip_axes"] == [1, 2] and "a flip along x would swap left eye and right eye" in plan
    ensemble = read_json(tmp_path / "out/configs/ensemble.json")
    assert ensemble["inferer"]["transform"]["spatial_axis"] == [1, 2]


def test_rare_classes_weigh_more(tmp_path):
    """In scans of voxels of 8 mm3: 90 of 1000 voxels of a box are of one class, 10 of the other."""

    def case(*sizes):
        classes = {id: measure.Structure(np.array([n]), np.zeros(3), np.ones(1)) for id, n in enumerate(sizes, 1) if n}
        return measure.Case(np.full(3, 2.0), np.full(3, 90.0), np.full(3, 20.0), False, classes, 0)

    task = decide.Task(
        tmp_path, {}, [case(90, 10), case(90, 0), case(90, 0), case()], [], ["b", "one", "two"], "ct", 1, None
    )
    assert task.shares(np.array([10, 10, 10])) == {1: 0.09, 2: 0.01}  # of the box
    assert task.shares(np.array([10, 40, 400]))[1] == 90 * 8 / (10 * 40 * 90)  # of the crop, which ends with the scan
    plan = decide.Plan({})
    decide.decide_weights(plan, task, np.ones(3))
    assert plan.ids["loss#weight"] == [0.11, 0.33, 1.0]  # roots of 1/90, 1/9 and 1
    assert "90% of which is background" in plan.lines[0]


def test_specks_are_no_components():
    assert decide.middle(np.array([1, 1, 1, 900, 1])) == 900
    assert decide.middle(np.array([5, 4, 6])) == 5


def test_names_are_those_of_the_list():
    assert measure.names_of({"labels": {"0": "background", "1": "liver"}}, {1}) == ["background", "liver"]
    assert measure.names_of({"labels": {"background": 0, "liver": 2}}, {2, 1}) == ["background", "class 1", "liver"]
    assert measure.names_of({}, {1, 3}, ["b", "x", "y", "z"]) == ["b", "x", "y", "z"]


def test_patches_grow_where_they_hold_least():
    assert list(decide.patches(np.array([100, 40, 30]))) == [[64, 32, 32], [96, 32, 32], [96, 64, 32], [128, 64, 32]]
    assert next(decide.patches(np.array([40, 90, 90]), x_first=True)) == [64, 32, 32]


def test_a_scan_is_made_coarser_but_small_components_stay():
    spacing_mm, extent_mm = np.array([0.5, 0.5, 3]), np.array([300.0, 300, 300])
    found = decide.coarsened(spacing_mm, extent_mm, 1e6, 1e6)
    assert 9e5 < (extent_mm / found).prod() <= 1e6
    found = decide.coarsened(spacing_mm, extent_mm, 4e6, 1e6)
    assert found[0] == found[1] > 1 and found[2] == 3
    assert 3e3 / decide.coarsened(spacing_mm, extent_mm, 1e4, 3e3).prod() >= decide.LEAST_VOXELS


@pytest.mark.parametrize(
    "more, arguments, said",
    [
        ({"shape": (20, 18, 1)}, [], "1 channels of 20x18x1; a 3D network needs several slices"),
        ({"ids": (1, 9)}, [], "have the ids 1, 9, and a network has a channel"),
        ({"lacking": [(0, 1), (1, 1)]}, [], "No label map to train on in"),
        ({"lacking": [(2, 1)]}, [], "No label map to validate on in"),
        ({}, ["--labels", "['background']"], "has 1 names with the background, but the ids go up to 1"),
        ({}, ["--learning_rat", "1"], "no id `learning_rat`; did you mean `learning_rate`?"),
        ({"modality": {"0": "CT", "1": "T1"}}, [], "has CT and t1; make a list of each"),
    ],
)
def test_what_cannot_be_adapted_to_is_refused(more, arguments, said, quick, tmp_path, capsys):
    assert main([str(write_cases(tmp_path, **more)), str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    assert main([str(write_cases(tmp_path)), str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_weights_fix_the_network_and_their_spacing_is_kept_where_it_fits(quick, tmp_path):
    network = SwinUNETR(in_channels=1, out_channels=1, feature_size=24, window_size=4)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    datalist = write_cases(tmp_path)
    config, plan = adapted(datalist, tmp_path / "out", "--pretrained", str(tmp_path / "model.pt"))
    assert config["feature_size"] == 24 and config["network_def"]["window_size"] == 4
    assert "The pre-training's spacing, that of each scan, does not fit" in plan


def test_a_pre_training_of_another_window_is_told(quick, tmp_path):
    weights = SwinUNETR(in_channels=1, out_channels=1, feature_size=24, window_size=4).state_dict()
    for number, (low, high) in enumerate(((-1000, 1000), (-75, 200))):
        weights.training = {"settings": {"modalities": {"ct": {"a_min": low, "a_max": high}}}}
        torch.save(weights, tmp_path / "model.pt")
        start = ["--pretrained", str(tmp_path / "model.pt")]
        config, plan = adapted(write_cases(tmp_path, ct=True), tmp_path / f"out{number}", *start)
        window = [config["intensity"][name] for name in ("a_min", "a_max")]
        assert window == [-75, 200]
        assert (f"The pre-training saw {low} to {high} HU, and this training sees -75 to 200." in plan) is (number == 0)


def test_a_residual_encoder_starts_a_bundle_of_its_network(quick, tmp_path):
    """And the training takes the weights, all but the output layer."""
    network = autoencoder(backbone="resenc")
    torch.save(network.state_dict(), tmp_path / "model.pt")
    file = write_cases(tmp_path)
    config, plan = adapted(file, tmp_path / "out", "--pretrained", str(tmp_path / "model.pt"), "--minutes", "0.1")
    assert config["network_def"]["_target_"].endswith("ResidualEncoderUNet") and config["feature_size"] == 4
    assert config["network_def"]["n_blocks_per_stage"] == [1] * 6 and "window_size" not in config["network_def"]
    assert "the pre-training's, a residual-encoder U-Net" in plan
    verify.check_ids(tmp_path / "out")
    data = {"datalist": file, "pretrained": tmp_path / "model.pt", "val_interval": 1}
    done = monai_bundle("train", bundle=tmp_path / "out", max_epochs=1, **data, **folders(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "A residual-encoder U-Net that segments class 1" in (tmp_path / "out/docs/README.md").read_text()


def test_a_ct_of_air_alone_is_refused(tmp_path, capsys):
    datalist = write_cases(tmp_path, ct=True)
    air = np.random.default_rng(0).integers(-1024, -600, (20, 18, 12)).astype(np.int16)
    nibabel.Nifti1Image(air, np.eye(4)).to_filename(tmp_path / "image_0.nii.gz")
    assert main([str(datalist), str(tmp_path / "out")]) == 2
    assert "image_0.nii.gz has no voxel above -500 HU" in capsys.readouterr().err
