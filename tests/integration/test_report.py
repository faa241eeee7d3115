"""The page of a short fine-tuning and of its evaluation in a real browser."""

import os
from pathlib import Path

import pytest

from tests.conftest import folders, monai_bundle
from tests.integration.browser import needs_browser, opened
from tests.integration.conftest import FETA

pytestmark = needs_browser


@pytest.mark.parametrize("place", ["", "evaluation", "eval"])
def test_a_browser_shows_it_without_a_network(place, trained, tmp_path):
    page = trained / place / "report.html"
    with opened(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.run("return document.title") == f"feta_mri_segmentation: {page.parent.name}"
        assert browser.run("return [...document.images].every(i => i.naturalWidth > 100) && document.images.length")
        assert browser.run("return document.querySelectorAll('svg polyline').length") == (0 if place else 4)
        headings = browser.run("return [...document.querySelectorAll('h2')].map(h => h.textContent)")
        assert "Provenance" in headings and (place == "eval" or "val_mean_dice: each case, the worst first" in headings)
        assert browser.run("return performance.getEntriesByType('resource').length") == 0
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        if "DAE_PICTURES" in os.environ:
            browser.picture(Path(os.environ["DAE_PICTURES"], f"report_{place or 'training'}.png"))


@pytest.fixture(scope="module")
def trained(labelled_lists, tmp_path_factory):
    """The folder of a fine-tuning of two epochs, its evaluation, and the inference of a scan."""
    folder, datalist = tmp_path_factory.mktemp("run"), labelled_lists["fetal"]
    training = {"max_epochs": 2, "val_interval": 1, "val_pictures": 1, **folders(folder)}
    steps = [("train", monai_bundle("train", bundle=FETA, datalist=datalist, **training))]
    steps.append(("evaluate", monai_bundle("train", "evaluate", bundle=folder, val_pictures=1, output_dir=folder)))
    scan = {"dataset_dir": datalist.parent / "images" / "fetal_001.nii.gz", "output_dir": folder / "eval"}
    steps.append(("infer", monai_bundle("inference", bundle=folder, **scan, overlap=0)))
    for name, done in steps:
        assert done.returncode == 0, (name, done.stderr)
    return folder
