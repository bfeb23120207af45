"""InfoNCE with soft targets: slow loops, closed forms, invariances, errors."""

import math

import pytest
import torch

from hibio.losses.contrastive import info_nce, soft_info_nce


def pairs(n: int = 7, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    return rows[0], rows[1]


def slow(image, omics, temperature, target_temperature, group=None) -> float:
    """The formula, one pair at a time."""
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (image, omics)]
    n, total = len(image), 0.0
    for i in range(n):
        near = [j for j in range(n) if group is None or group[i] == group[j]]
        alike = [sum(float(u[i] @ u[j]) for u in unit) / 2 / target_temperature for j in near]
        target = [math.exp(a) / sum(map(math.exp, alike)) for a in alike]
        for first, second in (unit, unit[::-1]):
            logits = [float(first[i] @ second[j]) / temperature for j in near]
            whole = math.log(sum(map(math.exp, logits)))
            total -= sum(t * (x - whole) for t, x in zip(target, logits, strict=True)) / (2 * n)
    return total


@pytest.mark.parametrize("group", [None, torch.tensor([0, 0, 1, 1, 1, 2, 0])])
@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_equals_the_formula_pair_by_pair(group, spread):
    image, omics = pairs()
    found = soft_info_nce(image, omics, 0.2, spread, group)
    assert float(found) == pytest.approx(slow(image, omics, 0.2, spread, group), rel=1e-9)


def test_sharp_targets_are_identity_targets():
    image, omics = pairs()
    group = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    for groups, negatives in ((None, "all"), (group, "same_slide")):
        sharp = soft_info_nce(image, omics, 0.2, 1e-3, groups)
        identity = info_nce(image, omics, 0.2, None, groups, negatives)
        assert float(sharp) == pytest.approx(float(identity), rel=1e-6)


def test_equal_spots_share_the_mass():
    """All embeddings equal: uniform targets and logits, so the loss is ln N."""
    same = torch.ones(6, 4)
    assert float(soft_info_nce(same, same, 0.1)) == pytest.approx(math.log(6))
    lonely = soft_info_nce(*pairs(), 0.1, group_N=torch.arange(7))
    assert float(lonely) == pytest.approx(0.0, abs=1e-12)


def test_order_scale_and_the_two_towers_do_not_matter():
    image, omics = pairs()
    value = float(soft_info_nce(image, omics, 0.2))
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    assert float(soft_info_nce(image[order], omics[order], 0.2)) == pytest.approx(value)
    assert float(soft_info_nce(3 * image, omics / 7, 0.2)) == pytest.approx(value)
    assert float(soft_info_nce(omics, image, 0.2)) == pytest.approx(value)


def test_targets_have_no_gradient_and_nothing_is_zero():
    image, omics = (x.requires_grad_() for x in pairs())
    loss = soft_info_nce(image, omics, 0.2, group_N=torch.tensor([0, 0, 1, 1, 1, 2, 0]))
    loss.backward()
    assert torch.isfinite(image.grad).all()
    assert image.grad.abs().sum() > 0
    empty = soft_info_nce(image[:0], omics[:0], 0.2)
    assert float(empty.detach()) == 0.0
    assert empty.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"omics_ND": torch.zeros(6, 5)}, "expected pairs"),
        ({"group_N": torch.zeros(6)}, "one a pair"),
        ({"target_temperature": 0.0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    image, omics = pairs()
    arguments = {"image_ND": image, "omics_ND": omics, "temperature": 0.1, **change}
    with pytest.raises(ValueError, match=words):
        soft_info_nce(**arguments)
