"""Draw the method on a phantom: a scan, disrupted, masked, and restored by a pre-trained network.

    python -m tools.phantom phantoms --subjects 16 --shape 64 --kinds fetal
    python -m tools.datalist scans.json t2=phantoms/fetal/images --validation 0.1
    python -m monai.bundle run --config_file bundles/dae_pretraining/configs/train.json \\
        --bundle_root bundles/dae_pretraining --datalist scans.json --output_dir RUN --feature_size 12 \\
        --patch_size "[64,64,32]" --batch_size 1 --max_iterations 280 --warmup_iterations 15 --learning_rate 0.004
    python -m tools.studies.method_picture docs/pictures/method.png RUN/models/model.pt

The subject drawn is not among those that the network was trained on. Everything in the picture is computed: the masked
embedding is that of the network, and the restored scan is its answer with the masking on, as in training. The picture
in docs/ is of the 98th iteration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from monai.networks.nets import SwinUNETR
from monai.transforms import NormalizeIntensity

from custom.disruption import Disrupt
from custom.engine.checkpoint import load_weights
from custom.masking import LocalMasking
from custom.network import disruptive_autoencoder
from tools import phantom
from tools._cli import tool

SUBJECT, SIDE, FEATURES, SLICE, MASKED = 100, 96, 12, 51, 0.6
ACCENT, GREY, PALE = "#c2410c", "#475569", "#e2e8f0"
# In inches: panels from left to right.
WIDTH, HEIGHT, PANEL, GAP, LEFT, BOTTOM = 11.6, 4.35, 2.3, 0.7, 0.15, 1.25


def compute(weights: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a scan, disrupted, and restored, (96, 96, 96) each, and its masked embedding (12, 48, 48, 48)."""
    drawn = phantom.fetal_head(SUBJECT, SIDE)[0]
    scan = torch.as_tensor(NormalizeIntensity(nonzero=True)(drawn[None].astype("float32")))
    disrupted = Disrupt().set_random_state(seed=0)(scan)
    network = disruptive_autoencoder(SwinUNETR(1, 1, feature_size=FEATURES), masking=LocalMasking(MASKED))
    embeddings: list[torch.Tensor] = []
    network.get_submodule("swinViT.pos_drop").register_forward_hook(lambda module, x, y: embeddings.append(y))
    load_weights(network, weights).train()
    torch.manual_seed(1)
    with torch.no_grad():
        restored = network(disrupted[None])[0]
    return scan[0], disrupted[0], restored[0, 0], embeddings[0][0]


def panel(figure: Figure, number: int, head: str, title: str, note: str) -> Axes:
    """Add an empty panel; returns its axes."""
    left = LEFT + number * (PANEL + GAP)
    axes = figure.add_axes((left / WIDTH, BOTTOM / HEIGHT, PANEL / WIDTH, PANEL / HEIGHT), xticks=[], yticks=[])
    axes.set_title(title, fontsize=11, color=GREY, pad=5)
    axes.spines[:].set_visible(False)
    center = (left + PANEL / 2) / WIDTH
    figure.text(center, 1 - 0.32 / HEIGHT, head, ha="center", fontsize=14, weight="bold", color=ACCENT)
    figure.text(center, (BOTTOM - 0.12) / HEIGHT, note, ha="center", va="top", fontsize=10, color=GREY, linespacing=1.3)
    return axes


def show(axes: Axes, image: torch.Tensor, low: float, high: float, extent: tuple | None = None) -> None:
    """Show a slice (x, y) with the front up."""
    axes.imshow(image.T, cmap="gray", origin="lower", vmin=low, vmax=high, interpolation="bilinear", extent=extent)


def show_channels(axes: Axes, embedding: torch.Tensor) -> None:
    """Show the channels of an embedding (12, x, y) side by side; those that are masked are pale and crossed out."""
    columns, rows, frame = 3, 4, 0.06
    for number, channel in enumerate(embedding):
        x, y = number % columns, rows - 1 - number // columns
        box = (x + frame, x + 1 - frame, y + frame, y + 1 - frame)
        if channel.any():
            low, high = torch.quantile(channel, torch.tensor([0.02, 0.98])).tolist()
            show(axes, channel, low, high, box)
        else:
            axes.fill(*zip(*((box[i], box[j]) for i, j in ((0, 2), (1, 2), (1, 3), (0, 3))), strict=True), color=PALE)
            axes.plot(box[:2], box[2:], box[:2], box[:1:-1], color="white", linewidth=2)
    axes.set(xlim=(0, columns), ylim=(0, rows), aspect="equal", xticks=[], yticks=[])


def draw(scan: torch.Tensor, disrupted: torch.Tensor, restored: torch.Tensor, embedding: torch.Tensor) -> Figure:
    """Draw the steps from left to right, and what the losses compare below."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=100, facecolor="white")
    low, high = torch.quantile(scan[..., SLICE], torch.tensor([0.01, 0.995])).tolist()
    show(panel(figure, 0, "Scan", "a patch, no labels", ""), scan[..., SLICE], low, high)
    first = "noise of variance 0.1, then\na quarter of the resolution"
    show(panel(figure, 1, "1  Disrupt", "what the encoder sees", first), disrupted[..., SLICE], low, high)
    second = "60 % of the channels of the\nembedding are set to zero"
    show_channels(panel(figure, 2, "2  Mask", "what the Swin blocks see", second), embedding[..., SLICE // 2])
    show(panel(figure, 3, "3  Restore", "what the decoder gives", ""), restored[..., SLICE], low, high)

    def arrow(start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
        points = [(x / WIDTH, y / HEIGHT) for x, y in (start, end)]
        figure.add_artist(FancyArrowPatch(*points, transform=figure.transFigure, mutation_scale=16, **style))

    lefts = [LEFT + number * (PANEL + GAP) for number in range(4)]
    for left in lefts[1:]:
        middle = BOTTOM + PANEL / 2
        arrow((left - GAP + 0.1, middle), (left - 0.1, middle), arrowstyle="-|>", color=ACCENT, linewidth=2.5)
    ends = [(left + PANEL / 2, BOTTOM - 0.1) for left in (lefts[0], lefts[3])]
    bend = "bar,fraction=0,armA=48,armB=48"
    arrow(*ends, arrowstyle="<|-|>", connectionstyle=bend, color=GREY, linewidth=1.5, shrinkA=0, shrinkB=0)
    text = "loss: L1 distance of the restored patch from the scan"
    figure.text(0.5, 0.14 / HEIGHT, text, ha="center", fontsize=11, color=GREY)
    return figure


def arguments(add: Callable) -> None:
    add("out", metavar="OUT.png", type=Path, help="picture to write")
    add("weights", metavar="MODEL.pt", type=Path, help="of a pre-training of feature size 12, see below")


def run(options: argparse.Namespace) -> None:
    draw(*compute(options.weights)).savefig(options.out, pil_kwargs={"optimize": True})
    print(f"Picture: {options.out}")


main = tool("studies.method_picture", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
