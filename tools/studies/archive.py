"""Curate a synthetic archive of many small CT series, kill the run twice, and see that nothing is lost or repeated.

    python -m tools.studies.archive OUT_DIR --series 10000

Prints the time, the processors' time and the peak memory of all processes. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from tqdm import tqdm

from tools._cli import ROOT, tool

SLICES, SIDE, MM = 12, 48, 3.0
KILLS = (1 / 3, 2 / 3)  # shares of the volumes that are made when the run is killed
NUMBER = b"10000000"  # stands for the number of the series in the template of a slice


def template(number: int) -> bytes:
    """Return an image without its pixels, the last element, in a file as a scanner would write it."""
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    root, text = "1.2.826.0.1.3680043.10.1", NUMBER.decode()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = f"{root}.{text}.3.{number + 1}"
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.StudyInstanceUID, image.SeriesInstanceUID = f"{root}.{text}.1", f"{root}.{text}.2"
    image.PatientID, image.Modality, image.ImageType = f"P{text}", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.SeriesNumber, image.InstanceNumber, image.AcquisitionNumber = 3, number + 1, 1
    image.Rows, image.Columns, image.SamplesPerPixel, image.PhotometricInterpretation = SIDE, SIDE, 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 0
    image.RescaleSlope, image.RescaleIntercept = 1, -1024
    image.PixelSpacing, image.SliceThickness = [MM, MM], MM
    image.ImageOrientationPatient, image.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-70, -60, MM * number]
    image.PixelData = bytes(2 * SIDE * SIDE)
    stream = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(stream, image, enforce_file_format=True)
    return stream.getvalue()[: -2 * SIDE * SIDE]


def body(seed: int) -> np.ndarray:
    """Return the stored values (slices, rows, columns) of a body with a dozen organs in air."""
    random = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in (SLICES, SIDE, SIDE)), indexing="ij")
    values = np.where(y**2 + x**2 < 0.75, 1060, 24).astype(np.float32)
    for _ in range(12):
        (cz, cy, cx), radius = random.uniform(-0.6, 0.6, 3), random.uniform(0.1, 0.3)
        values[(z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < radius**2] = random.uniform(900, 1300)
    return (values + random.normal(0, 8, values.shape)).clip(0).astype("<u2")


def write_archive(folder: Path, series: int) -> None:
    """Write series of different bodies and patients, those that are missing."""
    templates = [template(number) for number in range(SLICES)]
    for number in tqdm(range(series), "writing", unit="series"):
        own = folder / f"{number // 100:04d}" / f"{number:06d}"
        if (own / f"{SLICES - 1}").exists():
            continue
        own.mkdir(parents=True, exist_ok=True)
        id_ = str(int(NUMBER) + number).encode()
        for index, (start, pixels) in enumerate(zip(templates, body(number), strict=True)):
            (own / str(index)).write_bytes(start.replace(NUMBER, id_) + pixels.tobytes())


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Run a command in a session of its own, and end what is left of that."""
    with open(log, "ab") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def watch(process: subprocess.Popen, out: Path, most: float) -> tuple[float, float]:
    """Wait for the end or so many volumes; return the processors' seconds and the peak memory in GB, of a session."""
    peak = spent = 0
    while process.poll() is None and (not (out / "volumes").exists() or len(os.listdir(out / "volumes")) < most):
        memory = ticks = 0
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == process.pid:  # of its session
                    ticks += sum(map(int, fields[11:15]))  # its own, and those of its children that ended
                    share = Path("/proc", entry, "smaps_rollup").read_text().partition("Pss:")[2]
                    memory += int(share.split()[0])
        peak, spent = max(peak, memory), max(spent, ticks)
        time.sleep(0.5)
    return spent / os.sysconf("SC_CLK_TCK"), peak * 1024 / 1e9


def arguments(add: Callable) -> None:
    add("out", type=Path, metavar="OUT_DIR", help="folder for the archive and the set")
    add("--series", type=int, default=10_000, metavar="N", help="how many (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")


def run(options: argparse.Namespace) -> None:
    """Write the archive, curate it with two kills, and print what that took and whether all is there once."""
    archive, out, log = options.out / "archive", options.out / "set", options.out / "log.txt"
    write_archive(archive, options.series)
    command = [sys.executable, "-m", "tools.curate", str(out), str(archive), "--workers", str(options.workers)]
    seconds = cpu_s = peak_gb = 0.0
    made: dict[str, int] = {}
    for share in (*KILLS, np.inf):
        start = time.monotonic()
        with started(command, log) as process:
            spent, gb = watch(process, out, share * options.series)
        took_s = time.monotonic() - start
        seconds, cpu_s, peak_gb = seconds + took_s, cpu_s + spent, max(peak_gb, gb)
        made = volumes(out) | made if share < 1 else made  # each with the time that it was first seen with
        print(f"{'killed' if share < 1 else 'ended'} after {took_s:.0f} s with {len(volumes(out))} volumes")
    with open(out / "report.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    last = volumes(out)
    again = sum(last.get(name) != stamp for name, stamp in made.items())
    whole = len({row["id"] for row in rows}) == len(rows) == options.series == len(last)
    whole &= all(row["status"] == "used" and row["images"] == str(SLICES) for row in rows)
    print(f"{options.series} series, {options.workers} processes: {seconds / 60:.1f} minutes, of processors "
          f"{cpu_s / 60:.1f}; {peak_gb:.2f} GB of memory at the most")  # fmt: skip
    print(f"each series once and used: {'yes' if whole else 'NO'}; made again after the kills: {again} volumes")


def volumes(out: Path) -> dict[str, int]:
    """Return the volumes of a set, each with the time that it was written."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "volumes").glob("[!.]*.nii.gz")}


main = tool("studies.archive", __doc__, arguments, run, "the same command goes on from here")

if __name__ == "__main__":
    sys.exit(main())
