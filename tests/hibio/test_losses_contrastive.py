"""InfoNCE and near-duplicate pairs: double-loop oracles, closed forms, invariances, errors.

What is computed in tiles is compared with dense matrices in test_losses_tiles.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hibio.losses import NearDuplicates, info_nce


@dataclass(frozen=True)
class Given:
    """Excluded pairs from a whole mask."""

    mask: torch.Tensor

    @property
    def n_spots(self) -> int:
        return len(self.mask)

    def rows(self, start, stop, columns=slice(None)):
        return self.mask[start:stop, columns]


def near_duplicates(*arguments) -> torch.Tensor:
    pairs = NearDuplicates(*arguments)
    return pairs.rows(0, pairs.n_spots)


def pairs(n: int = 9, width: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, width, generator=generator, dtype=torch.float64))


def slow_info_nce(image, omics, temperature, exclude=None, group=None) -> float:
    """Reference: every pair in Python; ``group`` limits the candidates to the same group."""
    image, omics = image.numpy(), omics.numpy()
    n = len(image)
    total = 0.0
    for i in range(n):
        for query, key, turned in ((image, omics, False), (omics, image, True)):
            scores = {}
            for j in range(n):
                gone = exclude is not None and bool(exclude[j, i] if turned else exclude[i, j])
                other = group is not None and group[i] != group[j]
                if j == i or not (gone or other):
                    cosine = query[i] @ key[j] / np.linalg.norm(query[i]) / np.linalg.norm(key[j])
                    scores[j] = math.exp(cosine / temperature)
            total -= math.log(scores[i] / sum(scores.values()))
    return total / (2 * n)


GROUP = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1])


def test_against_a_double_loop():
    image, omics = pairs()
    exclude = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.4  # not symmetric
    everything = info_nce(image, omics, 0.2, Given(exclude), GROUP, "all").item()
    same = info_nce(image, omics, 0.2, Given(exclude), GROUP, "same_slide").item()
    mixed = info_nce(image, omics, 0.2, Given(exclude), GROUP, "mixed").item()
    assert everything == pytest.approx(slow_info_nce(image, omics, 0.2, exclude), rel=1e-9)
    assert same == pytest.approx(slow_info_nce(image, omics, 0.2, exclude, GROUP), rel=1e-9)
    assert mixed == pytest.approx((everything + same) / 2, rel=1e-12)
    assert len({round(v, 6) for v in (everything, same, mixed)}) == 3


def test_equals_cross_entropy_of_the_library():
    image, omics = pairs(seed=3)
    logits = torch.nn.functional.cosine_similarity(image[:, None], omics[None], dim=2) / 0.1
    target = torch.arange(9)
    expected = torch.nn.functional.cross_entropy(logits, target)
    expected = (expected + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(info_nce(image, omics, 0.1), expected)


def test_closed_forms():
    same = torch.ones(7, 3)
    assert info_nce(same, same, 0.1).item() == pytest.approx(math.log(7), rel=1e-6)
    apart = torch.eye(4)
    expected = math.log(1 + 3 * math.exp(-1 / 0.5))
    assert info_nce(apart, apart, 0.5).item() == pytest.approx(expected, rel=1e-6)
    assert info_nce(same[:1], -same[:1], 0.1).item() == 0
    assert info_nce(same[:0], same[:0], 0.1).item() == 0


def test_alone_in_its_slide_or_all_excluded_costs_nothing():
    image, omics = pairs()
    alone = torch.arange(9)
    assert info_nce(image, omics, 0.1, group_N=alone, negatives="same_slide").item() == 0
    assert info_nce(image, omics, 0.1, Given(torch.ones(9, 9, dtype=torch.bool))).item() == 0


def test_excluding_removes_a_negative_and_never_the_diagonal():
    image, omics = pairs()
    none = torch.zeros(9, 9, dtype=torch.bool)
    diagonal = torch.eye(9, dtype=torch.bool)
    plain = info_nce(image, omics, 0.1)
    torch.testing.assert_close(info_nce(image, omics, 0.1, Given(none)), plain)
    torch.testing.assert_close(info_nce(image, omics, 0.1, Given(diagonal)), plain)
    one = none.clone()
    one[2, 5] = True
    assert info_nce(image, omics, 0.1, Given(one)) < plain


def test_invariance_to_order_scale_and_side():
    image, omics = pairs()
    exclude = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.3
    loss = info_nce(image, omics, 0.1, Given(exclude), GROUP, "mixed")
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    turned = info_nce(
        image[order], omics[order], 0.1, Given(exclude[order][:, order]), GROUP[order], "mixed"
    )
    torch.testing.assert_close(turned, loss)
    scale = torch.linspace(0.1, 30, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        info_nce(image * scale, omics, 0.1, Given(exclude), GROUP, "mixed"), loss
    )
    torch.testing.assert_close(info_nce(omics, image, 0.1, Given(exclude.T), GROUP, "mixed"), loss)


def test_gradient():
    image, omics = (tensor.requires_grad_() for tensor in pairs(5))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    exclude = torch.eye(5, dtype=torch.bool).roll(1, 0)
    group = torch.tensor([0, 0, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda a, b, t: info_nce(a, b, t, Given(exclude), group, "mixed"),
        (image, omics, temperature),
    )


def test_half_precision_keeps_the_loss_in_float32():
    image, omics = (tensor.float() for tensor in pairs(9, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(image, omics, 0.05)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, info_nce(image, omics, 0.05), rtol=0, atol=0)
    half = info_nce(image.bfloat16(), omics.bfloat16(), 0.05)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"omics_ND": torch.ones(3, 2)}, "row by row"),
        ({"temperature": 0.0}, "expected more than 0"),
        ({"temperature": float("nan")}, "expected more than 0"),
        ({"temperature": torch.ones(2)}, "one number"),
        ({"exclude": Given(torch.ones(3, 3))}, "exclude is of 3 spots"),
        ({"negatives": "same_slide"}, "needs group_N"),
        ({"negatives": "mixed", "group_N": torch.ones(3)}, "needs group_N"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"negatives": "hard"}, "all, same_slide, mixed"),
        ({"image_ND": torch.ones(4), "omics_ND": torch.ones(4)}, "expected"),
    ],
)
def test_errors(change, words):
    arguments = {"image_ND": torch.ones(4, 2), "omics_ND": torch.ones(4, 2), "temperature": 0.1}
    with pytest.raises(ValueError, match=words):
        info_nce(**{**arguments, **change})


def cloud(n: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(5)
    vector = np.repeat(rng.normal(size=(4, 6)), n // 4, axis=0) + rng.normal(size=(n, 6)) * 0.3
    xy_um = rng.uniform(0, 400, size=(n, 2))
    return torch.tensor(vector), torch.tensor(xy_um), torch.tensor(rng.integers(0, 2, n))


def test_near_duplicates_against_a_double_loop():
    vector, xy_um, slide = cloud()
    found = near_duplicates(vector, xy_um, slide, 150.0, 0.9)
    expected = torch.zeros_like(found)
    for i in range(40):
        for j in range(40):
            correlation = np.corrcoef(vector[i], vector[j])[0, 1]
            distance = np.hypot(*(xy_um[i] - xy_um[j]).numpy())
            near = i != j and slide[i] == slide[j] and distance < 150 and correlation > 0.9
            expected[i, j] = bool(near)
    assert torch.equal(found, expected)
    assert 0 < expected.sum() < 200


def test_near_duplicates_closed_forms():
    vector = torch.tensor([[1.0, 2, 3], [10, 20, 30], [3, 2, 1], [0.1, 0.1, 0.1], [0.1, 0.1, 0.1]])
    xy_um = torch.zeros(5, 2)
    slide = torch.zeros(5, dtype=torch.long)
    found = near_duplicates(vector, xy_um, slide, 1.0, 0.9)
    assert found.nonzero().tolist() == [[0, 1], [1, 0]]  # opposite and constant rows are not alike
    assert not near_duplicates(vector, xy_um, slide, 0.0, 0.9).any()  # closer than r, not as close
    assert near_duplicates(vector[:0], xy_um[:0], slide[:0], 1.0, 0.9).shape == (0, 0)


def test_near_duplicates_does_not_depend_on_where_the_slide_lies():
    vector, xy_um, slide = cloud()
    found = near_duplicates(vector.float(), xy_um.float().round(), slide, 150.0, 0.9)
    moved = near_duplicates(vector.float(), xy_um.float().round() + 1e6, slide, 150.0, 0.9)
    assert torch.equal(found, moved)
    assert torch.equal(found, found.T)


def test_near_duplicates_errors():
    vector, xy_um, slide = cloud()
    with pytest.raises(ValueError, match="expected"):
        near_duplicates(vector, xy_um[:5], slide, 150.0, 0.9)
    with pytest.raises(ValueError, match="radius_um"):
        near_duplicates(vector, xy_um, slide, -1.0, 0.9)
