"""What the tests with real servers share: their environments, and packages as an engineer would get them."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import BACKBONES, ROOT, SEGMENTATION, folders, monai_bundle, small_ids
from tools import package

BTCV, FETA = SEGMENTATION
ORTHANC, DICOMWEB = shutil.which("Orthanc"), Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Archive(NamedTuple):
    """Orthanc: its port of DICOM, and what its REST interface answers."""

    port: int
    url: str

    def ask(self, path: str) -> list | dict:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def series(self, modality: str) -> list[dict]:
        """The tags of all series of a modality."""
        found = [self.ask(f"/series/{name}")["MainDicomTags"] for name in self.ask("/series")]
        return [tags for tags in found if tags["Modality"] == modality]


@pytest.fixture
def orthanc(tmp_path) -> Iterator[Archive]:
    """A DICOM server with DICOMweb, of Debian's packages orthanc and orthanc-dicomweb."""
    if not (ORTHANC and DICOMWEB.is_file()):
        pytest.skip("orthanc and orthanc-dicomweb are not installed")
    http, port = free_port(), free_port()
    places = dict.fromkeys(("StorageDirectory", "IndexDirectory"), str(tmp_path / "orthanc"))
    config = {**places, "Plugins": [str(DICOMWEB)], "HttpPort": http, "DicomPort": port, "DicomAet": "ORTHANC"}
    (tmp_path / "orthanc.json").write_text(json.dumps(config | {"DicomAlwaysAllowGet": True}))
    with (tmp_path / "orthanc.log").open("w") as log:
        process = subprocess.Popen([ORTHANC, tmp_path / "orthanc.json"], stdout=log, stderr=subprocess.STDOUT)
    archive = Archive(port, f"http://127.0.0.1:{http}")
    try:
        for _ in range(120):
            try:
                archive.ask("/system")
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "orthanc.log").read_text()
                time.sleep(0.5)
        yield archive
    finally:
        process.kill()
        process.wait()
