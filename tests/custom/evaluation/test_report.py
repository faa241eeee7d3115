"""The page of a run, read by a parser; by a browser in tests/integration."""

import html
import json
import re
from html.parser import HTMLParser

import matplotlib.figure
import pytest
from ignite.engine import Engine, Events
from monai.engines import Trainer

from custom.evaluation.report import Report, duration, page

HOSTILE = "</table><script>alert('1')</script>"
RECORD = {
    "bundle": "dae_pretraining", "commit": None, "defaults": {"feature_size": 48},
    "overrides": {"feature_size": 12, "labels": ["air", HOSTILE]},
}  # fmt: skip


class Page(HTMLParser):
    """Tags in the order in which they are, all of which have to be closed; cells of tables; pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.rows, self.pictures, self.shown = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "img":
            self.pictures.append(dict(attributes)["alt"])
            assert dict(attributes)["src"].startswith("data:image/png;base64,")

    def handle_endtag(self, tag):
        assert tag == self.open.pop()

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.shown.append(data)
        if self.open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)


@pytest.fixture
def folder(tmp_path):
    """A run of two validations, with a class and a case whose names are hostile, and one that measured nothing."""
    lines = [
        {"epoch": 1, "iteration": 4, "learning_rate": 0.1, "loss": 2.0, "val_mean_dice": 0.5},
        {"epoch": 2, "iteration": 8, "learning_rate": 0.0, "loss": 1.0, "val_mean_dice": float("nan")},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "validation").mkdir()
    cases = ["good.nii.gz,1.0,0.8,0.9", f'"a,b{HOSTILE}.nii.gz",nan,0.2,0.2', "none.nii.gz,nan,nan,nan"]
    head = "filename,liver,spleen,mean"
    (tmp_path / "validation" / "val_mean_dice_raw.csv").write_text("\n".join([head, *cases]) + "\n")
    distances = ["good.nii.gz,1.0,1.0,1.0", "far.nii.gz,9.0,9.0,9.0"]
    (tmp_path / "validation" / "val_hausdorff_mm_raw.csv").write_text("\n".join([head, *distances]) + "\n")
    (tmp_path / "pictures").mkdir()
    for name in ("good", "other", "far"):
        matplotlib.figure.Figure(figsize=(1, 1)).savefig(tmp_path / "pictures" / f"{name}.png", dpi=20)
    return tmp_path


def test_a_page_has_curves_pictures_cases_settings_and_nothing_from_elsewhere(folder):
    text = page(folder, "Epoch 2 of 9; about 3 h 0 min left.", RECORD)
    found = Page(text)
    assert "script" not in found.tags and not re.search(r"https?:|//", re.sub(r"base64,[^\"]+", "", text))
    assert found.tags.count("polyline") == found.tags.count("svg") == 3  # learning rate, loss, validation
    assert found.pictures[:2] == ["far", "good"] and sorted(found.pictures) == ["far", "good", "other"]
    assert [row[0] for row in found.rows if row[0].endswith(".nii.gz")] == [
        "far.nii.gz", "good.nii.gz", "none.nii.gz", f"a,b{HOSTILE}.nii.gz", "good.nii.gz"
    ]  # fmt: skip
    assert ["feature_size", "12"] in found.rows and ["labels", json.dumps(["air", HOSTILE])] in found.rows
    assert ["commit", "null"] in found.rows and "defaults" not in text
    shown = "".join(found.shown)
    assert "about 3 h 0 min left" in shown and "val_mean_dice 0.5" in shown and "epoch 1" in shown


@pytest.mark.parametrize(
    "cases, shown",
    [
        (["/data/x/a/1.nii.gz", "/data/x/b/1.nii.gz"], ["a/1.nii.gz", "b/1.nii.gz"]),
        (["/data/one.nii.gz"], ["one.nii.gz"]),
        (["/data/x/one.nii.gz", "images/two.nii.gz"], ["one.nii.gz", "images/two.nii.gz"]),
        (["/a.nii.gz", "/b&/c.nii.gz"], ["a.nii.gz", "b&/c.nii.gz"]),
    ],
)
def test_paths_of_cases_are_shown_without_the_folder_that_they_share(cases, shown, tmp_path):
    """The whole path is the cell's tooltip."""
    lines = [f"{case},0.{number}" for number, case in enumerate(cases, 1)]
    (tmp_path / "val_mean_dice_raw.csv").write_text("\n".join(["filename,mean", *lines]) + "\n")
    text = page(tmp_path, "Finished.", {})
    assert ["".join(row[:-1]) for row in Page(text).rows[1:]] == shown
    titles = [html.unescape(title) for title in re.findall(r'title="([^"]*)"', text)]
    assert titles == [case for case in cases if case.startswith("/")]


def test_a_folder_with_nothing_yet_has_a_page(tmp_path):
    assert "Finished." in "".join(Page(page(tmp_path, "Finished.", {})).shown)


@pytest.mark.parametrize(
    ("seconds", "said"), [(20, "20 s"), (125, "2 min"), (7500, "2 h 5 min"), (90000, "1 d 1 h"), (86390, "1 d 0 h")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_a_training_writes_it_at_each_validation_with_the_time_left(folder, caplog):
    class Training(Trainer):
        def __init__(self):
            Engine.__init__(self, lambda engine, batch: None)

    seen, run, lines = [], Training(), (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[0] = '{"epoch": 1, "iteration": 1, "loss": 1.0}\n'  # nothing is validated in the first epoch
    run.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda engine: (folder / "metrics.jsonl").write_text("".join(lines[: engine.state.epoch])),
    )
    Report(str(folder)).attach(run)
    file = folder / "report.html"
    run.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(file.is_file() and file.read_text()))
    Engine.run(run, [0], max_epochs=3)
    assert [bool(text) for text in seen] == [False, True, True]
    assert "Epoch 2 of 3; about 0 s left." in seen[1] and "Finished." in file.read_text()
    file.unlink()
    file.mkdir()  # can't be replaced
    Engine.run(run, [0], max_epochs=3)
    assert "report.html can't be written" in caplog.text
