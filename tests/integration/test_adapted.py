"""A bundle that tools.adapt has written: trained, packaged, downloaded, and served by MONAI Label and MONAI Deploy."""

import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest

from custom.files import read_json, write_json
from tests.conftest import folders, monai_bundle
from tests.integration.conftest import python_of
from tests.integration.test_deploy import check_seg, dicom
from tests.integration.test_label import Server, bundle_run, differing
from tools import package, verify
from tools.adapt.__main__ import main

NAME = "organs"
NAMES = {"1": "spleen", "2": "right kidney", "3": "left kidney", "6": "liver"}


@pytest.fixture(scope="module")
def built(labelled_lists, tmp_path_factory):
    """The package of a short training, whose classes have names of their own and gaps in their ids."""
    folder = tmp_path_factory.mktemp("adapted")
    content = read_json(labelled_lists["ct"])
    root, entries = labelled_lists["ct"].parent, [*content["training"], *content["validation"]]
    for number, entry in enumerate(entries):
        label = nibabel.load(root / entry["label"])
        ids = np.asarray(label.dataobj)
        entry |= {"image": str(root / entry["image"]), "label": str(folder / f"{number}.nii.gz")}
        kept = np.where(np.isin(ids, list(map(int, NAMES))), ids, 0).astype(np.uint8)
        nibabel.Nifti1Image(kept, label.affine).to_filename(entry["label"])
    datalist = folder / "list.json"
    write_json(datalist, {"labels": NAMES, "training": entries[:1], "validation": entries[1:]})
    options = ["--minutes", "0.1", "--pixdim_mm", "[6,6,6]", "--network_def#window_size", "4"]
    assert main([str(datalist), str(folder / NAME), *options]) == 0
    run = folder / "run"
    more = {"datalist": datalist, "max_epochs": 4, "val_interval": 4, "learning_rate": 0.01}
    done = monai_bundle("train", bundle=folder / NAME, **more, **folders(run))
    assert done.returncode == 0, done.stderr
    return package.build(run, folder / "dist")


@pytest.fixture(scope="module")
def downloaded(built, tmp_path_factory):
    """Its folder, as MONAI downloads it."""
    folder = tmp_path_factory.mktemp("downloaded")
    command = [sys.executable, "-m", "monai.bundle", "download", "--name", NAME, "--url", built.as_uri()]
    done = subprocess.run([*command, "--bundle_dir", folder], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / NAME


def test_it_is_downloaded_verified_and_run(built, downloaded, phantoms, tmp_path):
    verify.verify(downloaded)
    scan = phantoms / "held_out/ct_002.nii.gz"
    found = bundle_run(sys.executable, downloaded, scan, tmp_path)
    assert {0} < set(np.unique(found.dataobj)) <= set(range(7))
    assert found.shape == nibabel.load(scan).shape
    assert f"{NAME}/docs/training.json" in zipfile.ZipFile(built).namelist()


def test_it_is_served_by_monai_label(built, downloaded, phantoms, tmp_path):
    """With the names of its classes; the label map is that of `monai.bundle run`."""
    python, scan = python_of("label"), phantoms / "held_out/ct_002.nii.gz"
    server = Server(python, tmp_path, {NAME: built}, NAME)
    try:
        (server.studies / scan.name).write_bytes(scan.read_bytes())
        server.wait()
        labels = server.ask("/info/")[1]["models"][NAME]["labels"]
        assert {name: labels[name] for name in NAMES.values()} == {name: int(id) for id, name in NAMES.items()}
        found = server.infer(NAME, scan, tmp_path / "found.nii.gz")
        assert differing(found, bundle_run(python, downloaded, scan, tmp_path / "run")) == 0
    finally:
        server.stop()


def test_it_is_served_by_monai_deploy(downloaded, tmp_path):
    dicom("draw", tmp_path / "CT", "CT")
    assert len(np.unique(check_seg(tmp_path / "CT", downloaded, tmp_path))) > 1
