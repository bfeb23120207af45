"""Region losses: oracles, closed forms, halo spots and single regions, errors."""

import math

import numpy as np
import pytest
import torch

from hibio.losses import info_nce, spot_to_region


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    spot = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    region = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return spot, region, torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 2, 2])


def test_spot_to_region_against_a_double_loop():
    spot, region, own = example()
    rows = []
    for z, index in zip(spot.numpy(), own.tolist(), strict=True):
        if index < 0:
            continue
        cosine = [z @ r / np.linalg.norm(z) / np.linalg.norm(r) for r in region.numpy()]
        scores = [math.exp(c / 0.2) for c in cosine]
        rows.append(-math.log(scores[index] / sum(scores)))
    assert spot_to_region(spot, region, own, 0.2).item() == pytest.approx(np.mean(rows))


def test_spot_to_region_closed_forms():
    spot, region, own = example()
    assert spot_to_region(spot, region[:1], own.clamp(max=0), 0.2).item() == 0
    assert spot_to_region(spot, region, own * 0 - 1, 0.2).item() == 0
    assert spot_to_region(spot, region[:0], own * 0 - 1, 0.2).item() == 0
    same = torch.ones(10, 4)
    loss = spot_to_region(same, same[:3], own, 0.2)
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)


def test_nothing_to_compare_leaves_a_graph_behind():
    spot, region, own = example()
    for regions, ids in ((region[:1], own.clamp(max=0)), (region, own * 0 - 1), (region[:0], -1)):
        leaf = spot.clone().requires_grad_()
        ids = torch.full((10,), -1) if isinstance(ids, int) else ids
        spot_to_region(leaf, regions, ids, 0.2).backward()
        assert leaf.grad.abs().max() == 0


def test_spot_to_region_invariance():
    spot, region, own = example()
    loss = spot_to_region(spot, region, own, 0.2)
    rows = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(spot_to_region(spot[rows] * 3, region, own[rows], 0.2), loss)
    order = torch.tensor([2, 0, 1])  # new region k is old region order[k]
    renamed = torch.where(own >= 0, order.argsort()[own.clamp(min=0)], own)
    torch.testing.assert_close(spot_to_region(spot, region[order] * 2, renamed, 0.2), loss)
    core = own >= 0
    torch.testing.assert_close(spot_to_region(spot[core], region, own[core], 0.2), loss)


def test_spot_to_region_gradient():
    spot, region, own = example()
    inputs = (spot.requires_grad_(), region.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, r: spot_to_region(s, r, own, 0.3), inputs)


@pytest.mark.parametrize("wrong", [3, -2])
def test_spot_to_region_refuses_ids_outside(wrong):
    spot, region, own = example()
    own[0] = wrong
    with pytest.raises(ValueError, match="number the regions within the batch"):
        spot_to_region(spot, region, own, 0.2)


def test_spot_to_region_refuses_shapes():
    spot, region, own = example()
    with pytest.raises(ValueError, match="one a spot"):
        spot_to_region(spot, region, own[:4], 0.2)


def test_regions_of_one_slide_are_compared_with_each_other():
    spot, _, _ = example()
    group = torch.tensor([0, 0, 1, 1, 1])
    found = info_nce(spot[:5], spot[5:], 0.2, group_N=group, negatives="same_slide")
    parts = [info_nce(spot[a:b], spot[5 + a : 5 + b], 0.2) for a, b in ((0, 2), (2, 5))]
    torch.testing.assert_close(found, (2 * parts[0] + 3 * parts[1]) / 5)
    assert info_nce(spot[:1], spot[1:2], 0.2).item() == 0
