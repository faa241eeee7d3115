"""What a user gets wrong is answered by one sentence that names it and the mend, without a traceback."""

import json

import nibabel
import numpy as np
import pytest
import torch

from custom.data.loading import LoadScand
from custom.errors import BadInput, user_message
from tests.conftest import SEGMENTATION, autoencoder, monai_bundle
from tools.studies import damaged


def write(path, array) -> str:
    nibabel.Nifti1Image(np.asarray(array, np.float32), np.eye(4)).to_filename(path)
    return str(path)


def noise(*shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


# Of `tools.studies.damaged`: name of the file, what is wrong, what to do.
SCANS = {
    "missing.nii": ("does not exist", "--dataset_dir"),
    "truncated_1.nii.gz": ("can't be read", "tools.datalist"),
    "series.nii": ("not a 3D volume", "split it"),
    "plane.nii": ("not a 3D volume", "several slices"),
    "value_0_one.nii.gz": ("NaN", "replace those voxels"),
    "constant.nii": ("same value -1024", "take it out"),
}


def spoken(done) -> str:
    """The error sentence of a finished process, which has to be the last thing said, with no traceback."""
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def data_list(tmp_path, training) -> str:
    good = {"image": write(tmp_path / "good.nii.gz", noise(64, 32, 32)), "modality": "ct"}
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": training, "validation": [good]}))
    return str(path)


@pytest.mark.parametrize("name", SCANS)
def test_bad_scans(name, tmp_path):
    for _, other, content in damaged.contents():
        if other == name:
            (tmp_path / name).write_bytes(content)
    datalist = data_list(tmp_path, [{"image": str(tmp_path / name), "modality": "ct"}])
    message = spoken(monai_bundle("train", datalist=datalist, output_dir=tmp_path, ckpt_dir=tmp_path))
    assert all(part in message for part in (name, *SCANS[name]))


def test_a_fault_found_in_a_worker_process(tmp_path):
    scan = noise(64, 32, 32)
    scan[3, 4, 5] = np.nan
    datalist = data_list(tmp_path, [{"image": write(tmp_path / "bad.nii.gz", scan), "modality": "ct"}])
    arguments = {"datalist": datalist, "output_dir": tmp_path, "ckpt_dir": tmp_path, "cache_rate": 0}
    message = spoken(monai_bundle("train", **arguments, train__dataloader__num_workers=1))
    assert "bad.nii.gz holds NaN" in message


@pytest.mark.parametrize(
    "training, expected",
    [
        ([], 'no entries under "training"'),
        ([{"image": "good.nii.gz", "modality": "t1cee"}], "did you mean `t1ce`?"),
        ([{"image": "good.nii.gz"}], 'needs "image" and "modality"'),
    ],
    ids=["empty", "unknown modality", "no modality"],
)
def test_bad_data_lists(training, expected, tmp_path):
    datalist = data_list(tmp_path, training)
    message = spoken(monai_bundle("train", datalist=datalist, output_dir=tmp_path, ckpt_dir=tmp_path))
    assert expected in message and "list.json" in message


@pytest.mark.parametrize(
    "override, expected",
    [
        ({"datalist": "/nowhere/list.json"}, "/nowhere/list.json can't be read"),
        ({"patch_size": "[48,48,48]"}, "--patch_size [48, 48, 48] does not fit the network"),
        ({"patch_size": "[32,32,32]"}, "--patch_size [32, 32, 32] does not fit the network"),
        ({"learning_rat": 0.1}, "Nothing uses the id `learning_rat`; did you mean `learning_rate`?"),
        ({"train__bacth_size": 1}, "Nothing uses the id `train#bacth_size`"),
        (
            {"network_def__masking__ratoi": 1},
            "`network_def#masking#ratoi` is no argument of custom.masking.LocalMasking",
        ),
        ({"optimizer__learning_rate": 24}, "`optimizer#learning_rate` is no argument of torch.optim.AdamW"),
        ({"disruptions": '["nosie"]'}, "list of names from"),
    ],
    ids=str,
)
def test_bad_overrides(override, expected, tmp_path, small_list):
    arguments = {"datalist": small_list, "output_dir": tmp_path, "ckpt_dir": tmp_path, **override}
    assert expected in spoken(monai_bundle("train", **arguments))


@pytest.mark.parametrize("kind", ["missing", "truncated", "another size"])
@pytest.mark.parametrize("configs", [("train", "evaluate"), ("inference",)], ids=" and ".join)
def test_bad_checkpoints(kind, configs, tmp_path, small_list, phantoms):
    path = tmp_path / "model.pt"
    if kind != "missing":
        torch.save(autoencoder(feature_size=24).state_dict(), path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    scan = {"dataset_dir": phantoms / "ct" / "images"} if configs == ("inference",) else {"datalist": small_list}
    message = spoken(monai_bundle(*configs, ckpt_dir=tmp_path, output_dir=tmp_path, **scan))
    assert str(path) in message and ("no checkpoint" if kind == "missing" else "can't be loaded") in message


def test_resuming_with_other_settings(tmp_path, small_list):
    arguments = {"datalist": small_list, "output_dir": tmp_path, "ckpt_dir": tmp_path, "max_epochs": 1}
    assert monai_bundle("train", **arguments).returncode == 0
    before = (tmp_path / "checkpoint_iteration=1.pt").read_bytes()
    done = monai_bundle("train", **{**arguments, "network_def__network__feature_size": 24})
    assert 'started with network_def#network#feature_size "@feature_size", and now it would be 24' in spoken(done)
    assert (tmp_path / "checkpoint_iteration=1.pt").read_bytes() == before


def test_weights_that_are_nan_name_the_cases_and_leave_the_checkpoint(tmp_path, small_list):
    arguments = {"datalist": small_list, "output_dir": tmp_path, "ckpt_dir": tmp_path}
    # An epoch is one iteration: the first at learning rate 0, the second ruins the weights.
    message = spoken(monai_bundle("train", **arguments, max_epochs=3, learning_rate=1e38, warmup_iterations=2))
    assert "The norm of the weights is" in message and "iteration 2" in message
    assert "ct_000.nii.gz" in message and "ct_001.nii.gz" in message
    dump = torch.load(tmp_path / "nan_batch_rank=0.pt", weights_only=True)
    assert dump["image"].shape == dump["original"].shape == (2, 1, 64, 32, 32) and len(dump["case"]) == 2
    (checkpoint,) = tmp_path.glob("checkpoint_iteration=*.pt")
    weights = torch.load(checkpoint, weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())


def test_inference_without_scans(tmp_path):
    assert "no .nii" in spoken(monai_bundle("inference", dataset_dir=tmp_path, output_dir=tmp_path, ckpt_dir=tmp_path))
    missing = tmp_path / "scan.nii.gz"
    assert str(missing) in spoken(
        monai_bundle("inference", dataset_dir=missing, output_dir=tmp_path, ckpt_dir=tmp_path)
    )


def test_a_volume_smaller_than_the_patch_is_padded_and_said(tmp_path, caplog):
    scan = write(tmp_path / "small.nii.gz", noise(40, 50, 20))
    loaded = LoadScand("image", patch_size=(64, 32, 32))({"image": scan})["image"]
    assert loaded.shape == (1, 40, 50, 20)
    assert "small.nii.gz is 40x50x20 voxels, smaller than the patch 64x32x32, and is padded" in caplog.text
    training = [{"image": scan, "modality": "t1"}]
    done = monai_bundle(
        "train", datalist=data_list(tmp_path, training), max_epochs=1, output_dir=tmp_path, ckpt_dir=tmp_path
    )
    assert done.returncode == 0 and "is padded" in done.stdout


def test_the_sentence_survives_wrapping():
    try:
        try:
            raise BadInput("the file\n is bad")
        except BadInput as error:
            raise RuntimeError("applying transform") from error
    except RuntimeError as error:
        assert user_message(error) == "the file is bad"
    assert user_message(ValueError("another error")) is None


def labelled(tmp_path, label=None, affine=None, **entry) -> dict:
    """Overrides for a segmentation bundle with a data list of one scan and a label map."""
    label = np.zeros((64, 32, 32)) if label is None else label
    nibabel.Nifti1Image(np.asarray(label, np.float32), np.eye(4) if affine is None else affine).to_filename(
        tmp_path / "label.nii.gz"
    )
    case = {
        "image": write(tmp_path / "good.nii.gz", noise(64, 32, 32)),
        "label": str(tmp_path / "label.nii.gz"),
    } | entry
    other = {"image": write(tmp_path / "other.nii.gz", noise(64, 32, 32)[::-1]), "label": case["label"]} | entry
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"training": [case], "validation": [other]}))
    return {"datalist": path, "output_dir": tmp_path, "ckpt_dir": tmp_path}


def no_label(path) -> dict:
    case = {"image": str(path / "good.nii.gz"), "label": str(path / "no.nii")}
    (path / "no.json").write_text(json.dumps({"training": [case]}))
    return {"datalist": path / "no.json"}


def other_size(path) -> str:
    torch.save(autoencoder(feature_size=24).state_dict(), path)
    return str(path)


SEGMENTATIONS = {
    "an id outside the classes": (lambda path: labelled(path, np.full((64, 32, 32), 40)), "label.nii.gz holds 40, but"),
    "another shape": (lambda path: labelled(path, np.zeros((64, 32, 31))), "label.nii.gz has the shape (64, 32, 31)"),
    "another place": (lambda path: labelled(path, affine=np.diag([-1, 1, 1, 1])), "label.nii.gz lies elsewhere than"),
    "no label file": (
        lambda path: labelled(path) | no_label(path),
        "no.nii of the data list",
    ),
    "no fold": (lambda path: labelled(path, fold=1) | {"fold": 5}, "list.json has the folds [1], not 5; give --fold"),
    "no labels": (lambda path: labelled(path) | {"label_fraction": 0}, "--label_fraction is a share above 0"),
    "a missing pre-training": (
        lambda path: labelled(path) | {"pretrained": path / "no.pt"},
        "no.pt; train first, or name another",
    ),
    "a pre-training of another size": (
        lambda path: labelled(path) | {"pretrained": other_size(path / "other.pt")},
        "other.pt is of a network of another size: swinViT.patch_embed.proj.weight is (24, 1, 2, 2, 2) there and (12,",
    ),
    "an unknown part": (lambda path: labelled(path) | {"transfer": "encodr"}, "--transfer is one of"),
    "other channels": (
        lambda path: labelled(path) | {"in_channels": 4},
        "good.nii.gz is not a 3D volume of 4 channels",
    ),
    "a misspelt id": (lambda path: labelled(path) | {"val_intervall": 1}, "did you mean `val_interval`?"),
}


@pytest.mark.parametrize("kind", SEGMENTATIONS)
def test_bad_input_of_the_segmentation_bundles(kind, tmp_path):
    """Of one of them: they differ in nothing that this depends on (test_configs)."""
    make, expected = SEGMENTATIONS[kind]
    assert expected in spoken(monai_bundle("train", bundle=SEGMENTATION[0], max_epochs=1, **make(tmp_path)))


def test_an_ensemble_of_wrong_checkpoints(tmp_path):
    scan = {"dataset_dir": write(tmp_path / "good.nii.gz", noise(64, 32, 32)), "output_dir": tmp_path}
    for checkpoints, expected in (
        ([], "--checkpoints is a list"),
        ([str(tmp_path / "no.pt")], "no.pt; train first"),
        ([other_size(tmp_path / "other.pt")], "other.pt can't be loaded, it is of another network"),
    ):
        done = monai_bundle("inference", "ensemble", bundle=SEGMENTATION[1], checkpoints=checkpoints, **scan)
        assert expected in spoken(done)


@pytest.mark.parametrize("wrong, close", [("validate#infererr", "validate#inferer"), ("val_intervall", "val_interval")])
def test_a_misspelt_id_of_a_user_s_overlay(wrong, close, tmp_path):
    overlay = tmp_path / "mine.json"
    overlay.write_text(json.dumps({wrong: 3}))
    done = monai_bundle("train", str(overlay.with_suffix("")), bundle=SEGMENTATION[0], **labelled(tmp_path))
    assert f"Nothing uses the id `{wrong}`; did you mean `{close}`?" in spoken(done)
