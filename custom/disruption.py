"""Disruptions of the image: noise, low resolution, and masked cubes (the MAE baseline); of a scan or of a batch."""

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, RandFlip, Randomizable, RandSimulateLowResolution, Transform
from monai.utils import convert_to_dst_type, convert_to_tensor

from custom.errors import BadInput

IMAGE_DISRUPTIONS = ("noise", "downsampling", "token_masking")
DISRUPTIONS = (*IMAGE_DISRUPTIONS, "local_masking")


def check_disruptions(names: Sequence[str]) -> Sequence[str]:
    """Return the names, or raise `BadInput` for one that does not exist."""
    unknown = [name for name in names if name not in DISRUPTIONS]
    if unknown or isinstance(names, str):
        raise BadInput(f"`disruptions` is a list of names from {list(DISRUPTIONS)}, got {names!r}.")
    return names


def mask_cubes(image: torch.Tensor, masked: NdarrayOrTensor, cube: int) -> torch.Tensor:
    """Set cubes of an image to zero.

    Args:
        image: (C, D, H, W).
        masked: boolean grid of cubes (ceil(D / cube), ceil(H / cube), ceil(W / cube)), true where to mask.
        cube: side in voxels.

    Returns:
        A new image (C, D, H, W).
    """
    grid = torch.as_tensor(masked, device=image.device)
    for axis in range(3):
        grid = grid.repeat_interleave(cube, axis)
    depth, height, width = image.shape[1:]
    return image * ~grid[:depth, :height, :width]


class Disrupt(Randomizable, Transform):
    """Disrupt an image: add noise, then lower its resolution, then mask cubes; each only if it is named.

    "local_masking" may be among the names and does nothing here: it masks the embedding, inside the network.

    Args:
        disruptions: names from "noise", "downsampling", "token_masking", "local_masking".
        noise_variance: variance of the Gaussian noise, in the squared unit of the normalised image.
        downsample_factor: the image is resampled to 1 / factor of its size, and back.
        downsample_mode: interpolation both ways, "trilinear" (the paper's linear) or "nearest" (the published code).
        token_mask_ratio: share of the cubes to mask, in [0, 1]; exactly round(ratio * number) are.
        token_size: side of a masked cube in voxels.

    Shapes:
        input and output: (C, D, H, W), float.

    Raises:
        BadInput: for an unknown name.

    Randomness:
        `self.R`; noise and cubes are drawn anew for every image.

    Source:
        the paper's x + N(0, 0.1), where 0.1 is the variance, and down- and upsampling by 4. Token masking is its MAE
        baseline (60 % of 16-voxel cubes), done here to the image, so that no skip connection sees what it hides.
    """

    def __init__(
        self,
        disruptions: Sequence[str] = ("noise", "downsampling"),
        noise_variance: float = 0.1,
        downsample_factor: float = 4,
        downsample_mode: str = "trilinear",
        token_mask_ratio: float = 0.6,
        token_size: int = 16,
    ) -> None:
        self.disruptions = check_disruptions(disruptions)
        self.noise_std = noise_variance**0.5
        self.low_resolution = RandSimulateLowResolution(
            prob=1,
            downsample_mode=downsample_mode,
            upsample_mode=downsample_mode,
            zoom_range=(1 / downsample_factor, 1 / downsample_factor),
            align_corners=None if downsample_mode == "nearest" else False,
        )
        self.token_mask_ratio = token_mask_ratio
        self.token_size = token_size
        self.noise_seed = 0
        self.masked_tokens: np.ndarray | None = None

    def set_random_state(self, seed=None, state=None) -> "Disrupt":
        super().set_random_state(seed, state)
        self.low_resolution.set_random_state(state=self.R)
        return self

    def randomize(self, image: torch.Tensor) -> None:
        """Draw the noise's seed and the cubes for an image (C, D, H, W)."""
        if "noise" in self.disruptions:
            self.noise_seed = self.R.randint(2**31)
        if "downsampling" in self.disruptions:
            self.low_resolution.randomize()
        if "token_masking" in self.disruptions:
            grid = [-(-size // self.token_size) for size in image.shape[1:]]
            count = int(np.prod(grid))
            chosen = self.R.permutation(count) < round(self.token_mask_ratio * count)
            self.masked_tokens = chosen.reshape(grid)

    def __call__(self, image: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        disrupted = convert_to_tensor(image, dtype=torch.float32)
        if randomize:
            self.randomize(disrupted)
        if "noise" in self.disruptions:
            # Drawn where the image is; MONAI's RandGaussianNoise draws with NumPy, which takes four times as long.
            generator = torch.Generator(disrupted.device).manual_seed(self.noise_seed)
            noise = torch.empty_like(disrupted).normal_(0, self.noise_std, generator=generator)
            disrupted = disrupted + noise
        if "downsampling" in self.disruptions:
            disrupted = self.low_resolution(disrupted, randomize=False)
        if "token_masking" in self.disruptions:
            disrupted = mask_cubes(disrupted, self.masked_tokens, self.token_size)
        disrupted = convert_to_dst_type(disrupted, image, dtype=torch.float32)[0]
        if isinstance(disrupted, MetaTensor):
            disrupted.copy_meta_from(image)  # MONAI 1.5's low resolution drops it
        return disrupted


class Disruptd(Randomizable, MapTransform):
    """Dictionary form of `Disrupt`.

    Args:
        keys: the images to disrupt.
        disrupt: what to do with each.
        case_seed: None draws anew at every call. A number makes the disruption a function of it and of the string
            `data[case_key]`: the same case is disrupted in the same way in every epoch, order and worker, so that a
            validation loss is comparable.
        case_key: where the name of the case is.
    """

    def __init__(
        self, keys: KeysCollection, disrupt: Disrupt, case_seed: int | None = None, case_key: str = "case"
    ) -> None:
        MapTransform.__init__(self, keys)
        self.disrupt = disrupt
        self.case_seed = case_seed
        self.case_key = case_key

    def set_random_state(self, seed=None, state=None) -> "Disruptd":
        super().set_random_state(seed, state)
        self.disrupt.set_random_state(state=self.R)
        return self

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        output = dict(data)
        if self.case_seed is not None:
            self.set_random_state(seed=(zlib.crc32(output[self.case_key].encode()) + self.case_seed) % 2**32)
        for key in self.key_iterator(output):
            output[key] = self.disrupt(output[key])
        return output


class DisruptBatch:
    """Flip and disrupt the images of a batch where they are trained on; the `prepare_batch` of the trainer.

    The batch is given both: "original", its images as they were but for the flips, and "image", disrupted.

    Args:
        disrupt: what to do with each image.
        flip_probability: of a flip along each axis, of every image by itself.

    Shapes:
        batch["image"]: (B, 1, D, H, W); batch["modality"]: B names.

    Returns:
        disrupted images (B, 1, D, H, W) and, for `DisruptiveLoss`, {"image": originals, "modality": (B,) integers}.

    Randomness:
        NumPy's global state, which `custom.engine.resume.RunState` sets before every iteration.
    """

    def __init__(self, disrupt: Disrupt, flip_probability: float = 0) -> None:
        self.disrupt = disrupt
        self.flip = Compose([RandFlip(flip_probability, axis) for axis in range(3)])

    def __call__(self, batch: dict[str, Any], device: torch.device, non_blocking: bool = False, **kwargs) -> tuple:
        for transform in (self.flip, self.disrupt):
            transform.set_random_state(seed=np.random.randint(2**31))
        images = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
        batch["original"] = torch.stack([convert_to_tensor(self.flip(image)) for image in images])
        batch["image"] = torch.stack([self.disrupt(image) for image in batch["original"]])
        # Any name has a number, the same on every rank and without a list of all names.
        modality = torch.tensor([zlib.crc32(name.encode()) for name in batch["modality"]], device=device)
        return batch["image"], {"image": batch["original"], "modality": modality}


def prepare_restoration(
    batch: Mapping[str, torch.Tensor], device: torch.device, non_blocking: bool = False, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the disrupted and the original images of a batch; the `prepare_batch` of an evaluator.

    Shapes:
        batch["image"], batch["original"]: (B, 1, D, H, W).
    """
    image, original = (batch[key].to(device, non_blocking=non_blocking, **kwargs) for key in ("image", "original"))
    return image, original
