import os
import time

import pytest

from tools.studies import damaged


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return damaged.outcomes(damaged.write(tmp_path_factory.mktemp("damaged")))


def test_each_is_loaded_or_refused_in_a_sentence_that_names_the_file(told):
    assert len(told) >= 200
    for _, path, message, _ in told:
        assert not message or (str(path) in message and "\n" not in message and message.rstrip().endswith("."))


@pytest.mark.parametrize(
    "kind",
    ["truncated .nii", "truncated .nii.gz", "zero length", "NaN or infinity", "all voxels equal"]
    + ["2D, 4D or colour", "other format by that name", "link, folder or missing", "random bytes"]
    + ["complex numbers", "singular or senseless affine"],
)
def test_what_is_damaged_is_refused(told, kind):
    loaded = [path.name for other, path, message, _ in told if other == kind and not message]
    assert loaded == []


def test_what_is_sound_is_loaded(told):
    assert [message for kind, _, message, _ in told if kind == "sound, but uncommon" and message] == []


@pytest.fixture
def ordinary_user():
    """Who may not read everything, where the tests are run by the superuser."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    yield
    os.seteuid(user)


def test_what_may_not_be_read_is_refused(told, ordinary_user):
    (path,) = [path for kind, path, *_ in told if kind == "no permission to read"]
    message, reason = damaged.outcome(path)
    assert f"{path} can't be read" in message and reason == "permission denied"


def test_what_the_data_list_tool_accepts_training_loads(told):
    """And so whatever training refuses was found ahead of it."""
    accepted = {str(path): message for _, path, message, reason in told if not reason}
    assert len(accepted) > 5
    assert {path: message for path, message in accepted.items() if message} == {}


def test_the_table_counts(told):
    *_, last = damaged.table(told).splitlines()
    files, refused, listed, loaded = map(int, last.split("|")[2:-1])
    assert last.startswith("| **all** ") and files == len(told) == refused + loaded and listed >= refused


@pytest.mark.parametrize("fault", [lambda path: time.sleep(60), lambda path: os._exit(1)], ids=["hangs", "ends"])
def test_a_file_that_hangs_or_ends_the_process_is_named(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(damaged.Compose, "__call__", lambda self, item: fault(item))
    with pytest.raises(RuntimeError, match=r"a\.nii hangs for 0\.5 s, or ends the process"):
        damaged.outcomes([("kind", tmp_path / "a.nii")], limit_s=0.5)
