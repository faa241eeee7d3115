"""Pre-training on several nodes by torchrun: what each process reads and writes, and what the death of one changes."""

import json
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import TORCHRUN, folders, metrics, monai_bundle
from tools.studies import kills

# Two processes can't share them equally.
SCANS = ("ct/images/ct_000.nii.gz", "ct/images/ct_001.nii.gz", "fetal/images/fetal_000.nii.gz")
# Each process writes down what it reads ...
READ = (
    "print(engine.state.epoch, engine.state.batch['case'][0], file=open(@output_dir + '/read_by_' + str(@rank), 'a'))"
)
# ... and once, in the middle of the second epoch, one dies.
DIE = (
    "(@rank, engine.state.iteration) == (1, 3) and not os.path.exists(@output_dir + '/died') "
    "and open(@output_dir + '/died', 'w') and os.kill(os.getpid(), 9)"
)


@pytest.fixture(scope="module")
def three_scans(tmp_path_factory, phantom_list):
    scans = [
        {"image": str(phantom_list.parent / f"{scan}"), "modality": "t2" if "fetal" in scan else "ct"} for scan in SCANS
    ]
    path = tmp_path_factory.mktemp("list") / "three.json"
    others = {"held_out/ct_002.nii.gz": "ct", "brain/images/brain_000_t1.nii.gz": "t1"}
    validation = [{"image": str(phantom_list.parent / scan), "modality": others[scan]} for scan in others]
    path.write_text(json.dumps({"training": scans, "validation": validation}))
    return path


def train(folder, datalist, watch, launcher=TORCHRUN):
    """Train for three epochs with a further handler."""
    logger = f"$lambda engine: {watch}"
    handler = {"_target_": "StatsHandler", "epoch_log": False, "iteration_print_logger": logger}
    folder.mkdir(exist_ok=True)
    (folder / "watch.json").write_text(json.dumps({"+train#handlers": [handler]}))
    settings = {"datalist": datalist, "batch_size": 1, "max_epochs": 3, "warmup_iterations": 1, "val_pictures": 0}
    return monai_bundle("train", "multi_gpu_train", folder / "watch", launcher=launcher, **settings, **folders(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, three_scans):
    """A training by two processes of one node."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(folder, three_scans, READ)
    assert done.returncode == 0, done.stderr
    return folder


def test_in_each_epoch_the_processes_share_the_scans(whole):
    reads = [(whole / f"read_by_{rank}").read_text().splitlines() for rank in (0, 1)]
    assert [len(lines) for lines in reads] == [6, 6]  # two iterations of each of three epochs
    for epoch in (1, 2, 3):
        times = Counter(line.split("/")[-1] for lines in reads for line in lines if line.startswith(str(epoch)))
        assert sorted(times.values()) == [1, 1, 2] and times.keys() == {scan.split("/")[-1] for scan in SCANS}


def test_a_process_of_two_nodes_dies_and_the_run_ends_as_if_it_had_not(whole, three_scans, tmp_path, monkeypatch):
    """The nodes are two torchruns with a process each; both start their process anew, from the last epoch's end."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # see docs/howto/several_gpus.md
    folder = tmp_path / "run"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{unused.getsockname()[1]}"
    nodes = ("--nnodes", "2", "--nproc_per_node", "1", "--max_restarts", "1")
    launcher = (*TORCHRUN[:3], *nodes, "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: train(folder, three_scans, DIE, launcher), range(2)))
    assert [run.returncode for run in runs] == [0, 0], "\n".join(run.stderr for run in runs)
    said = "\n".join(run.stderr + run.stdout for run in runs)
    assert "exitcode: -9" in said and said.count("Resuming from") == 2
    assert kills.equal(kills.results(folder), kills.results(whole))
    assert [line["iteration"] for line in metrics(folder)] == [2, 4, 6]
    assert len(json.loads((folder / "run.json").read_text())) == 2
