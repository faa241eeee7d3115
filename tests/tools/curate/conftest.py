"""Runs of curation in the test's own process, which saves starting others for each of many small runs."""

import csv
from pathlib import Path

import nibabel
import pytest

from tools.curate.__main__ import main


@pytest.fixture
def in_process(monkeypatch):
    """Let a run read and make in its own process; test_run.py has runs with processes of their own."""
    monkeypatch.setattr(
        "tools.curate.run.parallel", lambda function, things, *_: ((thing, function(thing)) for thing in things)
    )


class Curated:
    """What a run left in its folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        with open(out / "report.csv", encoding="utf-8") as stream:
            self.rows = [row for row in csv.DictReader(stream) if row["id"]]
        with open(out / "report.csv", encoding="utf-8") as stream:
            self.files = [row for row in csv.DictReader(stream) if not row["id"]]

    def reasons(self) -> list[str]:
        return sorted(row["reason"] for row in self.rows + self.files if row["status"] != "used")

    def used(self) -> list[nibabel.Nifti1Image]:
        return [
            nibabel.load(self.out / "volumes" / f"{row['id']}.nii.gz") for row in self.rows if row["status"] == "used"
        ]


@pytest.fixture
def curated(tmp_path, in_process):
    """Run the tool on folders; what it found."""

    def run(*sources: Path | str, options: tuple[str, ...] = (), status: int | None = None) -> Curated:
        out = tmp_path / "set"
        code = main([str(out), *map(str, sources), "--workers", "1", *options])
        assert code in ((0, 2) if status is None else (status,))
        return Curated(out)

    return run
