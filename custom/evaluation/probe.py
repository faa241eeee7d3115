"""What a pre-training has learnt, seen while it trains: a linear probe of its features, the spread of its embedding."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced
from monai.transforms import Compose, CopyItemsd, RandCropByPosNegLabeld, ResampleToMatchd, SpatialPadd
from torch import nn

from custom.data.datalist import read_datalist
from custom.data.loading import LoadLabeld, LoadScand
from custom.errors import BadInput
from custom.network import submodule

logger = logging.getLogger(__name__)

CASES, CROPS, VOXELS = 8, 2, 100  # at most: cases a side, crops of each, and voxels of each class in a crop
RIDGE = 1e-2  # of a variance
KEPT = 512  # embeddings of an epoch, the last ones
COLLAPSED, FEWEST = 0.003, 16  # spread, and the embeddings that it takes to say so


class Embedding(Metric):
    """Effective rank and spread of the embeddings of an epoch, and the distance of their modalities.

    - embedding_rank: from 1 on.
    - embedding_spread: 1 minus the square of the mean of the embeddings, each of length 1: 0 where all are alike. Then
      the representation has collapsed, which is said in the log.
    - embedding_modalities: 1 minus the mean cosine of the mean embeddings of two modalities; where there are several.

    Shapes:
        update: embeddings (B, C), modalities (B,) integers.

    Source:
        Roy and Vetterli, "The effective rank", 2007.
    """

    _state_dict_all_req_keys = ("embeddings", "modalities")

    @reinit__is_reduced
    def reset(self) -> None:
        self.embeddings, self.modalities = torch.empty(0), torch.empty(0)

    @reinit__is_reduced
    def update(self, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        embeddings, modalities = (part.detach().clone() for part in output)  # the next step may overwrite them
        if len(self.embeddings):
            embeddings = torch.cat([self.embeddings.to(embeddings), embeddings])[-KEPT:]
            modalities = torch.cat([self.modalities.to(modalities), modalities])[-KEPT:]
        self.embeddings, self.modalities = embeddings, modalities

    def compute(self) -> dict[str, float]:
        embeddings, modalities = idist.all_gather(self.embeddings.float()), idist.all_gather(self.modalities)
        found = spread(embeddings, modalities)
        if len(embeddings) >= FEWEST and found["embedding_spread"] < COLLAPSED and idist.get_rank() == 0:
            logger.warning(
                f"The representation has collapsed: all crops have nearly the same embedding (spread "
                f"{found['embedding_spread']:.2g}, effective rank {found['embedding_rank']:.3g}). Lower "
                f"--learning_rate, or set --contrastive_weight 0 where there is one modality."
            )
        return found

    def completed(self, engine: Engine, name: str) -> None:
        engine.state.metrics |= self.compute()  # each by its own name


class Probe:
    """Classify the frozen features of a network that is pre-trained, by a linear model in closed form.

    Ridge regression is fitted on voxels of labelled cases, and scored on those of others. The same voxels are taken
    each time, and the training is not changed. `engine.state.metrics` gets probe_accuracy: the mean over classes of the
    share of voxels that are told right; that of a guess is 1 by the number of classes.

    Args:
        network: its weights are those of the epoch.
        stages: names of the submodules whose features are classified, such as those of a decoder.
        interval: in epochs; the last epoch counts.
        datalist: of labelled cases, see `read_datalist`: "training" to fit on, "validation" to score. None for none.
        dataset_dir: folder that relative paths in it start from.
        transforms: of a case's image, deterministic.
        modalities: the known ones.
        patch_size: in voxels.
        summary_writer: TensorBoard's, which gets the values of `Embedding` as well.

    Raises:
        BadInput: for a data list or a case that can't be used, when the training starts.

    Source:
        Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016.
    """

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[str],
        interval: int,
        datalist: str | None,
        dataset_dir: str,
        transforms: Callable,
        modalities: Sequence[str],
        patch_size: Sequence[int],
        summary_writer: Any = None,
    ) -> None:
        self.network = getattr(network, "module", network)  # of several processes one probes
        self.stages = list(stages)
        self.interval = interval
        self.datalist = datalist
        self.dataset_dir = dataset_dir
        self.transforms = transforms
        self.modalities = list(modalities)
        self.patch_size = list(patch_size)
        self.summary_writer = summary_writer
        self.crops: dict[str, list[Mapping[str, torch.Tensor]]] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def load(self, engine: Engine) -> None:
        """Load the crops of the labelled cases."""
        if self.datalist is None or self.crops:
            return
        for name in self.stages:
            submodule(self.network, name)
        for section in ("training", "validation"):
            cases = read_datalist(self.datalist, section, self.dataset_dir, self.modalities, labelled=True)
            self.crops[section] = [crop for case in cases[:CASES] for crop in self.crops_of(case)]
        fitted, scored = (
            set(torch.cat([c["label"].flatten() for c in crops]).tolist()) for crops in self.crops.values()
        )
        if len(fitted & scored) < 2:
            raise BadInput(
                f"The cases to fit and those to score of {self.datalist}, which --probe names, have no two classes in "
                f"common; name a list whose cases share their classes."
            )

    def crops_of(self, case: Mapping[str, Any]) -> list[Mapping[str, torch.Tensor]]:
        names = [str(number) for number in range(256)]  # any classes: nobody has named them
        sides = {"spatial_size": self.patch_size}
        crop = RandCropByPosNegLabeld(("image", "label"), "label", **sides, pos=1, neg=0, num_samples=CROPS)
        load = [
            CopyItemsd("image", names="scan"),
            LoadScand("scan"),
            LoadLabeld("label", names, image_key="scan"),
            self.transforms,
            ResampleToMatchd("label", key_dst="image", mode="nearest"),
            SpatialPadd(("image", "label"), self.patch_size),
            crop.set_random_state(seed=0),
        ]
        found = Compose(load)(dict(case))
        return [
            {key: torch.as_tensor(one[key]).as_subclass(torch.Tensor) for key in ("image", "label")} for one in found
        ]

    def __call__(self, engine: Engine) -> None:
        state = engine.state
        state.metrics.pop("probe_accuracy", None)
        if self.crops and (state.epoch % self.interval == 0 or state.epoch == state.max_epochs):
            state.metrics["probe_accuracy"] = self.accuracy()
        if self.summary_writer is not None:
            for name, value in state.metrics.items():
                if name.startswith(("probe_", "embedding_")):
                    self.summary_writer.add_scalar(name, value, state.iteration)

    def accuracy(self) -> float:
        """Fit on the one cases, and return the mean recall of the classes in the others."""
        training, device = self.network.training, next(self.network.parameters()).device
        self.network.eval()
        try:
            (x, y), (others, truth) = (self.samples(self.crops[side], device) for side in ("training", "validation"))
        finally:
            self.network.train(training)
        return ridge_accuracy(x, y, others, truth)

    @torch.no_grad()
    def samples(self, crops: Sequence[Mapping], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (n, C) and classes (n,) of the same voxels each time."""
        generator = torch.Generator().manual_seed(0)
        found: list[torch.Tensor] = []
        hooks = [
            self.network.get_submodule(name).register_forward_hook(lambda *call: found.append(call[-1]))
            for name in self.stages
        ]
        features, classes = [], []
        try:
            for crop in crops:
                found.clear()
                self.network(crop["image"][None].to(device))
                if len(found) != len(self.stages):
                    raise BadInput(
                        f"{type(self.network).__name__} does not call each of --probe_stages {self.stages} once; name "
                        f"others."
                    )
                label = crop["label"][0]
                places = chosen(label, generator)
                classes.append(label[tuple(places.T)].long())
                features.append(torch.cat([at(stage[0].float(), places, label.shape) for stage in found], 1))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(features).double().cpu(), torch.cat(classes)


def chosen(label: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Choose voxels of each class of a label map (D, H, W) at random; returns their indices (n, 3)."""
    places = []
    for number in label.unique():
        voxels = (label == number).nonzero()
        places.append(voxels[torch.randperm(len(voxels), generator=generator)[:VOXELS]])
    return torch.cat(places)


def at(features: torch.Tensor, places: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the features (n, C) of a stage (C, d, h, w) at voxels (n, 3) of an image of a shape (D, H, W)."""
    sizes = torch.tensor(features.shape[1:])
    index = (places * sizes // torch.tensor(list(shape))).to(features.device)
    return features[:, index[:, 0], index[:, 1], index[:, 2]].T


def ridge_accuracy(x: torch.Tensor, y: torch.Tensor, others: torch.Tensor, truth: torch.Tensor) -> float:
    """Fit classes by ridge regression, all alike, and return the mean recall of those that others have too.

    Shapes:
        x, others: (n, C), (m, C) in double; y, truth: (n,), (m,) integers.
    """
    mean, std = x.mean(0), x.std(0).clamp_min(1e-12)
    x, others = ((F.pad((part - mean) / std, (0, 1), value=1)) for part in (x, others))
    known = y.unique()
    targets = (y[:, None] == known).double()
    weights = (targets / targets.sum(0)).sum(1, keepdim=True)  # of the samples: they add up to 1 in each class
    gram = x.T @ (weights * x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    told = known[(others @ torch.linalg.solve(gram, x.T @ (weights * targets))).argmax(1)]
    recalls = [(told[truth == number] == number).double().mean() for number in known if (truth == number).any()]
    return torch.stack(recalls).mean().item()


def spread(embeddings: torch.Tensor, modalities: torch.Tensor) -> dict[str, float]:
    """Return what `Embedding` gives for embeddings (n, C) of modalities (n,)."""
    unit = F.normalize(embeddings.double().cpu(), dim=1)
    singular = torch.linalg.svdvals(unit - unit.mean(0))
    share = singular / singular.sum().clamp_min(1e-300)
    found = {
        "embedding_rank": torch.special.entr(share).sum().exp().item(),
        "embedding_spread": 1 - unit.mean(0).square().sum().item(),
    }
    kinds = modalities.unique()
    if len(kinds) > 1:
        means = F.normalize(torch.stack([unit[modalities.cpu() == kind.cpu()].mean(0) for kind in kinds]), dim=1)
        cosines = (means @ means.T)[~torch.eye(len(kinds), dtype=torch.bool)]
        found["embedding_modalities"] = 1 - cosines.mean().item()
    return found
