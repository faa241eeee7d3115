"""A training leaves a bundle, and is gone on with only by what leaves its result and meaning as they are."""

import json

import monai
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigWorkflow

from custom.engine.checkpoint import AtomicSaver, training_of
from custom.engine.run_bundle import RunBundle
from custom.engine.run_record import check_trained_alike
from custom.errors import BadInput
from custom.files import read_json, write_json
from tests.conftest import SEGMENTATION

BUNDLE = SEGMENTATION[1]
# The run of a bundle's training without a training: it is checked, and leaves a bundle and a checkpoint.
RUN = [
    {
        "_target_": "custom.engine.run_bundle.check_resumption",
        **{name: f"@{name}" for name in ("datalist", "dataset_dir", "pretrained", "resume")},
        "run_dir": "@output_dir",
    },
    {
        "_target_": "custom.engine.run_bundle.RunBundle",
        **{name: f"@{name}" for name in ("output_dir", "ckpt_dir", "datalist", "dataset_dir", "seed", "pretrained")},
        "resume": "@resume",
    },
]


@pytest.fixture
def run(tmp_path):
    """Start a training, by the configs of the bundle or of a folder, with overrides; return the starts recorded."""
    (tmp_path / "list.json").write_text("{}")

    def start(folder=BUNDLE, *overlays, **values) -> list[dict]:
        names = ("train", "metadata")
        config, meta = (str(folder / "configs" / f"{name}.json") for name in names)
        place = {"output_dir": str(tmp_path / "run"), "datalist": str(tmp_path / "list.json")}
        values = {"bundle_root": str(folder), **({} if folder != BUNDLE else place), **values}
        workflow = ConfigWorkflow([config, *overlays], meta, workflow_type=None, logging_file=False, **values)
        workflow.parser["run"] = [*RUN[:1], "$@start(@handler)"]
        workflow.parser["handler"] = RUN[1]
        workflow.parser["start"] = "$lambda handler: handler(__import__('ignite.engine').engine.Engine(lambda *_: 0))"
        workflow.parser.parse(True)
        workflow.run()
        (tmp_path / "run" / "checkpoint_iteration=1.pt").touch()
        return read_json(tmp_path / "run" / "run.json", list)

    return start


def test_a_start_is_recorded(run):
    (start,) = run(seed=7, feature_size=12)
    # sha256sum of a file with the two characters {}
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert (start["bundle"], start["version"], start["seed"]) == (BUNDLE.name, "0.1.0", 7)
    assert start["datalist_sha256"] == digest and start["overrides"]["feature_size"] == 12
    assert start["settings"]["feature_size"] == 12 and start["settings"]["fold"] is None
    assert start["versions"]["torch"] == torch.__version__ and start["versions"]["monai"] == monai.__version__
    assert start["started"].endswith("+00:00") and start["processes"] == 1


def test_the_folder_is_a_bundle_with_the_settings_of_the_training(run, tmp_path):
    changed = {
        "feature_size": 12,
        "pixdim_mm": [2, 2, 2],
        "patch_size": [64, 32, 32],
        "labels": ["background", "a", "b"],
    }
    run(**changed, learning_rate=0.1, **{"loss#weight": [1.0, 2.0, 3.0]})
    folder = tmp_path / "run"
    train, inference = (read_json(folder / f"configs/{name}.json") for name in ("train", "inference"))
    assert {name: train[name] for name in changed} == {name: inference[name] for name in changed} == changed
    assert train["learning_rate"] == 0.1 and train["loss"]["weight"] == [1.0, 2.0, 3.0]
    assert train["output_dir"] == "$@bundle_root" and train["datalist"] == str(tmp_path / "list.json")
    assert "learning_rate" not in inference and inference["output_dir"] == "$@bundle_root + '/eval'"
    shown = read_json(folder / "configs/metadata.json")["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert shown == {"0": "background", "1": "a", "2": "b"}
    for name in ("LICENSE", "docs/README.md", "custom/network.py", "configs/evaluate.json", "configs/logging.conf"):
        assert (folder / name).is_file()


def test_weights_elsewhere_are_found_from_the_folder(run, tmp_path):
    run(ckpt_dir=str(tmp_path / "weights"))
    train = read_json(tmp_path / "run/configs/train.json")
    assert train["ckpt_dir"] == "$@bundle_root + '/../weights'"


def test_what_is_sound_goes_on_and_is_said(run, tmp_path, caplog):
    caplog.set_level("INFO")
    assert len(run(max_epochs=1, feature_size=12)) == 1
    assert len(run(max_epochs=3, feature_size=12, num_workers=5)) == 2
    assert "was started with max_epochs 1, and goes on with 3" in caplog.text
    assert len(run(tmp_path / "run")) == 3  # by its own configs
    assert read_json(tmp_path / "run/configs/train.json")["max_epochs"] == 3


def test_other_scans_behind_the_same_list_are_refused(run, tmp_path):
    for place, size in (("here", 9), ("moved", 9), ("others", 8)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.nii").write_bytes(bytes(size))
    (tmp_path / "list.json").write_text('{"training": [{"image": "a.nii", "fold": 0}], "validation": null}')
    run(dataset_dir=str(tmp_path / "here"))
    run(dataset_dir=str(tmp_path / "moved"))
    with pytest.raises(RuntimeError) as caught:
        run(dataset_dir=str(tmp_path / "others"))
    with pytest.raises(BadInput, match="other files for the names in its data list, and now it would be those in"):
        raise caught.value.__cause__


def test_handlers_that_are_added_may_differ_and_are_said(run, tmp_path, caplog):
    """Such as a tracker; the run's own configs are without them."""
    overlay = str(tmp_path / "mine.json")
    write_json(tmp_path / "mine.json", {"+train#handlers": [{"_target_": "StatsHandler", "name": "mine"}]})
    assert len(run(BUNDLE, overlay)) == 1
    assert len(run(BUNDLE, overlay)) == 2 and "handlers added" not in caplog.text
    assert len(run(tmp_path / "run")) == 3 and "StatsHandler" in caplog.text and "goes on with: {}" in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fold": 1}, "fold 0, and now it would be 1"),
        ({"learning_rate": 0.5}, "learning_rate 0.0004, and now it would be 0.5"),
        ({"labels": ["background", "b"]}, r'labels#1 "a", and now it would be "b"'),
        ({"loss#include_background": False}, "loss#include_background null, and now it would be false"),
        ({"patch_size": [64, 64, 64]}, "patch_size#0 96"),
        ({"crops_per_volume": 2}, "crops_per_volume 4"),
        ({"batch_size": 3}, "batch_size 1"),
        ({"seed": 1}, "seed 0"),
        ({"train#dataset#seed": 4}, "train#dataset#seed"),
        ({"pretrained": "weights.pt"}, "no --pretrained weights, and now it would be weights.pt"),
        ({"datalist": "other.json"}, "another content of its data list, and now it would be that of other.json"),
    ],
)
def test_what_would_change_a_run_is_refused_with_both_values(run, tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").write_text("weights")
    (tmp_path / "other.json").write_text("{ }")
    settings = {"fold": 0, "labels": ["background", "a"]}
    run(**settings)
    before = read_json(tmp_path / "run/configs/train.json")
    with pytest.raises(RuntimeError) as caught:
        run(**{**settings, **change})
    assert isinstance(caught.value.__cause__, BadInput)
    with pytest.raises(BadInput, match=told):
        raise caught.value.__cause__
    assert read_json(tmp_path / "run/configs/train.json") == before
    assert len(run(**{**settings, **change, "resume": False})) == 1


@pytest.mark.parametrize("lost", ["configs/train.json", "run.json"])
def test_a_run_that_does_not_say_what_it_was_started_with_does_not_go_on(lost, run, tmp_path):
    run()
    (tmp_path / "run" / lost).unlink()
    with pytest.raises(RuntimeError) as caught:
        run(learning_rate=0.5)
    assert isinstance(caught.value.__cause__, BadInput) and lost in str(caught.value.__cause__)
    assert len(run(learning_rate=0.5, resume=False)) == 1


def test_data_that_moved_and_other_processes_at_work(run, tmp_path, monkeypatch):
    run()
    (tmp_path / "moved.json").write_text("{}")
    assert len(run(datalist=str(tmp_path / "moved.json"))) == 2
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    with pytest.raises(RuntimeError) as caught:
        run()
    assert "1 processes, and now it would be 2" in str(caught.value.__cause__)


def test_cases_that_are_given_without_a_list_as_by_a_server(run, tmp_path):
    """MONAI Label puts the cases and a device into the config; the cases stay out of the folder's configs."""
    cases = [{"image": "a.nii.gz", "label": "b.nii.gz"}]
    (start,) = run(**{"train#dataset#data": cases, "device": torch.device("cpu")})
    assert start["overrides"]["train#dataset#data"] == cases and start["datalist_sha256"] is None
    assert "a.nii.gz" not in (tmp_path / "run/configs/train.json").read_text()


def test_without_a_workflow_the_config_is_not_known(tmp_path):
    engine = Engine(lambda engine, batch: None)
    RunBundle(tmp_path, tmp_path / "models", tmp_path / "missing.json", tmp_path, seed=0).attach(engine)
    engine.run([0])
    (start,) = json.loads((tmp_path / "run.json").read_text())
    assert start["bundle"] is start["overrides"] is start["datalist_sha256"] is None


def test_a_site_of_a_federation_that_tracks_is_refused(tmp_path):
    config, place = str(BUNDLE / "configs/train.json"), {"output_dir": str(tmp_path), "tracking": "mlflow"}
    workflow = ConfigWorkflow(config, workflow_type="train", **place)
    with pytest.raises(BadInput, match="A site of a federation keeps no run of `tracking`"):
        RunBundle(tmp_path, tmp_path / "models", tmp_path / "list.json", tmp_path, seed=0).check_site(workflow)


def test_weights_that_are_carried_off_know_their_training(run, tmp_path):
    run(feature_size=12, pixdim_mm=[2, 2, 2])
    state = torch.nn.Linear(1, 1).state_dict()
    AtomicSaver(tmp_path / "elsewhere", tmp_path / "run")(state, "model.pt")
    weights = tmp_path / "elsewhere" / "model.pt"
    torch.nn.Linear(1, 1).load_state_dict(torch.load(weights, weights_only=True))
    record = training_of(weights)
    assert record["settings"]["pixdim_mm"] == [2, 2, 2]

    def workflow(**values):
        config = str(BUNDLE / "configs/inference.json")
        return ConfigWorkflow(config, workflow_type=None, logging_file=False, **values)

    check_trained_alike(weights, record, workflow(feature_size=12, pixdim_mm=[2, 2, 2], overlap=0))
    with pytest.raises(BadInput, match=r"trained with pixdim_mm \[2, 2, 2\], and this config has null"):
        check_trained_alike(weights, record, workflow(feature_size=12))
    with pytest.raises(
        BadInput, match=r"intensity#nonzero true, and this config has false; .* --intensity#nonzero true"
    ):
        check_trained_alike(
            weights, record, workflow(feature_size=12, pixdim_mm=[2, 2, 2], **{"intensity#nonzero": False})
        )


def test_an_evaluation_on_cases_that_were_trained_on_is_refused(run, tmp_path):
    run(fold=0)
    record = read_json(tmp_path / "run/run.json", list)[-1]
    write_json(tmp_path / "other.json", {"training": []})

    def check(datalist, fold):
        config = str(BUNDLE / "configs/train.json")
        values = {"datalist": str(tmp_path / datalist), "fold": fold}
        check_trained_alike("w.pt", record, ConfigWorkflow(config, workflow_type=None, logging_file=False, **values))

    check("list.json", 0)
    check("other.json", 1)
    with pytest.raises(BadInput, match="--fold 0, and this is --fold 1 of the same data list"):
        check("list.json", 1)
