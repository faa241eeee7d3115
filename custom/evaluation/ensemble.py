"""Several networks and several views of a scan instead of one."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from monai.data import TestTimeAugmentation, decollate_batch
from monai.inferers import Inferer
from monai.transforms import InvertibleTransform
from torch import nn

from custom.engine.checkpoint import load_weights
from custom.errors import BadInput


def load_networks(network: nn.Module, checkpoints: Sequence[str | Path]) -> list[nn.Module]:
    """Return a copy of a network for each checkpoint, with its weights.

    Raises:
        BadInput: for no checkpoint, or one that can't be loaded.
    """
    if not checkpoints or isinstance(checkpoints, str):
        raise BadInput(f"--checkpoints is a list of files, such as \"['fold0/model.pt']\", got {checkpoints!r}.")
    return [load_weights(deepcopy(network), checkpoint) for checkpoint in checkpoints]


class TestTimeInferer(Inferer):
    """Infer from randomly transformed copies of a scan by MONAI's `TestTimeAugmentation`, and average.

    Args:
        inferer: for a single copy, such as a `SlidingWindowInferer`.
        transform: random, invertible dictionary transform of "image". No `Compose`: its inverse seeds its transforms
            anew (MONAI 1.6.1), so that after the first copy all would be turned alike.
        examples: number of copies; 0 takes the scan as it is.
        seed: the copies of every scan are transformed in the same way by every network.

    Shapes:
        inputs: (B, C, D, H, W); output: (B, classes, D, H, W), the mean of the copies' class probabilities.
    """

    __test__ = False  # pytest, this is no test

    def __init__(self, inferer: Inferer, transform: InvertibleTransform, examples: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.inferer = inferer
        self.transform = transform
        self.examples = examples
        self.seed = seed

    def __call__(self, inputs: torch.Tensor, network: Callable, *args, **kwargs) -> torch.Tensor:
        def probabilities(batch: torch.Tensor) -> torch.Tensor:
            return self.inferer(batch, network, *args, **kwargs).softmax(1)

        if not self.examples:
            return probabilities(inputs)
        augmentation = TestTimeAugmentation(
            self.transform,
            batch_size=1,
            inferrer_fn=probabilities,
            device=inputs.device,
            orig_key="image",
            output_device=inputs.device,
            return_full_data=True,
            progress=False,
        )
        means = []
        for image in decollate_batch(inputs):
            with torch.random.fork_rng():  # MONAI's DataLoader seeds the transforms from torch's own generator
                torch.manual_seed(self.seed)
                means.append(augmentation({"image": image}, self.examples).mean(0))
        return torch.stack(means)
