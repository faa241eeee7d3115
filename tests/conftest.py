"""What the tests share: phantoms, a data list of them, real scans, and a bundle run as a user runs it."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import nibabel
import pytest
import torch
from monai.bundle import ConfigParser

from custom.files import read_json
from tests import preload
from tools import datalist as datalist_tool
from tools import phantom

ROOT = Path(__file__).parents[1]
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if path.is_dir())
PRETRAINING = ROOT / "bundles" / "dae_pretraining"
SEGMENTATION = [bundle for bundle in BUNDLES if bundle.name.endswith("segmentation")]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# The smallest network, and one crop of each scan that it takes in a second.
SMALL = {"feature_size": 12, "patch_size": [64, 32, 32], "crops_per_volume": 1, "num_workers": 0}
# The backbones that tests run with: their overlay, and what makes them small. Windows of 7 voxels a side would take
# four times as long.
BACKBONES = {
    "swin": ([], {"window_size": 4}),
    "resenc": (["resenc"], {"feature_size": 4, "n_blocks_per_stage": [1] * 6}),
}
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU: CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def server_of_forks() -> None:
    """Start it before anything else starts one, which would import less, so that each run would take seconds more."""
    fork_server()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder with two subjects of each kind of phantom, 64 voxels wide, and a third CT apart from them."""
    folder = tmp_path_factory.mktemp("phantoms")
    phantom.write(folder, subjects=2, shape=64, seed=0, kinds=("ct", "fetal", "brain"))
    image, _, affine = phantom.abdomen_ct(2, 64)
    (folder / "held_out").mkdir()
    nibabel.Nifti1Image(image, affine).to_filename(folder / "held_out" / "ct_002.nii.gz")
    return folder


@pytest.fixture(scope="session")
def phantom_list(phantoms) -> Path:
    """A data list of the phantoms with all five modalities."""
    brains = [f"{name}={phantoms}/brain/images/*_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair")]
    sources = [f"ct={phantoms}/ct/images", f"t2={phantoms}/fetal/images", *brains]
    path = phantoms / "datalist.json"
    assert datalist_tool.main([str(path), *sources, "--validation", "0.5"]) == 0
    return path


@pytest.fixture(scope="session")
def labelled_lists(phantoms) -> dict[str, Path]:
    """Data lists of two phantoms with labels, in two folds, the first to train on and the second to validate."""
    lists = {}
    for kind in ("ct", "fetal"):
        entries = [
            {
                "image": f"images/{kind}_00{n}.nii.gz",
                "label": f"labels/{kind}_00{n}.nii.gz",
                "modality": modality,
                "fold": n,
            }
            for n, modality in enumerate(["ct" if kind == "ct" else "t2"] * 2)
        ]
        lists[kind] = phantoms / kind / "labelled.json"
        lists[kind].write_text(json.dumps({"training": entries[:1], "validation": entries[1:]}))
    return lists


@pytest.fixture(scope="session")
def foreign_python(tmp_path_factory) -> Path:
    """A Python that has all packages of this one, but not this repository."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A plain folder on the path: the hooks in it, such as that of an editable installation, are not run.
    Path(site, "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    for module in ("custom", "tools"):
        found = subprocess.run([python, "-c", f"import {module}"], cwd=folder, capture_output=True, text=True)
        assert f"No module named '{module}'" in found.stderr, "install this repository with -e for its tests"
    return python


@pytest.fixture
def small_list(tmp_path, phantom_list) -> Path:
    """A data list of two CTs to train on and one to validate."""
    names = ("ct/images/ct_000", "ct/images/ct_001", "held_out/ct_002")
    scans = [{"image": str(phantom_list.parent / f"{name}.nii.gz"), "modality": "ct"} for name in names]
    path = tmp_path / "small.json"
    path.write_text(json.dumps({"training": scans[:2], "validation": scans[2:]}))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A disk in memory whose size can be set, in bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def resize(size: int) -> None:
        options = f"{'remount,' * os.path.ismount(disk)}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only the superuser can mount a small disk")

    yield disk, resize
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a worker may still be on its way out


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real CT and MRI volumes, which a user's machine need not have."""
    folder = Path(os.environ.get("DAE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real volumes at {folder}; name their folder with DAE_TEST_DATA")
    return folder


def autoencoder(
    ratio: float = 0.6, skip: bool = True, backbone: str = "swin", feature_size: int | None = None, **network
) -> torch.nn.Module:
    """The pre-training network as the bundle makes it, small by default."""
    overlay, _ = BACKBONES[backbone]
    parser = ConfigParser()
    parser.read_config([str(PRETRAINING / f"configs/{name}.json") for name in ("train", *overlay)])
    ids = {"device": "cpu", "local_mask_ratio": ratio, "full_resolution_skip": skip}
    parser.update({**ids, **small_ids(PRETRAINING, backbone)})
    parser.update({f"network_def#network#{name}": value for name, value in network.items()})
    if feature_size is not None:
        parser["feature_size"] = feature_size
    return parser.get_parsed_content("network")


def segmentation_network(backbone: str = "swin", classes: int = 2, **ids) -> torch.nn.Module:
    """The stock network of a segmentation bundle, small by default."""
    parser = ConfigParser()
    parser.read_config(
        [str(SEGMENTATION[1] / f"configs/{name}.json") for name in ("inference", *BACKBONES[backbone][0])]
    )
    parser.update({"labels": list(map(str, range(classes))), **small_ids(SEGMENTATION[1], backbone), **ids})
    return parser.get_parsed_content("network_def")


def small_ids(bundle: Path, backbone: str) -> dict:
    """Ids and values that make a bundle's network small."""
    network = json.loads((bundle / "configs/train.json").read_text())["network_def"]
    place = "network_def#network" if "network" in network else "network_def"
    ids = {**SMALL, **BACKBONES[backbone][1]}
    return {name if name in SMALL else f"{place}#{name}": value for name, value in ids.items()}


def folders(path: Path) -> dict[str, Path]:
    """Overrides that let a run write into a folder."""
    return {"output_dir": path, "ckpt_dir": path / "models"}


def overrides(**values) -> list[str]:
    """Command-line arguments of overrides; `__` in a name stands for `#`."""
    return [part for name, value in values.items() for part in (f"--{name.replace('__', '#')}", str(value))]


def monai_bundle(*configs: str, bundle: Path = PRETRAINING, launcher=(), ranks: int = 1, cwd=None, **values):
    """Run `python -m monai.bundle run` on a bundle's configs, as documented; return the finished process.

    Args:
        launcher: what starts it in place of `python`, such as `TORCHRUN`.
        ranks: run so many processes, with the variables that `torchrun` gives them; it imports everything anew in each.
    """
    files = [str(bundle / "configs" / f"{name}.json") for name in configs]
    config_file = files[0] if len(files) == 1 else str(files)
    module = ["monai.bundle", "run", "--config_file", config_file]
    # A picture takes as long as a training step of the small network, and so does each window.
    quick = {"val_pictures": 0} if "train" in configs else {}
    windows = {"inference", "evaluate"} & set(configs) or bundle.name.endswith("segmentation")
    quick |= {"overlap": 0} if windows else {}
    network = read_json(bundle / "configs/train.json")["network_def"]  # of a bundle of a run, or an adapted one
    other = "resenc" in configs or "ResidualEncoder" in str(network)
    small = SMALL if "published" in configs else small_ids(bundle, "resenc" if other else "swin")
    module += overrides(**{"bundle_root": bundle, **small, **quick, **values})
    cwd = cwd or ROOT.parent
    if launcher:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [*launcher, "-m", *module]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    if ranks == 1:
        return run_module(module, cwd, [{}])
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return run_module(module, cwd, [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group} for rank in range(ranks)])


def fork_server() -> multiprocessing.context.BaseContext:
    """A server to fork processes from that has imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])  # of no effect once it runs
    multiprocessing.forkserver.ensure_running()
    return context


def run_module(argv: list[str], cwd: Path, environments: list[dict[str, str]]) -> subprocess.CompletedProcess:
    """As `subprocess.run` of `python -m`, in a process for each environment, but forked from a server."""
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder, f"{n}.{name}") for name in ("stdout", "stderr")] for n in range(len(environments))]
        processes = [
            context.Process(target=preload.run_module, args=(argv, cwd, environment, *pair))
            for environment, pair in zip(environments, files, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 500
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        if any(process.exitcode is None for process in processes):
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(argv, 500)
        status = max(abs(process.exitcode) for process in processes)
        outputs = ["".join(file.read_text() for file in output) for output in zip(*files, strict=True)]
        return subprocess.CompletedProcess(argv, status, *outputs)


def metrics(output_dir: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
