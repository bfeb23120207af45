"""Contrast computed in tiles against dense matrices: values, every gradient, sizes, masks."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hibio.losses import NearDuplicates, SpatialPairs, info_nce, spatial_contrast, spot_to_region
from hibio.losses.logits import cosine_logits, mean_of_rows, tiles
from tests.hibio.test_losses_contrastive import Given, cloud


# ------------------------------------------------------------------ the dense versions
def dense_info_nce(image, omics, temperature, exclude=None, group=None, negatives="all"):
    """Oracle: the whole matrix of logits, masked, and autograd."""
    logits = cosine_logits(image, omics, temperature)
    diagonal = torch.eye(len(logits), dtype=torch.bool)
    allowed = torch.ones_like(diagonal) if exclude is None else ~exclude
    masks = [allowed] if negatives in ("all", "mixed") else []
    if negatives in ("same_slide", "mixed"):
        masks.append(allowed & (group[:, None] == group[None, :]))
    losses = []
    for mask in masks:
        masked = logits.masked_fill(~(mask | diagonal), -math.inf)
        both = (masked.logsumexp(dim=1) + masked.logsumexp(dim=0)) / 2
        losses.append((both - logits.diagonal()).mean())
    return torch.stack(losses).mean()


def dense_near(vector, xy_um, slide, radius_um, threshold):
    correlation = torch.corrcoef(vector)
    distance = (xy_um[:, None] - xy_um[None]).square().sum(dim=2).sqrt()
    near = (slide[:, None] == slide[None]) & (distance < radius_um) & (correlation > threshold)
    return near.fill_diagonal_(False)


def dense_spatial(view_a, view_b, pairs, temperature):
    positive, negative = pairs.rows(0, len(view_a))
    logits = cosine_logits(view_a, view_b, temperature)
    total = 0
    for turned, pos, neg in ((logits, positive, negative), (logits.T, positive.T, negative.T)):
        whole = turned.masked_fill(~(pos | neg), -math.inf).logsumexp(dim=1)
        own = (turned * pos).sum(dim=1) / pos.sum(dim=1)
        total = total + mean_of_rows(whole - own, neg.any(dim=1)) / 2
    return total


# ------------------------------------------------------------------ data
def leaves(n: int, width: int = 6, dtype=torch.float64, seed: int = 0, m: int | None = None):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, width, generator=generator, dtype=torch.float64)
    right = torch.randn(n if m is None else m, width, generator=generator, dtype=torch.float64)
    temperature = torch.tensor(0.13, dtype=torch.float64)
    return tuple(one.to(dtype).requires_grad_() for one in (left, right, temperature))


def group_of(n: int) -> torch.Tensor:
    return torch.arange(n) * 7 % 11 % 3


def excluded(n: int) -> torch.Tensor:
    """Neither symmetric nor without its diagonal."""
    return torch.rand(n, n, generator=torch.Generator().manual_seed(n)) < 0.3


def value_and_gradients(loss, inputs) -> list[torch.Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(3.0 * value, inputs)]


def assert_same(found, expected, tolerance=1e-10):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


SIZES = ((1, 4), (3, 4), (4, 4), (5, 4), (8, 4), (23, 4), (23, 64), (23, 1))


# ------------------------------------------------------------------ info_nce
@pytest.mark.parametrize(("n", "chunk"), SIZES)
@pytest.mark.parametrize("negatives", ["all", "same_slide", "mixed"])
@pytest.mark.parametrize("masked", [False, True])
def test_info_nce_is_the_dense_one(n, chunk, negatives, masked):
    mask = excluded(n) if masked else None
    given = Given(mask) if masked else None
    group = group_of(n)
    found = value_and_gradients(
        lambda a, b, t: info_nce(a, b, t, given, group, negatives, chunk), leaves(n)
    )
    expected = value_and_gradients(
        lambda a, b, t: dense_info_nce(a, b, t, mask, group, negatives), leaves(n)
    )
    assert_same(found, expected)
    if n > 5:
        assert all(bool(gradient.abs().sum() > 1e-3) for gradient in found[1:])


@pytest.mark.parametrize("chunk", [32, 100, 300])
def test_in_single_precision_to_1e_5(chunk):
    mask, group = excluded(200), group_of(200)
    found = value_and_gradients(
        lambda a, b, t: info_nce(a, b, t, Given(mask), group, "mixed", chunk),
        leaves(200, 32, torch.float32),
    )
    expected = value_and_gradients(
        lambda a, b, t: dense_info_nce(a, b, t, mask, group, "mixed"),
        leaves(200, 32, torch.float64),
    )
    assert_same([one.double() for one in found], expected, 1e-5)


@pytest.mark.parametrize("negatives", ["all", "same_slide", "mixed"])
@pytest.mark.parametrize("chunk", [3, 7, 16])
def test_info_nce_gradient_by_differences(negatives, chunk):
    given, group = Given(excluded(7)), group_of(7)
    assert torch.autograd.gradcheck(
        lambda a, b, t: info_nce(a, b, t, given, group, negatives, chunk), leaves(7, 3)
    )


def test_a_number_as_temperature_and_one_leaf_only():
    image, omics, _ = leaves(9)
    (gradient,) = torch.autograd.grad(info_nce(image, omics.detach(), 0.2, chunk_rows=4), image)
    (expected,) = torch.autograd.grad(dense_info_nce(image, omics.detach(), 0.2), image)
    torch.testing.assert_close(gradient, expected)


def test_a_cold_temperature_overflows_nothing():
    """Logits of 1,000 and masked ones far above the row's own: the exponential must not escape."""
    image, omics, _ = leaves(20, dtype=torch.float32)
    temperature = torch.tensor(1e-3, requires_grad=True)
    group = torch.arange(20) % 5
    inputs = (image, omics, temperature)
    for chunk in (6, 64):
        found = value_and_gradients(
            lambda a, b, t, c=chunk: info_nce(a, b, t, None, group, "same_slide", c), inputs
        )
        expected = value_and_gradients(
            lambda a, b, t: dense_info_nce(a, b, t, None, group, "same_slide"), inputs
        )
        assert all(bool(one.isfinite().all()) for one in found)
        assert_same(found, expected, 1e-3)


def test_autocast_changes_nothing_in_many_tiles():
    image, omics, temperature = leaves(30, 64, torch.float32)
    plain = value_and_gradients(lambda a, b, t: info_nce(a, b, t, chunk_rows=8), leaves(30, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(image, omics, temperature, chunk_rows=8)
        found = [loss.detach(), *torch.autograd.grad(3.0 * loss, (image, omics, temperature))]
    assert_same([one.double() for one in found], plain, 1e-4)


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.entries = max(self.entries, one.numel())
        return out


@pytest.mark.parametrize("term", ["spot", "member", "spatial"])
def test_nothing_of_size_n_by_n_exists(term):
    """Every tensor of both passes is of a tile or of the embeddings (300 x 6), none of 300^2."""
    left, right, temperature = leaves(300)
    n, chunk = 300, 32
    rng = np.random.default_rng(0)
    xy_um, slide = torch.tensor(rng.uniform(0, 900, (n, 2))), torch.arange(n) % 2
    profile = torch.tensor(rng.normal(size=(n, 5)))
    with LargestTensor() as seen:
        if term == "spot":
            near = NearDuplicates(profile, xy_um, slide, 150.0, 0.9)
            loss = info_nce(left, right, temperature, near, slide, "mixed", chunk)
        elif term == "member":
            loss = spot_to_region(left, right, torch.arange(n), temperature, chunk)
        else:
            loss = spatial_contrast(
                left, right, xy_um, slide, profile, temperature, chunk_rows=chunk
            )
        loss.backward()
    assert left.grad.abs().sum() > 0
    assert chunk**2 // 2 < seen.entries <= n * 8


# ------------------------------------------------------------------ near duplicates
@pytest.mark.parametrize("chunk", [7, 40, 64])
def test_near_duplicates_in_parts_are_the_whole(chunk):
    vector, xy_um, slide = cloud()
    pairs = NearDuplicates(vector, xy_um, slide, 150.0, 0.9)
    whole = dense_near(vector, xy_um, slide, 150.0, 0.9)
    assert torch.equal(pairs.rows(0, 40), whole)
    assert whole.any()
    found = torch.zeros_like(whole)
    for rows, columns in tiles(40, 40, chunk):
        found[rows, columns] = pairs.rows(rows.start, rows.stop, columns)
    assert torch.equal(found, whole)
    assert torch.equal(pairs.rows(13, 22), whole[13:22])


def test_near_duplicates_are_left_out_in_every_tile():
    vector, xy_um, slide = cloud()
    pairs = NearDuplicates(vector, xy_um, slide, 150.0, 0.9)
    mask = dense_near(vector, xy_um, slide, 150.0, 0.9)
    image, omics, temperature = leaves(40)
    expected = dense_info_nce(image, omics, temperature, mask, slide, "mixed")
    for chunk in (9, 40):
        found = info_nce(image, omics, temperature, pairs, slide, "mixed", chunk)
        torch.testing.assert_close(found, expected)
    assert expected < dense_info_nce(image, omics, temperature, None, slide, "mixed")


# ------------------------------------------------------------------ regions
@pytest.mark.parametrize(("n", "chunk"), SIZES)
def test_info_nce_within_slides_is_the_dense_one(n, chunk):
    group = group_of(n)
    found = value_and_gradients(
        lambda a, b, t: info_nce(a, b, t, None, group, "same_slide", chunk), leaves(n)
    )
    expected = value_and_gradients(
        lambda a, b, t: dense_info_nce(a, b, t, None, group, "same_slide"), leaves(n)
    )
    assert_same(found, expected)


@pytest.mark.parametrize(("n", "chunk"), SIZES)
@pytest.mark.parametrize("m", [1, 9])
def test_spot_to_region_is_cross_entropy(n, m, chunk):
    own = torch.arange(n) % (m + 1) - 1  # -1: none

    def library(spot, region, temperature):
        logits = cosine_logits(spot, region, temperature)
        total = torch.nn.functional.cross_entropy(logits, own, ignore_index=-1, reduction="sum")
        return total / max(int((own >= 0).sum()), 1)

    found = value_and_gradients(lambda s, r, t: spot_to_region(s, r, own, t, chunk), leaves(n, m=m))
    assert_same(found, value_and_gradients(library, leaves(n, m=m)))


# ------------------------------------------------------------------ spatial contrast
def spatial(n: int, seed: int = 3) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        "xy_um_S2": torch.tensor(rng.uniform(0, 400, (n, 2))),
        "slide_of_spot_S": torch.tensor(rng.integers(0, 2, n)),
        "profile_SV": torch.tensor(rng.normal(size=(n, 4))),
    }


@pytest.mark.parametrize(("n", "chunk"), SIZES)
def test_spatial_contrast_is_the_dense_one(n, chunk):
    spots = spatial(n)
    pairs = SpatialPairs(**spots, correlation=0.2)

    def tiled(a, b, t):
        return spatial_contrast(a, b, temperature=t, **spots, correlation=0.2, chunk_rows=chunk)

    found = value_and_gradients(tiled, leaves(n))
    expected = value_and_gradients(lambda a, b, t: dense_spatial(a, b, pairs, t), leaves(n))
    assert_same(found, expected)


@pytest.mark.parametrize("chunk", [5, 12])
def test_spatial_contrast_gradient_by_differences(chunk):
    spots = spatial(8)
    assert torch.autograd.gradcheck(
        lambda a, b, t: spatial_contrast(a, b, temperature=t, **spots, chunk_rows=chunk),
        leaves(8, 3),
    )


@pytest.mark.parametrize("chunk", [4, 23, 64])
def test_pairs_are_counted_in_rows_and_columns(chunk):
    pairs = SpatialPairs(**spatial(23), correlation=0.0)
    positive, negative = pairs.rows(0, 23)
    found = pairs.counts(chunk)
    for counted, mask in zip(found, (positive, negative), strict=True):
        assert torch.equal(counted, torch.stack([mask.sum(dim=1), mask.sum(dim=0)]))
    assert positive.sum() > 23
    assert not (positive | negative).all()


# ------------------------------------------------------------------ tiles
def test_tiles_cover_a_matrix_once():
    for n, m, chunk in ((5, 7, 3), (6, 6, 3), (2, 9, 100), (4, 1, 1)):
        seen = np.zeros((n, m), dtype=int)
        for rows, columns in tiles(n, m, chunk):
            seen[rows, columns] += 1
            assert max(seen[rows, columns].shape) <= chunk
        assert (seen == 1).all()
    with pytest.raises(ValueError, match="chunk_rows is 0, expected at least 1"):
        list(tiles(3, 3, 0))
