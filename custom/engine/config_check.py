"""What happens first in every `run` of a bundle: its config is checked, before any scan is read."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

import custom
from custom.engine.process import change_process
from custom.engine.run_record import TRACKER
from custom.errors import BadInput
from custom.text import did_you_mean

PATHS = {
    *("bundle_root", "dataset_dir", "datalist", "output_dir", "ckpt_dir"),
    *("checkpoint", "checkpoints", "pretrained", "store", "probe"),
}


def _is_number(value: Any, low: float, high: float = math.inf, whole: bool = False) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def _are_names(value: Any) -> bool:
    names = value if isinstance(value, list) else []
    return len(names) > 1 and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


# Ids, whether a value fits them, and what does.
VALUES: list[tuple[set[str], Callable[[Any], bool], str]] = [
    ({"labels"}, _are_names, "a list of two names or more, all different, background first"),
    (
        {"pixdim_mm"},
        lambda value: isinstance(value, list) and len(value) in (0, 3) and all(_is_number(s, 0.1) for s in value),
        "three spacings in mm, such as [1.5, 1.5, 2.0], or [] for those of each scan",
    ),
    (
        {"in_channels", "feature_size", "batch_size", "crops_per_volume"}
        | {"max_epochs", "max_iterations", "val_interval", "probe_interval"},
        lambda value: _is_number(value, 1, whole=True),
        "a whole number from 1 on",
    ),
    ({"num_workers", "val_pictures"}, lambda value: _is_number(value, 0, whole=True), "a whole number from 0 on"),
    ({"seed"}, lambda value: _is_number(value, 0, 2**32 - 1, whole=True), "a whole number from 0 to 2^32 - 1"),
    (
        {"learning_rate", "weight_decay", "warmup_epochs", "warmup_iterations", "contrastive_weight", "noise_variance"},
        lambda value: _is_number(value, 0),
        "a number from 0 on",
    ),
    ({"overlap"}, lambda value: _is_number(value, 0, 0.99), "a share from 0 to 0.99"),
    (
        {"cache_rate", "max_bad_share", "least_transferred", "local_mask_ratio", "token_mask_ratio"}
        | {"flip_probability", "rotation_probability", "intensity_probability"},
        lambda value: _is_number(value, 0, 1),
        "a share from 0 to 1",
    ),
    (
        {"modality"},
        lambda value: isinstance(value, str) and value.islower(),
        "a name in small letters, such as ct or t2",
    ),
    ({"resume", "strict", "amp", "full_resolution_skip"}, lambda value: value in (True, False), "True or False"),
]


def check_config(patch_size: Sequence[int], output_dir: str) -> None:
    """Check the config that is being run; the first expression of each `run`.

    From here on errors of a user are told in one sentence, and more is changed in this process, see `change_process`.

    Args:
        patch_size: in voxels, what the network will see.
        output_dir: folder of the run, where the traceback of an error is kept.

    Raises:
        BadInput: for an id that nothing uses, a value that an id can't have, an argument that a component does not
            have, a patch that the network can't take, or another `custom` than the bundle's, see `check_custom`.
    """
    workflow = running_workflow()
    # Its first `initialize` expression and MONAI have put them there.
    bundle = [] if workflow is None else [workflow.parser.get("bundle_root"), str(workflow.config_root_path.parent)]
    change_process(str(output_dir), bundle)
    check_custom()
    if workflow is not None:
        use_own_tracker(workflow.parser.config)
        check_paths(workflow.parser.config)
        check_values(workflow.parser.config)
        check_ids(workflow.parser.config, declared_ids(workflow.config_root_path))
    check_patch_size(patch_size)


def check_custom() -> None:
    """Check that the `custom` of this process is the bundle's: the first one that is imported stays.

    Raises:
        BadInput: for a bundle with other modules, such as a package of another version.
    """
    workflow, here = running_workflow(), Path(custom.__file__).resolve().parent
    own = None if workflow is None else workflow.config_root_path.resolve().parent / "custom"
    if own is not None and own.is_dir() and own.resolve() != here and _modules(own) != _modules(here):
        raise BadInput(
            f"This process has loaded the modules in {here}, and the bundle has others in {own}; give --bundle_root "
            f"{own.parent}, and run bundles of different versions in processes of their own."
        )


def _modules(folder: Path) -> dict[Path, bytes]:
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.py")}


def use_own_tracker(config: dict[str, Any]) -> None:
    """Let this project's handler take the place of those that MONAI's `--tracking mlflow` has added to a config.

    Raises:
        BadInput: where MLflow is not installed.
    """
    for _, value in walk(config):
        if isinstance(value, dict) and value.get("_target_") == "MLFlowHandler":
            if not find_spec("mlflow"):
                raise BadInput("--tracking mlflow needs MLflow: pip install mlflow.")
            value["_target_"] = TRACKER  # in place, since the config is parsed already


def check_paths(config: dict[str, Any]) -> None:
    """Raise `BadInput` for a file or folder whose name the command line or MONAI has turned into something else."""
    for name in PATHS & config.keys():
        for id, value in walk(config[name], name):
            if isinstance(value, int | float) and not isinstance(value, bool):
                raise BadInput(f"`{id}` is the number {value}; write a folder of that name as ./{value} or in full.")
            if isinstance(value, str) and value.startswith(("$", "@")) and Path(value).exists():
                raise BadInput(f"`{id}` is {value}, which MONAI takes for an expression; write it as ./{value}.")
            if not isinstance(value, str) or value.startswith(("$", "@", "%")):
                continue
            if "::" in value and not Path(value).exists():
                raise BadInput(
                    f"`{id}` is {value}; a path in a config can't have # or :: in it, since MONAI makes :: of a #, as "
                    f"in an id; rename the file or folder."
                )


def check_values(config: dict[str, Any]) -> None:
    """Raise `BadInput` for a value that makes no sense and that nothing else refuses in a sentence, or at all.

    MONAI takes the letters of a text for labels, and a spacing of -2 or of nothing for that of the scan.
    """
    for names, fits, words in VALUES:
        for name in names & config.keys():
            value = config[name]
            if not (value is None or isinstance(value, str) and value.startswith(("$", "@", "%"))) and not fits(value):
                raise BadInput(f"`{name}` is {value!r}, and should be {words}.")
    size = config.get("feature_size")
    if network_target(config).endswith("SwinUNETR") and isinstance(size, int) and size % 12:
        raise BadInput(f"`feature_size` is {size}, and should be a multiple of 12 for a Swin UNETR.")


def network_target(config: dict[str, Any]) -> str:
    """Return what makes the network of a config, or in pre-training the one inside; "" where an expression does."""
    network = config.get("network_def")
    while isinstance(network, dict) and "network" in network:
        network = network["network"]
    return str(network.get("_target_", "")) if isinstance(network, dict) else ""


def running_workflow() -> ConfigWorkflow | None:
    """Return the workflow that is being run; None where a program drives the parser itself.

    MONAI hands a component nothing of the config around it, so the workflow is found among the callers.
    """
    client = federated_client()
    if client is not None and client.train_workflow is not None:
        return client.train_workflow
    return next((caller for caller in _callers() if isinstance(caller, ConfigWorkflow)), None)


def federated_client() -> Any:
    """Return the client of federated learning that trains or evaluates, a MONAI `ClientAlgo`; None if none does."""
    module = sys.modules.get("monai.fl.client")
    return None if module is None else next((c for c in _callers() if isinstance(c, module.MonaiAlgo)), None)


def _callers() -> Iterator[Any]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals.get("self")
        frame = frame.f_back


def declared_ids(folder: Path) -> set[str]:
    """Return the ids of all configs in a folder, such as "train" and "train#dataset"."""
    declared = set()
    for file in set(folder.glob("*.json")) - {folder / "metadata.json"}:
        for key, value in ConfigParser.load_config_file(file).items():
            parts = ReferenceResolver.split_id(key.lstrip("+"))
            declared |= {parts[0], "#".join(parts[:2])}
            if isinstance(value, dict):
                declared |= {f"{key}#{child}" for child in value}
    return declared


def walk(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each id of a config, nested ones included, with its value; the config itself first, under `path`."""
    yield path, config
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from walk(value, f"{path}#{key}" if path else str(key))


def unused_ids(config: dict[str, Any]) -> set[str]:
    """Return the ids that nothing in a config refers to: those of the top level, and those in a group of it.

    A group is a dictionary that nothing refers to as a whole, such as `train`.
    """
    strings = (value for _, value in walk(config) if isinstance(value, str))
    referred = [
        ReferenceResolver.split_id(id) for string in strings for id in ReferenceResolver.match_refs_pattern(string)
    ]
    unused = config.keys() - {parts[0] for parts in referred}
    for name, value in config.items():
        if isinstance(value, dict) and "_target_" not in value and [name] not in referred:
            unused |= {f"{name}#{key}" for key in value.keys() - {parts[1] for parts in referred if parts[0] == name}}
    return unused


def check_ids(config: dict[str, Any], declared: set[str]) -> None:
    """Raise `BadInput` for a misspelt id, which `monai.bundle` adds to a config in silence.

    An id is wrong when no config file declares it and nothing refers to it, or when it is no argument of its component.

    Args:
        config: the content of all config files with the overrides of the command line.
        declared: ids of the config files.
    """
    config = {name: value for name, value in config.items() if name != "_meta_"}
    for name in sorted(unused_ids(config) - declared):
        hint = did_you_mean(name, declared) or "; the ids are listed in the bundle's docs/README.md."
        raise BadInput(f"Nothing uses the id `{name}`{hint}")
    locator = ConfigParser().locator
    for path, value in walk(config):
        target = value.get("_target_") if isinstance(value, dict) else None
        if isinstance(target, str) and not target.startswith(("$", "@")):
            component: Any = locate(ConfigComponent(config=dict(value), id=path, locator=locator).resolve_module_name())
            if component is None:
                package, _, rest = target.partition(".")
                missing = rest and package and not find_spec(package)
                hint = f"install its package {package}, or correct the name." if missing else "is it misspelt?"
                raise BadInput(f"`{path}#_target_` is {target}, which can't be imported; {hint}")
            accepted = arguments_of(component)
            for name in value.keys() - accepted if accepted else ():
                if not (name.startswith("_") and name.endswith("_")):
                    raise BadInput(f"`{path}#{name}` is no argument of {target}{did_you_mean(name, accepted) or '.'}")


def arguments_of(component: Callable) -> set[str]:
    """Return the names of the arguments that a component takes by its signature; none where that does not tell.

    Where a class of this project passes on what it does not know, those of its bases count too.
    """
    names: set[str] = set()
    for part in inspect.getmro(component) if inspect.isclass(component) else [component]:
        function = vars(part).get("__init__") if inspect.isclass(part) else part
        if function is None:
            continue
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # written in C
            return set()
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return names
        if not getattr(part, "__module__", "").startswith("custom."):
            return set()
    return set()


def check_patch_size(patch_size: Sequence[int]) -> None:
    """Raise `BadInput` for a patch that a Swin UNETR can't take."""
    # One voxel at the bottleneck has no variance, so that instance norm refuses 32x32x32.
    sides = patch_size if isinstance(patch_size, list | tuple) else []
    if len(sides) != 3 or any(size < 32 or size % 32 for size in sides) or list(sides) == [32] * 3:
        raise BadInput(
            f"--patch_size {patch_size} does not fit the network, which halves a patch five times: give three "
            f"multiples of 32 that are not all 32, such as [96, 96, 96]."
        )
