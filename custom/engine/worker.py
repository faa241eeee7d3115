"""How the worker processes of a data loader take signals."""

import multiprocessing
import os
import signal
import threading


def listen_to_trainer_alone(worker: int) -> None:
    """Let a DataLoader's worker work on where a scheduler or a terminal sends a signal to all processes of a run.

    Only SIGTERM from its own trainer ends it, which sends that at its end. Else the worker's death would break off the
    iteration after which the trainer saves. (On macOS, which can't tell who sent a signal, SIGTERM does.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()  # not the parent, which may be a fork server
    if trainer and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_told_by, args=(trainer.pid,), daemon=True).start()


def _end_when_told_by(process: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != process:
        pass
    os._exit(0)
