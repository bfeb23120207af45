"""Spatially-aware contrast: loops in Python, closed forms, micrometres, invariances, errors."""

import math

import numpy as np
import pytest
import torch

from hibio.losses import SpatialPairs, spatial_contrast

N = 24


def cloud(seed: int = 0, n: int = N) -> dict[str, torch.Tensor]:
    """Spots of three kinds on two slides of 500 um."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    profile = rng.normal(size=(3, 6))[kind] + 0.5 * rng.normal(size=(n, 6))
    return {
        "view_a_SD": torch.tensor(rng.normal(size=(n, 5))),
        "view_b_SD": torch.tensor(rng.normal(size=(n, 5))),
        "xy_um_S2": torch.tensor(rng.uniform(0, 500, size=(n, 2))),
        "slide_of_spot_S": torch.tensor(rng.integers(0, 2, n)),
        "profile_SV": torch.tensor(profile),
    }


def spatial_pairs(**arguments) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = SpatialPairs(**arguments)
    return pairs.rows(0, len(pairs.profile_SV))


def where(spots: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in spots.items() if not name.startswith("view")}


def slow_relation(spots, i, j, radius, correlation) -> str:
    """Reference: "positive", "negative" or "neither" for one pair."""
    if i == j:
        return "positive"
    xy = spots["xy_um_S2"].numpy()
    if spots["slide_of_spot_S"][i] != spots["slide_of_spot_S"][j]:
        return "negative"
    if math.hypot(*(xy[i] - xy[j])) >= radius:
        return "negative"
    profile = spots["profile_SV"].numpy()
    alike = np.corrcoef(profile[i], profile[j])[0, 1] > correlation
    return "positive" if alike else "neither"


def slow_contrast(spots, temperature, radius, correlation) -> float:
    """Reference: every row, positive and candidate in Python."""
    a, b = spots["view_a_SD"].numpy(), spots["view_b_SD"].numpy()
    means = []
    for query, key in ((a, b), (b, a)):
        rows = []
        for i in range(len(query)):
            told = [slow_relation(spots, i, j, radius, correlation) for j in range(len(query))]
            if "negative" not in told:
                continue
            score = {
                j: key[j] @ query[i] / np.linalg.norm(key[j]) / np.linalg.norm(query[i])
                for j, kind in enumerate(told)
                if kind != "neither"
            }
            total = sum(math.exp(s / temperature) for s in score.values())
            log_p = [math.log(math.exp(score[j] / temperature) / total) for j in score]
            chosen = [p for j, p in zip(score, log_p, strict=True) if told[j] == "positive"]
            rows.append(-sum(chosen) / len(chosen))
        means.append(sum(rows) / len(rows) if rows else 0.0)
    return sum(means) / 2


@pytest.mark.parametrize(("radius", "correlation"), [(150.0, 0.5), (250.0, 0.0), (40.0, 0.9)])
def test_against_loops(radius, correlation):
    spots = cloud()
    settings = {"radius_um": radius, "correlation": correlation}
    found = spatial_contrast(**spots, temperature=0.3, **settings)
    expected = slow_contrast(spots, 0.3, radius, correlation)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_pairs_against_a_double_loop():
    spots = cloud(seed=1)
    positive, negative = spatial_pairs(**where(spots), radius_um=200.0, correlation=0.3)
    seen = set()
    for i in range(N):
        for j in range(N):
            told = slow_relation(spots, i, j, 200.0, 0.3)
            assert (bool(positive[i, j]), bool(negative[i, j])) == (
                told == "positive",
                told == "negative",
            )
            seen.add((told, i == j))
    assert len(seen) == 4  # a pair of every kind, and the diagonal
    assert torch.equal(positive, positive.T)
    assert torch.equal(negative, negative.T)
    assert positive.diagonal().all()


def line(*places: float) -> dict[str, torch.Tensor]:
    """Spots with one profile on a line, all embeddings alike."""
    n = len(places)
    return {
        "view_a_SD": torch.ones(n, 3),
        "view_b_SD": torch.ones(n, 3),
        "xy_um_S2": torch.tensor([[x, 0.0] for x in places]),
        "slide_of_spot_S": torch.zeros(n, dtype=torch.long),
        "profile_SV": torch.tensor([[1.0, 2.0, 4.0]]).repeat(n, 1),
    }


def test_closed_forms():
    # far apart: plain InfoNCE; equal embeddings give ln n
    assert spatial_contrast(**line(0, 1e3, 2e3), temperature=0.1).item() == pytest.approx(
        math.log(3), rel=1e-6
    )
    # two near and alike, one far: every row still has the same three equal candidates
    assert spatial_contrast(**line(0, 100, 2e3), temperature=0.1).item() == pytest.approx(
        math.log(3), rel=1e-6
    )
    # the same, perfectly separated: rows 0 and 1 reach ln 2 (their two positives), row 2 reaches 0
    spots = line(0, 100, 2e3)
    spots["view_a_SD"] = spots["view_b_SD"] = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    found = spatial_contrast(**spots, temperature=0.05).item()
    assert found == pytest.approx(2 * math.log(2) / 3, rel=1e-6)


def test_near_without_correlation_takes_no_part():
    spots = line(0, 100, 2e3)
    spots["profile_SV"][1] = torch.tensor([4.0, 2.0, 1.0])
    positive, negative = spatial_pairs(**where(spots))
    assert positive.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert negative.int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]
    expected = (2 * math.log(2) + math.log(3)) / 3
    assert spatial_contrast(**spots, temperature=0.1).item() == pytest.approx(expected, rel=1e-6)


def test_another_slide_is_never_near():
    spots = line(0, 0, 0)
    spots["slide_of_spot_S"] = torch.tensor([0, 0, 1])
    positive, negative = spatial_pairs(**where(spots))
    assert positive.int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert torch.equal(negative, ~positive)


def test_micrometres_matter():
    spots = cloud()
    wide = {**spots, "xy_um_S2": spots["xy_um_S2"] * 10}
    positive, negative = spatial_pairs(**where(spots))
    positive_wide, negative_wide = spatial_pairs(**where(wide))
    assert positive.sum() > positive_wide.sum()
    assert negative.sum() < negative_wide.sum()
    plain = spatial_contrast(**spots, temperature=0.2)
    assert not torch.allclose(plain, spatial_contrast(**wide, temperature=0.2))
    scaled = spatial_contrast(**wide, temperature=0.2, radius_um=1500.0)
    torch.testing.assert_close(scaled, plain)


def test_without_a_negative_the_loss_is_zero_with_a_graph():
    for places in ((), (0.0,), (0.0, 50.0, 100.0)):
        spots = line(*places) if places else {k: v[:0] for k, v in line(0.0).items()}
        spots["view_a_SD"] = spots["view_a_SD"].clone().requires_grad_()
        loss = spatial_contrast(**spots, temperature=0.1)
        assert loss.item() == 0
        loss.backward()
        assert not spots["view_a_SD"].grad.any()


def test_rows_without_a_negative_are_left_out_of_the_mean():
    """The middle spot has everyone near; only the two ends compare."""
    spots = line(0, 100, 200)
    assert spatial_contrast(**spots, temperature=0.1).item() == pytest.approx(math.log(3), rel=1e-6)


def test_invariance_to_order_views_scale_and_to_where_the_slide_lies():
    spots = cloud()
    plain = spatial_contrast(**spots, temperature=0.2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = {name: value[order] for name, value in spots.items()}
    torch.testing.assert_close(spatial_contrast(**shuffled, temperature=0.2), plain)
    a, b = spots["view_a_SD"], spots["view_b_SD"]
    swapped = {**spots, "view_a_SD": b * 3, "view_b_SD": a * 0.1}
    torch.testing.assert_close(spatial_contrast(**swapped, temperature=0.2), plain)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    moved = {**spots, "xy_um_S2": spots["xy_um_S2"] @ turn + 3e4}
    torch.testing.assert_close(spatial_contrast(**moved, temperature=0.2), plain)
    profile = spots["profile_SV"] * 7 - 2  # Pearson: scale and offset of a profile cancel
    torch.testing.assert_close(
        spatial_contrast(**{**spots, "profile_SV": profile}, temperature=0.2), plain
    )


def test_gradient():
    spots = cloud(n=7)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    a, b = (spots[name].requires_grad_() for name in ("view_a_SD", "view_b_SD"))

    def loss(a, b, temperature):
        views = {"view_a_SD": a, "view_b_SD": b}
        return spatial_contrast(**{**spots, **views}, temperature=temperature, radius_um=200.0)

    assert torch.autograd.gradcheck(loss, (a, b, temperature))


def test_half_precision_keeps_the_loss_in_float32():
    spots = {k: v.float() if v.is_floating_point() else v for k, v in cloud().items()}
    plain = spatial_contrast(**spots, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spatial_contrast(**spots, temperature=0.05)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    views = {name: spots[name].bfloat16() for name in ("view_a_SD", "view_b_SD")}
    assert spatial_contrast(**{**spots, **views}, temperature=0.05).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"view_b_SD": torch.ones(3, 3)}, "row by row"),
        ({"profile_SV": torch.ones(5, 3)}, "4 embeddings and 5 profiles"),
        ({"profile_SV": torch.ones(4)}, "expected"),
        ({"xy_um_S2": torch.ones(4, 3)}, "expected"),
        ({"slide_of_spot_S": torch.ones(3)}, "expected"),
        ({"temperature": 0.0}, "expected more than 0"),
        ({"radius_um": -1.0}, "radius_um is -1.0, expected 0 or more micrometres"),
        ({"radius_um": math.nan}, "radius_um is nan"),
        ({"correlation": 1.5}, "correlation is 1.5, expected -1 to 1"),
    ],
)
def test_errors(change, words):
    arguments = {**line(0, 1, 2, 3), "temperature": 0.1}
    with pytest.raises(ValueError, match=words):
        spatial_contrast(**{**arguments, **change})
