"""A bundle that is run uses the `custom` in its own folder, or says that it can't."""

import shutil

import pytest

from tests.conftest import PRETRAINING, monai_bundle, run_module

MISSING = "none.json"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A bundle as it is downloaded, with its `custom` as a folder."""
    return shutil.copytree(
        PRETRAINING, tmp_path_factory.mktemp("package") / "bundle", ignore=shutil.ignore_patterns("*.pyc")
    )


@pytest.mark.parametrize("kind", ["a folder", "a file"])
def test_another_custom_in_the_working_directory_is_not_used(kind, package, tmp_path):
    if kind == "a folder":
        (tmp_path / "custom").mkdir()
    file = tmp_path / ("custom/__init__.py" if kind == "a folder" else "custom.py")
    file.write_text("raise SystemExit('another project')")
    done = monai_bundle("train", bundle=package, cwd=tmp_path, datalist=MISSING)
    assert f"error: The data list {MISSING} can't be read" in done.stderr


def test_without_its_folder_a_bundle_refuses_the_modules_of_another_version(package, tmp_path):
    shutil.copytree(package / "custom", tmp_path / "custom")
    (tmp_path / "custom/masking.py").write_text("# of another version\n")
    command = ["monai.bundle", "run", "--config_file", str(package / "configs/train.json"), "--datalist", MISSING]
    done = run_module(command, tmp_path, [{}])
    assert f"in {tmp_path}/custom, and the bundle has others in {package}/custom; give --bundle_root" in done.stderr
    assert "Traceback" not in done.stderr
