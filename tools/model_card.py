"""The model card of a package: what the Hugging Face Hub shows and searches."""

import posixpath
import re
from pathlib import Path
from typing import Any

import yaml

from custom.engine.config_check import network_target
from custom.files import read_json, write_text


def metadata_of(folder: Path) -> dict[str, Any]:
    """Return what the Hub reads in the card of a bundle, from the bundle's metadata and licence.

    The names are those of https://huggingface.co/docs/hub/model-cards. `datasets` is left out: it takes ids of the Hub,
    and these data have none.
    """
    metadata = read_json(folder / "configs/metadata.json")
    modality = metadata["network_data_format"]["inputs"]["image"]["modality"]
    segments = metadata["network_data_format"]["outputs"]["pred"]["format"] == "segmentation"
    task = "image-segmentation" if segments else "image-feature-extraction"
    network = network_target(read_json(folder / "configs/inference.json")).rpartition(".")[2].lower()
    apache = "Apache License" in (folder / "LICENSE").read_text()
    card = {
        "license": "apache-2.0" if apache else "other",
        "library_name": "monai",
        "pipeline_tag": task,
        "tags": ["monai", "medical", "3d", *filter(None, [network]), *re.findall(r"\w+", modality.lower())],
    }
    if metadata["eval_metrics"]:
        card["metrics"] = list(metadata["eval_metrics"])
        result = {
            "task": {"type": task, "name": metadata["task"]},
            "dataset": {"type": "validation", "name": "the validation cases of docs/training.json"},
            "metrics": [{"type": name, "value": value} for name, value in metadata["eval_metrics"].items()],
        }
        card["model-index"] = [{"name": metadata["name"], "results": [result]}]
    return card


def write_card(folder: Path) -> None:
    """Write a bundle's `README.md`: what the Hub reads, and `docs/README.md` with links that start one folder above."""

    def moved(link: re.Match) -> str:
        target = link[1]
        return link[0] if re.match(r"\w+:|#|/", target) else f"]({posixpath.normpath(posixpath.join('docs', target))})"

    text = re.sub(r"\]\(([^)\s]+)\)", moved, (folder / "docs/README.md").read_text())
    head = yaml.safe_dump(metadata_of(folder), sort_keys=False, allow_unicode=True)
    write_text(folder / "README.md", f"---\n{head}---\n\n{text}")
