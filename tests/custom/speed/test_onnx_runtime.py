"""Inference by ONNX Runtime gives what torch gives, or is refused."""

import json

import nibabel
import numpy as np
import pytest
import torch

from custom.errors import BadInput
from custom.speed.onnx_runtime import OnnxRuntime
from tests.conftest import SEGMENTATION, monai_bundle, segmentation_network

SHAPE = (1, 16, 16, 16)


def network(seed: int = 0, classes: int = 2) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.InstanceNorm3d(4), torch.nn.Conv3d(4, classes, 1)
    return torch.nn.Sequential(*layers).eval()


@torch.inference_mode()
def test_batches_of_any_size_of_an_export_and_of_one_that_is_there(tmp_path):
    own, file = network(), tmp_path / "model.onnx"
    exported = OnnxRuntime(own, str(file))
    for count in (1, 3, 2):
        windows = torch.randn(count, *SHAPE)
        assert torch.allclose(exported(windows), own(windows), atol=1e-5)
    assert list(tmp_path.iterdir()) == [file]
    written = file.stat().st_mtime_ns
    assert torch.allclose(OnnxRuntime(own, str(file))(windows), own(windows), atol=1e-5)
    assert file.stat().st_mtime_ns == written


@torch.inference_mode()
def test_weights_are_loaded_into_the_network(tmp_path):
    own = network()
    OnnxRuntime(own, str(tmp_path / "model.onnx")).load_state_dict(network(seed=1).state_dict())
    assert all(torch.equal(value, network(seed=1).state_dict()[name]) for name, value in own.state_dict().items())


@torch.inference_mode()
def test_what_is_no_export_of_this_network(tmp_path):
    file = tmp_path / "model.onnx"
    OnnxRuntime(network(), str(file))(torch.randn(1, *SHAPE))
    with pytest.raises(BadInput, match="is an export of other weights; delete it"):
        OnnxRuntime(network(seed=1), str(file))(torch.randn(1, *SHAPE))
    with pytest.raises(BadInput, match="can't be used .*; delete it"):
        OnnxRuntime(network(), str(file))(torch.randn(1, 1, 16, 16, 32))
    with pytest.raises(BadInput, match="can't be used .*; delete it"):
        OnnxRuntime(network(classes=3), str(file))(torch.randn(1, *SHAPE))
    file.write_bytes(b"nothing")
    with pytest.raises(BadInput, match="can't be used .*; delete it"):
        OnnxRuntime(network(), str(file))(torch.randn(1, *SHAPE))


def test_a_bundle_s_label_map_is_that_of_torch(labelled_lists, tmp_path):
    """But where two classes are as good as equal, as they often are with weights that nobody has trained."""
    bundle = SEGMENTATION[0]
    torch.manual_seed(0)
    labels = json.loads((bundle / "configs/inference.json").read_text())["labels"]
    torch.save(segmentation_network("resenc", len(labels)).state_dict(), tmp_path / "model.pt")
    scan = labelled_lists["ct"].parent / "images/ct_001.nii.gz"
    found = []
    for overlays in ([], ["onnx"]):
        out = tmp_path / "-".join(["out", *overlays])
        more = {"dataset_dir": scan, "output_dir": out, "ckpt_dir": tmp_path, "pixdim_mm": [4, 4, 4]}
        done = monai_bundle("inference", "resenc", *overlays, bundle=bundle, **more)
        assert done.returncode == 0, done.stderr
        found.append(np.asarray(nibabel.load(out / "ct_001_seg.nii.gz").dataobj))
    assert len(np.unique(found[0])) > 2 and (found[0] != found[1]).mean() < 1e-3
    assert (tmp_path / "model.onnx").is_file() and "onnx_ir" not in done.stderr


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="can't be written .*; name another file with --network#file"):
        OnnxRuntime(network(), str(tmp_path / "none/model.onnx"))(torch.randn(1, *SHAPE))


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("custom.speed.onnx_runtime.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(BadInput, match=r"pip install onnxscript\.$"):
        OnnxRuntime(network(), str(tmp_path / "model.onnx"))
