"""What the tests with real servers share: their environments, and packages as an engineer would get them."""

from pathlib import Path

import pytest

from tests.conftest import BACKBONES, ROOT, SEGMENTATION, folders, monai_bundle, small_ids
from tools import package

BTCV, FETA = SEGMENTATION


def python_of(environment: str) -> Path:
    """Return the Python of the environment that is made of a list of packages beside this file."""
    python = ROOT / f".venv-{environment}" / "bin" / "python"
    assert python.is_file(), f"{python} is made by `bash tools/test.sh integration`"
    return python


@pytest.fixture(scope="session")
def packages(tmp_path_factory, labelled_lists) -> dict[str, Path]:
    """A short training of each segmentation bundle on phantoms: of one its folder, of the other the package of it.

    The one is a Swin UNETR, the other a residual-encoder U-Net.
    """
    built = {}
    for bundle, kind, spacing_mm, backbone in ((BTCV, "ct", [3, 3, 3], "swin"), (FETA, "fetal", None, "resenc")):
        run_dir = tmp_path_factory.mktemp(bundle.name)
        more = {"datalist": labelled_lists[kind], "max_epochs": 4, "learning_rate": 0.01, "overlap": 0.1}
        if spacing_mm:
            more["pixdim_mm"] = spacing_mm
        more |= small_ids(bundle, backbone)
        done = monai_bundle("train", *BACKBONES[backbone][0], bundle=bundle, **more, **folders(run_dir))
        assert done.returncode == 0, done.stderr
        built[bundle.name] = run_dir if bundle == BTCV else package.build(run_dir, tmp_path_factory.mktemp("dist"))
    return built
