"""Build the packages that are downloaded: a zip of each bundle, with checksums and the index that the model zoo has.

    python -m tools.package [BUNDLE ...] [--output DIR]

A package is the bundle's folder with `custom/` in it, a model card, a small test for tools.verify, and SHA-256 sums.
The same bundle always gives the same bytes. The folder of a training (its --output_dir) is a bundle too: its package
has the weights, also as TorchScript, and docs/training.json says where they come from.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from monai.bundle import ConfigParser

from custom.engine.run_bundle import PLACE, copy_bundle
from custom.engine.run_record import RECORD, bundle_name, holds_path, portable
from custom.errors import BadInput
from custom.files import read_json, replacing, write_json, write_text
from tools import model_card, phantom
from tools._cli import ROOT, bundles, tool
from tools.verify import SMALL, SUMS, digest, files, modules_of, predict, quiet, sample_networks

BUNDLES = ROOT / "bundles"


def metrics(run: Path, folder: Path) -> dict[str, Any]:
    """Return the lines of a run's metrics at its best validation, the weights' own, and at its end."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = ConfigParser(read_json(folder / "configs/train.json"))
    key = next(iter(config["validate#key_metric"]))
    better = operator.gt
    if "validate#evaluator#metric_cmp_fn" in config:
        better = config.get_parsed_content("validate#evaluator#metric_cmp_fn")
    validated = [line for line in lines if key in line]
    best = functools.reduce(lambda a, b: b if better(b[key], a[key]) else a, validated) if validated else None
    return {"best": best, "last": lines[-1]}


def is_training(folder: Path) -> bool:
    """Return whether a bundle is that of a training.

    Raises:
        BadInput: for one of a training that has not saved its weights yet.
    """
    if not (folder / RECORD).is_file():
        return False
    for name in ("models/model.pt", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} is no finished training, it has no {name}; go on with it first.")
    return True


def forget_place(folder: Path, record: dict[str, Any]) -> None:
    """Give the ids of a training's folders and files back the values that its bundle had.

    Folders of the machine that trained are nobody's business, nor are names of patients.
    """
    file = folder / "configs/train.json"
    config = read_json(file)
    for id, value in record["defaults"].items():
        if id in PLACE or holds_path(config.get(id)):
            config[id] = value
    write_json(file, config)


def forget_source(folder: Path, bundle: Path, metadata: dict[str, Any]) -> None:
    """Take out of a package what its bundle says of data that it was not trained on, unless the run says it anew."""
    about = bundle / "configs/metadata.json"
    terms, own = (place / "docs/data_license.txt" for place in (folder, bundle))
    if about.is_file() and metadata["data_source"] == read_json(about)["data_source"]:
        metadata["data_source"] = "scans of whoever trained it, see docs/training.json"
    if own.is_file() and terms.is_file() and digest(terms) == digest(own):
        write_text(terms, "The scans are not part of this bundle. Ask whoever trained it for their licence.\n")


def add_weights(run: Path, folder: Path) -> None:
    """Put the weights of a training into its package, as they are and as TorchScript, with what they come from.

    Raises:
        BadInput: for weights that can't be exported.
    """
    record = read_json(run / RECORD, list)[-1]
    forget_place(folder, record)
    measured = metrics(run, folder)
    write_json(folder / "docs/training.json", {**portable(record), "metrics": measured})
    validated = {name.removeprefix("val_"): value for name, value in (measured["best"] or {}).items() if "val_" in name}
    metadata = read_json(folder / "configs/metadata.json")
    metadata["eval_metrics"] = {name: value for name, value in validated.items() if value is not None}
    cases = folder / "datalist.json"
    if not cases.is_file() or record["datalist_sha256"] != digest(cases):
        forget_source(folder, BUNDLES / bundle_name(run), metadata)
    write_json(folder / "configs/metadata.json", metadata)
    models = folder / "models"
    models.mkdir()
    shutil.copyfile(run / "models/model.pt", models / "model.pt")
    # Tracing fixes the patch size, which metadata have from the inferer; scripting a Swin UNETR fails. In a process of
    # its own, since the names in a TorchScript file count what was traced before.
    export = [sys.executable, "-m", "monai.bundle", "ckpt_export", "network_def", "--filepath", "models/model.ts"]
    export += ["--config_file", "configs/inference.json", "--use_trace", "True"]
    done = subprocess.run(export, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise BadInput(f"{run / 'models/model.pt'} can't be exported: {done.stderr.strip().splitlines()[-1]}")
    strip(models / "model.ts")


def strip(script: Path) -> None:
    """Take out of a TorchScript file what tells where it was made: paths of sources, and an id that depends on them."""
    with zipfile.ZipFile(script) as archive:
        members = {
            name: archive.read(name)
            for name in archive.namelist()
            if not name.endswith((".debug_pkl", ".data/serialization_id"))
        }
    zip_up(members, script)


def add_sample(folder: Path) -> None:
    """Put a small test into a bundle: a synthetic scan, what the network answers, and by how much that may differ.

    The network has the package's weights or, where it has none, is small and has weights that follow from their names.
    """
    sample = folder / "sample"
    sample.mkdir()
    inference, metadata = (read_json(folder / f"configs/{name}.json") for name in ("inference", "metadata"))
    is_ct = "CT" in metadata["network_data_format"]["inputs"]["image"]["modality"]
    draw = phantom.abdomen_ct if is_ct else phantom.fetal_head
    scan, *_ = draw(0, phantom.MIN_SHAPE)
    # Its spacing is the network's, so that it stays as small as it is.
    spacing_mm = np.diag([*(inference.get("pixdim_mm") or (1, 1, 1)), 1])
    nibabel.Nifti1Image(scan, spacing_mm).to_filename(sample / "scan.nii.gz")
    overrides = {} if (folder / "models").is_dir() else SMALL
    network = next(iter(sample_networks(folder, overrides).values()))
    expected = predict(folder, network, overrides)
    np.save(sample / "expected.npy", expected)
    # Another processor or version of torch rounds otherwise, by less than this; other weights are off by far more.
    tolerance = float(f"{1e-3 * np.abs(expected).max():.2g}")
    write_json(sample / "sample.json", {"overrides": overrides, "tolerance": tolerance})


def move_out(folder: Path, prefix: str, output: Path, url: str) -> None:
    """Move the weights out of a bundle and name them in `large_files.yml`, for MONAI's `download_large_files`."""
    entries = "large_files:\n"
    for path in sorted((folder / "models").iterdir()):
        out = output / f"{prefix}_{path.name}"
        entries += f'  - path: "models/{path.name}"\n    url: "{url.rstrip("/")}/{out.name}"\n'
        entries += f'    hash_val: "{digest(path)}"\n    hash_type: "sha256"\n'
        shutil.move(path, out)
    (folder / "large_files.yml").write_text(entries)


def zip_up(members: dict[str, bytes], file: Path) -> None:
    """Write a zip with nothing but names and contents in its bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)  # dated 1980, and not compressed: zlib's versions differ
            member.create_system = 3  # Unix
            member.external_attr = 0o100644 << 16
            archive.writestr(member, content)


def build(bundle: Path, output: Path, weights_url: str | None = None) -> Path:
    """Build the package of a bundle, or of a training, which is a bundle with weights.

    Args:
        bundle: its folder.
        output: folder to write to.
        weights_url: where the weights will be, to leave them out of the zip.

    Returns:
        the zip.

    Raises:
        BadInput: for a folder that is no bundle, or an unfinished training.
    """
    if not (bundle / "configs/metadata.json").is_file():
        raise BadInput(f"{bundle} is no bundle, it has no configs/metadata.json.")
    trained, name = is_training(bundle), bundle_name(bundle.resolve())
    if weights_url is not None and not trained:
        raise BadInput(f"--weights_url is for the weights of a training, and {bundle} is none.")
    prefix = f"{name}_v{read_json(bundle / 'configs/metadata.json')['version']}"
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, name)
        folder.mkdir()
        copy_bundle(bundle, folder, bundle / "custom")
        with modules_of(folder):
            if trained:
                add_weights(bundle, folder)
            model_card.write_card(folder)
            add_sample(folder)
        if weights_url is not None:
            move_out(folder, prefix, output, weights_url)
        write_sums(folder, files(folder))
        package = output / f"{prefix}.zip"
        members = {f"{name}/{file}": path.read_bytes() for file, path in files(folder).items()}
        with replacing(package) as part:
            zip_up(members, part)
    return package


def write_sums(folder: Path, named: dict[str, Path]) -> None:
    """Write the SHA-256 of files, by their names in a folder, as `sha256sum -c` reads them."""
    (folder / SUMS).write_text("".join(f"{digest(path)}  {name}\n" for name, path in sorted(named.items())))


def index(packages: list[Path], output: Path, source: str) -> None:
    """Write the packages into `model_info.json` and their SHA-256 into `SHA256SUMS`, beside those that stand there."""
    file = output / "model_info.json"
    content = read_json(file) if file.is_file() else {}
    for package in packages:
        url = f"{source.rstrip('/')}/{package.name}" if source else package.name
        content[package.stem] = {"checksum": digest(package, "sha1"), "source": url}
    write_json(file, dict(sorted(content.items())))
    released = {path.name: path for name in content for path in output.glob(f"{name}[._]*")}
    write_sums(output, released)


def arguments(add: Callable) -> None:
    add("bundles", nargs="*", metavar="BUNDLE", help="name or folder, also of a training; all of bundles/ by default")
    add("--output", type=Path, metavar="DIR", default=Path("dist"), help="folder to write to (%(default)s)")
    add("--source", default="", metavar="URL", help="where the zips will be, for model_info.json")
    add("--weights_url", metavar="URL", help="where the weights will be: they are left out of the zip, written beside "
        "it, and named in its large_files.yml")  # fmt: skip


@quiet()
def run(options: argparse.Namespace) -> None:
    """Build the packages and print the next command.

    Raises:
        BadInput: for wrong arguments, and see `build`.
    """
    folders = [BUNDLES / name if (BUNDLES / name).is_dir() else Path(name) for name in options.bundles] or bundles()
    packages = [build(folder, options.output, options.weights_url) for folder in folders]
    index(packages, options.output, options.source)
    for package in packages:
        print(f"{package}: {package.stat().st_size / 1e6:.1f} MB")
    print(f"Next: python -m tools.verify {' '.join(map(str, packages))}")


main = tool("package", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
