"""What a training was started with: told in `run.json`, carried by its weights, and held against what uses them."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from custom.errors import BadInput
from custom.files import read_json

RECORD = "run.json"
# What weights are trained for, so that whatever uses them must have it as the training had it.
TRAINED = (
    *("labels", "in_channels", "feature_size", "full_resolution_skip", "network_def", "patch_size"),
    *("pixdim_mm", "intensity", "modalities"),
)

# What MONAI's `--tracking mlflow` adds to a config: ids, and a handler of this class, see `config_check`.
TRACKING = ("tracking_uri", "experiment_name", "run_name", "save_execute_config", "is_not_rank0")
TRACKER = "custom.engine.tracking.MLflow"


def record_of(
    workflow: ConfigWorkflow | None, datalist: str | Path, dataset_dir: str | Path, seed: int, pretrained: str | None
) -> dict:
    """Return what a training starts with, for JSON.

    Overrides are what differs from `configs/train.json`, also by way of other config files; defaults, what that has
    for its plain values. What is not known is null: bundle, version, overrides and settings where no workflow is run,
    digests of files that are not there.
    """
    name = version = changed = settings = defaults = None
    if workflow is not None:
        folder = workflow.config_root_path.resolve()
        name, version = bundle_name(folder.parent), workflow.parser.get("_meta_#version")
        base = ConfigParser()
        base.read_config(str(folder / "train.json"))
        base.resolve_macro_and_relative_ids()
        changed = overrides(without_tracking(workflow.parser.config), base.config)
        settings = {id: workflow.parser.config[id] for id in TRAINED if id in workflow.parser.config}
        earlier = folder.parent / RECORD  # of the training whose own configs these are
        own = {id: value for id, value in base.config.items() if not isinstance(value, dict | list)}
        defaults = read_json(earlier, list)[-1]["defaults"] if earlier.is_file() else own
        settings["fold"] = workflow.parser.config.get("fold")
    listed = "train#dataset#data" not in (changed or {})
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bundle": name,
        "version": version,
        "overrides": changed,
        "settings": settings,
        "defaults": defaults,
        "datalist_sha256": digest(datalist) if listed else None,
        "scans_sha256": digest_of_scans(datalist, dataset_dir) if listed else None,
        "pretrained_sha256": pretrained and digest(pretrained),
        "seed": seed,
        "processes": idist.get_world_size(),
        "versions": {
            "python": platform.python_version(),
            "monai": monai.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "commit": commit(),
    }


def portable(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without the overrides that hold a path of the machine that trained, or a list of patients."""

    changed = record.get("overrides") or {}
    return {**record, "overrides": {id: value for id, value in changed.items() if not holds_path(value)}}


def holds_path(value: Any) -> bool:
    """Return whether a value of a config is or has an absolute path."""
    return any(isinstance(leaf, str) and os.path.isabs(leaf) for _, leaf in leaves(value))


def bundle_name(folder: Path) -> str:
    """Return the name of a bundle, that of its folder, or of a training's: the bundle that was trained."""
    record = folder / RECORD
    return read_json(record, list)[-1]["bundle"] or folder.name if record.is_file() else folder.name


def digest(file: str | Path) -> str | None:
    """Return the SHA-256 of a file; None if there is none."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if Path(file).is_file() else None


def digest_of_scans(datalist: str | Path, dataset_dir: str | Path) -> str | None:
    """Return the SHA-256 of the names and sizes of all files that a data list names; None if there is no list."""
    if not Path(datalist).is_file():
        return None
    entries = [entry for section in read_json(datalist).values() if isinstance(section, list) for entry in section]
    named = [value for entry in entries if isinstance(entry, dict) for _, value in leaves(entry)]
    paths = {name: os.path.join(dataset_dir, name) for name in named if isinstance(name, str)}
    sizes = sorted((name, os.path.getsize(path)) for name, path in paths.items() if os.path.isfile(path))
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def leaves(value: Any, id: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the ids and values of what is no dictionary or list in a config; empty ones count as values."""
    if isinstance(value, dict | list) and value:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(child, f"{id}#{key}" if id else str(key))
    else:
        yield id, value


def without_tracking(config: Any) -> Any:
    """Return a config without what `--tracking mlflow` adds, which is no setting of a training."""
    if isinstance(config, dict):
        return {id: without_tracking(value) for id, value in config.items() if id not in TRACKING}
    if isinstance(config, list):
        return [part for part in config if not (isinstance(part, dict) and part.get("_target_") == TRACKER)]
    return config


def overrides(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the ids whose values differ from those of a base, such as "train#trainer#max_epochs".

    A dictionary is compared id by id, unless it lacks some that the base has. Handlers that are added to the base's, as
    by a tracker, are an id as MONAI merges it: "+train#handlers".
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        known = base.get(name)
        if name == "_meta_" or (name in base and value == known):
            continue
        if isinstance(value, dict) and isinstance(known, dict) and value.keys() >= known.keys():
            for child, new in overrides(value, known).items():
                found["+" * child.startswith("+") + f"{name}#{child.lstrip('+')}"] = new
        elif name == "handlers" and isinstance(value, list) and value[: len(known or ())] == known:
            found[f"+{name}"] = value[len(known) :]
        else:
            found[name] = value
    return found


def check_trained_alike(weights: str | Path, record: dict[str, Any] | None, workflow: ConfigWorkflow | None) -> None:
    """Raise `BadInput` where a config that is run has what weights use in another way than their training had it.

    Args:
        weights: their file, for the sentence.
        record: of their training, None where that is not known.
        workflow: that is run, None where a program drives the parser itself.
    """
    trained = (record or {}).get("settings")
    if record is None or not trained or workflow is None:
        return
    config = json.loads(json.dumps(workflow.parser.config, default=str))
    for name in [name for name in TRAINED if name in trained and name in config]:
        then, now = ({name: part[name]} for part in (trained, config))
        if isinstance(then[name], dict) and isinstance(now[name], dict):
            then, now = (dict(leaves(part)) for part in (then, now))
        for id in [*then, *now]:
            if then.get(id) != now.get(id):
                was, is_ = (json.dumps(part.get(id)) for part in (then, now))
                raise BadInput(
                    f"{weights} was trained with {id} {was}, and this config has {is_}; use the configs in the folder "
                    f"of the training, or give --{id} {shlex.quote(was if was != 'null' else 'None')}."
                )
    fold = config.get("fold")
    other = "fold" in config and fold != trained.get("fold")
    if other and digest(workflow.parser.get_parsed_content("datalist")) == record["datalist_sha256"]:
        raise BadInput(
            f"{weights} was trained with --fold {trained.get('fold')}, and this is --fold {fold} of the same data "
            f"list, whose validation cases it was trained on; give --fold {trained.get('fold')}."
        )


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
