"""MONAI Label's own server with both segmentation bundles, over REST, as docs/howto/monai_label.md says."""

import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.integration.conftest import BTCV, FETA, free_port, python_of
from tools import package

# Real volumes, or phantoms where there are none: folder, name of the scan and of its label map.
REAL = {BTCV.name: ("ct", "abdomen_slab_3mm"), FETA.name: ("fetal_mri", "fetal_SB_atlas_GA21_notoperated")}
PHANTOMS = {BTCV.name: ("ct", "ct_000"), FETA.name: ("fetal", "fetal_000")}
each_model = pytest.mark.parametrize("model", [BTCV.name, FETA.name])


@pytest.fixture(scope="module")
def python() -> Path:
    return python_of("label")


@pytest.fixture(scope="module")
def scans(phantoms, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """A scan for each bundle, and its label map."""
    real = Path(os.environ.get("DAE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    root, chosen = (real, REAL) if real.is_dir() else (phantoms, PHANTOMS)
    return {
        model: tuple(root / folder / kind / f"{name}.nii.gz" for kind in ("images", "labels"))
        for model, (folder, name) in chosen.items()
    }


class Server:
    """A server in a process of its own, and what is asked of it with curl."""

    def __init__(
        self, python: Path, folder: Path, packages: dict[str, Path], models: str, studies: str = "", **conf: str
    ) -> None:
        self.app, self.studies = folder / "apps" / "monaibundle", folder / "studies"
        command = [python, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle"]
        subprocess.run([*command, "--output", self.app.parent], check=True, cwd=folder, capture_output=True)
        for name, place in packages.items():
            if place.is_dir():
                shutil.copytree(place, self.app / "model" / name)
            else:
                zipfile.ZipFile(place).extractall(self.app / "model")
        self.studies.mkdir()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        self.command = [python, "-m", "monailabel.main", "start_server", "--app", self.app]
        self.command += ["--studies", studies or self.studies, "--host", "127.0.0.1", "--port", str(port)]
        for name, value in {"zoo_source": "local", "sam2": "false", "models": models, **conf}.items():
            self.command += ["--conf", name, value]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.log.parent, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers or has ended."""
        for _ in range(600):
            if self.process.poll() is not None or self.ask("/info/", check=False)[0] == 200:
                return
            time.sleep(0.5)
        raise TimeoutError(self.log.read_text()[-2000:])

    def stop(self) -> None:
        """End it with the trainings that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ask(self, path: str, *options, check: bool = True):
        """Return the status of a request and its answer."""
        command = ["curl", "--silent", "--write-out", "\n%{http_code}", *map(str, options), self.url + path]
        answer, _, status = subprocess.run(command, capture_output=True, text=True).stdout.rpartition("\n")
        assert not check or status == "200", (answer, self.log.read_text()[-3000:])
        return int(status), json.loads(answer) if answer.startswith(("{", "[")) else answer

    def says(self, text: str, seconds: int = 10) -> bool:
        """Whether the log has a text; it may come a moment after the answer."""
        for _ in range(2 * seconds):
            if text in self.log.read_text():
                return True
            time.sleep(0.5)
        return False

    def infer(self, model: str, scan: Path, output: Path) -> nibabel.Nifti1Image:
        image = scan.name.removesuffix(".nii.gz")
        self.ask(f"/infer/{model}?image={image}&output=image", "--request", "POST", "--output", output)
        return nibabel.load(output)

    def images(self) -> list[str]:
        return list(self.ask("/datastore/?output=all")[1]["objects"])

    def train(self, model: str, **options) -> dict:
        """Train, and return what became of it."""
        return self.task("/train/", f"/train/{model}", **options)

    def task(self, place: str, request: str, **options) -> dict:
        """Ask for what takes long, and return what became of it, as a place says."""
        self.begin(request, **options)
        while (task := self.ask(place)[1])["status"] in ("SUBMITTED", "RUNNING"):
            time.sleep(1)
        return task

    def begin(self, request: str, **options) -> None:
        self.ask(request, "--header", "Content-Type: application/json", "--data", json.dumps(options))


@pytest.fixture(scope="module")
def server(python, packages, scans, tmp_path_factory):
    """A server with both bundles and a scan for each, without labels."""
    server = Server(python, tmp_path_factory.mktemp("label"), packages, ",".join(packages))
    try:
        for scan, _ in scans.values():
            shutil.copy(scan, server.studies)
        server.wait()
        yield server
    finally:
        server.stop()


def bundle_run(python: Path, folder: Path, scan: Path, output: Path) -> nibabel.Nifti1Image:
    """The label map of `monai.bundle run`, in the server's environment and from the bundle's folder."""
    command = [python, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", scan, "--output_dir", output]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return nibabel.load(output / scan.name.replace(".nii", "_seg.nii"))


def differing(one: nibabel.Nifti1Image, other: nibabel.Nifti1Image) -> int:
    """Number of voxels in which two label maps differ, which lie in the same place."""
    assert np.allclose(one.affine, other.affine, atol=1e-4)
    return int((np.asarray(one.dataobj) != np.asarray(other.dataobj)).sum())


def test_both_bundles_are_loaded_with_their_labels(server):
    info = server.ask("/info/")[1]
    for bundle in (BTCV, FETA):
        labels = json.loads((bundle / "configs/train.json").read_text())["labels"][1:]
        assert info["models"][bundle.name]["labels"] == {name: number for number, name in enumerate(labels, 1)}
        assert info["trainers"][bundle.name]["config"]["pretrained"] is True
    assert info["datastore"]["total"] == 2


@each_model
def test_a_label_is_taken_trained_on_and_its_weights_are_served(model, server, python, scans, tmp_path):
    """All that a user does with a model; each label map is that of `monai.bundle run` with the same weights."""
    scan, truth = scans[model]
    folder = server.app / "model" / model
    before = server.infer(model, scan, tmp_path / "before.nii.gz")
    assert differing(before, bundle_run(python, folder, scan, tmp_path / "before")) == 0
    assert len(np.unique(before.dataobj)) > 1

    image = scan.name.removesuffix(".nii.gz")
    server.ask(f"/datastore/label?image={image}&tag=final", "--request", "PUT", "--form", f"label=@{truth}")
    try:
        task = server.train(model, max_epochs=1)
        assert task["status"] == "DONE", "\n".join(task["details"])
        after = server.infer(model, scan, tmp_path / "after.nii.gz")
        assert differing(after, before) > 0
        assert differing(after, bundle_run(python, folder, scan, tmp_path / "after")) == 0

        # The next training is not the first one's end: it starts from the current weights, and trains.
        first = (folder / "models/model.pt").read_bytes()
        task = server.train(model, max_epochs=2)
        assert task["status"] == "DONE" and (folder / "models/model.pt").read_bytes() != first
        packaged = (folder / "models/model.ts").is_file()
        run = folder / "eval" if packaged else folder  # the folder of a training is its own
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2]
        assert {path.name for path in (folder / "models").iterdir()} <= {"model.pt", "model.ts"}
        assert server.train(model, pretrained=False)["status"] == "ERROR"  # MONAI Label's own fault, see the docs
    finally:
        server.ask(f"/datastore/label?id={image}&tag=final", "--request", "DELETE")


def test_a_training_is_stopped_all_scans_are_segmented_and_the_server_starts_again(server, scans, tmp_path):
    """A stopped training leaves the weights as they were; what was trained lasts, and labels are kept."""
    scan, truth = scans[BTCV.name]
    image = scan.name.removesuffix(".nii.gz")
    weights = server.app / "model" / BTCV.name / "models/model.pt"
    server.ask(f"/datastore/label?image={image}&tag=final", "--request", "PUT", "--form", f"label=@{truth}")
    before = weights.read_bytes()
    server.begin(f"/train/{BTCV.name}", max_epochs=1000)
    assert server.says("Epoch 2 of 1000", seconds=120)
    server.ask("/train/", "--request", "DELETE")
    assert server.ask("/train/")[1]["status"] == "STOPPED"
    assert weights.read_bytes() == before and [path.name for path in weights.parent.glob("*.pt")] == ["model.pt"]
    assert server.train(BTCV.name, max_epochs=1)["status"] == "DONE"
    assert weights.read_bytes() != before

    trained = server.infer(BTCV.name, scan, tmp_path / "trained.nii.gz")
    infer = f"/batch/infer/{BTCV.name}?images=all"
    assert server.task("/batch/infer", infer)["status"] == "ERROR"  # MONAI Label's own fault, see the docs
    assert server.says("integer modulo by zero")
    assert server.task("/batch/infer", infer, multi_gpu=False)["status"] == "DONE"
    kept = {name: nibabel.load(server.studies / f"labels/original/{name}.nii.gz") for name in server.images()}
    assert len(kept) == 2 and differing(kept[image], trained) == 0

    server.stop()
    server.start()
    server.wait()
    assert differing(server.infer(BTCV.name, scan, tmp_path / "again.nii.gz"), trained) == 0
    server.ask(f"/datastore/label?id={image}&tag=final", "--request", "DELETE")


@pytest.mark.parametrize(
    "model, image, said",
    [
        (BTCV.name, "no_such_image", "FileNotFoundError: no DICOMs in: ."),
        ("no_such_model", "ct_000", "There is no model 'no_such_model' available"),
    ],
)
def test_what_is_not_there(model, image, said, server):
    """MONAI Label's own answers."""
    assert server.ask(f"/infer/{model}?image={image}&output=image", "--request", "POST", check=False)[0] == 500
    assert server.says(said)


def test_a_misspelt_bundle(python, packages, tmp_path):
    """The server ends before it listens."""
    server = Server(python, tmp_path, packages, "btcv_segmentation")
    try:
        server.wait()
        assert server.process.poll()
        assert server.says("To get the latest bundle version, source should be 'github'")
    finally:
        server.stop()


def test_uncertainty_as_a_strategy_is_not_there(python, packages, tmp_path):
    """MONAI Label's scoring gives the network an argument that a Swin UNETR has not, and the server ends."""
    server = Server(python, tmp_path, packages, FETA.name, epistemic_model=FETA.name)
    try:
        server.wait()
        assert server.process.poll() and server.says("unexpected keyword argument 'dropout'")
    finally:
        server.stop()


def test_a_dicomweb_server_as_the_store(orthanc, python, packages, tmp_path, monkeypatch):
    """A CT of Orthanc is segmented, and its final label goes there as a DICOM SEG, by itkimage2segimage of dcmqi."""
    if not shutil.which("itkimage2segimage"):
        pytest.skip("itkimage2segimage is not installed: pip install dcmqi")
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path / "cache"))
    deploy = python_of("deploy")
    draw = [deploy, Path(__file__).parent / "dicom.py", "draw", tmp_path / "CT", "CT"]
    send = [deploy, "-m", "pynetdicom", "storescu", "-r", "127.0.0.1", str(orthanc.port), tmp_path / "CT"]
    for command in (draw, send):
        subprocess.run(command, check=True, capture_output=True)
    server = Server(python, tmp_path, {BTCV.name: packages[BTCV.name]}, BTCV.name, f"{orthanc.url}/dicom-web")
    try:
        server.wait()
        image = orthanc.series("CT")[0]["SeriesInstanceUID"]
        found = server.infer(BTCV.name, Path(image), tmp_path / "found.nii.gz")
        (scan,) = tmp_path.glob(f"cache/*/{image}.nii.gz")  # as MONAI Label has converted it
        folder = server.app / "model" / BTCV.name
        assert differing(found, bundle_run(python, folder, scan, tmp_path)) == 0
        label = ["--request", "PUT", "--form", f"label=@{tmp_path / 'found.nii.gz'}"]
        server.ask(f"/datastore/label?image={image}&tag=final", *label)
        assert len(orthanc.series("SEG")) == 1
        task = server.train(BTCV.name, max_epochs=1)
        assert task["status"] == "DONE", "\n".join(task["details"])
    finally:
        server.stop()


def test_a_package_without_weights(python, tmp_path):
    """It can be trained, from scratch, but segments nothing before."""
    server = Server(python, tmp_path, {FETA.name: package.build(FETA, tmp_path / "dist")}, FETA.name)
    try:
        server.wait()
        info = server.ask("/info/")[1]
        assert list(info["trainers"]) == [FETA.name] and not info["models"]
        assert server.says("neither model.pt nor model.ts exists")
    finally:
        server.stop()
