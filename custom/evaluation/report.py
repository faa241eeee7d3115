"""The page of a run, report.html: curves, pictures, cases, settings and provenance in one file without a network."""

import base64
import csv
import html
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.engines import Trainer

from custom.engine.config_check import running_workflow
from custom.engine.run_record import RECORD
from custom.files import read_json, write_text

logger = logging.getLogger(__name__)

PICTURES = 12  # in a page, those of the worst cases first
POINTS = 500  # of a curve
WIDTH, HEIGHT, LEFT = 420, 200, 60  # of a curve's drawing, in pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf")
TITLES = {"val": "Validation", "learning": "Learning rate", "probe": "Probe", "embedding": "Embedding"}  # of curves
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1300px;padding:0 1em;color:#222}
h1{margin-bottom:0}svg,img{max-width:100%}figure{display:inline-block;margin:0 1em 1em 0;vertical-align:top}
div{overflow-x:auto}
table{border-collapse:collapse}td,th{padding:.15em .7em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}figcaption{font-size:90%}"""


class Report:
    """Write report.html into a run's folder: of a training at each validation, of what else is run at its end.

    What it shows is what the folder holds by then, see `page`. A page that can't be written stops no run.

    Args:
        output_dir: the folder.
    """

    def __init__(self, output_dir: str) -> None:
        self.folder = Path(output_dir)
        self.began = 0.0  # seconds
        self.done = 0  # epochs that earlier starts of the run have trained

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        if isinstance(engine, Trainer):
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self)

    def start(self, engine: Engine) -> None:
        if not self.began:  # and what an earlier start has done is loaded
            self.began, self.done = time.time(), engine.state.epoch - 1

    def __call__(self, engine: Engine) -> None:
        if idist.get_rank() > 0:
            return
        state, status = engine.state, "Finished."
        if isinstance(engine, Trainer) and state.epoch < state.max_epochs:
            seconds = (time.time() - self.began) / (state.epoch - self.done) * (state.max_epochs - state.epoch)
            status = f"Epoch {state.epoch} of {state.max_epochs}; about {duration(seconds)} left."
            last = metrics_of(self.folder)[-1:]
            if not any(name.startswith("val_") for line in last for name in line):
                return
        workflow = running_workflow()
        records = [self.folder / RECORD]
        if workflow is not None:
            records.append(workflow.config_root_path.resolve().parent / RECORD)
        record: dict[str, Any] = next((read_json(file, list)[-1] for file in records if file.is_file()), {})
        try:
            write_text(self.folder / "report.html", page(self.folder, status, record))
        except OSError as error:
            logger.warning(f"{self.folder / 'report.html'} can't be written ({error.strerror}).")


def page(folder: Path, status: str, record: Mapping[str, Any]) -> str:
    """Return the HTML of a run's page.

    Args:
        folder: of the run. Curves come from its `metrics.jsonl`, tables from `*_raw.csv`, also in `validation/`, and
            pictures from `*.png`, also in `pictures/`.
        status: a sentence.
        record: of the training, see `record_of`; empty where it is not known.
    """
    files = sorted([*folder.glob("*_raw.csv"), *folder.glob("validation/*_raw.csv")])
    tables = {file.stem.removesuffix("_raw"): table_of(file) for file in files}
    ranked = [row[0] for rows in list(tables.values())[:1] for row in rows[1:]]
    shared = shared_folder([row[0] for rows in tables.values() for row in rows[1:]])
    pictures = sorted([*folder.glob("pictures/*.png"), *folder.glob("*.png")], key=lambda file: -file.stat().st_mtime)
    parts = [curve(name, series) for name, series in curves(metrics_of(folder)).items()]
    parts.append(f"<h2>Pictures</h2>{''.join(map(picture, by_rank(pictures, ranked)[:PICTURES]))}" if pictures else "")
    parts += [
        f"<h2>{escaped(name)}: each case, the worst first</h2>{table(rows, shared)}" for name, rows in tables.items()
    ]
    if record:
        changed = [("id", "value"), *(record.get("overrides") or {}).items()]
        rest = [("of the training", ""), *((k, v) for k, v in record.items() if k not in ("overrides", "defaults"))]
        parts.append(f"<h2>Settings that differ from the default</h2>{table(changed)}")
        parts.append(f"<h2>Provenance</h2>{table(rest)}")
    title = escaped(f"{record.get('bundle') or 'Run'}: {folder.resolve().name}")
    head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    written = time.strftime("%Y-%m-%d %H:%M")
    body = f"<h1>{title}</h1><p>{escaped(status)} Written on {written}.</p>{''.join(parts)}"
    return f"{head}<style>{STYLE}</style></head><body>{body}</body></html>\n"


def escaped(value: Any) -> str:
    return html.escape(value if isinstance(value, str) else json.dumps(value, default=str))


def duration(seconds: float) -> str:
    """Return a time in words of two units at most, such as "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def metrics_of(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def curves(lines: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return the points of each metric over the epochs, in groups of one scale: title, name, (epoch, value)."""
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("epoch", "iteration") and math.isfinite(value):
                kind = name.split("_")[0]
                title = TITLES.get(kind, "Training loss")
                groups.setdefault(title, {}).setdefault(name, []).append((line["epoch"], value))
    return groups


def curve(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return a drawing of metrics over epochs."""
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (y - low) / ((high - low) or 1)
        return round(LEFT + across * (WIDTH - LEFT - 10), 1), round(HEIGHT - 25 - up * (HEIGHT - 40), 1)

    drawn, legend = [], []
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(*point) for point in points[:: max(1, len(points) // POINTS)]]
        drawn.append(f'<polyline fill="none" stroke="{colour}" points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
        drawn += [f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}"/>' for x, y in places if len(places) < 50]
        legend.append(f'<span style="color:{colour}">{escaped(name)} {points[-1][1]:.4g}</span>')
    marks = [(LEFT - 5, 20, "end", f"{high:.3g}"), (LEFT - 5, HEIGHT - 22, "end", f"{low:.3g}")]
    marks += [(LEFT, HEIGHT - 5, "start", f"epoch {left}"), (WIDTH - 10, HEIGHT - 5, "end", str(right))]
    text = "".join(f'<text x="{x}" y="{y}" text-anchor="{side}" font-size="12">{t}</text>' for x, y, side, t in marks)
    frame = f'<path d="M{LEFT} 10V{HEIGHT - 22}H{WIDTH - 8}" fill="none" stroke="#888"/>'
    image = f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">{frame}{"".join(drawn)}{text}</svg>'
    return f"<figure><b>{title}</b><br>{image}<figcaption>{', '.join(legend)}</figcaption></figure>"


def table_of(file: Path) -> list[list[str]]:
    """Return the rows of a `*_raw.csv` of `SegmentationReport`: header, then cases from the worst to the best."""
    header, *rows = csv.reader(file.read_text().splitlines())
    best_last = 1 if "dice" in file.name else -1

    def rank(row: Sequence[str]) -> float:
        mean = float(row[-1])
        return best_last * mean if math.isfinite(mean) else -math.inf

    return [header, *sorted(rows, key=rank)]


def shared_folder(cases: Sequence[str]) -> str:
    """Return the folder, with a "/" behind, that all cases that are whole paths have in common; "" where none is."""
    folders = [os.path.dirname(case) for case in cases if os.path.isabs(case)]
    return os.path.join(os.path.commonpath(folders), "") if folders else ""


def table(rows: Sequence[Sequence[Any]], shared: str = "") -> str:
    """Return rows, the first of which is the header, as a table.

    Args:
        rows: of cells.
        shared: a folder that paths are shown without; the whole one is their tooltip.
    """
    head, *others = rows

    def cell(value: Any) -> str:
        if shared and str(value).startswith(shared):
            return f'<td title="{escaped(value)}">{escaped(value.removeprefix(shared))}</td>'
        try:
            return f'<td class="n">{float(value):.3f}</td>' if isinstance(value, str) else f"<td>{escaped(value)}</td>"
        except ValueError:
            return f"<td>{escaped(value)}</td>"

    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in others)
    return f"<div><table><tr>{''.join(f'<th>{escaped(name)}</th>' for name in head)}</tr>{lines}</table></div>"


def by_rank(pictures: Sequence[Path], cases: Sequence[str]) -> list[Path]:
    """Return pictures in the order of the cases whose scans they are named by; others, newest first, behind."""
    places = {Path(case).name.partition(".")[0]: place for place, case in reversed(list(enumerate(cases)))}
    return sorted(pictures, key=lambda file: places.get(file.stem, len(cases)))


def picture(file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    name = escaped(file.stem)
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
