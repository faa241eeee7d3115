"""Runs in a Jupyter kernel, and runs that MLflow keeps: both in the environment of tests/integration/notebook.txt."""

import json
import subprocess

from tests.conftest import PRETRAINING, ROOT, SEGMENTATION, SMALL
from tests.integration.conftest import python_of

EXECUTE = """
import json, sys, nbclient, nbformat
cells = [nbformat.v4.new_code_cell(text) for text in json.load(open(sys.argv[1]))]
notebook = nbformat.v4.new_notebook(cells=cells)
nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", allow_errors=True).execute()
print(json.dumps([cell["outputs"] for cell in notebook["cells"]]))
"""
BEFORE = """
import sys, torch, monai.bundle
def state():
    deterministic = torch.are_deterministic_algorithms_enabled()
    return sys.excepthook, list(sys.path), deterministic, get_ipython().custom_exceptions
before = state()
"""
SAME = "assert state() == before, state()\nprint('the same')"


def outputs(cells: list[str], folder) -> list[list[dict]]:
    """Execute cells in a kernel and return what each shows."""
    (folder / "cells.json").write_text(json.dumps(cells))
    command = [python_of("notebook"), "-c", EXECUTE, "cells.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_in_a_notebook_shows_a_bar_and_the_sentence_and_leaves_nothing_behind(small_list, tmp_path):
    values = {**SMALL, "bundle_root": str(PRETRAINING), "max_iterations": 2, "val_pictures": 0}
    values |= {"config_file": str(PRETRAINING / "configs/train.json"), "output_dir": str(tmp_path / "run")}
    good, bad = ({**values, "datalist": str(datalist)} for datalist in (small_list, tmp_path / "none.json"))
    run = "monai.bundle.run(**{})"
    *_, failed, after, done, last = outputs([BEFORE, run.format(bad), SAME, run.format(good), SAME], tmp_path)
    shown = "".join(output.get("text", "") for output in failed)
    assert f"error: The data list {tmp_path}/none.json can't be read" in shown and "Traceback" not in shown
    assert [output["text"] for output in (*after, *last)] == ["the same\n"] * 2
    bars = [output for output in done if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert bars and (tmp_path / "run/models/model.pt").is_file()


MLFLOW = """
import json, sys, mlflow
client = mlflow.MlflowClient("sqlite:///" + sys.argv[1])
runs = client.search_runs([e.experiment_id for e in client.search_experiments()], order_by=["attributes.start_time"])
found = []
for run in runs:
    id = run.info.run_id
    found.append({
        "status": run.info.status, "name": run.info.run_name, "params": run.data.params,
        "steps": {name: [m.step for m in client.get_metric_history(id, name)] for name in run.data.metrics},
        "files": [f.path for folder in ("", "pictures", "evaluation") for f in client.list_artifacts(id, folder)],
    })
print(json.dumps(found))
"""


def tracked(folder, *configs, bundle=PRETRAINING, **values) -> subprocess.CompletedProcess:
    command = [python_of("notebook"), "-m", "monai.bundle", "run", "--tracking", "mlflow", "--config_file"]
    command += [str([str(bundle / f"configs/{name}.json") for name in configs])]
    if configs != ("inference",):
        values = {**SMALL, "output_dir": folder, "ckpt_dir": folder / "models", **values}
    values |= {"bundle_root": bundle, "overlap": 0}
    command += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=500)


def kept(database) -> list[dict]:
    """The runs in a store."""
    reader = [python_of("notebook"), "-c", MLFLOW, database]
    return json.loads(subprocess.run(reader, capture_output=True, text=True, check=True).stdout)


def test_mlflow_keeps_settings_metrics_and_pictures_of_runs_that_end(small_list, tmp_path):
    folder = tmp_path / "run"
    values = {"datalist": small_list, "max_iterations": 2, "val_pictures": 1}
    done = tracked(folder, "train", **values)
    assert done.returncode == 0, done.stderr
    done = tracked(folder, "train", "evaluate", **values)
    assert done.returncode == 0, done.stderr
    failed = tracked(folder, "train", **values, learning_rate="1e30", resume=False)
    assert "error: The " in failed.stderr and "is nan" in failed.stderr.lower() or "inf" in failed.stderr
    trained, evaluated, broken = kept(folder / "mlruns.db")
    assert [trained["status"], evaluated["status"], broken["status"]] == ["FINISHED", "FINISHED", "FAILED"]
    assert trained["name"] == str(folder) and evaluated["name"] == f"{folder} evaluation"
    assert trained["params"]["feature_size"] == "12" and trained["params"]["max_iterations"] == "2"
    assert trained["steps"]["loss"][-1] == 2 and trained["steps"]["val_l1"] == [1, 2][: len(trained["steps"]["val_l1"])]
    assert {"run.json", "report.html", "metrics.jsonl"} <= set(trained["files"])
    assert any(name.startswith("pictures/") for name in trained["files"])
    assert any(name.startswith("evaluation/") for name in evaluated["files"])
    assert all(any(name.startswith("config_") for name in run["files"]) for run in (trained, evaluated, broken))
    assert not list(folder.glob("config_*"))
    # It is no setting of the training.
    (start,) = json.loads((folder / "run.json").read_text())
    assert not [id for id in start["overrides"] if "handlers" in id or "track" in id or id == "run_name"]
    assert "LFlow" not in (folder / "configs/train.json").read_text()


def test_mlflow_keeps_a_segmentation_s_training_and_inference(labelled_lists, tmp_path):
    run, scan = tmp_path / "run", labelled_lists["ct"].parent / "images/ct_001.nii.gz"
    values = {"datalist": labelled_lists["ct"], "pixdim_mm": [5, 5, 5], "max_epochs": 1, "val_interval": 1}
    done = tracked(run, "train", bundle=SEGMENTATION[0], **values)
    assert done.returncode == 0, done.stderr
    store = {"tracking_uri": f"sqlite:///{run}/mlruns.db", "run_name": "scan"}
    done = tracked(None, "inference", bundle=run, dataset_dir=scan, output_dir=tmp_path / "out", **store)
    assert done.returncode == 0, done.stderr
    trained, inferred = kept(run / "mlruns.db")
    assert [trained["status"], inferred["status"]] == ["FINISHED", "FINISHED"]
    assert trained["steps"]["val_mean_dice"] == [1] and trained["params"]["pixdim_mm"] == "[5, 5, 5]"
    assert inferred["name"] == "scan evaluation" and {"ct_001.png", "report.html"} <= set(inferred["files"])
