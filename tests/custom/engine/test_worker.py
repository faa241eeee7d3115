import subprocess

import pytest
from torch.utils.data import DataLoader

from custom.engine.worker import listen_to_trainer_alone


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_by_their_trainer_s_signal_and_by_no_other(method):
    options = {"num_workers": 1, "persistent_workers": True, "worker_init_fn": listen_to_trainer_alone}
    loader = DataLoader(list(range(4)), multiprocessing_context=method, **options)
    batches = iter(loader)
    (worker,) = batches._workers
    next(batches)
    for name in ("INT", "TERM", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert len(list(batches)) == 3 and len(list(loader)) == 4
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
