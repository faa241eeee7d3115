"""The published code: its networks' outputs, met by this project's configs with weights that tools.weights converted,
and its faults, which this project does not share."""

import json
import shutil
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.networks.nets import SwinUNETR

from custom.engine.checkpoint import load_weights
from custom.errors import BadInput
from custom.network import disruptive_autoencoder
from custom.published import AxisPermutation, PublishedSwinUNETR, RepeatedOctantMerging, SharedLocalMasking
from tests.conftest import BUNDLES, PRETRAINING, ROOT, SEGMENTATION, monai_bundle
from tools import weights as weights_tool

# Where the numbers come from and how weights and images are made stands in the file.
PUBLISHED = json.loads((ROOT / "tests/fixtures/published_networks.json").read_text())["networks"]
CASES = [
    pytest.param(network, seed, case, id=f"{network}-{seed}-{case}")
    for network, content in PUBLISHED.items()
    for seed, cases in content["outputs"].items()
    for case in cases
    # A pass of the shipped size takes as long as all others; what is masked in one does not depend on the size.
    if (network, case) != ("shipped_48_96", "sld")
]


def manifest(network: str) -> dict[str, list[int]]:
    """Names and shapes of a published network's tensors; the shipped one is the small one with 4 times the channels."""
    if network != "shipped_48_96":
        return PUBLISHED[network]["manifest"]
    return {name: widened(name, shape) for name, shape in PUBLISHED["pretrain_fs12"]["manifest"].items()}


def widened(name: str, shape: list[int]) -> list[int]:
    """Four times the channels, but for heads and for what is single: input, output, and the mask token's first axes."""
    channel_axes = 0 if name.endswith("bias_table") else 2 if len(shape) == 5 else len(shape)
    return [4 * size if size > 1 and axis < channel_axes else size for axis, size in enumerate(shape)]


def fill(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Weights that follow from the names of the tensors, so that they need not be stored."""
    return {
        name: torch.tensor(
            np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape) * 0.05
            + ("norm" in name and name.endswith(".weight")),
            dtype=torch.float32,
        )
        for name, shape in shapes.items()
    }


def declared(network: str, **overrides) -> SwinUNETR:
    """The network that a bundle declares with its overlay for the published weights."""
    bundle = SEGMENTATION[0] if network.startswith("finetune") else PRETRAINING
    parser = ConfigParser()
    parser.read_config([str(bundle / f"configs/{name}.json") for name in ("train", "published")])
    for name, value in {"feature_size": 48 if network == "shipped_48_96" else 12, **overrides}.items():
        parser[name.replace("__", "#")] = value
    return parser.get_parsed_content("network_def").eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Write a published checkpoint on first use, convert it by the command line, and return the new file."""
    files = {}

    def file(network: str, seed: str):
        if (network, seed) not in files:
            folder = tmp_path_factory.mktemp(network)
            key = "state_dict" if network.startswith("finetune") else "model"
            torch.save({key: fill(manifest(network), int(seed))}, folder / "published.pth")
            assert weights_tool.main([str(folder / "published.pth"), str(folder / "model.pt")]) == 0
            files[network, seed] = folder / "model.pt"
        return files[network, seed]

    return file


@torch.no_grad()
def differences(model: SwinUNETR, network: str, seed: str, case: str) -> tuple[float, float]:
    """Largest difference from the published output (samples, mean, std), and from the hidden states' mean and std."""
    published = PUBLISHED[network]
    expected, side = published["outputs"][seed][case], published["side"]
    hidden: list[torch.Tensor] = []
    model.swinViT.register_forward_hook(lambda module, inputs, states: hidden.extend(states))
    if case == "sld":
        masked = torch.tensor(published["masked"])
        model.swinViT.pos_drop.register_forward_hook(lambda module, inputs, out: out.index_fill(1, masked, 0))
    image = torch.tensor(np.random.RandomState(int(seed)).rand(1, 1, side, side, side), dtype=torch.float32)
    output = model(image).double()

    def moments(values):
        return torch.stack([values.double().mean(), values.double().std(correction=0)])

    def largest(found, wanted):
        return (found - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()

    return (
        max(
            largest(output.flatten()[published["index"]], expected["samples"]),
            largest(moments(output), [expected["mean"], expected["std"]]),
        ),
        largest(torch.stack([moments(state) for state in hidden]), expected["hidden"]),
    )


@pytest.mark.parametrize("network, seed, case", CASES)
def test_outputs_and_hidden_states_are_the_published_ones(network, seed, case, converted):
    """Of the network that a bundle declares, with weights that were converted, written and read again."""
    model = load_weights(declared(network), converted(network, seed))
    output, hidden = differences(model, network, seed, case)
    print(f"{network} seed {seed} {case}: output {output:.1e}, hidden states {hidden:.1e}")
    assert output < 1e-5 and hidden < 1e-5


def test_inference_by_the_command_line_gives_the_published_output(converted, tmp_path):
    """Of a scan that is one patch, neither normalised nor disrupted."""
    published, seed = PUBLISHED["pretrain_fs12"], "1"
    scan = np.random.RandomState(int(seed)).rand(*[published["side"]] * 3).astype(np.float32)
    nibabel.Nifti1Image(scan, np.eye(4)).to_filename(tmp_path / "scan.nii")
    plain = {"disruptions": [], "modalities": {"ct": {"_target_": "Identity"}}, "patch_size": [published["side"]] * 3}
    files = {
        "dataset_dir": tmp_path / "scan.nii",
        "output_dir": tmp_path,
        "checkpoint": converted("pretrain_fs12", seed),
    }
    done = monai_bundle("inference", "published", **plain, **files)
    assert done.returncode == 0, done.stderr
    restored = np.asarray(nibabel.load(tmp_path / "scan_restored.nii.gz").dataobj)
    expected = published["outputs"][seed]["denoise"]
    assert np.abs(restored.ravel()[published["index"]] - expected["samples"]).max() < 1e-5
    assert abs(restored.mean(dtype=float) - expected["mean"]) < 1e-5


@pytest.mark.parametrize(
    "switch", [{"network_def__network__repeated_octants": False}, {"network_def__network__normalize": True}]
)
def test_without_a_switch_the_outputs_are_others(switch, converted):
    model = load_weights(declared("pretrain_fs12", **switch), converted("pretrain_fs12", "0"))
    assert differences(model, "pretrain_fs12", "0", "denoise")[0] > 1e-3


def test_without_any_switch_it_is_the_stock_network():
    networks = []
    for make in (SwinUNETR, PublishedSwinUNETR):
        torch.manual_seed(0)
        networks.append(make(in_channels=1, out_channels=2, feature_size=12))
    stock, variant = (network.state_dict() for network in networks)
    assert list(stock) == list(variant) and all(torch.equal(stock[name], variant[name]) for name in stock)
    assert repr(networks[0]) == repr(networks[1]).replace("PublishedSwinUNETR", "SwinUNETR")


def test_merging_takes_two_octants_twice_and_two_never():
    merging = RepeatedOctantMerging(dim=1)
    merging.norm = merging.reduction = torch.nn.Identity()
    places = torch.tensor([[[[100 * d + 10 * h + w] for w in (0, 1)] for h in (0, 1)] for d in (0, 1)])[None]
    assert merging(places).flatten().tolist() == [0, 100, 10, 1, 101, 10, 1, 111]


def test_the_permutation_is_the_published_view_of_flattened_tokens():
    embedding = torch.rand(2, 4, 4, 4, 4)
    tokens = embedding.flatten(2).transpose(1, 2).contiguous()
    assert torch.equal(AxisPermutation()(embedding), tokens.view(embedding.shape))
    with pytest.raises(BadInput, match=r"give --patch_size \[8, 8, 8\]"):
        AxisPermutation()(torch.rand(2, 4, 4, 4, 2))


def masked_embeddings(permuted_axes: bool) -> torch.Tensor:
    """What a published pre-training network masks of an embedding, in its own axes (B, C, D, H, W)."""
    torch.manual_seed(0)
    switches = {"block_embedding": True, "permuted_axes": permuted_axes}
    stock = PublishedSwinUNETR(in_channels=1, out_channels=1, feature_size=12, **switches)
    network = disruptive_autoencoder(stock, masking=SharedLocalMasking(0.6)).train()
    with torch.no_grad():
        masked = network.swinViT.pos_drop(network.swinViT.patch_embed(torch.rand(2, 1, 24, 24, 24))) == 0
    return masked.permute(0, 4, 1, 2, 3) if permuted_axes else masked


def test_masking_as_published_hits_slabs_of_space_where_axes_are_permuted_and_else_channels():
    for permuted_axes in (True, False):
        masked = masked_embeddings(permuted_axes)
        line = masked[:, 0, :, 0, 0] if permuted_axes else masked[:, :, 0, 0, 0]
        assert line.sum(1).tolist() == [7, 7] and torch.equal(line[0], line[1])  # int(0.6 * 12), for the whole batch
        whole = line[:, None, :, None, None] if permuted_axes else line[:, :, None, None, None]
        assert torch.equal(masked, whole.expand_as(masked))


def test_shared_masking_draws_anew_rounds_down_and_multiplies_by_noise():
    embedding = torch.ones(3, 48, 4, 4, 4)
    torch.manual_seed(0)
    zeros, noise = SharedLocalMasking(0.6).train(), SharedLocalMasking(0.6, "noise").train()
    kept = [(zeros(embedding) == 1).all(0).flatten(1).all(1) for _ in range(2)]
    assert [int(channels.sum()) for channels in kept] == [48 - 28] * 2 and not torch.equal(*kept)
    noisy = noise(5 * embedding)
    assert abs(noisy[noisy != 5].var() - 25 * 0.1) < 0.1
    assert torch.equal(zeros.eval()(embedding), embedding)


def test_the_published_size_is_refused_with_another_patch():
    network = declared("shipped_48_96")
    with pytest.raises(BadInput, match=r"give --patch_size \[96, 96, 96\]"), torch.no_grad():
        network(torch.zeros(1, 1, 64, 64, 64))


# What the published code stumbles over, beside its networks.


def config(bundle: Path, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/train.json"))
    for name, value in {"feature_size": 12, **overrides}.items():
        parser[name.replace("__", "#")] = value
    return parser


def test_crops_are_new_in_every_epoch_and_scans_come_from_the_cache(small_list, tmp_path):
    entries = json.loads(small_list.read_text())
    for number, entry in enumerate(entries["training"]):
        entry["image"] = str(shutil.copy(entry["image"], tmp_path / f"{number}.nii.gz"))
    small_list.write_text(json.dumps(entries))
    overrides = {"datalist": str(small_list), "patch_size": [32] * 3, "disruptions": [], "num_workers": 0}
    dataset = config(PRETRAINING, **overrides).get_parsed_content("train#dataset")
    for entry in entries["training"]:
        Path(entry["image"]).unlink()
    first, second = dataset[1, 0]["image"], dataset[2, 0]["image"]  # of the first and the second epoch
    assert first.shape == second.shape == (1, 32, 32, 32) and not torch.equal(first, second)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)
def test_the_best_checkpoint_is_not_overwritten_by_a_worse_one(bundle, tmp_path):
    metric, scores = ("val_l1", (0.3, 0.2, 0.4)) if bundle == PRETRAINING else ("val_mean_dice", (0.7, 0.8, 0.6))
    parser = config(bundle, ckpt_dir=str(tmp_path), device=torch.device("cpu"))
    keep, network = parser.get_parsed_content("best_checkpoint"), parser.get_parsed_content("network")
    evaluator = Engine(lambda engine, batch: None)
    for epoch, score in enumerate(scores):
        network.out.conv.conv.bias.data.fill_(epoch)
        evaluator.state.metrics = {metric: score}
        keep(evaluator)
    assert (torch.load(tmp_path / "model.pt", weights_only=True)["out.conv.conv.bias"] == 1).all()


@pytest.mark.parametrize("bundle", SEGMENTATION, ids=lambda bundle: bundle.name)
def test_validation_sees_whole_scans_as_they_are(bundle):
    steps = [step for step in config(bundle)["validate#preprocessing#transforms"] if isinstance(step, dict)]
    assert steps and not [step for step in steps if "Rand" in step["_target_"]]
