"""The studies of curation, on a few small scans."""

import nibabel
import numpy as np

from tests.tools.curate.series import body
from tools.studies import archive, twins


def test_the_series_of_the_synthetic_archive_are_used(tmp_path, curated):
    archive.write_archive(tmp_path / "a", 3)
    found = curated(tmp_path / "a")
    assert [image.shape for image in found.used()] == [(archive.SIDE, archive.SIDE, archive.SLICES)] * 3
    assert len({row["patient"] for row in found.rows}) == 3


def test_a_table_of_copies_that_are_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(twins, "parallel", lambda function, things, *_: [(thing, function(thing)) for thing in things])
    for seed in range(2):
        image = nibabel.Nifti1Image(body(seed, (36, 48, 48)).astype(np.int16) - 1024, np.diag([3.0, 3, 3, 1]))
        image.to_filename(tmp_path / f"scan_{seed}.nii.gz")
    assert twins.main([str(tmp_path), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "2 scans, found" in said
    assert [line.split("|")[2].strip() for line in said.splitlines() if line.startswith("| mirrored")] == ["100%"]
    assert "0 of 1 pairs of scans are taken for near twins" in said
