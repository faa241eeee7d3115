import re
import shutil
import sys

import pytest
import torch
from monai.bundle import create_workflow

from custom.engine.config_check import arguments_of, check_ids, check_patch_size, check_paths, check_values, unused_ids
from custom.errors import BadInput, user_message
from tests.conftest import BUNDLES

CONFIG = {
    "side": 3,
    "width": "$2 * @side",
    "network": {"_target_": "torch.nn.Linear", "in_features": "@width", "out_features": 1},
    "run": "$@network#out_features",
}


def test_an_id_is_used_if_any_other_refers_to_it():
    assert unused_ids(CONFIG) == {"run"}
    assert unused_ids({**CONFIG, "widht": 4}) == {"run", "widht"}
    group = {"train": {"epochs": 1, "epoch": 2}, "every": "$@train#epochs", "run": "@every"}
    assert unused_ids(group) == {"run", "train#epoch"}
    assert unused_ids({**group, "run": "$@every + len(@train)"}) == {"run"}


def test_declared_ids_need_no_use():
    check_ids(CONFIG, declared={"run"})
    with pytest.raises(BadInput, match="`widht`; did you mean `width`"):
        check_ids({**CONFIG, "widht": 4}, declared={"run", "width"})


@pytest.mark.parametrize(
    "component, expected",
    [
        ({"_target_": "torch.nn.Linear", "in_feature": 1}, "`network#in_feature` is no argument of torch.nn.Linear"),
        ({"_target_": "torch.nn.Linaer"}, "torch.nn.Linaer, which can't be imported"),
        ({"_target_": "Spacingd", "pixdims": 1}, "`network#pixdims` is no argument of Spacingd"),
    ],
)
def test_components_have_the_arguments_that_they_are_given(component, expected):
    with pytest.raises(BadInput, match=expected):
        check_ids({"network": component}, declared={"network"})


@pytest.mark.parametrize("size", [[96, 96, 96], [64, 32, 32], [128, 96, 32]])
def test_patches_that_fit(size):
    check_patch_size(size)


@pytest.mark.parametrize("size", [[32, 32, 32], [96, 96], [100, 96, 96], [0, 64, 64], [-32, 64, 64], 64, "[64,64,64"])
def test_patches_that_do_not_fit(size):
    with pytest.raises(BadInput, match="multiples of 32"):
        check_patch_size(size)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"output_dir": 20261126}, "`output_dir` is the number 20261126; write a folder of that name as ./20261126"),
        ({"checkpoints": ["a.pt", 3]}, "`checkpoints#1` is the number 3"),
        ({"dataset_dir": "/data/a::1"}, "`dataset_dir` is /data/a::1; a path in a config can't have # or ::"),
        ({"store": "runs/x::y"}, "`store` is runs/x::y"),
    ],
)
def test_paths_that_are_not_what_was_typed(config, told):
    with pytest.raises(BadInput) as caught:
        check_paths({"seed": 3, "resume": True, "datalist": "$@bundle_root + 'a::b'", "pretrained": None, **config})
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["@home", "$x"])
def test_a_folder_that_monai_takes_for_an_expression(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    check_paths({"dataset_dir": f"./{name}", "output_dir": f"{name}/new"})
    with pytest.raises(BadInput, match=r"`dataset_dir` is .*; write it as \./"):
        check_paths({"dataset_dir": name})


def test_a_path_that_has_two_colons_and_is_there(tmp_path):
    (tmp_path / "a::b").mkdir()
    check_paths({"dataset_dir": str(tmp_path / "a::b"), "checkpoint": "@other::id"})


def test_arguments_of_our_classes_are_those_of_their_bases_too():
    class Ours(torch.nn.Linear):
        def __init__(self, colour, **kwargs):
            super().__init__(**kwargs)

    assert arguments_of(Ours) == set()  # of a module of somebody else, which may hand them to anybody
    Ours.__module__ = "custom.somewhere"
    assert {"colour", "in_features", "bias"} <= arguments_of(Ours) and "color" not in arguments_of(Ours)
    assert arguments_of(torch.nn.Linear) >= {"in_features"} and "lr" in arguments_of(torch.optim.AdamW)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("labels", ["$@names", ["a", "b"]], ["spleen", ["a"], ["a", "b", "b"], {"a": 0, "b": 1}, [0, 1]]),
        (
            "pixdim_mm",
            [None, [], [1, 1.5, 2]],
            [1.5, [1.5, 2], [1, 1, -2], [0, 1, 1], [0.01] * 3, ["1", 1, 1], [float("nan")] * 3],
        ),
        ("max_epochs", [1, "$@max_iterations // 3"], [0, -1, 1.5, "ten", True]),
        ("feature_size", [12, 13], [0, 24.0]),
        ("num_workers", [0, 2], [-1, 0.5]),
        ("seed", [0, 2**32 - 1], [-1, 2**32, 0.5]),
        ("learning_rate", [0, 1e-4], [-1, "1e-4x", float("nan")]),
        ("overlap", [0, 0.5], [1, 50, -0.1]),
        ("cache_rate", [0, 1.0], [7, -1]),
        ("modality", ["ct", "t1ce"], ["CT", 3, ["ct"]]),
        ("resume", [True, 0], ["no", "False", 2]),
    ],
)
def test_values_that_make_no_sense(name, right, wrong):
    for value in right:
        check_values({name: value})
    for value in wrong:
        with pytest.raises(BadInput, match=f"`{name}` is .*, and should be "):
            check_values({name: value})


def test_the_width_of_a_swin_unetr_is_a_multiple_of_12():
    for network in ({"_target_": "SwinUNETR"}, {"network": {"_target_": "custom.published.PublishedSwinUNETR"}}):
        check_values({"feature_size": 24, "network_def": network})
        with pytest.raises(BadInput, match="`feature_size` is 32, and should be a multiple of 12 for a Swin UNETR."):
            check_values({"feature_size": 32, "network_def": network})
    for other in ("$network()", {"_target_": "f", "network": "@other"}, {"_target_": "torch.nn.Identity"}):
        check_values({"feature_size": 32, "network_def": other})


@pytest.mark.parametrize(
    "target, hint",
    [
        ("no_such_package.networks.UNet", "install its package no_such_package, or correct the name."),
        ("SwinUNTER", "is it misspelt?"),  # a name of MONAI's, and of no package
        (".UNet", "is it misspelt?"),
    ],
)
def test_what_cannot_be_imported_is_misspelt_or_its_package_not_installed(target, hint):
    with pytest.raises(BadInput, match=f"is {re.escape(target)}, which can't be imported; {re.escape(hint)}"):
        check_ids({"network_def": {"_target_": target}}, {"network_def"})


def test_a_bundle_with_other_modules_than_those_of_the_process_is_refused(tmp_path):
    """The same ones in another folder are as good."""
    package = tmp_path / "package"
    shutil.copytree(BUNDLES[0], package, ignore=shutil.ignore_patterns("*.pyc"))
    files = {"config_file": str(package / "configs/train.json"), "logging_file": False, "bundle_root": str(package)}
    before, modules = list(sys.path), set(sys.modules)
    create_workflow(**files).finalize()
    (package / "custom/masking.py").write_text("# of another version\n")
    with pytest.raises(RuntimeError) as caught:
        create_workflow(**files)
    assert user_message(caught.value).endswith(
        f"and the bundle has others in {package}/custom; give --bundle_root {package}, and run bundles of different "
        f"versions in processes of their own."
    )
    assert not {name for name in set(sys.modules) - modules if name.startswith("custom")}
    sys.path[:] = before
