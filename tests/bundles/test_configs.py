"""Every config of every bundle, found by glob: a new bundle is covered without touching a test."""

import json
import sys
from pathlib import Path

import pytest
from monai.bundle import ConfigParser

from tests.conftest import BUNDLES, PRETRAINING, ROOT, SEGMENTATION, folders, metrics, monai_bundle
from tools import verify

# Twice the phantoms' own, at which a case is one window.
PIXDIM_MM = {"ct": [10.5] * 3, "fetal": [3.25] * 3}
CONFIGS = [
    pytest.param(config, id=f"{bundle.name}-{config.stem}")
    for bundle in BUNDLES
    for config in sorted((bundle / "configs").glob("*.json"))
    if config.stem not in ("metadata", "onnx")  # onnx: tests/custom/speed/test_onnx_runtime.py
]


def phantom_kind(bundle) -> str:
    """The kind of phantoms that a bundle is for, by its metadata."""
    image = json.loads((bundle / "configs/metadata.json").read_text())["network_data_format"]["inputs"]["image"]
    return "ct" if "CT" in image["modality"] else "fetal"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, labelled_lists):
    """Train a bundle for an epoch, on first use, and return the folder of the run."""
    runs = {}

    def run(bundle):
        if bundle not in runs:
            runs[bundle] = tmp_path_factory.mktemp(bundle.name)
            kind = phantom_kind(bundle)
            data = {"datalist": labelled_lists[kind], "max_epochs": 1, "pixdim_mm": PIXDIM_MM[kind]}
            before = set(verify.files(bundle))
            done = monai_bundle("train", bundle=bundle, **data, **folders(runs[bundle]))
            assert done.returncode == 0, done.stderr
            assert set(verify.files(bundle)) == before
        return runs[bundle]

    return run


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs_for_an_epoch(config, trained, labelled_lists, tmp_path):
    bundle = config.parents[1]
    run, kind = trained(bundle), phantom_kind(bundle)
    datalist = labelled_lists[kind]
    weights = run / "models" / "model.pt"
    assert weights.is_file()
    names = [Path(file).stem for file in verify.based(config)]
    if names[0] == "inference":
        more = {"dataset_dir": datalist.parent / "images" / f"{kind}_001.nii.gz", "checkpoint": weights}
        more |= {"test_time_examples": 1} if "ensemble" in names else {}
    else:
        more = {"datalist": datalist, "max_epochs": 1} | ({"checkpoint": weights} if "evaluate" in names else {})
    ranks = 2 if "multi_gpu_train" in names else 1
    if names != ["train"]:
        out, elsewhere, before = tmp_path / "out", tmp_path / "elsewhere", set(verify.files(bundle))
        elsewhere.mkdir()
        output = {**folders(out), "pixdim_mm": PIXDIM_MM[kind]}
        done = monai_bundle(*names, bundle=bundle, cwd=elsewhere, ranks=ranks, **more, **output)
        assert done.returncode == 0, done.stderr
        assert any(path.is_file() for path in out.rglob("*"))
        # Nothing is written but there.
        assert set(tmp_path.iterdir()) == {out, elsewhere} and not list(elsewhere.iterdir())
        assert set(verify.files(bundle)) == before
        if ranks > 1:  # they write once
            assert len(list((out / "tensorboard").iterdir())) == len(metrics(out)) == 1
            assert len(json.loads((out / "run.json").read_text())) == 1


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("check", verify.CHECKS, ids=lambda check: check.__name__)
def test_a_bundle_passes(check, bundle):
    check(bundle)


PARTS = [f"validate#{part}" for part in ("evaluator", "handlers", "dataset", "dataset#data")]
PARTS += [f"train#{part}" for part in ("trainer", "trainer#max_epochs", "dataset", "dataset#data", "handlers")]
ZOO = {
    "train": ["bundle_root", "device", "dataset_dir", "output_dir", *PARTS],
    "inference": ["bundle_root", "device", "network_def", "inferer", "output_dir"],
}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
@pytest.mark.parametrize("name", ZOO)
def test_the_model_zoo_s_ids_are_there(name, bundle):
    """https://github.com/Project-MONAI/model-zoo, CONTRIBUTING.md."""
    config = ConfigParser(json.loads((bundle / f"configs/{name}.json").read_text()))
    assert [id for id in ZOO[name] if id not in config] == []
    handlers = config["train#handlers"] if name == "train" else []
    intervals = [handler["interval"] for handler in handlers if handler["_target_"] == "ValidationHandler"]
    assert set(intervals) <= {"@val_interval"}


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_a_bundle_has_the_one_custom(bundle):
    assert (bundle / "custom").resolve() == ROOT / "custom"


def test_segmentation_bundles_differ_in_nothing_but_their_task():
    """So that what is mended in one is not forgotten in the other."""
    own = {"labels", "modality", "intensity", "pixdim_mm"}
    first, *others = SEGMENTATION
    for name in ("train", "field", "resenc", "evaluate", "inference", "multi_gpu_train", "ensemble", "onnx"):
        configs = [ConfigParser.load_config_file(bundle / f"configs/{name}.json") for bundle in (first, *others)]
        for config in configs:
            for transform in config.get("postprocessing", {}).get("transforms", []):
                if isinstance(transform, dict):
                    transform.pop("independent", None)
        assert {key: value for key, value in configs[0].items() if key not in own} == {
            key: value for key, value in configs[1].items() if key not in own
        }


@pytest.mark.parametrize("bundle", SEGMENTATION, ids=lambda bundle: bundle.name)
def test_what_label_and_deploy_read_of_inference_needs_no_custom(bundle):
    """They never run `run`, but make these components, beside other bundles whose `custom` may differ."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/inference.json"))
    parser["feature_size"] = 12
    loaded = {name for name in sys.modules if name.partition(".")[0] == "custom"}
    for name in ("network_def", "network", "preprocessing", "inferer", "postprocessing"):
        assert parser.get_parsed_content(name) is not None
    assert not [item for item in parser.ref_resolver.resolved_content.values() if type(item).__module__ in loaded]


def test_metadata_names_the_versions_that_are_installed():
    pins = dict(
        line.partition(";")[0].strip().split("==")
        for line in (ROOT / "tools/constraints.txt").read_text().splitlines()
        if "==" in line and '< "3.11"' not in line
    )
    for bundle in BUNDLES:
        metadata = json.loads((bundle / "configs/metadata.json").read_text())
        named = {"monai": metadata["monai_version"], "torch": metadata["pytorch_version"]}
        named |= {"numpy": metadata["numpy_version"], **metadata["required_packages_version"]}
        assert named == {name: pins[name] for name in named}, bundle.name


PAPER = {
    "noise_variance": 0.1,
    "downsample_factor": 4,
    "downsample_mode": "trilinear",
    "local_mask_ratio": 0.6,
    "local_mask_fill": "zeros",
    "token_mask_ratio": 0.6,
    "token_size": 16,
    "full_resolution_skip": True,
    "contrastive_weight": 0.05,
    "temperature": 0.07,
    "learning_rate": 4e-4,
    "weight_decay": 1e-5,
    "warmup_iterations": 500,
    "max_iterations": 20000,
    "batch_size": 2,
    "patch_size": [96, 96, 96],
    "feature_size": 48,
    "disruptions": ["noise", "downsampling", "local_masking"],
}


def test_pretraining_has_the_values_of_the_paper():
    """Valanarasu et al., MIDL 2024, section 4 (implementation details); token masking is its MAE baseline."""
    train = ConfigParser.load_config_file(PRETRAINING / "configs" / "train.json")
    assert {name: train[name] for name in PAPER} == PAPER
    assert list(train["modalities"]) == ["ct", "t1", "t1ce", "t2", "flair"]
    assert train["modalities"]["ct"] == {
        "_target_": "ScaleIntensityRange", "a_min": -1000, "a_max": 1000, "b_min": 0, "b_max": 1, "clip": True
    }  # fmt: skip


FINE_TUNING = {
    "learning_rate": 4e-4,
    "weight_decay": 1e-5,
    "max_epochs": 600,
    "crops_per_volume": 4,
    "flip_probability": 0.2,
    "rotation_probability": 0.2,
    "intensity_range": 0.1,
    "intensity_probability": 0.1,
    "patch_size": [96, 96, 96],
    "feature_size": 48,
    "overlap": 0.5,
    "transfer": "both",
}


@pytest.mark.parametrize("bundle", SEGMENTATION, ids=lambda bundle: bundle.name)
def test_fine_tuning_has_the_values_of_the_paper(bundle):
    """Paper: learning rate, epochs, batch of 4 crops. Published code: weight decay, warm-up of 50 epochs, the rest."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    assert {name: parser[name] for name in FINE_TUNING} == FINE_TUNING
    assert parser.get_parsed_content("warmup_epochs") == 50
    task = {name: parser[name] for name in ("pixdim_mm", "intensity")}
    if bundle.name.startswith("btcv"):
        window = {"a_min": -175, "a_max": 250, "b_min": 0, "b_max": 1, "clip": True}
        intensity = {"_target_": "ScaleIntensityRanged", "keys": "image", **window}
        assert task == {"pixdim_mm": [1.5, 1.5, 2.0], "intensity": intensity}
    else:
        intensity = {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True}
        assert task == {"pixdim_mm": None, "intensity": intensity}
