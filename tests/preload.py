"""What the server imports from which tests fork their runs, and how a run is made there."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import blosc2  # noqa: F401
import fire  # noqa: F401
import ignite.engine  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import monai.bundle  # noqa: F401
import torch._inductor  # noqa: F401  `torch.use_deterministic_algorithms` imports it
import torch.utils.tensorboard  # noqa: F401


def run_module(argv: list[str], cwd: Path, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Become `python -m` with these arguments, in a folder, with more variables, and with files for its output."""
    os.environ.update(environment)
    for path, stream in ((stdout, sys.stdout), (stderr, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(cwd)
    sys.path[0] = str(cwd)
    sys.argv = argv
    # A fork server hands its own way to start processes down to what it starts; a run of a user has the system's.
    multiprocessing.set_start_method(None, force=True)
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # multiprocessing has a way of its own
        sys.exit(1)
