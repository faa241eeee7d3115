"""Packages as they are built, served over HTTP, downloaded with MONAI and used where this repository is not."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import nibabel
import pytest
import torch
import yaml
from monai.bundle import download_large_files, load, verify_metadata, verify_net_in_out
from monai.bundle.scripts import _get_git_release_url
from monai.data import load_net_with_metadata
from packaging.requirements import Requirement

from custom.engine.run_bundle import apply
from custom.files import read_json
from tests.conftest import (
    BUNDLES,
    PRETRAINING,
    ROOT,
    SEGMENTATION,
    SMALL,
    folders,
    metrics,
    monai_bundle,
    overrides,
    segmentation_network,
)
from tools import model_card, package, verify

BTCV, FETA = SEGMENTATION
LABELS = ["background", "csf", "grey", "white", "ventricles", "cerebellum", "deep grey", "brainstem"]
TAG = "/someone/some-fork/releases/download/v0.1.0"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A package without weights."""
    return package.build(BTCV, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, labelled_lists):
    """A training with another size, spacing and names of classes than the bundle's."""
    folder = tmp_path_factory.mktemp("run")
    more = {"datalist": labelled_lists["fetal"], "max_epochs": 2, "val_interval": 1, "pixdim_mm": [4, 4, 4]}
    done = monai_bundle("train", bundle=FETA, labels=LABELS, learning_rate=0.01, seed=5, **more, **folders(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A local HTTP server in GitHub's layout: the folder of a release, and its address."""
    root = tmp_path_factory.mktemp("server")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=root)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        folder = root / TAG.strip("/")
        folder.mkdir(parents=True)
        yield folder, f"http://127.0.0.1:{httpd.server_port}{TAG}"
        httpd.shutdown()


@pytest.fixture(scope="module")
def released(run_dir, server):
    """A package with the weights of the training, on the server."""
    folder, url = server
    assert package.main([str(run_dir), "--output", str(folder), "--source", url]) == 0
    return folder / f"{FETA.name}_v0.1.0.zip"


@pytest.fixture(scope="module")
def downloaded(released, server, foreign_python, tmp_path_factory):
    """The folder of the package after MONAI has downloaded it, by the command line."""
    folder = tmp_path_factory.mktemp("downloaded")
    options = ["--name", FETA.name, "--bundle_dir", folder, "--url", f"{server[1]}/{released.name}"]
    command = [foreign_python, "-m", "monai.bundle", "download", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / FETA.name


def test_a_package_has_the_bundle_and_nothing_else(tmp_path):
    """Not what runs leave in its folder, nor what someone put there."""
    bundle = tmp_path / BTCV.name
    shutil.copytree(BTCV, bundle)
    for name in ("eval/a", "runs/a/run.json", "models/model.pt", "custom/__pycache__/a.pyc", "scans.json", ".env"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("")
    with zipfile.ZipFile(package.build(bundle, tmp_path / "dist")) as archive:
        names = {Path(name).relative_to(BTCV.name).as_posix() for name in archive.namelist()}
    source = {name for name in verify.files(BTCV) if not name.startswith("models/")}
    custom = {path.relative_to(ROOT).as_posix() for path in (ROOT / "custom").rglob("*.py")}
    sample = {f"sample/{name}" for name in ("scan.nii.gz", "expected.npy", "sample.json")}
    assert names == source - {"custom"} | custom | sample | {verify.SUMS, "README.md"}


def test_the_same_bundle_gives_the_same_bytes(plain, tmp_path):
    """In another folder, at another time, with other permissions."""
    bundle = tmp_path / "elsewhere" / BTCV.name
    shutil.copytree(BTCV, bundle)
    for path in bundle.rglob("*"):
        os.utime(path, (0, 0))
        path.chmod(0o700)
    before = os.umask(0o077)
    try:
        again = package.build(bundle, tmp_path)
    finally:
        os.umask(before)
    assert again.read_bytes() == plain.read_bytes()


@pytest.fixture(scope="module")
def large(run_dir, server):
    """The same package once more, whose weights lie beside it."""
    folder, url = server
    out = folder / "large"
    assert package.main([str(run_dir), "--output", str(out), "--weights_url", f"{url}/large"]) == 0
    return out / f"{FETA.name}_v0.1.0.zip"


def test_weights_give_the_same_bytes_too(released, large, tmp_path):
    one, other = (verify.files(verify.unpack(file, tmp_path / name)) for name, file in (("a", released), ("b", large)))
    beside = {f"models/{name}": next(large.parent.glob(f"*_{name}")) for name in ("model.pt", "model.ts")}
    for name in one.keys() - {"SHA256SUMS"}:
        assert (beside | other)[name].read_bytes() == one[name].read_bytes()
    assert other.keys() | beside.keys() == one.keys() | {"large_files.yml"}


def test_the_test_in_a_package_is_small(plain, released):
    for file in (plain, released):
        with zipfile.ZipFile(file) as archive:
            assert sum(member.file_size for member in archive.infolist() if "/sample/" in member.filename) < 80_000


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_the_sums_are_those_of_sha256sum(released, tmp_path):
    for folder in (released.parent, verify.unpack(released, tmp_path)):
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "OK" in done.stdout, done.stderr


def test_the_index_has_the_model_zoo_s_form(released, server, tmp_path):
    """https://github.com/Project-MONAI/model-zoo, models/model_info.json: SHA-1, and the address of the zip."""
    name = f"{FETA.name}_v0.1.0"
    entry = {"checksum": hashlib.sha1(released.read_bytes()).hexdigest(), "source": f"{server[1]}/{name}.zip"}
    assert json.loads((released.parent / "model_info.json").read_text()) == {name: entry}
    # The next bundle's entry comes beside it.
    shutil.copytree(released.parent, tmp_path / "dist")
    (tmp_path / "dist" / "other_v1.0.0.zip").write_text("")
    package.index([tmp_path / "dist" / "other_v1.0.0.zip"], tmp_path / "dist", "")
    index = json.loads((tmp_path / "dist" / "model_info.json").read_text())
    assert index[name] == entry and index["other_v1.0.0"]["source"] == "other_v1.0.0.zip"
    sums = (tmp_path / "dist" / "SHA256SUMS").read_text()
    assert f"  {name}.zip\n" in sums and "  other_v1.0.0.zip\n" in sums


def test_what_the_training_overrode_is_in_the_package(released, run_dir, tmp_path):
    folder = verify.unpack(released, tmp_path)
    changed = {"labels": LABELS, "pixdim_mm": [4, 4, 4], "patch_size": [64, 32, 32], "feature_size": 12}
    changed["overlap"] = read_json(run_dir / "configs/train.json")["overlap"]
    learnt = {"learning_rate": 0.01, "seed": 5, "max_epochs": 2, "val_interval": 1, "num_workers": 0, "val_pictures": 0}
    learnt["crops_per_volume"] = 1
    for name, more in {"inference": {}, "train": learnt}.items():
        before, after = (read_json(path / f"configs/{name}.json") for path in (FETA, folder))
        network = {"network_def": {**before["network_def"], "window_size": 4}}
        assert after == before | changed | network | more  # and no folder of the machine
    data = read_json(folder / "configs/metadata.json")["network_data_format"]
    assert data["inputs"]["image"]["spatial_shape"] == data["outputs"]["pred"]["spatial_shape"] == [64, 32, 32]
    assert list(data["outputs"]["pred"]["channel_def"].values()) == LABELS
    weights = torch.load(folder / "models/model.pt", weights_only=True)
    segmentation_network(classes=len(LABELS)).load_state_dict(weights)


def test_a_package_says_where_its_weights_come_from(released, run_dir, labelled_lists, tmp_path):
    folder = verify.unpack(released, tmp_path)
    training, lines = read_json(folder / "docs/training.json"), metrics(run_dir)
    assert training["metrics"] == {"best": max(lines, key=lambda line: line["val_mean_dice"]), "last": lines[-1]}
    assert training["datalist_sha256"] == hashlib.sha256(labelled_lists["fetal"].read_bytes()).hexdigest()
    assert (training["seed"], training["overrides"]["learning_rate"]) == (5, 0.01)
    assert training["versions"]["torch"] == torch.__version__
    # Nothing of the machine that trained, nor of that which packaged.
    content = released.read_bytes()
    assert not [text for text in (run_dir, ROOT, labelled_lists["fetal"].parent, tmp_path) if bytes(text) in content]


def test_several_channels_and_the_best_of_a_pre_training(tmp_path):
    for bundle in (BTCV, PRETRAINING):
        shutil.copytree(bundle, tmp_path / bundle.name)
    apply({"in_channels": 2, "intensity#a_max": 300}, tmp_path / BTCV.name)
    image = read_json(tmp_path / BTCV.name / "configs/metadata.json")["network_data_format"]["inputs"]["image"]
    assert image["num_channels"] == 2 and image["channel_def"] == {"0": "image 0", "1": "image 1"}
    for name in ("train", "inference"):
        content = read_json(tmp_path / BTCV.name / f"configs/{name}.json")
        assert content["intensity"]["a_max"] == 300 and content["bundle_root"] == "."
    lines = [{"epoch": 1, "val_l1": 0.3}, {"epoch": 2, "val_l1": 0.2}, {"epoch": 3, "val_l1": 0.4}, {"epoch": 4}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert package.metrics(tmp_path, tmp_path / PRETRAINING.name) == {"best": lines[1], "last": lines[3]}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_metadata_name_the_library_of_another_network(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / bundle.name)
    apply(read_json(bundle / "configs/resenc.json"), tmp_path / bundle.name)
    required = read_json(tmp_path / bundle.name / "configs/metadata.json")["required_packages_version"]
    assert required["dynamic_network_architectures"] == version("dynamic_network_architectures")


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_a_config_in_which_nothing_changes_stays_as_it_is(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / bundle.name)
    apply({"learning_rate": 1, "output_dir": "/elsewhere"}, tmp_path / bundle.name)
    for name in ("inference", "metadata"):
        file = f"configs/{name}.json"
        assert (tmp_path / bundle.name / file).read_bytes() == (bundle / file).read_bytes()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nowhere"], "nowhere is no bundle"),
        ([BTCV.name, "--weights_url", "http://127.0.0.1"], "--weights_url is for the weights of a training"),
    ],
)
def test_wrong_arguments(arguments, expected, tmp_path, capsys):
    assert package.main([*arguments, "--output", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err and not list(tmp_path.glob("*.zip"))


def test_a_training_that_has_no_weights_yet(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("model.pt"))
    assert package.main([str(tmp_path / "run"), "--output", str(tmp_path)]) == 2
    assert "is no finished training, it has no models/model.pt" in capsys.readouterr().err


def test_torchscript_has_the_package_s_patch_size_and_no_need_of_custom(released, tmp_path):
    folder = verify.unpack(released, tmp_path)
    script, metadata, files = load_net_with_metadata(
        str(folder / "models/model.ts"), more_extra_files=["inference.json"]
    )
    assert metadata["version"] == read_json(folder / "configs/metadata.json")["version"]
    assert json.loads(files["inference.json"]) == read_json(folder / "configs/inference.json")
    network = segmentation_network(classes=len(LABELS)).eval()
    network.load_state_dict(torch.load(folder / "models/model.pt", weights_only=True))
    image = torch.rand(1, 1, *SMALL["patch_size"])
    with torch.no_grad():
        assert torch.equal(script(image), network(image))


def test_large_weights_are_fetched_by_monai_and_verified(large, tmp_path):
    assert large.stat().st_size < 1e6
    unpacked = verify.unpack(large, tmp_path)
    with pytest.raises(ValueError, match="models/model.pt is yet to be downloaded: .*download_large_files"):
        verify.verify(unpacked)
    served = next(large.parent.glob("*model.pt"))
    whole = served.read_bytes()
    served.write_bytes(b"tampered with")
    with pytest.raises((RuntimeError, ValueError), match="sha256"):  # the former in MONAI 1.5
        download_large_files(str(unpacked))
    assert not (unpacked / "models/model.pt").exists()
    served.write_bytes(whole)
    download_large_files(str(unpacked))
    verify.verify(unpacked)
    (unpacked / "models/model.ts").write_bytes((unpacked / "models/model.pt").read_bytes())
    with pytest.raises(ValueError, match=r"models/model.ts was changed"):
        verify.verify(unpacked)


def test_a_package_passes_the_model_zoo_s_checks(large, tmp_path):
    """Those of https://github.com/Project-MONAI/model-zoo, CONTRIBUTING.md and ci/, written anew and offline."""
    folder = verify.unpack(large, tmp_path)
    assert max(path.stat().st_size for path in verify.files(folder).values()) < 25e6
    download_large_files(str(folder))
    for name in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt"):
        assert (folder / name).is_file()
    paths = {"meta_file": f"{folder}/configs/metadata.json", "config_file": f"{folder}/configs/inference.json"}
    metadata = read_json(paths["meta_file"])
    assert metadata["version"] in metadata["changelog"]
    for name, number in {"monai": metadata["monai_version"], **metadata["required_packages_version"]}.items():
        assert Requirement(f"{name}=={number}")
    # With the schema in place nothing is downloaded.
    verify_metadata(meta_file=paths["meta_file"], filepath=str(ROOT / "tools/metadata_schema.json"))
    verify_net_in_out("network_def", **paths, device="cpu", bundle_root=str(folder))
    assert torch.jit.load(folder / "models/model.ts")
    assert "TorchScript is exported by tracing" in (folder / "docs/README.md").read_text()  # scripting fails


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_a_readme_has_the_headings_of_the_model_zoo_s_template(bundle):
    """https://github.com/Project-MONAI/model-zoo/blob/dev/docs/readme_template.md, in its order."""
    found = re.findall(r"^#+ (.+)$", (bundle / "docs/README.md").read_text(), re.MULTILINE)[1:]
    template = ["Authors", "Tags", "Model Description", "Data", "Preprocessing", "Performance", "System Configuration"]
    template += ["Limitations", "Citation Info", "References"]
    assert [heading for heading in found if heading in template] == template


def test_the_model_card_has_what_the_hub_reads_and_its_pictures(released, run_dir, tmp_path):
    folder = verify.unpack(released, tmp_path)
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    card, best = yaml.safe_load(head), max(metrics(run_dir), key=lambda line: line["val_mean_dice"])
    expected = {"license": "apache-2.0", "library_name": "monai", "pipeline_tag": "image-segmentation"}
    assert {name: card[name] for name in expected} == expected and {"monai", "mr", "swinunetr"} <= set(card["tags"])
    (result,) = card["model-index"][0]["results"]
    assert {"type": "mean_dice", "value": best["val_mean_dice"]} in result["metrics"]
    assert read_json(folder / "configs/metadata.json")["eval_metrics"]["mean_dice"] == best["val_mean_dice"]
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert "docs/segmentation.png" in links and all((folder / link).is_file() for link in links)
    # The Hub's client leaves its cache in the folder that it downloads into.
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/CACHEDIR.TAG").write_text("")
    verify.check_sums(folder)
    plain = model_card.metadata_of(PRETRAINING)
    assert plain["pipeline_tag"] == "image-feature-extraction" and "model-index" not in plain


def test_a_package_of_other_scans_names_no_data_of_the_bundle_s(released, run_dir, tmp_path):
    """Unless somebody has written into the run what they are."""
    folder = verify.unpack(released, tmp_path)
    assert read_json(folder / "configs/metadata.json")["data_source"].startswith("scans of whoever trained it")
    assert "challenge" not in (folder / "docs/data_license.txt").read_text()
    (folder / "docs/data_license.txt").write_text("Ours.")
    metadata = {"data_source": "our hospital"}
    package.forget_source(folder, FETA, metadata)
    assert metadata["data_source"] == "our hospital" and (folder / "docs/data_license.txt").read_text() == "Ours."


def test_the_asset_s_name_is_what_monai_asks_github_for(released):
    """`download --source github --repo OWNER/REPOSITORY/TAG --version 0.1.0`: this address, made of these parts."""
    address = _get_git_release_url("someone", "some-fork", "v0.1.0", f"{FETA.name}_v0.1.0.zip")
    assert address == f"https://github.com{TAG}/{released.name}"


def test_a_download_is_whole(downloaded, released, tmp_path):
    unpacked = verify.unpack(released, tmp_path)
    found = {name: path.read_bytes() for name, path in verify.files(downloaded).items()}
    assert found == {name: path.read_bytes() for name, path in verify.files(unpacked).items()}


def test_a_download_trains_evaluates_and_infers_where_the_repository_is_not(
    downloaded, foreign_python, labelled_lists, tmp_path
):
    """From another folder, without an override of what the training had set; the modules are the download's."""

    def run(*configs, **values):
        files = [str(downloaded / "configs" / f"{name}.json") for name in configs]
        values = {"bundle_root": downloaded, "num_workers": 0, **values}
        command = [foreign_python, "-m", "monai.bundle", "run", "--config_file", str(files), *overrides(**values)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    scan = labelled_lists["fetal"].parent / "images" / "fetal_001.nii.gz"
    run("inference", dataset_dir=scan, output_dir=tmp_path / "segmented")
    assert nibabel.load(tmp_path / "segmented" / "fetal_001_seg.nii.gz").shape == nibabel.load(scan).shape
    data = {"datalist": labelled_lists["fetal"], "output_dir": tmp_path / "run"}
    run("train", "evaluate", **data)
    assert (tmp_path / "run" / "evaluation" / "summary.md").is_file()
    weights = {"ckpt_dir": tmp_path / "models", "pretrained": downloaded / "models" / "model.pt"}
    run("train", max_epochs=1, **data, **weights)
    start = read_json(tmp_path / "run" / "run.json", list)[-1]
    assert (start["bundle"], start["version"], start["commit"]) == (FETA.name, "0.1.0", None)
    assert (tmp_path / "models" / "model.pt").is_file()


def test_a_download_by_way_of_load(released, server, tmp_path):
    """`load` takes an address by its `args_file`; then what is there already is not downloaded again."""
    (tmp_path / "download.json").write_text(json.dumps({"url": f"{server[1]}/{released.name}"}))
    network = load(FETA.name, bundle_dir=tmp_path, args_file=str(tmp_path / "download.json"), device="cpu")
    weights = torch.load(tmp_path / FETA.name / "models/model.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    script, metadata, _ = load(FETA.name, bundle_dir=tmp_path, load_ts_module=True, device="cpu")
    image = torch.rand(1, 1, *metadata["network_data_format"]["inputs"]["image"]["spatial_shape"])
    with torch.no_grad():
        assert torch.equal(script(image), network.eval()(image))
