"""Where weights come from: what a training was started with, written beside what it leaves."""

import hashlib
import json
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from custom.engine.config_check import running_workflow
from custom.files import write_json


class RunRecord:
    """Write to `run.json` what a training starts with.

    The file is a list with an entry for each start of the run; the weights come from the last one. Overrides are what
    differs from `configs/train.json`, also by way of other config files. Digest of the data list, bundle, version and
    overrides are null where they are not known: for cases that are given without a list, and where no workflow is run.

    Args:
        output_dir: folder of the run.
        datalist: file that the cases come from.
        seed: of the run.
        resume: whether earlier starts in this folder belong to the same run.
    """

    def __init__(self, output_dir: str, datalist: str, seed: int, resume: bool = True) -> None:
        self.file = Path(output_dir, "run.json")
        self.datalist = Path(datalist)
        self.seed = seed
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        workflow = running_workflow()
        name = version = changed = None
        if workflow is not None:
            name, version = workflow.config_root_path.resolve().parent.name, workflow.parser.get("_meta_#version")
            base = ConfigParser()
            base.read_config(str(workflow.config_root_path / "train.json"))
            base.resolve_macro_and_relative_ids()
            changed = overrides(workflow.parser.config, base.config)
        listed = self.datalist.is_file() and "train#dataset#data" not in (changed or {})
        start = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "bundle": name,
            "version": version,
            "overrides": changed,
            "datalist_sha256": hashlib.sha256(self.datalist.read_bytes()).hexdigest() if listed else None,
            "seed": self.seed,
            "versions": {
                "python": platform.python_version(),
                "monai": monai.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "commit": commit(),
        }
        starts = json.loads(self.file.read_text()) if self.resume and self.file.exists() else []
        write_json(self.file, [*starts, start])


def overrides(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the ids whose values differ from those of a base, such as "train#trainer#max_epochs".

    A dictionary is compared id by id, unless it lacks some that the base has.
    """
    found = {}
    for name, value in config.items():
        known = base.get(name)
        if name == "_meta_" or (name in base and value == known):
            continue
        if isinstance(value, dict) and isinstance(known, dict) and value.keys() >= known.keys():
            found |= {f"{name}#{child}": new for child, new in overrides(value, known).items()}
        else:
            found[name] = value
    return found


def commit() -> str | None:
    """Return the git commit of this file's checkout, with "-dirty" if that has changes; None for a copy outside git."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)  # a downloaded bundle may lie in a checkout of something else
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
