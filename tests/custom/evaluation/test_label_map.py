import json

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from custom.data.loading import id_type
from custom.evaluation import label_map
from custom.evaluation.label_map import LabelMapd
from tests.conftest import SEGMENTATION


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A CT with air around it, whose axes run to the left, up and to the front, with unequal spacing."""
    voxels = np.full((40, 30, 36), -1000, np.int16)
    voxels[5:35, 4:27, 6:30] = np.random.default_rng(0).integers(-100, 200, (30, 23, 24))
    affine = [[-1.2, 0, 0, 9], [0, 0, 2.5, 8], [0, 0.8, 0.1, 7], [0, 0, 0, 1]]
    path = tmp_path_factory.mktemp("scan") / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return str(path)


@pytest.mark.parametrize("at_once", [1, 2**17, 2**27], ids=["one class", "three classes", "all classes"])
@pytest.mark.parametrize("bundle", SEGMENTATION, ids=lambda bundle: bundle.name)
def test_label_maps_are_those_of_monai_s_transforms(bundle, at_once, scan, monkeypatch):
    """Of what MONAI Label and Deploy run: softmax, inversion of all classes, argmax."""
    parser = ConfigParser(json.loads((bundle / "configs/inference.json").read_text()))
    preprocessing, stock = (parser.get_parsed_content(name) for name in ("preprocessing", "postprocessing"))
    image = preprocessing({"image": scan})["image"]
    torch.manual_seed(0)
    scores = torch.nn.functional.avg_pool3d(torch.randn(14, *image.shape[1:])[None], 5, 1, 2)[0] * 10
    expected = stock({"pred": MetaTensor(scores.clone()), "image": image})["pred"]
    monkeypatch.setattr(label_map, "VALUES_AT_ONCE", at_once)
    found = LabelMapd("pred", preprocessing)({"pred": MetaTensor(scores.clone()), "image": image})["pred"]
    assert found.dtype == torch.uint8 and len(found.unique()) == 14
    assert torch.equal(found.float().as_tensor(), expected.as_tensor()) and torch.equal(found.affine, expected.affine)
    given = {"pred": MetaTensor(scores.softmax(0)), "image": image}
    assert torch.equal(LabelMapd("pred", preprocessing, softmax=False)(given)["pred"].as_tensor(), found.as_tensor())


def test_ids_have_room():
    assert [id_type(count) for count in (2, 256, 257, 40_000)] == [torch.uint8, torch.uint8, torch.int16, torch.int32]
