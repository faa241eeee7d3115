"""The unit test for MONAI's model zoo, in a folder that is laid out as the zoo."""

import os
import shutil
import subprocess
import zipfile

import pytest

from tests.conftest import PRETRAINING, ROOT, SEGMENTATION
from tools import package


@pytest.mark.parametrize("bundle", [PRETRAINING, SEGMENTATION[0]], ids=lambda bundle: bundle.name)
def test_the_zoo_s_runner_finds_and_passes_it(bundle, tmp_path, foreign_python):
    zipfile.ZipFile(package.build(bundle, tmp_path)).extractall(tmp_path / "models")
    tests = tmp_path / "ci/unit_tests"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "examples/model_zoo/test_bundle.py", tests / f"test_{bundle.name}.py")
    command = [foreign_python, "-m", "unittest", f"test_{bundle.name}"]
    environment = {**os.environ, "PYTHONPATH": str(tests)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "Ran 1 test" in done.stderr, done.stderr
