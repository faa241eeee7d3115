"""A recipe: the sources of a published pre-training set, what must come out of each, and what it takes.

A recipe is a JSON file:

    {"name": "...", "rules": {"min_slices": 16},
     "sources": [{"name": "luna16", "path": "LUNA16", "modality": "ct", "volumes": {"ct": 888},
                  "archive_gb": 120, "licence": "...", "from": "https://..."}]}

"modality" is for files without DICOM headers and may be left out; so may "rules", "licence" and "from".
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom.errors import BadInput
from custom.files import read_json
from tools.curate.find import Source
from tools.curate.rules import MODALITIES, Rules, check_rules
from tools.curate.run import Row

# How much of an archive one core takes in a second, and how much of its size the volumes have: 9 MB and 0.46, by
# 300 MB of uncompressed CT (three series of 512 x 512 x 200). Archives with much that is not used give less; those
# of compressed files give more, and take longer.
MB_A_SECOND = 9.0
VOLUME_SHARE = 0.5


@dataclass(frozen=True)
class Recipe:
    """Sources, the volumes that must come of each by modality, the size of each archive in GB, and the rules."""

    sources: list[Source]
    volumes: dict[str, dict[str, int]]
    archive_gb: dict[str, float]
    rules: Rules


def read_recipe(file: str, root: str) -> Recipe:
    """Read a recipe.

    Args:
        file: the JSON file.
        root: folder that the paths of its sources start from.

    Raises:
        BadInput: for what is no recipe.
    """
    content = read_json(file)
    sources: list[Source] = []
    volumes: dict[str, dict[str, int]] = {}
    sizes: dict[str, float] = {}
    for number, entry in enumerate(content.get("sources") or [{}]):
        entry = entry if isinstance(entry, dict) else {}
        name, path, expected = entry.get("name"), entry.get("path"), entry.get("volumes")
        if not (
            isinstance(name, str)
            and isinstance(path, str)
            and isinstance(expected, dict)
            and all(key in MODALITIES and isinstance(count, int) for key, count in expected.items())
            and entry.get("modality", "ct") in MODALITIES
        ):
            raise BadInput(
                f'{file}: source {number} needs "name", "path" and "volumes", such as {{"ct": 888}}; a "modality" is '
                f"one of {', '.join(MODALITIES)}."
            )
        if name in volumes:
            raise BadInput(f"{file}: two sources are called {name}.")
        sources.append(Source(name, str(Path(root, path).resolve()), entry.get("modality", "")))
        volumes[name], sizes[name] = expected, float(entry.get("archive_gb") or 0)
    return Recipe(sources, volumes, sizes, check_rules(dict(content.get("rules") or {}), file))


def plan(recipe: Recipe, out: Path, workers: int) -> str:
    """Return what the run will take: a table of the sources, disk and hours, and whether that is there.

    Args:
        recipe: what is asked for.
        out: folder of the set, or where it will be made.
        workers: processes.
    """
    table: list[Sequence[Any]] = [("source", "there", "volumes", "archive GB", "set GB", "hours")]
    total: dict[str, float] = defaultdict(int)  # volumes stay whole
    for source in recipe.sources:
        archive = recipe.archive_gb[source.name]
        volumes = sum(recipe.volumes[source.name].values())
        set_gb, hours = archive * VOLUME_SHARE, archive * 1e3 / MB_A_SECOND / workers / 3600
        for key, value in {"volumes": volumes, "archive": archive, "set_gb": set_gb, "hours": hours}.items():
            total[key] += value
        there = "yes" if Path(source.path).exists() else "no"
        table.append((source.name, there, volumes, f"{archive:.0f}", f"{set_gb:.0f}", f"{hours:.1f}"))
    table.append(
        ("all", "", total["volumes"], *(f"{total[key]:.0f}" for key in ("archive", "set_gb")), f"{total['hours']:.1f}")
    )
    widths = [max(len(str(row[column])) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    folder = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    free = shutil.disk_usage(folder).free / 1e9
    enough = "enough" if free > total["set_gb"] * 1.1 else "NOT enough: make room, or name another folder for the set"
    lines.append(
        f"{free:.0f} GB are free at {folder}: {enough}. Archives (zip, tar) take their size once more meanwhile."
    )
    return "\n".join(lines)


def compare(recipe: Recipe, rows: Sequence[Row]) -> tuple[str, bool]:
    """Return a table of the counts that were asked for and that came out, and whether they are the same."""
    lines, same = [], True
    for source in recipe.sources:
        found = Counter(row.modality for row in rows if row.source == source.name and row.status in ("used", "twin"))
        twins = Counter(row.modality for row in rows if row.source == source.name and row.status == "twin")
        for modality, expected in recipe.volumes[source.name].items():
            right = found[modality] == expected
            same &= right
            left = f", {twins[modality]} of them twins" if twins[modality] else ""
            lines.append(
                f"{source.name} {modality}: {found[modality]} of {expected}{left}{'' if right else '  <- differs'}"
            )
    return "\n".join(lines), same
