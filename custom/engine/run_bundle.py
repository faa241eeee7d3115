"""A training leaves a bundle: its settings in the configs, its weights, what it was started with, and its `custom`."""

import contextlib
import json
import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

import custom
from custom.engine.checkpoint import weights_file
from custom.engine.config_check import (
    PATHS,
    check_ids,
    declared_ids,
    federated_client,
    network_target,
    running_workflow,
    walk,
)
from custom.engine.run_record import (
    RECORD,
    TRACKING,
    digest,
    digest_of_scans,
    leaves,
    overrides,
    record_of,
    without_tracking,
)
from custom.errors import BadInput
from custom.files import read_json, write_json

logger = logging.getLogger(__name__)

# Of a bundle's folder; what runs and caches leave in it, and whatever else lies there, does not belong to it.
CONTENT = ("LICENSE", "configs", "custom", "datalist.json", "docs")
# Ids of a run's place and machine, and of its cases where a program gives them: no settings of the training.
PLACE = {
    *("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_dir", "checkpoint", "resume", "pretrained"),
    *("device", "rank", "imports", "initialize", "run", "finalize", "train#dataset#data", "validate#dataset#data"),
}
# What may change when a run goes on: its length, what is looked at on the way, and how the work is done.
SOUND = {
    *("max_epochs", "max_iterations", "train#trainer#max_epochs", "val_interval", "val_pictures", "overlap"),
    *("num_workers", "cache_rate", "store", "bad_cases", "max_bad_share"),
    *("probe", "probe_stages", "probe_interval"),
}


def parsed(file: Path) -> ConfigParser:
    """Return the config of a file as a workflow has it, an empty one where there is no file."""
    parser = ConfigParser(read_json(file) if file.is_file() else {})
    parser.resolve_macro_and_relative_ids()
    return parser


def settings_of(config: dict[str, Any], several: dict[str, Any]) -> dict[str, Any]:
    """Return the ids and values of a config that are settings of a training.

    Args:
        config: of the training.
        several: overlay for several processes, which changes how the work is done and not what is done.
    """
    names = PLACE | several.keys() | {"_meta_"}

    def is_place(id: str) -> bool:
        parts = id.split("#")
        return any("#".join(parts[:count]) in names for count in range(1, len(parts) + 1))

    written = json.loads(json.dumps(without_tracking(config), default=str))
    return {id: value for id, value in leaves(written) if not is_place(id)}


def check_resumption(
    run_dir: str | Path,
    datalist: str | Path,
    dataset_dir: str | Path,
    pretrained: str | None = None,
    resume: bool = True,
) -> None:
    """Refuse to go on with a run by what would change its result or its meaning; what is sound is said.

    Args:
        run_dir: folder of the run; it is resumed if it holds a `checkpoint_iteration=N.pt`.
        datalist: of this start.
        dataset_dir: folder that relative paths in it start from.
        pretrained: weights to start from, None for none.
        resume: False starts anew, whatever the folder holds.

    Raises:
        BadInput: that shows both values.
    """
    run, workflow = Path(run_dir), running_workflow()
    pretrained = pretrained and weights_file(pretrained)
    known, record = run / "configs" / "train.json", run / RECORD
    if not resume or workflow is None or not any(run.glob("checkpoint_iteration=*.pt")):
        return
    if not known.is_file() or not record.is_file():
        raise BadInput(
            f"{run} has checkpoints of a run, but not both of {known} and {record}, which say what it was started "
            f"with; put them back, train in another --output_dir, or anew in this one by --resume False."
        )
    several = parsed(workflow.config_root_path / "multi_gpu_train.json").config
    configs = (parsed(known).config, without_tracking(workflow.parser.config))
    then, now = (settings_of(config, several) for config in configs)
    start = read_json(record, list)[-1]
    # Handlers that a user's config adds, such as a tracker, are not in the bundle that the run has become.
    before, added = (
        {id: json.dumps(value, default=str) for id, value in found.items() if id.startswith("+")}
        for found in (start["overrides"] or {}, overrides(*configs[::-1]))
    )
    if before != added:
        logger.warning(f"The run in {run} was started with these handlers added: {before}, and goes on with: {added}.")
    for id in sorted(then.keys() | now.keys()):
        if then.get(id) != now.get(id) and (id in then or not id.startswith(tuple(f"{name[1:]}#" for name in added))):
            words = f"{id} {json.dumps(then.get(id))}", json.dumps(now.get(id))
            if id.partition("#")[0] in SOUND or id in SOUND:
                logger.info(f"The run in {run} was started with {words[0]}, and goes on with {words[1]}.")
            else:
                _refuse(run, *words)
    cases, weights = start["datalist_sha256"], start["pretrained_sha256"]
    if None not in (cases, digest(datalist)) and cases != digest(datalist):
        _refuse(run, "another content of its data list", f"that of {datalist}")
    if start.get("scans_sha256") not in (None, digest_of_scans(datalist, dataset_dir)):
        _refuse(run, "other files for the names in its data list", f"those in {dataset_dir}")
    if weights != (pretrained and digest(pretrained)):
        _refuse(run, "other weights by --pretrained" if weights else "no --pretrained weights", str(pretrained))
    if start["processes"] != idist.get_world_size():
        _refuse(run, f"{start['processes']} processes", str(idist.get_world_size()))


def _refuse(run: Path, was: str, is_: str) -> None:
    raise BadInput(
        f"The run in {run} was started with {was}, and now it would be {is_}, which can't be changed on the way; give "
        f"what it was started with, train in another --output_dir, or anew in this one by --resume False."
    )


class RunBundle:
    """Write into the folder of a run, when it starts, all of a bundle but the weights, and `run.json`.

    `run.json` is a list with an entry for each start of the run, see `record_of`; the weights come from the last one.
    Without a workflow, as where a program drives the parser itself, only `run.json` is written.

    Args:
        output_dir: folder of the run.
        ckpt_dir: folder of its weights.
        datalist: file that the cases come from.
        dataset_dir: folder that relative paths in it start from.
        seed: of the run.
        pretrained: weights that it starts from.
        resume: whether earlier starts in this folder belong to the same run.
    """

    def __init__(
        self,
        output_dir: str,
        ckpt_dir: str,
        datalist: str,
        dataset_dir: str,
        seed: int,
        pretrained: str | None = None,
        resume: bool = True,
    ) -> None:
        self.folder = Path(output_dir)
        self.ckpt_dir = Path(ckpt_dir)
        self.sources = {"datalist": os.path.abspath(datalist), "dataset_dir": os.path.abspath(dataset_dir)}
        if pretrained is not None:
            self.sources["pretrained"] = os.path.abspath(weights_file(pretrained))
        self.seed = seed
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration:  # a further round of federated learning
            return
        workflow, file = running_workflow(), self.folder / RECORD
        pretrained = self.sources.get("pretrained")
        if workflow is not None and federated_client() is not None:
            self.check_site(workflow)
        record = record_of(workflow, self.sources["datalist"], self.sources["dataset_dir"], self.seed, pretrained)
        goes_on = self.resume and file.is_file() and any(self.folder.glob("checkpoint_iteration=*.pt"))
        starts = read_json(file, list) if goes_on else []
        if workflow is not None:
            self.write(workflow.config_root_path.resolve().parent, without_tracking(workflow.parser.config))
        write_json(file, [*starts, record])

    def check_site(self, workflow: ConfigWorkflow) -> None:
        """Check what a federation's client has not, which runs none of the config's own steps."""
        if any(id in workflow.parser.config for id in TRACKING[:2]):
            raise BadInput(
                "A site of a federation keeps no run of `tracking`, since each round would end it; leave `tracking` "
                "out and see the site's report.html, or track at the server."
            )
        check_ids(without_tracking(workflow.parser.config), declared_ids(workflow.config_root_path))
        if "pretrained" in self.sources:
            raise BadInput(
                "A site of a federation takes its weights from the server, so that `pretrained` would have no effect; "
                "let the server start with the transferred weights."
            )

    def write(self, bundle: Path, config: dict[str, Any]) -> None:
        """Write configs, documentation, licence and modules of a bundle, with the settings of a config."""
        copy_bundle(bundle, self.folder, Path(custom.__file__).parent)
        place = {"output_dir": "$@bundle_root", **self.sources}
        weights = os.path.relpath(self.ckpt_dir, self.folder)
        if weights != "models":
            place["ckpt_dir"] = f"$@bundle_root + '/{weights}'"
        several = parsed(bundle / "configs" / "multi_gpu_train.json").config
        base = parsed(bundle / "configs" / "train.json")
        names = PLACE | several.keys()
        changed = {  # whoever runs the folder's configs may do so from elsewhere
            id: os.path.abspath(value) if id in PATHS and isinstance(value, str) and value[:1] not in "$@%" else value
            for id, value in overrides(config, base.config).items()
            if not id.startswith("+") and not {id, id.partition("#")[0]} & names
        }
        apply(changed, self.folder, place)


def copy_bundle(bundle: Path, folder: Path, modules: Path) -> None:
    """Copy what belongs to a bundle, with a folder of modules as its `custom`, into another folder."""
    if bundle.resolve() == folder.resolve():
        return
    for source in (modules if item == "custom" else bundle / item for item in CONTENT):
        target = folder / source.name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, target, ignore=skip, dirs_exist_ok=True)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def inference_ids(config: dict[str, Any]) -> set[str]:
    """Return the top-level ids that network, loading, preprocessing and inferer of an inference config are made of."""
    found: set[str] = set()
    todo = [name for name in ("network_def", "load_checked", "preprocessing", "inferer") if name in config]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            texts = (value for _, value in walk(config[name]) if isinstance(value, str))
            todo += [ReferenceResolver.split_id(id)[0] for t in texts for id in ReferenceResolver.match_refs_pattern(t)]
    return found


def apply(changed: dict[str, Any], folder: Path, place: dict[str, Any] | None = None) -> None:
    """Make what a training changed the values of a bundle's configs, and its metadata agree with them.

    Args:
        changed: ids and values; inference takes what it must have as the training had it, see `inference_ids`.
        folder: of the bundle.
        place: further ids and values, each for the configs that have it.
    """
    inference = read_json(folder / "configs/inference.json")
    needed = inference_ids(inference)
    applies = {"train": None, "inference": needed, "evaluate": set(), "ensemble": set()}
    for name, ids in applies.items():
        if not (folder / f"configs/{name}.json").is_file():
            continue
        config = ConfigParser(read_json(folder / f"configs/{name}.json"))
        here = {id: v for id, v in changed.items() if ids is None or ReferenceResolver.split_id(id)[0] in ids}
        own = set() if name == "train" else {"output_dir", "dataset_dir"}
        here |= {id: value for id, value in (place or {}).items() if id in config and id not in own}
        config.update(here)
        write_json(folder / f"configs/{name}.json", {id: v for id, v in config.get().items() if id != "_meta_"})
    inference, metadata = (read_json(folder / f"configs/{name}.json") for name in ("inference", "metadata"))
    data = metadata["network_data_format"]
    image, pred = data["inputs"]["image"], data["outputs"]["pred"]
    image["spatial_shape"] = pred["spatial_shape"] = inference["patch_size"]
    target = network_target(inference)
    if not target.endswith("SwinUNETR"):
        (folder / "configs/published.json").unlink(missing_ok=True)  # it changes a Swin UNETR
    library, _, rest = target.partition(".")
    if rest and library not in ("custom", "monai", "torch"):
        with contextlib.suppress(PackageNotFoundError):  # a module of the user's own
            metadata["required_packages_version"][library] = version(library)
    if "labels" in inference:
        channels, labels = inference["in_channels"], inference["labels"]
        classes = {str(number): name for number, name in enumerate(labels)}
        image |= {"num_channels": channels}
        if channels > 1:
            image["channel_def"] = {str(number): f"image {number}" for number in range(channels)}
        pred |= {"num_channels": len(labels), "channel_def": classes}
        metadata["label_classes"] = "one channel, " + ", ".join(f"{number}: {name}" for number, name in classes.items())
        metadata["pred_classes"] = f"{len(labels)} channels of the network, turned into one of ids by argmax"
    write_json(folder / "configs/metadata.json", metadata)
