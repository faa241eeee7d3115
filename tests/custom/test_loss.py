import math

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss

from custom.errors import BadInput
from custom.loss import CrossModalContrastiveLoss, DisruptiveLoss, WeightedDiceCELoss


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_contrastive_loss_of_a_batch_by_hand():
    # Vectors at 0, 60 and 90 degrees: cosines 1/2 (0-60), 0 (0-90), sqrt(3)/2 (60-90). Their lengths do not matter.
    vectors = [(0, 1), (math.pi / 3, 5), (math.pi / 2, 0.1)]
    embedding = torch.tensor([[length * math.cos(angle), length * math.sin(angle)] for angle, length in vectors])
    modality = torch.tensor([3, 3, 8])
    scale = math.exp(0.07)
    # -log sigmoid(x) = softplus(-x) where the modalities agree, -log(1 - sigmoid(x)) = softplus(x) where they do not.
    expected = (
        3 * softplus(-scale) + 2 * softplus(-scale / 2) + 2 * softplus(0) + 2 * softplus(scale * math.sqrt(3) / 2)
    ) / 9
    assert CrossModalContrastiveLoss()(embedding, modality).item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_loss_does_not_depend_on_order_or_class_ids():
    """The published code gives 0.0 for (ct, t1) and 3743 for (t1, ct)."""
    embedding = torch.randn(2, 64)
    loss = CrossModalContrastiveLoss()
    values = [loss(embedding, torch.tensor(ids)) for ids in ([0, 1], [1, 0], [7, 3])]
    assert torch.allclose(torch.stack(values), values[0])
    assert torch.allclose(loss(embedding.flip(0), torch.tensor([0, 1])), values[0])


def test_its_gradient_pulls_one_modality_together_and_pushes_others_apart():
    embedding = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    modality = torch.tensor([0, 0, 1, 1])

    def similarities():
        unit = F.normalize(embedding, dim=1)
        cosine = unit @ unit.T
        same = modality[:, None] == modality[None]
        return cosine[same & ~torch.eye(4, dtype=bool)].mean().item(), cosine[~same].mean().item()

    before = similarities()
    CrossModalContrastiveLoss()(embedding, modality).backward()
    with torch.no_grad():
        embedding -= embedding.grad
    after = similarities()
    assert after[0] > before[0] and after[1] < before[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 6e4])
def test_finite_in_every_precision(dtype, size):
    embedding = torch.full((3, 768), size).to(dtype).requires_grad_()
    restored = torch.rand(3, 1, 8, 8, 8).to(dtype).requires_grad_()
    target = {"image": torch.rand(3, 1, 8, 8, 8), "modality": torch.tensor([0, 1, 1])}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = DisruptiveLoss()((restored, embedding), target)
    loss.backward()
    assert loss.dtype is torch.float32 and loss.isfinite()
    assert embedding.grad.isfinite().all() and restored.grad.isfinite().all()


def test_loss_is_l1_plus_alpha_times_contrastive():
    restored, image, embedding = torch.rand(2, 1, 4, 4, 4), torch.rand(2, 1, 4, 4, 4), torch.randn(2, 8)
    modality = torch.tensor([0, 1])
    loss = DisruptiveLoss(contrastive_weight=0.05)
    total = loss((restored, embedding), {"image": image, "modality": modality})
    contrastive = CrossModalContrastiveLoss()(embedding, modality)
    l1 = (restored - image).abs().mean()
    assert torch.allclose(total, l1 + 0.05 * contrastive)
    assert torch.allclose(loss.parts["reconstruction"], l1) and torch.allclose(loss.parts["contrastive"], contrastive)


def test_without_weight_there_is_no_contrastive_loss():
    loss = DisruptiveLoss(contrastive_weight=0)
    restored, image = torch.zeros(2, 1, 2, 2, 2), torch.ones(2, 1, 2, 2, 2)
    embedding = torch.full((2, 8), torch.nan)
    assert loss((restored, embedding), {"image": image, "modality": torch.tensor([0, 1])}) == 1


@pytest.mark.parametrize("include_background", [True, False])
def test_weights_of_classes_may_be_a_list_as_in_a_config(include_background):
    prediction, target = torch.rand(2, 3, 4, 4, 4), torch.randint(3, (2, 1, 4, 4, 4))
    options = {"to_onehot_y": True, "softmax": True, "include_background": include_background}
    expected = DiceCELoss(**options, weight=torch.tensor([0.0, 1.0, 0.5]))(prediction, target)
    assert torch.equal(WeightedDiceCELoss(**options, weight=[0, 1, 0.5])(prediction, target), expected)
    unweighted = WeightedDiceCELoss(**options)(prediction, target)
    assert torch.equal(unweighted, DiceCELoss(**options)(prediction, target)) and not torch.equal(unweighted, expected)
    with pytest.raises(BadInput, match="--loss#weight has 2 weights, and there are 3 classes"):
        WeightedDiceCELoss(**options, weight=[1, 2])(prediction, target)


@pytest.mark.parametrize(
    "weight", [[0.2, -1], [0, 0], [float("nan"), 1], ["a", 1], "[0.2,1.0", {"a": 1}, [1, float("inf")]]
)
def test_weights_that_make_no_sense(weight):
    with pytest.raises(BadInput, match="--loss#weight is "):
        WeightedDiceCELoss(weight=weight)
