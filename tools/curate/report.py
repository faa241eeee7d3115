"""Write what a run decided: the data list, a table with a line for each series, and a summary on the terminal."""

import csv
import io
import math
import shlex
from collections import Counter, defaultdict
from pathlib import Path

from custom.errors import BadInput
from custom.files import write_json, write_text
from tools.curate.rules import MODALITIES
from tools.curate.run import Row

COLUMNS = (
    *("id", "status", "reason", "modality", "confidence", "told_by", "source", "patient", "split", "format", "images"),
    *("shape", "spacing_mm", "lowest", "highest", "twin_of", "notes"),
)
NEXT = (
    "python -m monai.bundle run --config_file {0}/configs/train.json --bundle_root {0} --datalist {1} --dataset_dir {2}"
)


def write_datalist(rows: list[Row], out: Path) -> Path:
    """Write the data list of what is used; paths are relative to the set's folder."""
    lists: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    for row in sorted(rows, key=lambda row: row.id):
        if row.status == "used":
            image = f"volumes/{row.id}.nii.gz"
            lists[row.split].append({"image": image, "modality": row.modality, "patient": row.patient})
    count = Counter(row.modality for row in rows if row.status == "used")
    about = ", ".join(f"{count[name]} {name}" for name in MODALITIES if count[name])
    file = out / "datalist.json"
    write_json(file, {"name": "curated", "description": f"curated for pre-training: {about}", **lists})
    return file


def write_table(rows: list[Row], out: Path) -> Path:
    """Write one line for each series or volume, and one for all files of a source that are no images of one kind."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=lambda row: (row.source, row.status, row.reason, row.id)):
        measures = row.measures
        cells = {
            **vars(row),
            "confidence": f"{row.confidence:.2f}" if row.told_by else "",
            "shape": "x".join(map(str, measures.get("shape", ()))),
            "spacing_mm": "x".join(f"{mm:g}" for mm in measures.get("spacing_mm", ())),
            "lowest": f"{measures['lowest']:g}" if measures else "",
            "highest": f"{measures['highest']:g}" if measures else "",
            "notes": "; ".join(measures.get("notes", ())),
        }
        writer.writerow([cells[name] for name in COLUMNS])
    file = out / "report.csv"
    write_text(file, table.getvalue())
    return file


def summary(rows: list[Row]) -> str:
    """Return a table of what is used by source and modality, and how often each reason was met."""
    used = Counter((row.source, row.modality) for row in rows if row.status == "used")
    names = [name for name in MODALITIES if any(key[1] == name for key in used)]
    table = [("source", *names, "used", "uncertain", "twins", "left out", "refused")]
    for source in sorted({row.source for row in rows}):
        own = [row for row in rows if row.source == source]
        count = Counter(row.status for row in own)
        cells = [used[source, name] for name in names]
        others = (count["used"], count["uncertain"], count["twin"], count["left out"], count["refused"])
        table.append((source, *map(str, (*cells, *others))))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
    kinds: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        if row.reason and row.status != "twin":
            kinds[row.status][row.reason.partition(":")[0]] += row.images if not row.id else 1
    for status in ("uncertain", "left out", "refused", "no image"):
        for reason, times in kinds[status].most_common():
            lines.append(f"{status.capitalize()}, {reason}: {times}")
    size = sum(math.prod(row.measures["shape"]) for row in rows if row.status == "used" and row.measures)
    lines.append(f"{sum(row.status == 'used' for row in rows)} volumes are used, {size / 1e9:.3g} billion voxels.")
    return "\n".join(lines)


def next_step(out: Path) -> str:
    """Return the command that trains on the set."""
    return NEXT.format("bundles/dae_pretraining", shlex.quote(str(out / "datalist.json")), shlex.quote(str(out)))


def check_used(rows: list[Row]) -> None:
    """Raise `BadInput` where nothing can be trained on."""
    if not any(row.status == "used" for row in rows):
        raise BadInput(f"None of the {len(rows)} series and files can be used; report.csv says why of each.")
