"""From class scores to a label map on the scan, in little memory."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Invertd, InvertibleTransform, Transform

from custom.data.loading import id_type

VALUES_AT_ONCE = 2**27  # 0.5 GiB; where it resamples, MONAI takes seven times as much for where each value comes from


class LabelMapd(Transform):
    """MONAI's `Activationsd(softmax=True)`, `Invertd` and `AsDiscreted(argmax=True)` in one, a few classes at a time.

    All classes of a large CT at full resolution fill the memory several times over. Here no more of them are there at
    once than `VALUES_AT_ONCE`, or one. The label maps are the same; of equal probabilities the first class is taken.

    Args:
        key: the scores, which are overwritten by probabilities.
        transform: its inverse leads from the network's to the file's geometry.
        orig_key: the scan.
        softmax: False for what are probabilities already.

    Shapes:
        (classes, D, H, W) as the network sees the scan becomes (1, D, H, W) as the file has it, on the device of
        the scan; see `id_type`.
    """

    def __init__(
        self, key: Hashable, transform: InvertibleTransform, orig_key: Hashable = "image", softmax: bool = True
    ) -> None:
        self.key = key
        self.orig_key = orig_key
        self.softmax = softmax
        self.invert = Invertd(key, transform, orig_key, nearest_interp=False)

    @torch.no_grad()
    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        scan, scores = data[self.orig_key], data[self.key].as_subclass(torch.Tensor)
        if self.softmax:
            for slab in scores.unbind(1):
                slab.copy_(slab.softmax(0))
        count = max(1, VALUES_AT_ONCE // int(torch.as_tensor(scan.meta["spatial_shape"]).prod()))
        most = None
        for first in range(0, len(scores), count):
            inverted = self.invert({**data, self.key: MetaTensor(scores[first : first + count])})[self.key]
            for number, probability in enumerate(inverted.as_tensor(), first):
                if most is None:
                    most = probability.clone()
                    label_map = torch.zeros_like(most, dtype=id_type(len(scores)))
                else:
                    label_map.masked_fill_(probability > most, number)
                    torch.maximum(most, probability, out=most)
        return {**data, self.key: MetaTensor(label_map[None].to(scan.device), meta=inverted.meta)}
