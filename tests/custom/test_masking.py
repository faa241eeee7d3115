import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom.masking import LocalMasking


def masked_channels(output: torch.Tensor) -> torch.Tensor:
    """(B, C), true where a channel is zero everywhere."""
    return (output == 0).flatten(2).all(2)


@given(ratio=st.floats(0, 1), channels=st.integers(1, 60), batch=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_masks_exactly_the_share_in_every_sample(ratio, channels, batch):
    masked = masked_channels(LocalMasking(ratio)(torch.ones(batch, channels, 2, 3, 4)))
    assert masked.sum(1).tolist() == [round(ratio * channels)] * batch


def test_whole_channels_are_masked_and_the_others_untouched():
    embedding = torch.rand(2, 48, 4, 4, 4) + 1
    output = LocalMasking(0.6)(embedding)
    masked = masked_channels(output)
    assert (output == 0).sum() == masked.sum() * 4**3
    assert torch.equal(output[~masked], embedding[~masked])


def test_channels_differ_between_samples_and_calls():
    masking = LocalMasking(0.6)
    first, second = (masked_channels(masking(torch.ones(4, 48, 2, 2, 2))) for _ in range(2))
    assert len({tuple(row.tolist()) for row in torch.cat([first, second])}) == 8


def test_every_channel_is_masked_equally_often():
    masked = masked_channels(LocalMasking(0.6)(torch.ones(4000, 10, 1)))
    # The standard deviation of a channel's share of 4000 draws at p = 0.6 is 0.008.
    assert torch.allclose(masked.float().mean(0), torch.tensor(0.6), atol=0.04)


def test_nothing_is_masked_in_eval_mode():
    embedding = torch.rand(2, 12, 4, 4, 4)
    assert torch.equal(LocalMasking(1.0).eval()(embedding), embedding)


def test_noise_fill_is_standard_normal():
    filled = LocalMasking(1.0, fill="noise")(torch.full((4, 24, 10, 10, 10), 7.0))
    assert abs(filled.mean()) < 0.02 and abs(filled.std() - 1) < 0.02


def test_masked_channels_pass_no_gradient():
    embedding = torch.ones(2, 10, 3, requires_grad=True)
    output = LocalMasking(0.5)(embedding)
    output.sum().backward()
    assert torch.equal(embedding.grad, (output != 0).float())


def test_seeded_masks_are_identical():
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(LocalMasking(0.6)(torch.ones(2, 48, 2)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("arguments", [{"ratio": 1.1}, {"ratio": -0.1}, {"ratio": 0.5, "fill": "ones"}])
def test_refuses_what_it_can_not_do(arguments):
    with pytest.raises(ValueError, match="local masking"):
        LocalMasking(**arguments)
