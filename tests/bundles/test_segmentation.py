"""The segmentation bundles, run as their documentation says, each on the phantoms of its kind."""

import json
import logging
import re
import sys

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from skimage.measure import label as components

from tests.conftest import ROOT, SEGMENTATION, folders, metrics, monai_bundle, segmentation_network
from tools import weights as weights_tool

BTCV, FETA = SEGMENTATION
KIND = {BTCV: "ct", FETA: "fetal"}
COARSE = {"pixdim_mm": [5, 5, 5]}  # the phantoms' own spacing, so that a case is a few windows
each_bundle = pytest.mark.parametrize("bundle", SEGMENTATION, ids=lambda bundle: bundle.name)


def names_of_classes(bundle) -> list[str]:
    return json.loads((bundle / "configs" / "train.json").read_text())["labels"]


def run(bundle, *configs, **values):
    """Run a bundle and return the finished process, which has to have succeeded."""
    done = monai_bundle(*configs, bundle=bundle, **({} if bundle == FETA else COARSE), **values)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory, labelled_lists):
    """Folder of a bundle's training of two epochs."""
    runs = {}

    def train(bundle):
        if bundle not in runs:
            runs[bundle] = tmp_path_factory.mktemp(bundle.name)
            more = {
                "max_epochs": 2,
                "val_interval": 1,
                "learning_rate": 0.01,
                "val_pictures": 1,
                **folders(runs[bundle]),
            }
            run(bundle, "train", datalist=labelled_lists[KIND[bundle]], **more)
        return runs[bundle]

    return train


@pytest.fixture(scope="module")
def evaluated(trained, labelled_lists):
    """Folder of a bundle's run after its evaluation, and what was printed."""

    def evaluate(bundle):
        more = {"datalist": labelled_lists[KIND[bundle]], "val_pictures": 1, **folders(trained(bundle))}
        done = run(bundle, "train", "evaluate", **more)
        return trained(bundle) / "evaluation", done.stdout

    return evaluate


def weights(run_dir) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "models" / "model.pt", weights_only=True)


@each_bundle
def test_training_leaves_weights_of_a_stock_network_metrics_and_pictures(bundle, trained):
    run_dir = trained(bundle)
    network = segmentation_network(classes=len(names_of_classes(bundle)))
    network.load_state_dict(weights(run_dir))
    lines = metrics(run_dir)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(np.isfinite(list(line.values())).all() and 0 <= line["val_mean_dice"] <= 1 for line in lines)
    assert list(run_dir.glob("pictures/*.png")) and list(run_dir.glob("tensorboard/*"))


@each_bundle
def test_evaluation_reports_each_class_of_each_case_in_the_scan_s_own_geometry(
    bundle, evaluated, trained, labelled_lists, tmp_path
):
    report, printed = evaluated(bundle)
    classes = names_of_classes(bundle)[1:]
    figures = ("val_mean_dice", "val_hausdorff_95_mm", "val_hausdorff_mm", "val_surface_distance_mm")
    for name in figures:
        rows = [line.split(",") for line in (report / f"{name}_raw.csv").read_text().splitlines()]
        assert rows[0] == ["filename", *classes, "mean"] and len(rows) == 2
    table = (report / "summary.md").read_text()
    assert all(name in table for name in (*classes, *figures)) and table in printed
    assert list(report.glob("*.png"))
    best = max(line["val_mean_dice"] for line in metrics(trained(bundle)))
    dice = np.array([float(value) for value in rows_of(report / "val_mean_dice_raw.csv")[0][1:-1]])
    assert np.nanmean(dice) == pytest.approx(best, abs=1e-3)
    # The same from the label map that inference saves, by hand.
    case = labelled_lists[KIND[bundle]].parent
    scan, truth = (case / kind / f"{KIND[bundle]}_001.nii.gz" for kind in ("images", "labels"))
    run(bundle, "inference", dataset_dir=scan, checkpoint=trained(bundle) / "models/model.pt", output_dir=tmp_path)
    predicted = np.asarray(nibabel.load(tmp_path / scan.name.replace(".nii", "_seg.nii")).dataobj)
    truth = np.asarray(nibabel.load(truth).dataobj)
    for number in range(1, len(classes) + 1):
        mine, true = predicted == number, truth == number
        assert dice[number - 1] == pytest.approx(2 * (mine & true).sum() / (mine.sum() + true.sum()), abs=1e-3)


@pytest.mark.parametrize("bundle", [FETA], ids=lambda bundle: bundle.name)
def test_the_python_lines_of_the_readme_give_the_label_map_of_inference(bundle, trained, phantoms, tmp_path):
    folder, scan = trained(bundle), phantoms / KIND[bundle] / "images" / f"{KIND[bundle]}_001.nii.gz"
    code = re.search(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("runs/segmentation", str(folder)).replace("scan.nii.gz", str(scan))
    names: dict = {}
    path, handlers = list(sys.path), logging.getLogger().handlers[:]
    exec(code, names)
    sys.path[:], logging.getLogger().handlers[:] = path, handlers
    done = monai_bundle("inference", bundle=folder, dataset_dir=scan, output_dir=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = np.asarray(nibabel.load(tmp_path / scan.name.replace(".nii", "_seg.nii")).dataobj)
    assert np.array_equal(names["label_map"][0].numpy(), expected) and expected.any()


def rows_of(path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()[1:]]


@each_bundle
def test_inference_gives_one_label_map_in_the_scan_s_own_geometry(bundle, trained, phantoms, tmp_path):
    """A scan with unequal spacing whose axes run to the front, to the left and down."""
    source = nibabel.load(phantoms / KIND[bundle] / "images" / f"{KIND[bundle]}_000.nii.gz")
    turned = source.slicer[:, ::2].as_reoriented([[1, -1], [0, 1], [2, -1]])
    nibabel.save(turned, tmp_path / "scan.nii.gz")
    more = {"dataset_dir": tmp_path / "scan.nii.gz", "checkpoint": trained(bundle) / "models" / "model.pt"}
    run(bundle, "inference", output_dir=tmp_path / "out", **more)
    predicted = nibabel.load(tmp_path / "out" / "scan_seg.nii.gz")
    assert predicted.shape == turned.shape and np.allclose(predicted.affine, turned.affine, atol=1e-4)
    assert predicted.get_data_dtype() == np.uint8
    assert set(np.unique(predicted.dataobj)) <= set(range(len(names_of_classes(bundle))))
    assert (tmp_path / "out" / "scan.png").stat().st_size > 10_000


@each_bundle
def test_an_ensemble_of_checkpoints_gives_one_component_of_each_label(bundle, trained, phantoms, tmp_path):
    scan = phantoms / KIND[bundle] / "images" / f"{KIND[bundle]}_001.nii.gz"
    run_dir = trained(bundle)
    checkpoints = [str(run_dir / "models" / "model.pt"), str(run_dir / "checkpoint_iteration=1.pt")]
    more = {"checkpoints": checkpoints, "test_time_examples": 2}
    run(bundle, "inference", "ensemble", dataset_dir=scan, output_dir=tmp_path, **more)
    source, result = nibabel.load(scan), nibabel.load(tmp_path / scan.name.replace(".nii", "_seg.nii"))
    assert result.shape == source.shape and np.allclose(result.affine, source.affine)
    label_map = np.asarray(result.dataobj)
    parts = [label_map == number for number in range(1, 14)] if bundle == BTCV else [label_map > 0]
    assert label_map.any() and max(components(part, return_num=True)[1] for part in parts) == 1


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, phantom_list):
    """Weights of a real, short pre-training."""
    run_dir = tmp_path_factory.mktemp("pretrained")
    done = monai_bundle("train", datalist=phantom_list, max_epochs=1, warmup_iterations=1, **folders(run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir / "models" / "model.pt"


@pytest.fixture(scope="module")
def start(tmp_path_factory, labelled_lists):
    """Weights that a fine-tuning starts with: those after an epoch with a learning rate of zero."""

    def weights_at_start(**values):
        run_dir = tmp_path_factory.mktemp("start")
        more = {"max_epochs": 1, "val_interval": 1, "learning_rate": 0, **folders(run_dir)}
        done = run(FETA, "train", datalist=labelled_lists["fetal"], **more, **values)
        return weights(run_dir), done.stdout

    return weights_at_start


def test_each_part_of_a_pre_training_comes_over_tensor_by_tensor(pretrained, start):
    source = torch.load(pretrained, weights_only=True)
    scratch, log = start()
    assert "starts from scratch" in log
    prefixes = {"encoder": ("swinViT.", "encoder"), "decoder": ("decoder",), "both": ("swinViT.", "encoder", "decoder")}
    for parts, prefix in prefixes.items():
        begun, log = start(pretrained=pretrained, transfer=parts)
        came = [name for name in begun if name.startswith(prefix)]
        assert f"{len(came)} of {len(begun)} tensors start from {pretrained}" in log
        for name, value in begun.items():
            assert torch.equal(value, source[name] if name in came else scratch[name]), name
    learnt = [name for name in came if not torch.equal(source[name], scratch[name])]
    assert len(learnt) > 100  # the comparison above tells the two apart


def test_four_contrasts_start_from_single_channel_weights(pretrained, phantoms, tmp_path):
    contrasts = [f"brain/images/brain_000_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
    first = nibabel.load(phantoms / contrasts[0])
    bright = (np.asarray(first.dataobj) > 300).astype(np.uint8)
    nibabel.Nifti1Image(bright, first.affine).to_filename(tmp_path / "label.nii.gz")
    entry = {"image": contrasts, "label": str(tmp_path / "label.nii.gz")}
    datalist = tmp_path / "list.json"
    other = {**entry, "image": [contrast.replace("brain_000", "brain_001") for contrast in contrasts]}
    datalist.write_text(json.dumps({"training": [entry], "validation": [other]}))
    more = {"datalist": datalist, "dataset_dir": phantoms, "in_channels": 4, "pretrained": pretrained, "max_epochs": 1}
    done = run(FETA, "train", learning_rate=0, **more, **folders(tmp_path))
    begun, source = weights(tmp_path), torch.load(pretrained, weights_only=True)
    for name in ("swinViT.patch_embed.proj.weight", "encoder1.layer.conv1.conv.weight"):
        assert begun[name].shape[1] == 4 and torch.equal(begun[name], source[name].expand_as(begun[name]) / 4)
    assert "2 start anew, the output layer is new" in done.stdout
    scans = [[str(phantoms / contrast) for contrast in contrasts]]
    more = {"in_channels": 4, "dataset_dir": scans, "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "out"}
    run(FETA, "inference", **more)
    assert (tmp_path / "out" / "brain_000_t1_seg.nii.gz").is_file()


def test_other_labels_spacing_and_intensities_are_overrides(phantoms, labelled_lists, tmp_path):
    """A third person's data in the CT bundle: two classes, MRI."""
    for name in ("fetal_000", "fetal_001"):
        source = nibabel.load(phantoms / "fetal" / "labels" / f"{name}.nii.gz")
        brain = (np.asarray(source.dataobj) > 1).astype(np.uint8)
        nibabel.Nifti1Image(brain, source.affine).to_filename(tmp_path / f"{name}.nii.gz")
    content = json.loads(labelled_lists["fetal"].read_text())
    for entry in content["training"] + content["validation"]:
        entry["label"] = str(tmp_path / entry["label"].removeprefix("labels/"))
    datalist = tmp_path / "list.json"
    datalist.write_text(json.dumps(content))
    task = {"labels": ["background", "brain"], "intensity": {"_target_": "NormalizeIntensityd", "keys": "image"}}
    task |= {"pixdim_mm": [], "dataset_dir": phantoms / "fetal"}
    done = monai_bundle("train", bundle=BTCV, datalist=datalist, max_epochs=1, **task, **folders(tmp_path))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path)["out.conv.conv.weight"].shape[0] == 2


def test_a_training_without_validation_saves_its_last_weights(labelled_lists, tmp_path):
    more = {"datalist": labelled_lists["fetal"], "max_epochs": 2, "val_interval": 5, **folders(tmp_path)}
    run(FETA, "train", **more)
    last = torch.load(tmp_path / "checkpoint_iteration=2.pt", weights_only=True)["model"]
    assert all(torch.equal(value, last[name]) for name, value in weights(tmp_path).items())
    assert "val_mean_dice" not in metrics(tmp_path)[-1]


def test_fold_and_share_of_labels_are_ids_and_a_run_is_resumed(labelled_lists, tmp_path):
    arguments = {"datalist": labelled_lists["fetal"], "fold": 0, "label_fraction": 0.5, "val_interval": 1}
    arguments["val_pictures"] = 1
    run(FETA, "train", max_epochs=1, **arguments, **folders(tmp_path))
    done = run(FETA, "train", max_epochs=2, **arguments, **folders(tmp_path))
    assert f"Resuming from {tmp_path}/checkpoint_iteration=1.pt" in done.stdout
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["fetal_000.png"]  # that of fold 0


def test_cases_may_be_given_without_a_list_and_none_to_validate(labelled_lists, tmp_path):
    """As MONAI Label gives them: nothing but image and label."""
    folder = labelled_lists["fetal"].parent
    cases = [
        {"image": f"{folder}/images/fetal_00{n}.nii.gz", "label": f"{folder}/labels/fetal_00{n}.nii.gz"} for n in (0, 1)
    ]
    arguments = {"max_epochs": 1, "val_interval": 1, "train__dataset__data": cases[:1]}
    run(FETA, "train", validate__dataset__data=cases[1:], **arguments, **folders(tmp_path / "validated"))
    report = rows_of(tmp_path / "validated/validation/val_mean_dice_raw.csv")
    assert [row[0] for row in report] == [cases[1]["image"]]
    run(FETA, "train", validate__dataset__data=[], **arguments, **folders(tmp_path / "not"))
    assert weights(tmp_path / "not") and "val_mean_dice" not in metrics(tmp_path / "not")[0]


@each_bundle
def test_a_training_in_monai_label_is_a_run_of_its_own(bundle, monkeypatch):
    """Its server tells its processes where its app is."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    assert parser.get_parsed_content("resume") is True
    monkeypatch.setenv("MONAI_LABEL_APP_DIR", "monaibundle")
    parser.parse(reset=True)
    assert parser.get_parsed_content("resume") is False


def test_two_processes_evaluate_as_one_does(evaluated, trained, labelled_lists, tmp_path):
    """Of one case: the second process has none of its own."""
    more = {"datalist": labelled_lists["fetal"], "ckpt_dir": trained(FETA) / "models", "output_dir": tmp_path}
    run(FETA, "train", "multi_gpu_train", "evaluate", ranks=2, **more)
    for name in ("val_mean_dice", "val_hausdorff_mm"):
        both, one = (rows_of(folder / f"{name}_raw.csv") for folder in (tmp_path / "evaluation", evaluated(FETA)[0]))
        assert both[0] == one[0]


def test_a_published_pre_training_is_fine_tuned_from(labelled_lists, tmp_path):
    """Weights filled at random, with the names and shapes of the published ones, by way of tools.weights."""
    published = json.loads((ROOT / "tests/fixtures/published_networks.json").read_text())["networks"]["pretrain_fs12"]
    generator = torch.Generator().manual_seed(0)
    source = {name: torch.randn(shape, generator=generator) for name, shape in published["manifest"].items()}
    torch.save({"model": source}, tmp_path / "published.pth")
    assert weights_tool.main([str(tmp_path / "published.pth"), str(tmp_path / "converted.pt")]) == 0
    more = {"datalist": labelled_lists["fetal"], "pretrained": tmp_path / "converted.pt", "max_epochs": 1}
    done = run(FETA, "train", "published", learning_rate=0, **more, **folders(tmp_path))
    begun = weights(tmp_path)
    backbone = {name: value for name, value in begun.items() if not name.startswith("out.")}
    assert f"{len(backbone)} of {len(begun)} tensors start from {tmp_path}/converted.pt" in done.stdout
    assert "2 start anew, the output layer is new: out.conv.conv.bias, out.conv.conv.weight" in done.stdout
    converted = torch.load(tmp_path / "converted.pt", weights_only=True)["model"]
    assert all(torch.equal(value, converted[name]) for name, value in backbone.items())
