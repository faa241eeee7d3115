"""Turn weights of others into those of this project's networks, and back: Swin UNETR, and residual-encoder U-Nets.

    python -m tools.weights ckpt_best.pth model.pt              # published pre-training or fine-tuning
    python -m tools.weights model_swinvit.pt model.pt           # encoder of the Swin-UNETR self-supervision
    python -m tools.weights model.pt stock.pt --to stock        # for monai.networks.nets.SwinUNETR
    python -m tools.weights model.pt back.pth --to published    # back as it came; own weights: for the authors' code
    python -m tools.weights checkpoint_final.pth model.pt       # nnU-Net's or nnssl's residual-encoder U-Net
    python -m tools.weights model.pt dae.pth --to nnunet --plans nnUNetResEncUNetMPlans.json

A file is recognised by its names and shapes; what becomes of each of its tensors, and of each of the network's, is
printed. The written file has the weights under "model" and, under "origin", what leads back without loss: the names
that they had, and the tensors that the network has no place for. Those of a residual-encoder U-Net have their axes
turned instead, see `tools.resenc`; for nnU-Net a plan is written beside them, which fits them to its data set.
Nothing but tensors and plain values is unpickled.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.networks.nets import SwinUNETR

from custom.engine.checkpoint import read_weights, training_of
from custom.errors import BadInput
from custom.files import replacing, write_json
from custom.published import PublishedSwinUNETR
from tools import resenc
from tools._cli import tool

STEM = "swinViT.patch_embed.proj."
BLOCK = f"{STEM}conv1.conv.weight"  # of the published patch embedding; MONAI's has STEM + "weight"
FIRST = "encoder1.layer.conv1.conv.weight"
OUT = "out.conv.conv.weight"
INDEX = "relative_position_index"
UNCALLED = tuple(f"encoder{n}.layer.conv3.conv.weight" for n in (2, 3, 4, 10))
PUBLISHED, SSL, OTHER = "the published pre-training", "the encoder of the Swin-UNETR self-supervision", "a Swin UNETR"
# What a name starts with in files of a kind only, and what turns its names, rule after rule, into those of SwinUNETR.
KINDS = {
    PUBLISHED: (
        "encoder.patch_embed.",
        ((r"^encoder\.", "swinViT."), (r"^(swinViT\.layers\d\.0\.)0\.", r"\1"), (r"\.mlp\.fc(\d)", r".mlp.linear\1")),
    ),
    SSL: (
        "patch_embed.",
        ((r"^(?=(patch_embed|layers\d|norm)\.)", "swinViT."), (r"\.mlp\.fc(\d)", r".mlp.linear\1")),
    ),
    OTHER: ("swinViT.patch_embed.", ()),
}
TO_PUBLISHED = ((r"^swinViT\.", "encoder."), (r"^(encoder\.layers\d\.0\.)", r"\g<1>0."), (r"\.mlp\.linear", ".mlp.fc"))
# Tensors that influence no output, by their names in SwinUNETR.
DEAD = {
    r"swinViT\.mask_token": "stands for masked tokens in the published masked autoencoder only",
    r"swinViT\.norm\..+": "normalises what no decoder reads",
    r"encoder(2|3|4|10)\.layer\.conv3\..+": "a projection that is never called",
    r"(rotation|contrastive|conv)\w*\..+": "of the self-supervision's own tasks",
}


# What nnU-Net's checkpoints have beside tensors and plain values: NumPy's numbers.
NUMBERS = [np.dtype, np.float64(0).__reduce__()[0], *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8"))]


class Checkpoint(NamedTuple):
    """What a file holds.

    Args:
        weights: under the names that they came with.
        key: what they are under, None for a bare state dict.
        others: keys of what is no weights.
        kept: None, or for a file that this tool wrote, names of the weights that it had no place for.
        turn: of nnU-Net's axes z, y, x by its plan, None for weights that are not nnU-Net's.
    """

    weights: dict[str, torch.Tensor]
    key: str | None
    others: list[str]
    kept: set[str] | None = None
    turn: Sequence[int] | None = None


class Source(NamedTuple):
    """Recognised weights: their kind, tensors by name in SwinUNETR, and the names that they came with."""

    kind: str
    tensors: dict[str, torch.Tensor]
    names: dict[str, str]

    @property
    def stem(self) -> torch.Tensor:
        """Weight of the first convolution, feature_size x channels x ..."""
        return self.tensors[BLOCK if BLOCK in self.tensors else f"{STEM}weight"]

    @property
    def classes(self) -> int:
        """Output channels, 0 for an encoder alone."""
        return self.tensors[OUT].shape[:1].numel() if OUT in self.tensors else 0

    @property
    def repeats_octants(self) -> bool:
        """Whether it was trained with the patch merging of the authors and of MONAI up to 1.4, as far as names tell."""
        return self.kind in (PUBLISHED, SSL) or BLOCK in self.tensors or UNCALLED[0] in self.tensors

    def __str__(self) -> str:
        kind, block = self.kind, BLOCK in self.tensors
        if kind == OTHER and block:
            kind = "the published fine-tuning" if UNCALLED[0] in self.tensors else "this project's published variant"
        feature_size, channels = self.stem.shape[:2]
        return (
            f"{kind}, with {'the published' if block else 'the stock'} patch embedding, feature size {feature_size}, "
            f"{channels} input and {self.classes or 'no'} output channels"
        )


class Row(NamedTuple):
    """What became of a tensor: its shape, its names before and after, and why."""

    status: str
    shape: torch.Size
    source: str
    name: str
    why: str = ""

    def __str__(self) -> str:
        names = " -> ".join(dict.fromkeys(filter(None, (self.source, self.name))))
        return f"{self.status:9}{str(tuple(self.shape)):22}{names}{': ' * bool(self.why)}{self.why}"


def rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Substitute in a name, rule after rule."""
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and torch.is_tensor(item[1])


def _transpose_forward(content: Mapping[str, Any]) -> Sequence[int]:
    """Return by what a checkpoint of nnU-Net says that it turns its axes; those of nnssl don't, and say nothing."""
    return content.get("init_args", {}).get("plans", {}).get("transpose_forward", (0, 1, 2))


def read(path: str | Path) -> Checkpoint:
    """Read weights as they came, also from a file that this tool wrote.

    Raises:
        BadInput: for a file that can't be read or holds no weights.
    """
    try:
        with torch.serialization.safe_globals(NUMBERS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        read_weights(path)  # says in a sentence what is wrong with the file
        raise
    keys = ("model", "state_dict", "network_weights")
    key = next((key for key in keys if isinstance(content, Mapping) and key in content), None)
    weights = content if key is None else content[key]
    if not isinstance(weights, Mapping) or not weights or not all(map(_is_weight, weights.items())):
        raise BadInput(f"The checkpoint {path} holds no network's weights; name a file that does.")
    origin = None if key is None else content.get("origin")
    if origin is None:
        turn = _transpose_forward(content) if key == "network_weights" else None
        return Checkpoint(dict(weights), key, [str(other) for other in content if key not in (None, other)], None, turn)
    try:
        came = {origin["names"][name]: value for name, value in weights.items() if name in origin["names"]}
        return Checkpoint(came | origin["unused"], origin["key"], [], set(origin["unused"]))
    except (KeyError, TypeError) as error:
        raise BadInput(f'The "origin" in {path} is damaged; convert its source anew.') from error


def recognise(weights: Mapping[str, torch.Tensor]) -> Source:
    """Find out by names and shapes what some weights are of.

    Raises:
        BadInput: for weights of another network.
    """
    bare = {name: name.removeprefix("module.") for name in weights}
    for kind, (start, rules) in KINDS.items():
        if any(name.startswith(start) for name in bare.values()):
            names = {rename(name, rules): source for source, name in bare.items()}
            source = Source(kind, {name: weights[source] for name, source in names.items()}, names)
            if len(names) < len(weights):
                raise BadInput("Several of these tensors have the same place in a Swin UNETR; the file is damaged.")
            if {BLOCK, f"{STEM}weight"} & names.keys() and source.stem.ndim == 5 and len(source.stem) % 12 == 0:
                return source
    raise BadInput(
        f"These are not the weights of a 3D Swin UNETR, but tensors such as {', '.join(list(weights)[:3])}; give those "
        f"of {', of '.join(KINDS)}."
    )


def network_for(source: Source, stock: bool) -> SwinUNETR:
    """Make the network that weights are for: of their size, and with their patch embedding unless `stock`."""
    feature_size, in_channels = source.stem.shape[:2]
    network = SwinUNETR if stock else partial(PublishedSwinUNETR, block_embedding=BLOCK in source.tensors)
    return network(in_channels=in_channels, out_channels=source.classes or 1, feature_size=feature_size)


def convert(source: Source, network: SwinUNETR) -> tuple[dict[str, torch.Tensor], list[Row]]:
    """Return what a network gets of some weights, and what became of every tensor of both.

    Raises:
        BadInput: for a tensor that has another shape than the network's or no place, and for weights that are neither
            whole nor an encoder.
    """
    own, model, rows = network.state_dict(), {}, []
    for name, value in own.items():
        found, came = source.tensors.get(name), source.names.get(name, "")
        if found is None and name.endswith(INDEX):
            model[name] = value
            rows.append(Row("computed", value.shape, "", name, "follows from the size of the windows"))
        elif found is None:
            why = "of another patch embedding" if name.startswith(STEM) else "not in an encoder alone"
            rows.append(Row("missing", value.shape, "", name, f"{why}, starts anew"))
        elif found.shape != value.shape or name.endswith(INDEX) and not torch.equal(found.to(value), value):
            raise BadInput(
                f"{came} of shape {tuple(found.shape)} is not that of a Swin UNETR of feature size {len(own[FIRST])}, "
                f"{tuple(value.shape)}; the file is damaged or of another network."
            )
        else:
            model[name] = found
            rows.append(Row("taken" if came == name else "renamed", value.shape, came, name))
    missing = {row.name for row in rows if row.status == "missing" and not row.name.startswith(STEM)}
    if missing and missing != {name for name in own if not name.startswith("swinViT.")}:
        raise BadInput(f"These weights lack {len(missing)} tensors, such as {min(missing)}; the file is not complete.")
    for name in [name for name in source.tensors if name not in own]:
        why = next((why for pattern, why in DEAD.items() if re.fullmatch(pattern, name)), "")
        why = why or "MONAI's patch embedding is one strided convolution" * name.startswith(STEM)
        if not why:
            raise BadInput(f"{source.names[name]} has no place in a Swin UNETR; the weights are of another network.")
        rows.append(Row("unused", source.tensors[name].shape, source.names[name], "", why))
    return model, rows


def publish(source: Source) -> tuple[dict[str, torch.Tensor], str, list[Row]]:
    """Give weights of this project the names that the authors' code loads, and the dead tensors that it asks for.

    Returns:
        the weights, the key under which the authors' code looks for them, and what became of every tensor.

    Raises:
        BadInput: for weights with MONAI's patch embedding, or of an encoder alone.
    """
    if not {BLOCK, OUT} <= source.tensors.keys():
        raise BadInput(
            "These weights have MONAI's patch embedding or no decoder, and don't fit the published networks; those of "
            "a training with configs/published.json do."
        )
    pretraining, feature_size = source.classes == 1, len(source.stem)
    weights, rows = {}, []
    for name, value in source.tensors.items():
        new = rename(name, TO_PUBLISHED) if pretraining else name
        weights[new] = value
        rows.append(Row("taken" if new == name else "renamed", value.shape, name, new))
    shapes = {name: source.tensors[name.replace("conv3", "conv1")].shape[:2] for name in UNCALLED}
    dead = {name: torch.zeros(*shape, 1, 1, 1) for name, shape in shapes.items()}
    if pretraining:
        dead["encoder.mask_token"] = torch.zeros(1, 1, feature_size)
        dead["encoder.norm.weight"] = torch.ones(16 * feature_size)
        dead["encoder.norm.bias"] = torch.zeros(16 * feature_size)
    rows += [Row("filled", value.shape, "", name, "influences nothing, is asked for") for name, value in dead.items()]
    return weights | dead, "model" if pretraining else "state_dict", rows


def next_step(source: Source, to: str, out: Path) -> str:
    """What to go on with: a command, lines of Python, or a hint."""
    feature_size, channels = source.stem.shape[:2]
    if to == "published":
        return "in the authors' code, a pre-training is ckpt_best.pth in --load_dir and a fine-tuning is --checkpoint"
    if to == "stock":
        size = f"in_channels={channels}, out_channels={source.classes or 1}, feature_size={feature_size}"
        strict = "" if source.classes and BLOCK not in source.tensors else ", strict=False"
        return (
            f"network = monai.networks.nets.SwinUNETR({size})\n"
            f'network.load_state_dict(torch.load({str(out)!r}, weights_only=True)["model"]{strict})'
        )
    bundle = f"bundles/{'feta_mri' if source.classes == 8 else 'btcv_ct'}_segmentation"
    if source.classes > 1:
        config, use = "inference", f"--checkpoint {shlex.quote(str(out))} --dataset_dir SCANS"
    else:
        config, use = "train", f"--pretrained {shlex.quote(str(out))} --datalist DATALIST.json"
    files = f"{bundle}/configs/{config}.json"
    if source.repeats_octants:
        files = f"\"['{files}','{bundle}/configs/published.json']\""
        use += "" if BLOCK in source.tensors else " --network_def#block_embedding False"
    return (
        f"python -m monai.bundle run --config_file {files} --bundle_root {bundle} --feature_size {feature_size} {use}"
    )


def run(options: argparse.Namespace) -> None:
    """Read, recognise, convert, report and write.

    Raises:
        BadInput: for wrong arguments, or weights that can't be converted; nothing is written then.
    """
    out = Path(options.out)
    if out.is_dir() or not os.access(out.parent, os.W_OK) or os.path.realpath(out) == os.path.realpath(options.source):
        raise BadInput(f"{out} must be another file than {options.source}, in a folder that can be written to.")
    checkpoint = read(options.source)
    if resenc.is_resenc(checkpoint.weights):
        return convert_resenc(checkpoint, options)
    if options.to == "nnunet":
        raise BadInput(f"{options.source} is of no residual-encoder U-Net, and nnU-Net has no other of the bundles'.")
    source = recognise(checkpoint.weights)
    feature_size = len(source.stem)
    if options.feature_size not in (None, feature_size):
        raise BadInput(f"{options.source} has the feature size {feature_size}, not {options.feature_size}.")
    model, rows = convert(source, network_for(source, options.to == "stock"))
    unused = {row.source: checkpoint.weights[row.source] for row in rows if row.status == "unused"}
    names = {name: source.names[name] for name in model if name in source.names}
    content: dict[str, Any] = {"model": model, "origin": {"key": checkpoint.key, "names": names, "unused": unused}}
    if options.to == "published":
        weights, key = checkpoint.weights, checkpoint.key
        if checkpoint.kept is None and source.kind == OTHER and UNCALLED[0] not in source.tensors:
            weights, key, rows = publish(source)
        else:
            kept = checkpoint.kept or ()
            rows = [
                Row("restored" if came in kept else "taken" if came == name else "renamed", value.shape, name, came)
                for (came, value), name in zip(weights.items(), source.tensors, strict=True)
            ]
        content = weights if key is None else {key: weights}
    with replacing(out) as part:
        torch.save(content, part)
    print(f"Recognised: {source}.", *rows, sep="\n")
    print(", ".join(f"{count} {status}" for status, count in Counter(row.status for row in rows).items()) + ".")
    if checkpoint.others:
        print(f"Left out, as no weights: {', '.join(checkpoint.others)}.")
    if options.to == "stock" and source.repeats_octants:
        print(
            "Note: these were trained with another patch merging than that of a stock network of MONAI 1.5 or newer, "
            "which gives other outputs; --to ours keeps them."
        )
    print(f"Weights: {out}\nNext:\n{next_step(source, options.to, out)}")


def convert_resenc(checkpoint: Checkpoint, options: argparse.Namespace) -> None:
    """Turn weights of a residual-encoder U-Net, report and write; those for nnU-Net with a plan beside them.

    Raises:
        BadInput: as `run`.
    """
    if options.to not in ("ours", "nnunet") or (options.to == "nnunet") is (options.plans is None):
        raise BadInput("Weights of a residual-encoder U-Net are for --to ours, or for --to nnunet with its --plans.")
    network, names = resenc.read(checkpoint.weights)
    if checkpoint.turn is not None:  # to x, y, z
        network = resenc.turned(network, [list(resenc.nnunet_axes(checkpoint.turn)).index(axis) for axis in range(3)])
    out, plan = Path(options.out), None
    if options.to == "nnunet":
        plans, settings = resenc.read_plans(options.plans), (training_of(options.source) or {}).get("settings") or {}
        network = resenc.turned(network, resenc.nnunet_axes(plans["transpose_forward"]))
        plan = resenc.plan(network, plans, out.stem, settings)
    sizes = resenc.architecture(network.state_dict())
    if options.feature_size not in (None, width := sizes["features_per_stage"][0]):
        raise BadInput(f"{options.source} has the feature size {width}, not {options.feature_size}.")
    with replacing(out) as part:
        torch.save({"network_weights" if plan else "model": network.state_dict()}, part)
    rows = [
        Row("taken" if name == target else "the same", checkpoint.weights[name].shape, name, target)
        for name, target in names.items()
    ]
    channels, classes = sizes["input_channels"], sizes["num_classes"]
    print(
        f"Recognised: a residual-encoder U-Net of {sizes['n_stages']} stages, feature size {width}, {channels} input "
        f"and {classes} output channels.",
        *rows,
        f"{len(set(names.values()))} tensors under {len(names)} names.",
        sep="\n",
    )
    if checkpoint.others:
        print(f"Left out, as no weights: {', '.join(checkpoint.others)}.")
    if plan:
        file = Path(options.plans).with_name(f"{out.stem}.json")
        write_json(file, plan)
        steps = "nnUNetv2_preprocess -d DATASET -c 3d_fullres -plans_name {0}\n"
        steps += "nnUNetv2_train DATASET 3d_fullres FOLD -p {0} -pretrained_weights {1}"
        print(f"Plan: {file}\nWeights: {out}\nNext:", steps.format(out.stem, shlex.quote(str(out))), sep="\n")
    else:
        bundle = "bundles/feta_mri_segmentation"
        files = f"\"['{bundle}/configs/train.json','{bundle}/configs/resenc.json']\""
        print(
            f"Weights: {out}\nNext:\npython -m monai.bundle run --config_file {files} --bundle_root {bundle}"
            f"{resenc.overrides(sizes)} --pretrained {shlex.quote(str(out))} --datalist DATALIST.json"
        )


def arguments(add: Callable) -> None:
    add("source", metavar="SOURCE", help="weights: a state dict, bare or under 'model' or 'state_dict'")
    add("out", metavar="OUT", help="file to write, for a bundle's --pretrained or --checkpoint")
    add("--to", choices=("ours", "stock", "published", "nnunet"), default="ours", help="ours: as they are, for the "
        "networks of the bundles (%(default)s); stock: for MONAI's SwinUNETR; published: with the names that they had "
        "or, for this project's own, that the authors' code loads; nnunet: for its -pretrained_weights")  # fmt: skip
    add("--plans", metavar="PLANS.json", help="nnU-Net's plan of the data set that the weights are for")
    add("--feature_size", type=int, metavar="N", help="refuse weights of another feature size")


main = tool("weights", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
