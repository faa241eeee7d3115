"""Write the page to look at: one HTML file with pictures and all, for any browser and without a network."""

import base64
import json
from pathlib import Path

from custom.files import write_text
from tools.curate.run import Row
from tools.curate.state import State

TEMPLATE = Path(__file__).with_name("page.html")
ORDER = ("used", "uncertain", "twin", "refused", "left out", "no image")


def write_page(rows: list[Row], out: Path) -> Path:
    """Write page.html into a set's folder.

    Args:
        rows: what was decided.
        out: the set, whose state has the pictures.
    """
    state = State(out / "state.sqlite")
    pictures: list[str] = []
    entries = []
    for row in sorted(rows, key=lambda row: (ORDER.index(row.status), row.source, row.modality, row.reason, row.id)):
        measures = row.measures
        entry = {
            "id": row.id, "source": row.source, "status": row.status, "reason": row.reason, "modality": row.modality,
            "told": row.told_by, "patient": row.patient, "split": row.split, "images": row.images,
            "twin_of": row.twin_of, "notes": "; ".join(measures.get("notes", ())),
        }  # fmt: skip
        if measures:
            numbers = {"low": f"{measures['lowest']:.5g}", "high": f"{measures['highest']:.5g}"}
            entry |= {"shape": measures["shape"], "spacing": measures["spacing_mm"], **numbers}
        if picture := state.picture(row.id) if row.id else b"":
            entry["picture"] = len(pictures)
            pictures.append(base64.b64encode(picture).decode())
        entries.append(entry)
    state.close()
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition("ROWS")
    between, _, after = after.partition("PICTURES")
    file = out / "page.html"
    write_text(file, "".join((before, _script(entries), between, _script(pictures), after)))
    return file


def _script(content: list) -> str:
    """Return JSON that can't end the script it stands in."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
