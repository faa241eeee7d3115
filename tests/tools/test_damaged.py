import os

import nibabel
import numpy as np
import pytest

from tools import damaged
from tools.datalist import inspect_file


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    with nibabel.imageglobals.LoggingOutputSuppressor(), np.errstate(all="ignore"):
        return damaged.outcomes(damaged.write(tmp_path_factory.mktemp("damaged")))


def test_each_is_loaded_or_refused_in_a_sentence_that_names_the_file(told):
    assert len(told) >= 200
    for _, path, message in told:
        assert not message or (str(path) in message and "\n" not in message and message.rstrip().endswith("."))


@pytest.mark.parametrize(
    "kind",
    ["truncated .nii", "truncated .nii.gz", "zero length", "NaN or infinity", "all voxels equal"]
    + ["2D, 4D or colour", "other format by that name", "link, folder or missing", "random bytes"],
)
def test_what_is_damaged_is_refused(told, kind):
    loaded = [path.name for other, path, message in told if other == kind and not message]
    assert loaded == []


def test_what_is_sound_is_loaded(told):
    assert [message for kind, _, message in told if kind == "sound, but uncommon" and message] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_what_may_not_be_read_is_refused(told):
    assert all(message for kind, _, message in told if kind == "no permission to read")


def test_what_the_data_list_tool_accepts_training_loads(told):
    """And so whatever training refuses was found ahead of it."""
    accepted = {path for _, path, _ in told if not inspect_file(path).reason}
    assert len(accepted) > 5
    assert {str(path): message for _, path, message in told if message and path in accepted} == {}


def test_the_table_counts(told):
    *_, last = damaged.table(told).splitlines()
    assert last.startswith(f"| **all** | {len(told)} |")
