"""Federated averaging by MONAI's client, as docs/howto/federated.md says, of bundles that were downloaded alone."""

import json
import re
import shutil
import subprocess

import pytest
import torch

from tests.conftest import PRETRAINING, ROOT, SEGMENTATION, folders, metrics, monai_bundle, overrides, small_ids

# Two rounds of an epoch, by each bundle's own words for it.
ROUNDS = {
    PRETRAINING: {"max_iterations": 2, "warmup_iterations": 1, "batch_size": 2, "overlap": 0},
    SEGMENTATION[0]: {"pixdim_mm": [5, 5, 5], "overlap": 0, "schedule_epochs": 2},
}


@pytest.mark.parametrize("bundle", ROUNDS, ids=lambda bundle: bundle.name)
def test_two_sites_with_equal_data_train_as_one(bundle, tmp_path, small_list, labelled_lists, foreign_python):
    source = small_list if bundle == PRETRAINING else labelled_lists["ct"]
    cases = json.loads(source.read_text())
    for case in (case for side in cases.values() for case in side):
        case |= {key: str(source.parent / case[key]) for key in ("image", "label") if key in case}
    lists = [str(tmp_path / f"{name}.json") for name in ("site_a", "site_b")]
    for file in lists:
        (tmp_path / file).write_text(json.dumps(cases))
    settings = {**small_ids(bundle, "swin"), "val_pictures": 0, "val_interval": 1, **ROUNDS[bundle]}
    downloaded = tmp_path / "downloaded"
    shutil.copytree(bundle, downloaded)
    (tmp_path / "custom.py").write_text("raise SystemExit('not this one')")
    command = [foreign_python, ROOT / "examples/federated.py", downloaded, tmp_path, str(lists), "--rounds", "2"]
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
