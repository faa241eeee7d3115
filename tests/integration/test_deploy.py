"""The example application, run by MONAI Deploy's App SDK, gives what `monai.bundle run` gives."""

import json
import shutil
import subprocess
import time

import nibabel
import numpy as np
import pytest

from custom.files import read_json
from tests.conftest import ROOT, monai_bundle
from tests.integration.conftest import BTCV, FETA, free_port, python_of
from tools import verify


def dicom(*arguments) -> None:
    """Run tests/integration/dicom.py in the environment of the application."""
    command = [python_of("deploy"), ROOT / "tests/integration/dicom.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def application(scan, output, bundle) -> subprocess.CompletedProcess:
    """Run the application as documented."""
    command = [python_of("deploy"), "examples/deploy", "-i", scan, "-o", output, "-m", bundle]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def bundles(packages, tmp_path_factory):
    """The folder of a training, and that of an unpacked package."""
    folder = tmp_path_factory.mktemp("unpacked")
    return {name: place if place.is_dir() else verify.unpack(place, folder) for name, place in packages.items()}


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A CT and an MR series with unequal pixel spacing."""
    folder = tmp_path_factory.mktemp("series")
    for modality in ("CT", "MR"):
        dicom("draw", folder / modality, modality)
    return folder


def by_bundle(bundle, scan, output) -> nibabel.Nifti1Image:
    """Segment a NIfTI file with `monai.bundle run`."""
    values = read_json(bundle / "configs/inference.json")
    sizes = {name: values[name] for name in ("feature_size", "patch_size", "overlap")}
    done = monai_bundle("inference", bundle=bundle, dataset_dir=scan, output_dir=output, **sizes)
    assert done.returncode == 0, done.stderr
    return nibabel.load(output / f"{scan.name.removesuffix('.nii.gz')}_seg.nii.gz")


def check_seg(scan, bundle, folder) -> np.ndarray:
    """Segment a series with the application and, as NIfTI, with the bundle; compare, and return the label map."""
    done = application(scan, folder / "seg", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    file, report = sorted((folder / "seg").glob("*.dcm"), key=lambda file: file.stat().st_size, reverse=True)
    dicom("nifti", scan, folder / "scan.nii.gz")
    dicom("read", file, folder / "scan.nii.gz", folder / "seg.npz")
    found = np.load(folder / "seg.npz")
    label = np.asarray(by_bundle(bundle, folder / "scan.nii.gz", folder).dataobj)
    assert np.count_nonzero(found["label"] != label) == 0
    metadata = read_json(bundle / "configs/metadata.json")
    assert found["names"].tolist() == read_json(bundle / "configs/inference.json")["labels"][1:]
    assert found["model"].tolist()[:3] == [metadata[name] for name in ("authors", "name", "version")]
    assert found["model"][3] and found["series"]
    said = results(folder / "seg")
    voxel_ml = np.abs(np.linalg.det(nibabel.load(folder / "scan.nii.gz").affine)) / 1000
    names = {name: np.count_nonzero(label == number) for number, name in enumerate(found["names"].tolist(), 1)}
    volumes_ml = {name: count * voxel_ml for name, count in names.items() if count}
    assert said["volumes_ml"] == pytest.approx(volumes_ml, abs=1e-3, rel=1e-4) and said["seg"] in said["evidence"]
    return label


def results(folder) -> dict:
    """What the SEG and the SR in a folder say."""
    dicom("results", folder, folder.parent / "results.json")
    return json.loads((folder.parent / "results.json").read_text())


@pytest.mark.parametrize("bundle, modality", [(BTCV, "CT"), (FETA, "MR")])
def test_a_series_of_unequal_pixel_spacing(bundle, modality, bundles, series, tmp_path):
    """Turned, too, and with a series number that is empty; some segments are absent."""
    label = check_seg(series / modality, bundles[bundle.name], tmp_path)
    assert 1 < len(np.unique(label)) <= 14
    assert nibabel.load(tmp_path / "scan.nii.gz").header.get_zooms() == pytest.approx((2.5, 4, 5))


# SNOMED: https://dicom.nema.org/medical/dicom/current/output/chtml/part16/sect_CID_7151.html and, for sides, CID 244.
CODES = {
    "spleen": ["78961009"],
    "right kidney": ["64033007", "24028007"],
    "left adrenal gland": ["23451007", "7771000"],
    "inferior vena cava": ["64131007"],
    "portal and splenic veins": ["91723000"],  # no term of its own: an anatomical structure
}


def test_codes_sides_and_the_choice_of_a_series_from_a_server_and_back(bundles, tmp_path):
    """Three series come by C-STORE, the thick one is segmented, and its results go by C-STORE to another server."""
    dicom("study", tmp_path / "study")
    net = [python_of("deploy"), "-m", "pynetdicom"]
    ports = [free_port(), free_port()]
    inbox, archive = tmp_path / "inbox", tmp_path / "archive"
    servers = [
        subprocess.Popen(
            [*net, "storescp", str(port), "-od", folder], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        for port, folder in zip(ports, (inbox, archive), strict=True)
    ]
    try:
        send([*net, "storescu", "-r", "127.0.0.1", str(ports[0]), tmp_path / "study"])
        assert len(list(inbox.iterdir())) == 30
        done = application(inbox, tmp_path / "seg", bundles[BTCV.name])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Series Description of selected DICOM Series for inference: thick" in done.stdout + done.stderr
        send([*net, "storescu", "127.0.0.1", str(ports[1]), "-r", tmp_path / "seg"])
    finally:
        for server in servers:
            server.kill()
            server.wait()
    said = results(archive)
    assert {name: said["codes"][name] for name in CODES} == CODES and said["volumes_ml"]
    assert said["seg"] in said["evidence"] and len(said["evidence"]) == 11


def test_a_series_of_orthanc_and_its_results_back(orthanc, bundles, series, tmp_path):
    """As documented: found and fetched by C-FIND and C-GET, and stored by C-STORE."""
    net, server = [python_of("deploy"), "-m", "pynetdicom"], ["127.0.0.1", str(orthanc.port)]
    send([*net, "storescu", "-r", *server, series / "CT"])
    (found,) = orthanc.series("CT")
    level = ["-k", "QueryRetrieveLevel=SERIES", "-k", f"SeriesInstanceUID={found['SeriesInstanceUID']}"]
    (tmp_path / "inbox").mkdir()
    send([*net, "getscu", *server, *level, "-od", tmp_path / "inbox"])
    assert len(list((tmp_path / "inbox").iterdir())) == 12
    done = application(tmp_path / "inbox", tmp_path / "seg", bundles[BTCV.name])
    assert done.returncode == 0, done.stdout + done.stderr
    send([*net, "storescu", "-r", *server, tmp_path / "seg"])
    assert len(orthanc.series("SEG")) == len(orthanc.series("SR")) == 1
    assert len(orthanc.ask("/studies")) == 1  # the results are filed with the scan


def send(command) -> None:
    """Send files to a server, once it answers."""
    for _ in range(60):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(done.stdout + done.stderr)


def test_rules_that_choose_the_thin_series_of_a_kernel_or_none(bundles, tmp_path):
    """In MONAI Deploy's own form, in the file beside the application."""
    dicom("study", tmp_path / "study")
    shutil.copytree(ROOT / "examples/deploy", tmp_path / "deploy")
    file = tmp_path / "deploy/rules.json"
    rules = read_json(file)
    conditions = {"SliceThickness": [0.5, 2], "ConvolutionKernel": "B30"}
    for more, said in ((conditions, "for inference: thin"), ({"BodyPartExamined": "head"}, "but no series that fits")):
        rules["selections"][0]["conditions"] |= more
        file.write_text(json.dumps(rules))
        command = [python_of("deploy"), tmp_path / "deploy", "-i", tmp_path / "study", "-o", tmp_path / "seg"]
        command += ["-m", bundles[BTCV.name]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert said in done.stdout + done.stderr


def test_the_real_ct(bundles, real_data, tmp_path):
    """Its UIDs were taken out; it is compressed with JPEG 2000."""
    label = check_seg(real_data / "ct_dicom" / "series", bundles[BTCV.name], tmp_path)
    assert label.shape == (512, 512, 20) and len(np.unique(label)) > 1


def test_nifti_to_nifti(bundles, series, tmp_path):
    """Without a model.ts: the SDK then takes the network of the config and model.pt."""
    bundle = tmp_path / FETA.name
    shutil.copytree(bundles[FETA.name], bundle)
    (bundle / "models/model.ts").unlink()
    dicom("nifti", series / "MR", tmp_path / "scan.nii.gz")
    scan = nibabel.load(tmp_path / "scan.nii.gz")
    scan.set_qform(scan.affine @ np.diag([-1, -1, 1, 1]), 2)
    nibabel.save(scan, tmp_path / "scan.nii.gz")
    done = application(tmp_path / "scan.nii.gz", tmp_path / "app", bundle)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (
        nibabel.load(tmp_path / "app/scan_seg.nii.gz"),
        by_bundle(bundle, tmp_path / "scan.nii.gz", tmp_path),
    )
    assert np.array_equal(found.dataobj, expected.dataobj)
    assert found.get_data_dtype() == np.uint8
    for form in ("get_sform", "get_qform"):
        (mine, code), (own, its) = (getattr(image, form)(coded=True) for image in (found, scan))
        assert np.allclose(mine, own, atol=1e-4) and code == its


def empty(folder, series, bundle):
    """No DICOM."""
    (folder / "notes.txt").write_text("nothing")
    return folder, bundle


def other(folder, series, bundle):
    """MR for a bundle that takes CT."""
    return series / "MR", bundle


def gap(folder, series, bundle):
    """A series without one of its images."""
    shutil.copytree(series / "CT", folder / "series")
    (folder / "series/5.dcm").unlink()
    return folder / "series", bundle


def two(folder, series, bundle):
    """CT of two studies."""
    for name in ("a", "b"):
        dicom("draw", folder / name, "CT")
    return folder, bundle


def no_weights(folder, series, bundle):
    """A bundle as it is in the repository."""
    return series / "CT", BTCV


def no_bundle(folder, series, bundle):
    """A folder that is none."""
    return series / "CT", folder


def damaged(folder, series, bundle):
    """A file that is no NIfTI."""
    (folder / "a.nii.gz").write_text("nothing")
    return folder / "a.nii.gz", bundle


def several(folder, series, bundle):
    """Two NIfTI files."""
    for name in "ab":
        (folder / f"{name}.nii.gz").write_text("nothing")
    return folder, bundle


def flat(folder, series, bundle):
    """An image of two dimensions."""
    nibabel.Nifti1Image(np.zeros((8, 8), np.float32), np.eye(4)).to_filename(folder / "a.nii.gz")
    return folder / "a.nii.gz", bundle


def elsewhere(folder, series, bundle):
    """Spacing in doubt; beside what is no scan, and in a suffix of capitals."""
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(9, 9, 9)), np.eye(4))
    image.header["pixdim"][3] = 3
    (folder / "A.NII").write_bytes(image.to_bytes())
    for name in ("A.NII.md5", "._A.nii"):
        (folder / name).write_text("nothing")
    return folder, bundle


def channels(folder, series, bundle):
    """A bundle that takes four contrasts at once."""
    shutil.copytree(bundle, folder / bundle.name)
    file = folder / bundle.name / "configs/metadata.json"
    about = read_json(file)
    about["network_data_format"]["inputs"]["image"]["num_channels"] = 4
    file.write_text(json.dumps(about))
    return series / "CT", folder / bundle.name


@pytest.mark.parametrize(
    "make, expected",
    [
        (empty, "has no DICOM files, the bundle takes CT Image Storage; name another with --input."),
        (other, "has MR Image Storage only, the bundle takes CT Image Storage; name another with --input."),
        (gap, "of 11 images is no volume: between its images are 5 to 10 mm; some are missing, or it is several"),
        (two, "has CT Image Storage of 2 studies; name a folder with one."),
        (no_weights, "has no models/model.ts or models/model.pt; download one with weights."),
        (no_bundle, "is no bundle, it has no configs/metadata.json; name another with --model."),
        (damaged, "is it a whole NIfTI file?"),
        (several, "has 2 NIfTI files; name one with --input."),
        (flat, "is not a 3D volume but has 1 channels of 8x8;"),
        (elsewhere, "has two spacings in its header: 1 x 1 x 1 mm by its affine, 1 x 1 x 3 mm by its pixdim"),
        (channels, "takes scans of 4 channels, this application has one."),
    ],
)
def test_bad_input(make, expected, bundles, series, tmp_path):
    scan, bundle = make(tmp_path, series, bundles[BTCV.name])
    done = application(scan, tmp_path / "seg", bundle)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and expected in last
    assert not list((tmp_path / "seg").glob("*"))


def test_the_application_s_requirements_are_those_that_are_tested():
    tested = (ROOT / "tests/integration/deploy.txt").read_text().splitlines()
    assert set((ROOT / "examples/deploy/requirements.txt").read_text().splitlines()) <= set(tested)
