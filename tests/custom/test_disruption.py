from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose

from custom.disruption import Disrupt, DisruptBatch, Disruptd, mask_cubes, prepare_restoration
from custom.errors import BadInput


def seeded(seed: int = 0, **kwargs) -> Disrupt:
    return Disrupt(**kwargs).set_random_state(seed)


@pytest.mark.parametrize("variance", [0.01, 0.1, 0.5])
def test_noise_has_the_variance_that_is_configured(variance):
    image = torch.full((1, 64, 64, 64), 3.0)
    noise = seeded(disruptions=["noise"], noise_variance=variance)(image) - image
    # The relative standard error of the variance of 64^3 normal numbers is 0.3 %.
    assert noise.var().item() == pytest.approx(variance, rel=0.015)
    assert abs(noise.mean().item()) < 0.01


def test_noise_is_fresh_for_every_call():
    disrupt, image = seeded(disruptions=["noise"]), torch.zeros(1, 8, 8, 8)
    assert not torch.equal(disrupt(image), disrupt(image))


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_downsampling_is_interpolation_by_the_factor_and_back(mode):
    image = torch.rand(1, 32, 48, 64)
    kwargs = {"align_corners": False} if mode == "trilinear" else {}
    low = F.interpolate(image[None], size=(8, 12, 16), mode=mode, **kwargs)
    expected = F.interpolate(low, size=(32, 48, 64), mode=mode, **kwargs)[0]
    disrupted = seeded(disruptions=["downsampling"], downsample_factor=4, downsample_mode=mode)(image)
    assert torch.allclose(disrupted, expected)


def test_nearest_downsampling_leaves_blocks_of_the_factor():
    disrupted = seeded(disruptions=["downsampling"], downsample_factor=4, downsample_mode="nearest")(
        torch.rand(1, 16, 16, 16)
    )
    blocks = disrupted.unfold(1, 4, 4).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (blocks == blocks[..., :1]).all()
    assert len(disrupted.unique()) == 4**3


def test_noise_comes_before_downsampling():
    image = torch.zeros(1, 32, 32, 32)
    both = seeded(disruptions=["noise", "downsampling"])(image)
    noisy = seeded(disruptions=["noise"])(image)
    assert torch.allclose(both, seeded(disruptions=["downsampling"])(noisy))


@given(
    ratio=st.floats(0, 1), size=st.integers(1, 20), shape=st.tuples(*[st.integers(1, 40)] * 3), seed=st.integers(0, 99)
)
@settings(max_examples=50, deadline=None)
def test_token_masking_zeroes_exactly_the_share_of_whole_cubes(ratio, size, shape, seed):
    disrupt = seeded(seed, disruptions=["token_masking"], token_mask_ratio=ratio, token_size=size)
    zero = disrupt(torch.ones(1, *shape))[0] == 0
    grid = [-(-side // size) for side in shape]
    cubes = [zero[tuple(slice(index * size, (index + 1) * size) for index in place)] for place in np.ndindex(*grid)]
    assert all(cube.all() or not cube.any() for cube in cubes)
    assert sum(bool(cube.all()) for cube in cubes) == round(ratio * len(cubes))


def test_mask_cubes_by_hand():
    masked = np.zeros((2, 1, 1), bool)
    masked[1] = True
    assert mask_cubes(torch.ones(1, 4, 2, 2), masked, 2)[0, :, 0, 0].tolist() == [1, 1, 0, 0]


def test_local_masking_alone_leaves_the_image():
    image = torch.rand(1, 8, 8, 8)
    assert torch.equal(Disrupt(["local_masking"])(image), image)


@pytest.mark.parametrize("names", [["nosie"], "noise"])
def test_unknown_disruption_is_refused(names):
    with pytest.raises(BadInput, match="noise"):
        Disrupt(names)


def test_the_original_is_untouched_and_the_meta_data_kept():
    image = MetaTensor(torch.rand(1, 16, 16, 16), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    before = image.clone()
    disrupted = Disrupt(["noise", "downsampling", "token_masking"])(image)
    assert torch.equal(image, before)
    assert isinstance(disrupted, MetaTensor) and torch.equal(disrupted.affine, image.affine)
    assert not isinstance(Disrupt()(image.as_tensor()), MetaTensor)


@pytest.mark.parametrize("seed", [0, 1])
def test_dictionary_and_array_agree_and_are_reproducible(seed):
    image = torch.rand(1, 16, 16, 16)
    names = ["noise", "downsampling", "token_masking"]
    results = [Disruptd("image", Disrupt(names)).set_random_state(seed)({"image": image})["image"] for _ in range(2)]
    assert torch.equal(*results)
    assert torch.equal(results[0], seeded(seed, disruptions=names)(image))


def test_compose_seeds_it():
    results = []
    for seed in (5, 5, 6):
        pipeline = Compose([Disruptd("image", Disrupt())])
        pipeline.set_random_state(seed)
        results.append(pipeline({"image": torch.zeros(1, 8, 8, 8)})["image"])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_case_seed_makes_the_disruption_a_function_of_the_case():
    image = torch.zeros(1, 8, 8, 8)
    disrupt = Disruptd("image", Disrupt(), case_seed=0)
    a, b = {"image": image, "case": "a"}, {"image": image, "case": "b"}
    first = [disrupt(case)["image"] for case in (a, b)]
    again = [disrupt(case)["image"] for case in (b, a)]
    assert torch.equal(first[0], again[1]) and torch.equal(first[1], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], Disruptd("image", Disrupt(), case_seed=1)(a)["image"])


def test_modalities_of_a_batch_are_numbered_by_name():
    batch = {"image": torch.rand(3, 1, 2, 2, 2), "modality": ["ct", "t1", "ct"]}
    first, second, third = DisruptBatch(Disrupt([]))(batch, torch.device("cpu"))[1]["modality"].tolist()
    assert first == third != second


def test_restoration_is_evaluated_against_the_original():
    batch = {"image": torch.zeros(1, 1, 2, 2, 2), "original": torch.ones(1, 1, 2, 2, 2)}
    assert [part.mean().item() for part in prepare_restoration(batch, torch.device("cpu"))] == [0, 1]


def test_a_batch_is_disrupted_as_the_global_seed_says_and_keeps_its_originals():
    prepare, images = DisruptBatch(Disrupt(["noise"])), torch.rand(2, 1, 16, 16, 16)
    results = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        batch = {"image": images, "modality": ["ct", "t1"]}
        image, target, *_ = prepare(batch, torch.device("cpu"))
        assert torch.equal(target["image"], images) and target["modality"].shape == (2,)
        assert batch["image"] is image and batch["original"] is target["image"]  # what a NaN is looked for in
        noise = image - images
        assert noise.std().item() == pytest.approx(0.1**0.5, rel=0.05) and not torch.equal(noise[0], noise[1])
        results.append(noise)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_batch_is_flipped_along_any_axis_and_restored_as_flipped():
    image = torch.rand(1, 4, 4, 4)
    flips = [axes for count in range(4) for axes in combinations((1, 2, 3), count)]
    np.random.seed(0)
    batch = {"image": image.expand(400, -1, -1, -1, -1), "modality": ["ct"] * 400}
    flipped, target, *_ = DisruptBatch(Disrupt([]), flip_probability=0.5)(batch, torch.device("cpu"))
    assert torch.equal(flipped, target["image"]) and type(flipped) is torch.Tensor
    counts = [sum(torch.equal(one, image.flip(axes)) for one in flipped) for axes in flips]
    assert sum(counts) == 400 and min(counts) > 25  # of 50 each
