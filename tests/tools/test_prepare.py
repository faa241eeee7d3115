"""A store is made once, whatever comes between, and what can't be in it is told."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests import preload
from tests.bundles.test_bad_input import spoken
from tests.conftest import PRETRAINING, ROOT, folders, monai_bundle
from tools import prepare
from tools.studies import damaged


def write_list(folder: Path, files, validation=()) -> Path:
    entries = [[{"image": str(file), "modality": "ct"} for file in part] for part in (files, validation)]
    path = folder / "list.json"
    path.write_text(json.dumps(dict(zip(("training", "validation"), entries, strict=True))))
    return path


@pytest.fixture
def scans(tmp_path) -> Path:
    """A data list of three small scans, the last to validate."""
    files = [tmp_path / f"scan{number}.nii" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(damaged.volume(number))
    return write_list(tmp_path, files[:2], files[2:])


def arguments(datalist: Path, store: Path, *more: str) -> list[str]:
    return [str(datalist), str(store), "--bundle", str(PRETRAINING), "--processes", "2", *more]


def made(store: Path) -> dict[str, tuple[int, int]]:
    """The finished files with what tells whether they were written again."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in store.glob("*.b2nd")}


def test_a_killed_run_goes_on_and_loses_nothing(tmp_path, capsys):
    files = [tmp_path / f"scan{number}.nii" for number in range(6)]
    for number, file in enumerate(files):
        voxels = np.random.default_rng(number).integers(0, 1000, (80, 80, 80)).astype(np.int16)
        nibabel.Nifti1Image(voxels, np.eye(4)).to_filename(file)
    datalist, killed, whole = write_list(tmp_path, files[1:], files[:1]), tmp_path / "killed", tmp_path / "whole"
    command = ["tools.prepare", *arguments(datalist, killed)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    run = context.Process(target=preload.run_module, args=(command, ROOT, {}, tmp_path / "out", tmp_path / "err"))
    run.start()
    end = time.monotonic() + 120
    while len(made(killed)) < 2 or not list(killed.glob("*.part")):
        assert run.is_alive() and time.monotonic() < end, (tmp_path / "err").read_text()
        time.sleep(0.001)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for process in (run.pid, *map(int, workers)):
        os.kill(process, signal.SIGKILL)
    run.join()
    before = made(killed)
    assert 2 <= len(before) < 6
    assert prepare.main(arguments(datalist, killed)) == 0
    assert f"{6 - len(before)} prepared, {len(before)} were there, 0 failed" in capsys.readouterr().out
    assert before.items() <= made(killed).items() and not list(killed.glob("*.part"))
    assert prepare.main(arguments(datalist, whole)) == 0
    assert made(killed).keys() == made(whole).keys() and len(made(whole)) == 6
    for name in made(whole):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_the_same_faults_are_found_as_by_training(tmp_path, capsys):
    """And so, by tests/tools/test_damaged.py, no more than by `tools.datalist`."""
    written = [(kind, path) for kind, path in damaged.write(tmp_path / "damaged") if path.is_file()]
    sample = [written[0], *(now for last, now in zip(written, written[1:], strict=False) if last[0] != now[0])]
    told = {str(path): message for _, path, message, _ in damaged.outcomes(sample)}
    (tmp_path / "other.nii").write_bytes(damaged.volume(1))
    datalist = write_list(tmp_path, told, [tmp_path / "other.nii"])
    assert prepare.main(arguments(datalist, tmp_path / "store")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prepare: ") and error.endswith(
        "(With --skip such a case is left out; what was done is kept.)"
    )
    spacing = ("--pixdim_mm", "[2,2,2]")  # as in `damaged.outcome`
    assert prepare.main(arguments(datalist, tmp_path / "store", "--skip", *spacing)) == 0
    output = capsys.readouterr().out
    refused = {message for message in told.values() if message}
    assert {line.removeprefix("Left out: ") for line in output.splitlines() if "Left out" in line} == refused
    assert len(refused) > 10 and f"{len(refused)} failed" in output and output.rstrip().endswith("--bad_cases skip")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pixdim_m", "[2,2,2]"], "Nothing uses the id `pixdim_m`; did you mean `pixdim_mm`?"),
        (["--bundle", "elsewhere"], "elsewhere is no bundle's folder, it has no configs/train.json."),
        (["--train#stored", "1"], "Nothing uses the id `train#stored`"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_written(scans, tmp_path, capsys, more, said):
    assert prepare.main(arguments(scans, tmp_path / "store", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare: ") and said in error and not made(tmp_path / "store")


def test_an_id_without_a_value_is_told(scans, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare.main(arguments(scans, tmp_path / "store", "--pixdim_mm"))
    assert "ids come with their values, such as --pixdim_mm '[2,2,2]', got --pixdim_mm." in capsys.readouterr().err


def test_a_bundle_without_a_store_and_a_folder_that_cannot_be_are_told(scans, tmp_path, capsys):
    assert prepare.main(arguments(scans, scans)) == 2
    assert f"The store {scans} can't be written (File exists)" in capsys.readouterr().err
    empty = tmp_path / "bundle" / "configs"
    empty.mkdir(parents=True)
    plain = {"preprocessing": {"_target_": "Compose", "transforms": []}}
    (empty / "train.json").write_text(json.dumps({"datalist": "", "store": "", "train": plain, "validate": plain}))
    assert prepare.main([str(scans), str(tmp_path / "store"), "--bundle", str(empty.parent)]) == 2
    assert "reads nothing from a store" in capsys.readouterr().err


def test_two_runs_keep_out_of_one_store(scans, tmp_path, capsys):
    store = tmp_path / "store"
    reader, writer = os.pipe()
    other = os.fork()  # a lock is a process's
    if not other:
        with prepare.alone(store):
            os.write(writer, b".")
            signal.pause()
    os.read(reader, 1)
    (store / "other.part").touch()
    assert prepare.main(arguments(scans, store)) == 2
    assert f"Another run is at work in the store {store}" in capsys.readouterr().err
    assert (store / "other.part").exists() and not made(store)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert prepare.main(arguments(scans, store)) == 0
    assert not (store / "other.part").exists() and len(made(store)) == 3


def test_a_worker_that_is_killed_is_told(scans, tmp_path, capsys):
    last = "--loading#transforms#3"
    assert prepare.main(arguments(scans, tmp_path / "store", last, "$lambda data: os.kill(os.getpid(), 9)")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "prepare: A process was killed, perhaps for want of memory; the same command goes on, with fewer --processes."
    )
    assert prepare.main(arguments(scans, tmp_path / "store")) == 0


def test_a_full_disk_is_told_and_with_room_the_same_command_goes_on(scans, small_disk, capsys):
    disk, resize = small_disk
    resize(100_000)  # of some 60 kB each
    assert prepare.main(arguments(scans, disk / "store", "--skip")) == 2
    assert f"The store {disk}/store can't be written" in capsys.readouterr().err.splitlines()[-1]
    resize(10**6)
    assert prepare.main(arguments(scans, disk / "store")) == 0
    assert len(made(disk / "store")) == 3 and not list((disk / "store").glob("*.part"))


def test_training_names_what_is_damaged_or_stale(scans, tmp_path):
    store = tmp_path / "store"
    run = {"datalist": scans, "store": store, "max_epochs": 1, **folders(tmp_path / "run")}
    assert prepare.main(arguments(scans, store)) == 0
    assert "was put into the store" in spoken(monai_bundle("train", **run, pixdim_mm="[1,1,1]"))
    os.utime(tmp_path / "scan1.nii", (0, 0))
    assert "scan1.nii has changed since it was put into the store" in spoken(monai_bundle("train", **run))
    assert prepare.main(arguments(scans, store)) == 0
    file = next(store.glob("scan0-*.b2nd"))
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    assert f"{file} is damaged: chunk 0, which starts at voxel [0, 0, 0]" in spoken(monai_bundle("train", **run))
