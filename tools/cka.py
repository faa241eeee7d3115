"""Tell how alike the features of two networks are, stage by stage: linear centred kernel alignment (CKA).

    python -m tools.cka OUT RUN OTHER
    python -m tools.cka OUT RUN pre.pt --other_bundle bundles/dae_pretraining

RUN and OTHER are folders of trainings, or weights with the bundle that they are for. Each is loaded into its network in
eval mode, where nothing is masked. Both networks see the same crops of the data list of RUN, undisrupted and
preprocessed as RUN's, and are compared at the same positions. CKA is 1 for features that differ by a rotation and a
scale only, and about 0 for unrelated ones. Written to OUT: cka.csv, cka.md, cka.png. As the paper's analysis of what
fine-tuning changes (Table 7).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from monai.networks.nets import SwinUNETR
from monai.transforms import RandSpatialCropSamplesd, SpatialPadd
from torch import nn
from tqdm import tqdm

from custom.data.datalist import read_datalist
from custom.engine.checkpoint import training_of, weights_file
from custom.engine.config_check import check_patch_size
from custom.errors import BadInput
from custom.files import read_json
from custom.published import AxisPermutation
from custom.text import markdown_table
from tools import resenc
from tools._cli import tool
from tools.weights import BLOCK, convert, read, recognise

# Stages of a Swin UNETR, its decoder's in the order in which they are called.
DECODERS = ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1")
STAGES = ("patch embedding", "stage 1", "stage 2", "stage 3", "stage 4", *DECODERS)


class Row(NamedTuple):
    """One stage: how many samples, channels of either network, and the CKA."""

    stage: str
    samples: int
    channels: int
    other_channels: int
    cka: float


def hsic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Estimate the Hilbert-Schmidt independence criterion of two linear kernels without bias.

    Args:
        x, y: centred features of the same n > 3 samples.

    Shapes:
        x: (n, C); y: (n, C').

    Source:
        Song et al., "Feature selection via dependence maximization", JMLR 2012, equation 5. It asks for the n x n
        kernels without their diagonals. The estimate does not change when features are shifted, and with centred ones
        the rows of those kernels sum to minus the diagonals: three terms in the space of the channels are left.
    """
    n, x_diagonal, y_diagonal = len(x), x.square().sum(1), y.square().sum(1)
    traces = x_diagonal.sum() * y_diagonal.sum() / ((n - 1) * (n - 2))
    return ((x.T @ y).square().sum() - n / (n - 2) * (x_diagonal @ y_diagonal) + traces) / (n * (n - 3))


def cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the debiased linear CKA of the features of two networks.

    The plain estimate grows with the ratio of channels to samples: for independent normal features of n samples and C
    channels it is about C / (n + C), and the deepest stage has many channels and few positions. This one, a ratio of
    unbiased estimates, is about 0 then (and can be a little below). Neither knows that neighbouring positions are
    alike, so that they tell less than as many independent samples.

    Args:
        x, y: features of the same samples.

    Shapes:
        x: (n, C); y: (n, C').

    Returns:
        at most 1; not a number for features that are constant.

    Raises:
        BadInput: for fewer than 4 samples.

    Source:
        Kornblith et al., "Similarity of neural network representations revisited", ICML 2019; with the estimates of
        Nguyen et al., "Do wide and deep networks learn the same things?", ICLR 2021, equation 3.
    """
    if len(x) < 4:
        raise BadInput(f"CKA takes at least 4 positions of a stage, got {len(x)}; give more --crops or --samples.")
    x, y = (features.double() - features.double().mean(0) for features in (x, y))
    return (hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()).item()


def load(bundle: str, checkpoint: str, settings: Mapping[str, Any] | None = None) -> tuple[nn.Module, ConfigParser]:
    """Make a bundle's network with the weights of a checkpoint, of the size that they are of.

    Args:
        bundle: its folder.
        checkpoint: weights of this project, or published ones as they are or converted.
        settings: ids and values to set in the config, where it has them.

    Returns:
        the network in eval mode, and the bundle's inference config.

    Raises:
        BadInput: for a folder without a bundle, or weights that are not a whole network's of the bundles.
    """
    checkpoint = weights_file(checkpoint)
    weights, parser = read(checkpoint).weights, ConfigParser()
    try:
        if resenc.is_resenc(weights):
            source, overlays = None, ["resenc"]
            own = resenc.architecture(weights)
            sizes = {"feature_size": own["features_per_stage"][0], "in_channels": own["input_channels"]}
        else:
            source = recognise(weights)
            overlays = ["published"] * source.repeats_octants
            feature_size, channels = source.stem.shape[:2]
            sizes = {"feature_size": feature_size, "in_channels": channels}
            own = {"in_channels": channels, "out_channels": source.classes, "block_embedding": BLOCK in source.tensors}
        files = [Path(bundle, "configs", f"{name}.json") for name in ("inference", *overlays)]
        for file in files:
            if not file.is_file():
                raise BadInput(f"{bundle} is no bundle's folder, it has no configs/{file.name}.")
        parser.read_config(list(map(str, files)))
        sizes |= {f"{id}#{name}": value for id in ("network_def", "network_def#network") for name, value in own.items()}
        for name, value in {"disruptions": [], **sizes, **(settings or {})}.items():
            if name in parser:
                parser[name] = value
        if source is not None and not source.classes:
            raise BadInput("These weights are an encoder's alone; train with them first.")
        network = parser.get_parsed_content("network")
        network.load_state_dict(weights if source is None else convert(source, network)[0])
    except BadInput as error:
        raise BadInput(f"{checkpoint}: {error}") from None  # of two checkpoints, which
    return network.eval(), parser


def stages_of(network: nn.Module) -> dict[str, list[str]]:
    """Return the submodules whose outputs are compared, each with the names of its stages."""
    if isinstance(network, SwinUNETR):
        return {"swinViT": list(STAGES[:5]), **{name: [name] for name in DECODERS}}
    encoder, decoder = (list(network.get_submodule(f"{part}.stages").children()) for part in ("encoder", "decoder"))
    up = {f"decoder.stages.{number}": [f"decoder {number + 1}"] for number in range(len(decoder))}
    return {"encoder": [f"stage {number + 1}" for number in range(len(encoder))], **up}


def bundle_of(place: str, given: str | None) -> str:
    """Return the bundle of a training's folder, or the one that is given for weights alone."""
    if Path(place, "configs/inference.json").is_file():
        return place
    if given is None:
        raise BadInput(
            f"{place} is not the folder of a training; name the bundle that these weights are for by --bundle."
        )
    return given


@torch.no_grad()
def stage_features(network: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """Return what each stage gives for an image, see `stages_of`; those of the encoder as the decoder reads them.

    Shapes:
        image: (1, channels, D, H, W); features: (1, C, d, h, w).
    """
    found: list = []
    modules = [network.get_submodule(name) for name in stages_of(network)]
    hooks = [module.register_forward_hook(lambda *call: found.append(call[-1])) for module in modules]
    network(image)
    for hook in hooks:
        hook.remove()
    hidden, *decoded = found
    return [*hidden, *decoded]


def compare(networks: Sequence[nn.Module], images: Iterable[torch.Tensor], positions: int, seed: int) -> list[Row]:
    """Compare two networks at the same random positions of images.

    Args:
        positions: to take of each image at each stage, at the most.
        seed: of their choice.

    Shapes:
        images: each (1, channels, D, H, W).

    Raises:
        BadInput: see `cka`.
    """
    stages = [name for names in stages_of(networks[0]).values() for name in names]
    generator = torch.Generator().manual_seed(seed)
    samples: list = [([], []) for _ in stages]
    for image in images:
        found = [stage_features(network, image.to(next(network.parameters()).device)) for network in networks]
        for kept, pair in zip(samples, zip(*found, strict=True), strict=True):
            places = torch.randperm(pair[0][0, 0].numel(), generator=generator)[:positions]
            for side, features in zip(kept, pair, strict=True):
                side.append(features[0].flatten(1)[:, places.to(features.device)].T.cpu())
    pairs = zip(stages, ([torch.cat(side) for side in kept] for kept in samples), strict=True)
    return [Row(name, len(x), x.shape[1], y.shape[1], cka(x, y)) for name, (x, y) in pairs]


def table(rows: Iterable[Row]) -> str:
    """Return the rows as Markdown."""
    return markdown_table(
        [[name.replace("_", " ") for name in Row._fields], *([*row[:-1], f"{row.cka:.3f}"] for row in rows)]
    )


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Bars of the CKA of each stage, the encoder's in one colour and the decoder's in another."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    colours = ["tab:orange" if row.stage.startswith("decoder") else "tab:blue" for row in rows]
    bars = axis.bar([row.stage for row in rows], [row.cka for row in rows], color=colours)
    axis.bar_label(bars, fmt="%.2f")
    axis.set(ylim=(min(0, *(row.cka for row in rows)), 1.08), ylabel="linear CKA, debiased")
    axis.set_title(title, fontsize=9)
    axis.tick_params(axis="x", rotation=30)
    return figure


def run(options: argparse.Namespace) -> None:
    """Load, compare, print and write.

    Raises:
        BadInput: for wrong arguments, checkpoints or scans; no file is written then.
    """
    if options.crops < 1:
        raise BadInput(f"--crops is at least 1, got {options.crops}.")
    bundles = [bundle_of(options.one, options.bundle), bundle_of(options.other, options.other_bundle or options.bundle)]
    checkpoints = options.one, options.other
    loaded = [load(*pair, options.ids) for pair in zip(bundles, checkpoints, strict=True)]
    networks, parsers = zip(*loaded, strict=True)
    for name, value in options.ids.items():
        if not any(name in parser for parser in parsers):
            raise BadInput(f"--{name}: neither bundle's inference config has this id.")
        for checkpoint in checkpoints:
            trained = ((training_of(weights_file(checkpoint)) or {}).get("settings") or {}).get(name, value)
            if trained != value:
                raise BadInput(
                    f"{checkpoint} was trained with {name} {trained}, and --{name} gives {value}; leave it out."
                )
    channels = [next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv3d)) for network in networks]
    if channels[0] != channels[1]:
        raise BadInput(f"The networks take {channels[0]} and {channels[1]} input channels, but have to see the same.")
    stages = [", ".join(name for names in stages_of(network).values() for name in names) for network in networks]
    if stages[0] != stages[1]:
        raise BadInput(f"The networks have other stages, {stages[0]}, and {stages[1]}.")
    if len({any(isinstance(part, AxisPermutation) for part in network.modules()) for network in networks}) > 1:
        raise BadInput(
            "One network permutes the axes of its embedding, as published, and the other does not, so that their "
            "positions are not the same; --permuted_axes False compares without it, as the fine-tuning starts."
        )
    parser = parsers[0]
    patch_size = options.patch_size or parser["patch_size"]
    check_patch_size(patch_size)
    known = read_json(Path(options.one, "configs/train.json")) if Path(options.one).is_dir() else {}
    datalist = options.datalist or known.get("datalist")
    if datalist is None:
        raise BadInput(f"{options.one} is not the folder of a training, which knows its scans; give --datalist.")
    fold = known.get("fold") if options.datalist is None else options.fold
    folder = options.dataset_dir or (known["dataset_dir"] if options.datalist is None else Path(datalist).parent)
    modalities = list(parser["modalities"]) if "modalities" in parser else None
    items = read_datalist(datalist, options.section, folder, modalities, fold=fold)
    preprocessing = parser.get_parsed_content("dataset#transform")
    pad = SpatialPadd("image", patch_size)
    crop = RandSpatialCropSamplesd("image", patch_size, options.crops, random_size=False)
    crop.set_random_state(options.seed)
    count = len(items) * options.crops
    crops = (part["image"].as_tensor()[None] for item in items for part in crop(pad(preprocessing(item))))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)  # before the work: it may not be allowed
    rows = compare(networks, tqdm(crops, "crops", count), max(1, options.samples // count), options.seed)

    size = "x".join(map(str, patch_size))
    about = f"Debiased linear CKA of {options.one} and {options.other}: {options.crops} crops of {size} "
    about += f'of each of {len(items)} scans, "{options.section}" of {datalist}, seed {options.seed}.'
    with (out / "cka.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([Row._fields, *rows])
    (out / "cka.md").write_text(f"{about}\n\n{table(rows)}\n")
    draw(rows, f"{options.one}\n{options.other}").savefig(out / "cka.png", dpi=120)
    print(f"{about}\n\n{table(rows)}\n\nTable and picture: {out}/cka.csv, cka.md, cka.png")
    print(f"Next: the same with a RUN trained from scratch; what that shares with {options.other} is not inherited.")


def arguments(add: Callable) -> None:
    add("out", metavar="OUT", help="folder to write to")
    add("one", metavar="RUN", help="folder of a training, or weights; its preprocessing is that of both")
    add("other", metavar="OTHER", help="folder of a training, or weights")
    add("--bundle", metavar="DIR", help="that weights alone are for")
    add("--other_bundle", metavar="DIR", help="that OTHER is for, if it is weights alone (--bundle)")
    add("--datalist", metavar="FILE", help="scans to compare on; labels are not needed (the data list of RUN)")
    add("--dataset_dir", metavar="DIR", help="where relative paths in it start (its own folder)")
    add("--section", default="validation", help="of the data list (%(default)s)")
    add("--fold", type=int, metavar="N", help="of the data list: --section of this fold, not of the list")
    add("--crops", type=int, default=4, metavar="N", help="random crops of each scan (%(default)s)")
    add("--patch_size", type=int, nargs=3, metavar="N", help="of a crop, in voxels (the bundle's)")
    add("--samples", type=int, default=20000, metavar="N", help="positions of a stage, at most, in all (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of crops and positions (%(default)s)")


main = tool("cka", __doc__, arguments, run, takes_ids=True)

if __name__ == "__main__":
    sys.exit(main())
