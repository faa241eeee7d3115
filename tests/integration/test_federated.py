"""Federated averaging by MONAI's client, as docs/howto/federated.md says, of bundles that were downloaded alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import PRETRAINING, ROOT, SEGMENTATION, folders, metrics, monai_bundle, overrides, small_ids
from tests.integration.conftest import python_of

# Two rounds of an epoch, by each bundle's own words for it.
ROUNDS = {
    PRETRAINING: {"max_iterations": 2, "warmup_iterations": 1, "batch_size": 2, "overlap": 0},
    SEGMENTATION[0]: {"pixdim_mm": [5, 5, 5], "overlap": 0, "schedule_epochs": 2},
}


def datalists(source, folder) -> list[str]:
    """A data list with whole paths for each of two sites, which have the same cases."""
    cases = json.loads(source.read_text())
    for case in (case for side in cases.values() for case in side):
        case |= {key: str(source.parent / case[key]) for key in ("image", "label") if key in case}
    files = [folder / f"{name}.json" for name in ("site_a", "site_b")]
    for file in files:
        file.write_text(json.dumps(cases))
    return list(map(str, files))


@pytest.mark.parametrize("bundle", ROUNDS, ids=lambda bundle: bundle.name)
def test_two_sites_with_equal_data_train_as_one(bundle, tmp_path, small_list, labelled_lists, foreign_python):
    lists = datalists(small_list if bundle == PRETRAINING else labelled_lists["ct"], tmp_path)
    settings = {**small_ids(bundle, "swin"), "val_pictures": 0, "val_interval": 1, **ROUNDS[bundle]}
    downloaded = tmp_path / "downloaded"
    shutil.copytree(bundle, downloaded)
    (tmp_path / "custom.py").write_text("raise SystemExit('not this one')")
    command = [
        foreign_python,
        ROOT / "examples/federated/one_process.py",
        downloaded,
        tmp_path,
        str(lists),
        "--rounds",
        "2",
    ]
    command += overrides(**settings)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    measured = re.findall(r"^Round (\d), (site_.): \{'val_", done.stdout, re.MULTILINE)
    assert measured == [(number, name) for number in "12" for name in ("site_a", "site_b")]

    whole = tmp_path / "whole"
    central = {"max_epochs": 2} if bundle != PRETRAINING else {}
    done = monai_bundle("train", bundle=bundle, datalist=lists[0], **settings, **central, **folders(whole))
    assert done.returncode == 0, done.stderr
    expected = torch.load(whole / "checkpoint_iteration=2.pt", weights_only=True)["model"]
    found = torch.load(tmp_path / "model.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    # The learning rate follows one schedule over the rounds, and the site's folder is a bundle with one start.
    rates = [[line["learning_rate"] for line in metrics(folder)] for folder in (whole, tmp_path / "site_a")]
    assert rates[0] == rates[1] and len(rates[0]) == 2
    assert len(json.loads((tmp_path / "site_a" / "run.json").read_text())) == 1
    assert (tmp_path / "site_a" / "configs" / "inference.json").is_file()


def test_nvidia_flare_s_simulator_gives_the_same_weights(tmp_path, labelled_lists):
    """With its server and a process for each site, which sends its weights; two sites with other cases."""
    bundle = SEGMENTATION[1]
    lists = datalists(labelled_lists["fetal"], tmp_path)
    cases = json.loads(Path(lists[0]).read_text())
    turned = {"training": cases["validation"], "validation": cases["training"]}
    Path(lists[1]).write_text(json.dumps(turned))
    settings = {**small_ids(bundle, "swin"), "val_pictures": 0, "overlap": 0, "schedule_epochs": 2}
    found = {}
    for name, python in (("one_process", sys.executable), ("flare_job", python_of("nvflare"))):
        command = [python, ROOT / f"examples/federated/{name}.py", bundle, tmp_path / name, str(lists), "--rounds", "2"]
        done = subprocess.run([*command, *overrides(**settings)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = torch.load(tmp_path / name / "model.pt", weights_only=True)
    first = torch.load(tmp_path / "flare_job/first.pt", weights_only=True)
    ours, theirs = found.values()
    assert ours.keys() == theirs.keys() == first.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(ours[name], first[name]) for name in ours)
