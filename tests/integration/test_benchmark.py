"""Tests of tools.benchmark: a grid on phantoms from end to end, killed in the middle; tables, tests, fairness."""

from __future__ import annotations

import csv
import html
import json
import os
import signal
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest
import torch

from custom.engine.checkpoint import read_weights
from custom.errors import BadInput
from tests.conftest import ROOT, SMALL
from tests.integration.conftest import python_of
from tools import phantom
from tools.benchmark import runs as benchmark
from tools.benchmark.__main__ import main
from tools.benchmark.runs import RECORD, Result, Run
from tools.benchmark.task import read_task
from tools.benchmark.verdict import Found, answers, interval, p_value, table

SIZES = {name: value for name, value in SMALL.items() if name != "num_workers"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of four phantoms: two to train on, one to validate, one to test."""
    folder = tmp_path_factory.mktemp("benchmark")
    phantom.write(folder, subjects=4, shape=32, seed=0, kinds=("fetal",))
    names = [f"fetal_00{n}.nii.gz" for n in range(4)]
    entries = [
        {"image": f"fetal/images/{name}", "label": f"fetal/labels/{name}", "modality": "t2", "fold": min(n, 2)}
        for n, name in enumerate(names)
    ]
    (folder / "list.json").write_text(json.dumps({"training": entries[1:], "validation": entries[:1]}))
    content = {
        "datalist": "list.json",
        "validation_folds": [0],
        "test_folds": [1],
        "pretraining": {"bundle": "dae_pretraining", "iterations": 1, "overrides": SIZES},
        "finetuning": {
            "bundle": "feta_mri_segmentation",
            "iterations": 2,
            "overrides": {**SIZES, "crops_per_volume": 1, "learning_rate": 0.01},
        },
        "counts": [1],
        "seeds": [0],
    }
    (folder / "task.json").write_text(json.dumps(content))
    return folder / "task.json"


def finished(out) -> dict:
    """When each record of a finished command was written."""
    records = {path: json.loads(path.read_text()) for path in out.rglob(RECORD)}
    return {path: path.stat().st_mtime_ns for path, record in records.items() if record["seconds"]}


def test_a_grid_that_is_killed_in_the_middle_repeats_nothing_and_is_fair(task, capsys):
    out = task.parent / "out"
    arguments = [str(task), str(out), "--section", "testing", "--methods", "scratch", "DAE", "--jobs", "2"]
    process = subprocess.Popen([sys.executable, "-m", "tools.benchmark", *arguments], cwd=ROOT, start_new_session=True)
    while len(before := finished(out)) < 2:
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert main(arguments) == 0
    after = finished(out)
    assert len(after) == 1 + 2 * 2 and {path: after[path] for path in before} == before
    printed = capsys.readouterr().out
    assert main(arguments) == 0 and finished(out) == after

    rows = list(csv.DictReader((out / "runs.csv").open()))
    assert sorted((row["method"], row["count"]) for row in rows) == sorted(
        (method, "1") for method in ("scratch", "DAE")
    )
    text = (out / "table.md").read_text()
    assert text in printed
    for row in rows:
        folder = out / row["folder"]
        (case,) = csv.DictReader((folder / "testing/evaluation/val_mean_dice_raw.csv").open())
        assert case["filename"].endswith("fetal_001.nii.gz")
        start = (
            "starts from scratch" if row["method"] == "scratch" else f"start from {out}/pretraining/DAE/models/model.pt"
        )
        assert start in (folder / "log.txt").read_text()
        assert float(row["dice"]) == pytest.approx(float(case["mean"]), abs=1e-6)
        assert f"{float(row['dice']):.4f} ± 0.0000 (n = 1)" in text
        assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 2
        assert not list(folder.glob("checkpoint*"))
    for name in ("dice_over_labels.png", "learning_curves.png", "dice_over_iterations.png"):
        assert (out / name).stat().st_size > 10_000

    # Fair: what two runs of a seed are started with differs in the weights alone.
    folders = [Run(method, 1, 2, 0).folder(out) for method in ("scratch", "DAE")]
    starts = [json.loads((folder / "run.json").read_text())[-1] for folder in folders]
    scratch, ours = (
        {name: value for name, value in start["overrides"].items() if not name.endswith("_dir")} for start in starts
    )
    assert ours.pop("pretrained") == str(out / "pretraining/DAE/models/model.pt")
    assert ours == scratch and scratch["label_fraction"] == 1 / 2
    assert starts[0]["datalist_sha256"] == starts[1]["datalist_sha256"]

    # A run again, by its own command and with as many threads: the same weights, and they are the last.
    folder, command = benchmark.finetuning(read_task(task), Run("DAE", 1, 2, 0), out)
    first = read_weights(folder / "models/model.pt")
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for again in (folder / "models/model.pt", folder / "checkpoint_iteration=2.pt"):
        weights = read_weights(again)
        assert weights.keys() == first.keys() and all(torch.equal(weights[name], first[name]) for name in first)


def test_nn_u_net_is_trained_for_the_time_that_scratch_took_and_measured_alike(task, tmp_path):
    """By its own Python. The Dice in the table is that of the label maps, computed by hand."""
    python = python_of("nnunet")
    content, out = read_task(task), tmp_path / "out"
    run = Run("nnU-Net", 2, 2, 0)
    (out / "finetuning.json").parent.mkdir()
    (out / "finetuning.json").write_text(json.dumps(content["finetuning"]["datalist"]))
    scratch = run._replace(method="scratch").folder(out)
    scratch.mkdir(parents=True)
    (scratch / RECORD).write_text(json.dumps({"command": [], "seconds": 100, "cpu_seconds": 60}))
    folder, command = benchmark.rival(content, run, "testing", out, python)
    assert command[0] == str(python) and command[command.index("--seconds") + 1] == "60"
    benchmark.finish(folder, command, threads=1)
    cpu_seconds = json.loads((folder / RECORD).read_text())["cpu_seconds"]
    log = (folder / "log.txt").read_text()
    assert " iterations in 6" in log and cpu_seconds > 60
    (result,) = benchmark.results(content, [run], "testing", out)
    (found,), (case,) = result.dice.values(), content["finetuning"]["datalist"]["testing"]
    true, predicted = (
        np.asarray(nibabel.load(file).dataobj) for file in (case["label"], folder / "predicted/0.nii.gz")
    )
    pairs = [(true == id, predicted == id) for id in range(1, 8)]
    assert found == pytest.approx(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs if a.any()]))


def changed(task, name: str, **values):
    path = task.with_name(name)
    path.write_text(json.dumps({**json.loads(task.read_text()), **values}))
    return path


def test_what_is_tested_is_never_trained_on(task):
    content = read_task(task)
    names = {
        (part, section): [entry["image"][-13:] for entry in content[part]["datalist"][section]]
        for part in ("pretraining", "finetuning")
        for section in content[part]["datalist"]
    }
    training, validation, testing = ["l_002.nii.gz", "l_003.nii.gz"], ["l_000.nii.gz"], ["l_001.nii.gz"]
    assert {key: [name[-12:] for name in value] for key, value in names.items()} == {
        ("pretraining", "training"): training,
        ("pretraining", "validation"): validation,
        ("finetuning", "training"): training,
        ("finetuning", "validation"): validation,
        ("finetuning", "testing"): testing,
    }


def test_without_validation_folds_the_training_cases_take_their_place(task):
    content = read_task(changed(task, "no_validation.json", validation_folds=[]))
    for part in ("pretraining", "finetuning"):
        lists = {name: [e["image"][-8:-7] for e in es] for name, es in content[part]["datalist"].items()}
        assert lists["training"] == lists["validation"] == ["2", "3", "0"]
        assert lists.get("testing", ["1"]) == ["1"]
    commands = [benchmark.pretraining(one, "DAE", task.parent)[1] for one in (content, read_task(task))]
    assert ["--validate#dataset#data#apart" in command for command in commands] == [True, False]


def test_a_wrong_task_is_refused_in_a_sentence(task, tmp_path, capsys):
    for values, expected in (
        ({"test_folds": [7]}, "no case for testing"),
        ({"counts": [3]}, "3 labelled cases, but there are 2 to train on"),
        ({"datalist": "none.json"}, "none.json can't be read"),
    ):
        with pytest.raises(BadInput, match=expected):
            read_task(changed(task, "wrong.json", **values))
    (tmp_path / "task.json").write_text("{}")
    assert main([str(tmp_path / "task.json"), str(tmp_path / "out")]) == 2
    assert "task.json lacks counts, datalist" in capsys.readouterr().err
    path = changed(task, "wrong.json", validation_folds=[])
    assert main([str(path), str(tmp_path / "out")]) == 2
    assert "wrong.json has no validation folds" in capsys.readouterr().err
    for more, expected in (
        (["--methods", "nnU-Net"], "nnU-Net needs --nnunet PYTHON, and scratch"),
        (["--methods", "DEA"], "has no method DEA; it has scratch, token masking"),
    ):
        assert main([str(task), str(tmp_path / "out"), *more]) == 2
        assert expected in capsys.readouterr().err
    path = changed(task, "wrong.json", finetuning={**json.loads(task.read_text())["finetuning"], "iterations": [1, 2]})
    assert main([str(path), str(tmp_path / "out"), "--methods", "DAE"]) == 2
    assert "Several lengths need scratch" in capsys.readouterr().err
    assert main([str(task.parent / "list.json"), str(tmp_path / "out")]) == 2
    assert "list.json is a data list; give the weights to be judged, --pretrained FILE." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_recipe_does_not_mix_with_what_a_folder_holds(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"command": ["-c", "1"], "seconds": 3.0}))
    assert benchmark.seconds_of(tmp_path, ["-c", "1"]) == 3
    with pytest.raises(BadInput, match="another task or recipe"):
        benchmark.finish(tmp_path, ["-c", "2"], threads=1)


def test_a_run_that_fails_is_told_and_run_again(tmp_path):
    for _ in range(2):
        with pytest.raises(BadInput, match=r"log.txt: error: the mend$"):
            benchmark.finish(tmp_path, ["-c", "import sys; sys.exit('error: the mend')"], threads=1)
    assert (tmp_path / "log.txt").read_text().count("the mend") == 2


def result(method: str, seed: int, *dice: float, iterations: int = 32, end: float = 0.5) -> Result:
    dices = {f"case {n}": value for n, value in enumerate(dice)}
    return Result(Run(method, 4, iterations, seed), dices, {iterations: end}, 1.0, 1.0)


def test_paired_tests_and_the_table_by_hand():
    """Five pairs that all differ by one sign: of 2^5 signs two are as extreme, p = 2/32; of ten, p = 2/1024."""
    ours = [result("DAE", seed, *(0.8 + seed / 10 + n / 100 for n in range(5))) for seed in (0, 1)]
    theirs = [result("scratch", seed, *(0.7 + seed / 8 - n / 1000 for n in range(5))) for seed in (0, 1)]
    found = Found([*theirs[::-1], *ours])
    dice = {method: found.dice(method, 4, 32) for method in ("DAE", "scratch")}
    assert p_value(dice["DAE"], dice["scratch"], by_case=True) == pytest.approx(2 / 32)
    assert p_value(dice["DAE"], dice["scratch"], by_case=False) == pytest.approx(2 / 1024)
    assert p_value(dice["DAE"], dice["DAE"], by_case=True) == 1
    text = " ".join(table(found).split())
    assert "| scratch | 0.7605 ± 0.0625 (n = 2) |" in text and "| DAE | 0.8700 ± 0.0500 (n = 2) |" in text
    assert "| 4 | 32 | scratch | +0.1095 | +0.122, +0.097 | 0.002 | 0.062 |" in text
    assert np.mean(list(ours[0].dice.values())) == pytest.approx(0.82)


def test_the_interval_is_that_of_a_mean():
    """Of many cases of one seed: the mean and twice its standard error. Of seeds that differ: as wide as they."""
    cases = np.random.default_rng(0).normal(0.1, 0.2, (1, 200))
    error = 1.96 * cases.std() / np.sqrt(200)
    assert interval(cases) == pytest.approx((cases.mean() - error, cases.mean() + error), abs=3e-3)
    assert interval(np.repeat([[0.0], [0.3]], 50, axis=1)) == pytest.approx((0, 0.3))


def test_the_answer_by_hand():
    """Scratch converges at 128 iterations, where its best is 0.8; the start has that with 32."""
    ends = {32: (0.5, 0.8), 64: (0.79, 0.82), 128: (0.8, 0.81)}
    results = [
        result(method, seed, value - 0.01, value + 0.01, iterations=length, end=values[0])
        for length, values in ends.items()
        for method, value in zip(("scratch", "DAE"), values, strict=True)
        for seed in (0, 1)
    ]
    found = Found(results)
    assert [Found(results[: 4 * n]).flat(4) for n in (1, 2)] == [False, False]
    (line,) = answers(found)
    assert line.startswith("With 4 labels, DAE gains 0.010 Dice after 128 iterations (95 % interval +0.010 to +0.010, ")
    assert "reaches scratch's best, 0.800, with 32 iterations, 75% fewer than scratch's 128." in line
    assert line.endswith("Scratch has not converged yet.")  # the last doubling gained 0.01
    flat = [result("scratch", seed, 0.8, 0.8, iterations=256, end=0.804) for seed in (0, 1)]
    assert Found([*results, *flat]).flat(4)


def test_the_verdict_on_own_data(task, tmp_path, capsys, monkeypatch):
    """From a data list and weights: a bundle is adapted, trained for longer until scratch is flat, and judged."""
    monkeypatch.setattr("tools.benchmark.task.LENGTHS", (4, 8))
    out = tmp_path / "out"
    listed = json.loads((task.parent / "list.json").read_text())
    for name in ("training", "validation"):
        for entry in listed[name]:
            for key in ("image", "label"):
                entry[key] = str(task.parent / entry[key])
    (tmp_path / "mine.json").write_text(json.dumps(listed))
    weights = next((task.parent / "out").glob("pretraining/DAE/models/model.pt"))
    arguments = [str(tmp_path / "mine.json"), str(out), "--pretrained", str(weights), "--minutes", "0.1", "--jobs", "2"]
    assert main([*arguments, "--counts", "2", "--seeds", "0"]) == 0
    rows = list(csv.DictReader((out / "runs.csv").open()))
    lengths = sorted({int(row["iterations"]) for row in rows})
    assert len(lengths) > 1 and {row["method"] for row in rows} == {"scratch", "pre-trained"}
    assert len(rows) == 2 * len(lengths) and {row["section"] for row in rows} == {"testing"}
    page = (out / "verdict.html").read_text()
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("With 2 labels, pre-trained")]
    assert html.escape(line) in page and f"after {lengths[-1]} iterations" in line
    assert page.count("data:image/png;base64") == 3
    assert f"{out}/verdict.html" in printed

    # The bundle is that of its minutes and weights, or none.
    assert main([*arguments, "--minutes", "5"]) == 2
    assert "has a bundle for other weights or minutes" in capsys.readouterr().err


def test_a_case_without_a_class_does_not_count(task, tmp_path):
    """Its Dice is no number, and would make one of nothing else."""
    content, run = read_task(task), Run("scratch", 1, 2, 0)
    folder = run.folder(tmp_path)
    report = folder / "testing/evaluation/val_mean_dice_raw.csv"
    report.parent.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps({"command": [], "seconds": 1, "cpu_seconds": 1}))
    report.write_text("filename,a,mean\none,0.5,0.5\nempty,nan,nan\n")
    (result,) = benchmark.results(content, [run], "testing", tmp_path)
    assert result.dice == {"one": 0.5}
    report.write_text("filename,a,mean\nempty,nan,nan\n")
    with pytest.raises(BadInput, match="No label map of the cases for testing has any class"):
        list(benchmark.results(content, [run], "testing", tmp_path))


@pytest.mark.parametrize("task", sorted((ROOT / "examples/benchmark").glob("*.json")), ids=lambda task: task.stem)
def test_a_task_fine_tunes_as_a_preset_does(task):
    """That for few labels, or the field's, which is an overlay."""
    part = json.loads(task.read_text())["finetuning"]
    preset = ROOT / "bundles" / part["bundle"] / "configs/few_labels.json"
    few = json.loads(preset.read_text()).items() <= part["overrides"].items() if preset.is_file() else False
    assert few != ("field" in part.get("configs", []))
