"""Verify bundles, or packages of them: files, sums, metadata, configs, network, TorchScript, and the packaged test.

    python -m tools.verify [BUNDLE or ZIP ...]

One line each, `ok` or `FAILED` with a sentence; all bundles by default. Nothing is downloaded, and `custom` is that of
the bundle: this folder is all that is needed of the repository, by `python path/to/tools verify ZIP`. Configs and
modules of a bundle are code, which is run: verify only what you trust.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import stat
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any

import jsonschema
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_net_in_out
from monai.data import load_net_with_metadata
from monai.networks import convert_to_torchscript

from tools._cli import bundles, tool

CONFIGS = ("train", "evaluate", "inference", "multi_gpu_train")
REQUIRED = (
    *("LICENSE", "docs/README.md", "custom/__init__.py", "configs/logging.conf", "configs/metadata.json"),
    *(f"configs/{name}.json" for name in CONFIGS),
)
OVERLAYS = {
    **dict.fromkeys(("ensemble", "onnx"), "inference"),
    **dict.fromkeys(("evaluate", "multi_gpu_train", "published", "few_labels", "field", "resenc"), "train"),
}
# What monai.bundle or its consumers read by name.
ENTRY_POINTS = {"imports", "initialize", "run", "finalize", "val_interval", "train#trainer", "postprocessing"}
# What train and inference each have for themselves, though by the same name.
OWN = {"imports", "initialize", "run", "dataset_dir", "output_dir", "ckpt_dir", "network"}
# The smallest network and patch, for what holds at any size.
SMALL: dict[str, Any] = {"feature_size": 12, "patch_size": [64, 32, 32]}
SUMS = "SHA256SUMS"


def files(folder: Path) -> dict[str, Path]:
    """Return all files of a folder by their names in it, without the caches of Python and of the Hugging Face Hub."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    caches = {"__pycache__", ".cache"}
    return {name.as_posix(): path for name, path in found.items() if not caches & set(name.parts)}


def digest(path: Path, kind: str = "sha256") -> str:
    """Return a file's checksum."""
    return hashlib.new(kind, path.read_bytes()).hexdigest()


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Let `custom` be that of a bundle, whatever is installed or loaded already, and put back what was there."""

    def take() -> dict:
        names = [name for name in sys.modules if name.partition(".")[0] == "custom"]
        return {name: sys.modules.pop(name) for name in names}

    before, caching = take(), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = caching
        sys.path.remove(str(folder))
        take()
        sys.modules.update(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let a command line print its own lines alone: until its end, nothing below an error is logged, nor a warning."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def unpack(package: Path, folder: Path) -> Path:
    """Unpack a package, unless something in it would land outside of its one folder.

    Returns:
        the bundle's folder.

    Raises:
        ValueError: for a file that is no zip or damaged, and for a member that is a link, has an absolute path or `..`
            in it, or lies in a second folder; nothing is written then, except before a damaged member.
    """
    try:
        with zipfile.ZipFile(package) as archive:
            members = archive.infolist()
            if not members:
                raise ValueError("it is empty.")
            top = PureWindowsPath(members[0].filename).parts[:1]
            for member in members:
                path = PureWindowsPath(member.filename)  # knows both kinds of separators, and drives
                if path.anchor or ".." in path.parts:
                    raise ValueError(f"{member.filename} would be unpacked outside of the bundle's folder.")
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(f"{member.filename} is a link, which could lead anywhere.")
                if path.parts[:1] != top or (len(path.parts) == 1 and not member.is_dir()):
                    raise ValueError(f"{member.filename} lies outside of the bundle's folder {''.join(top)}.")
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise ValueError(f"it is no zip, or damaged: {error}.") from error
    return folder.joinpath(*top)


def check_files(folder: Path) -> None:
    """Raise ValueError for a file that is missing."""
    for name in REQUIRED:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing.")


def large_files(folder: Path) -> dict[str, str]:
    """Return SHA-256 of the files that are to be downloaded, by their names, as `large_files.yml` gives them."""
    file = folder / "large_files.yml"
    listed = ConfigParser.load_config_file(str(file))["large_files"] if file.is_file() else []
    return {entry["path"]: entry["hash_val"] for entry in listed}


def check_sums(folder: Path) -> None:
    """Raise ValueError for a file of a package that was changed, is missing, or was added."""
    if not (folder / SUMS).is_file():
        return
    sums = [line.split("  ", 1) for line in (folder / SUMS).read_text().splitlines()]
    expected, found = {name: value for value, name in sums}, files(folder)
    found.pop(SUMS)
    later = {name: value for name, value in large_files(folder).items() if name in found}
    for name, value in sorted((expected | later).items()):
        if name not in found:
            raise ValueError(f"{name} is missing, though {SUMS} lists it.")
        if digest(found[name]) != value:
            raise ValueError(f"{name} was changed: its SHA-256 is not that of {SUMS} or large_files.yml.")
    added = found.keys() - expected.keys() - later.keys()
    if added:
        raise ValueError(f"{min(added)} is not listed in {SUMS}; it was added after packaging.")


def check_metadata(folder: Path) -> None:
    """Raise ValueError for metadata that do not fit MONAI's schema, or lack the version in the changelog."""
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    schema = json.loads(Path(__file__).with_name("metadata_schema.json").read_text())
    try:
        jsonschema.validate(metadata, schema)
    except jsonschema.ValidationError as error:
        reason = f"{error.json_path}: {error.message}"
        raise ValueError(f"configs/metadata.json does not fit MONAI's schema, {reason}.") from error
    if metadata["version"] != next(iter(metadata["changelog"]), None):
        raise ValueError(f"configs/metadata.json: version {metadata['version']} is not the changelog's first.")


def based(config: Path) -> list[str]:
    """Return the files of a config: it alone, or after the one that it is an overlay on."""
    base = OVERLAYS.get(config.stem)
    return [str(config.with_stem(base)), str(config)] if base else [str(config)]


def check_ids(folder: Path) -> None:
    """Raise ValueError for an id that nothing uses, or an argument that a component does not have."""
    from custom.engine.config_check import check_ids, unused_ids  # of the bundle

    for config in sorted(folder.glob("configs/*.json")):
        try:
            json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"configs/{config.name} is no JSON: {error}.") from error
        # A network of another library is a choice: where that is missing, nobody has made it.
        if config.stem == "metadata" or (config.stem == "resenc" and not find_spec("dynamic_network_architectures")):
            continue
        parser = ConfigParser()
        parser.read_config(based(config))
        # An overlay with a `run` of its own may leave ids of its base unused, which are checked with the base.
        base = ConfigParser.load_config_file(based(config)[0]).keys() if config.stem in OVERLAYS else set()
        content = {name: value for name, value in parser.get().items() if name != "_meta_"}
        try:
            for name in sorted(unused_ids(content) - ENTRY_POINTS - base):
                raise ValueError(f"Nothing uses the id `{name}`.")
            check_ids(content, declared=ENTRY_POINTS | base)
        except ValueError as error:
            raise ValueError(f"configs/{config.name}: {error}") from error


def check_agreement(folder: Path) -> None:
    """Raise ValueError where train, inference and metadata say different things about the same."""
    read = ConfigParser.load_config_file
    train, inference, metadata = (read(folder / f"configs/{n}.json") for n in ("train", "inference", "metadata"))
    for name in sorted((train.keys() & inference.keys()) - OWN):
        if train[name] != inference[name]:
            raise ValueError(f"configs/train.json and inference.json differ in `{name}`, which they share.")
    data = metadata["network_data_format"]
    shown = {
        "spatial_shape of the input": (data["inputs"]["image"]["spatial_shape"], inference["patch_size"]),
        "spatial_shape of the output": (data["outputs"]["pred"]["spatial_shape"], inference["patch_size"]),
    }
    if "labels" in inference:
        classes = {str(number): name for number, name in enumerate(inference["labels"])}
        shown["channel_def of the output"] = (data["outputs"]["pred"]["channel_def"], classes)
    for name, (said, is_) in shown.items():
        if said != is_:
            raise ValueError(f"configs/metadata.json: the {name} is {said}, but {is_} in configs/inference.json.")


def check_workflows(folder: Path) -> None:
    """Raise ValueError for a property that MONAI's workflows are asked for, and train or inference do not have."""
    none: dict[str, dict[str, Any]] = {
        "train": {"train#dataset#data": [{}], "validate#dataset#data": [{}], "cache_rate": 0},
        "inference": {"dataset#data": [{}]},
    }
    for kind, data in none.items():
        config = folder / "configs" / f"{kind}.json"
        with tempfile.TemporaryDirectory() as scratch:
            paths = {"bundle_root": str(folder), "output_dir": scratch, "ckpt_dir": scratch}
            unseeded: dict[str, Any] = {"initialize": []}  # the seed would be that of the whole process
            small = {**SMALL, **data, **paths, **unseeded}
            workflow = ConfigWorkflow(str(config), workflow_type=kind, logging_file=False, **small)
            workflow.initialize()
            try:
                wrong = workflow.check_properties()
            except KeyError as error:
                raise ValueError(f"configs/{kind}.json: {error.args[0]}") from error
        if wrong:
            raise ValueError(f"configs/{kind}.json: {wrong[0]} is not where MONAI's workflows look for it.")


def small_network(folder: Path) -> torch.nn.Module:
    """Make a bundle's network, small and in eval mode, with weights that follow from their names."""
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    parser.update(SMALL)
    return fill(parser.get_parsed_content("network_def")).eval()


def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Set all parameters to numbers that follow from their names, the same with every version of torch and NumPy."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(parameter.shape) * 0.05
            parameter.copy_(torch.from_numpy(values + ("norm" in name and name.endswith("weight"))))
    return network


def check_network(folder: Path) -> None:
    """Raise ValueError for a network that does not take or give what metadata say."""
    metadata, config = (str(folder / "configs" / f"{name}.json") for name in ("metadata", "inference"))
    shape = {"_meta_#network_data_format#inputs#image#spatial_shape": SMALL["patch_size"]}
    try:
        verify_net_in_out("network_def", meta_file=metadata, config_file=config, device="cpu", **SMALL, **shape)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"configs/metadata.json is not about the network of inference.json: {reason}") from error


def check_torchscript(folder: Path) -> None:
    """Raise ValueError for a network whose TorchScript, made by tracing, gives something else than it does."""
    network, file = small_network(folder), io.BytesIO()
    image, other = torch.rand(2, 1, network_channels(folder), *SMALL["patch_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        convert_to_torchscript(network, file, inputs=[image], use_trace=True, check_trace=False)
    file.seek(0)
    with torch.no_grad():
        if not torch.equal(torch.jit.load(file)(other), network(other)):
            raise ValueError("the network of configs/inference.json gives something else when traced to TorchScript.")


def network_channels(folder: Path) -> int:
    """Return how many channels a bundle's network takes."""
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    return metadata["network_data_format"]["inputs"]["image"]["num_channels"]


def predict(folder: Path, network: torch.nn.Module, overrides: dict) -> np.ndarray:
    """Give a bundle's network the test scan, as inference does, and return every fourth voxel of its answer.

    Shapes:
        returns (C, D, H, W), of the preprocessed scan and a quarter of its size.
    """
    scan, channels = str(folder / "sample/scan.nii.gz"), network_channels(folder)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    parser.update({**overrides, "bundle_root": str(folder), "dataset_dir": [[scan] * channels]})
    if channels == 1:
        parser["dataset_dir"] = scan
    image = parser.get_parsed_content("dataset")[0]["image"][None]
    with torch.no_grad():
        answer = parser.get_parsed_content("inferer")(image, network)
    return torch.as_tensor(answer)[0, :, ::4, ::4, ::4].numpy()


def sample_networks(folder: Path, overrides: dict) -> dict[str, torch.nn.Module]:
    """Return the networks that the packaged test is for, by name: those of the weights, or one with filled weights."""
    weights = {file.name: file for file in folder.glob("models/model.*")}
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    parser.update(overrides)
    network = parser.get_parsed_content("network_def").eval()
    networks = {"the network": network}
    if "model.pt" in weights:
        network.load_state_dict(torch.load(weights["model.pt"], map_location="cpu", weights_only=True))
        networks = {"models/model.pt": network}
    else:
        fill(network)
    if "model.ts" in weights:
        networks["models/model.ts"], _, _ = load_net_with_metadata(str(weights["model.ts"]), map_location="cpu")
    return networks


def replay(folder: Path) -> None:
    """Raise ValueError where a package's networks answer its test scan otherwise than when it was packaged."""
    if not (folder / "sample").is_dir():
        return
    test = json.loads((folder / "sample/sample.json").read_text())
    expected = np.load(folder / "sample/expected.npy")
    absent = [name for name in large_files(folder) if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{absent[0]} is yet to be downloaded: python -m monai.bundle download_large_files {folder}")
    for name, network in sample_networks(folder, test["overrides"]).items():
        answer = predict(folder, network, test["overrides"])
        if answer.shape != expected.shape:
            raise ValueError(f"{name} answers sample/scan.nii.gz with {answer.shape}, not {expected.shape}.")
        difference = float(np.abs(answer - expected).max())
        if not difference <= test["tolerance"]:
            raise ValueError(
                f"{name} answers sample/scan.nii.gz with values up to {difference:.2g} off sample/expected.npy; "
                f"{test['tolerance']} is allowed."
            )


CHECKS = (
    *(check_files, check_sums, check_metadata, check_ids, check_agreement, check_workflows),
    *(check_network, check_torchscript, replay),
)


def verify(target: Path) -> None:
    """Verify a bundle's folder or a package.

    Raises:
        ValueError: that says in a sentence what is wrong.
    """
    with contextlib.ExitStack() as stack:
        if not target.exists():
            raise ValueError("there is no such file or folder.")
        if target.is_file():
            target = unpack(target, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        folder = target.resolve()
        stack.enter_context(modules_of(folder))
        for check in CHECKS:
            check(folder)


def arguments(add: Callable) -> None:
    add("targets", type=Path, nargs="*", metavar="BUNDLE or ZIP", help="all of bundles/ by default")


@quiet()
def run(options: argparse.Namespace) -> int:
    """Verify, and print a line for each; return 1 when one has failed."""
    failed = False
    for target in options.targets or bundles():
        try:
            verify(target)
            print(f"{target}: ok")
        except Exception as error:  # what a broken bundle raises can be anything
            failed = True
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            print(f"{target}: FAILED: {kind}{' '.join(str(error).split())[:500]}")
    return int(failed)


main = tool("verify", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
