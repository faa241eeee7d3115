"""The loss of pre-training, reconstruction (L1) plus cross-modal contrastive (CMCL), and that of fine-tuning."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import nn
from torch.distributed.nn.functional import all_gather

from custom.errors import BadInput


class CrossModalContrastiveLoss(nn.Module):
    """Pull embeddings of one modality together, push those of different modalities apart.

    With the cosine similarities s_ij of all B x B pairs and y_ij = 1 where the modalities agree,
    loss = (BCE(exp(t) * s, y) + BCE(exp(t) * s^T, y^T)) / 2, where BCE takes logits and averages over the pairs. For
    embeddings of one network s is symmetric, so that both halves are equal and one is computed.

    In a distributed run the pairs are those of all ranks, and the gradients flow to all ranks: averaged over them, as
    DistributedDataParallel does, they are those of one process with the whole batch.

    Args:
        temperature: t, whose exponential scales the similarities.

    Shapes:
        embedding: (B, C), any float type; computed in float32, which keeps it finite under autocast.
        modality: (B,), integers, equal where the modality is the same.

    Returns:
        A scalar in float32.

    Source:
        the paper's CMCL with t = 0.07. The published code takes dot products without normalising and class ids for
        column indices, and gives 0.0 for (ct, t1) and 3743 for (t1, ct).
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.scale = float(torch.tensor(temperature).exp())

    def forward(self, embedding: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = F.normalize(embedding.float(), dim=1)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                embedding, modality = torch.cat(all_gather(embedding)), torch.cat(all_gather(modality))
            same = (modality[:, None] == modality[None, :]).float()
            return F.binary_cross_entropy_with_logits(self.scale * embedding @ embedding.T, same)


class DisruptiveLoss(nn.Module):
    """L1 between restored and original scan, plus `contrastive_weight` times `CrossModalContrastiveLoss`.

    After each call `parts` holds both terms, detached, under "reconstruction" and "contrastive", for logging.

    Args:
        contrastive_weight: alpha; 0 computes no contrastive loss.
        temperature: see `CrossModalContrastiveLoss`.

    Shapes:
        prediction: (restored (B, 1, D, H, W), embedding (B, C)).
        target: {"image": original (B, 1, D, H, W), "modality": (B,) integers}.

    Returns:
        A scalar in float32.

    Source:
        the paper's L = L1 + alpha * CMCL, alpha = 0.05.
    """

    def __init__(self, contrastive_weight: float = 0.05, temperature: float = 0.07) -> None:
        super().__init__()
        self.contrastive_weight = contrastive_weight
        self.contrastive = CrossModalContrastiveLoss(temperature)
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, prediction: tuple[torch.Tensor, torch.Tensor], target: dict[str, torch.Tensor]) -> torch.Tensor:
        restored, embedding = prediction
        reconstruction = F.l1_loss(restored.float(), target["image"].float())
        contrastive = reconstruction.new_zeros(())
        if self.contrastive_weight:
            contrastive = self.contrastive(embedding, target["modality"])
        self.parts = {"reconstruction": reconstruction.detach(), "contrastive": contrastive.detach()}
        return reconstruction + self.contrastive_weight * contrastive


class WeightedDiceCELoss(DiceCELoss):
    """MONAI's `DiceCELoss`, whose weights of the classes may be a list, as a config has them, and follow the input.

    Args:
        weight: of each class, background first; None weighs all alike.
        args, kwargs: see `DiceCELoss`.

    Shapes:
        as `DiceCELoss`.

    Raises:
        BadInput: for another number of weights than of classes, and for weights that are no numbers from 0 on.
    """

    def __init__(self, *args, weight: Sequence[float] | torch.Tensor | None = None, **kwargs) -> None:
        try:
            weights = None if weight is None else torch.as_tensor(weight, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise BadInput(f"--loss#weight is {weight!r}, and should be a list of numbers.") from error
        if weights is not None and not ((weights >= 0).all() and 0 < weights.sum() < torch.inf):
            raise BadInput(f"--loss#weight is {weight!r}; weights are from 0 on, and not all 0.")
        super().__init__(*args, weight=weights, **kwargs)
        self.count = None if weights is None else weights.numel()

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self.count not in (None, input.shape[1]):
            raise BadInput(f"--loss#weight has {self.count} weights, and there are {input.shape[1]} classes.")
        self.to(input.device)  # nobody else moves a loss
        return super().forward(input, target)
