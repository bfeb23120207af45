"""Sampler: whole regions, every spot once, a pure function of (seed, epoch), balance, weights."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hibio.config.training import SamplerConfig
from hibio.data.sampler import RegionSampler, pack_regions


def make_regions(sizes: list[int], n_regions: int, seed: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {i: rng.integers(0, n_regions, size) for i, size in enumerate(sizes)}


def spots_of(batches) -> Counter:
    return Counter((slide, int(s)) for batch in batches for slide, core in batch for s in core)


def plain(batches) -> list:
    return [[(slide, core.tolist()) for slide, core in batch] for batch in batches]


SIZES = [100, 40, 260]


@pytest.mark.parametrize("slides_per_batch", [1, 2, 3])
def test_every_spot_exactly_once_by_spot_balance(slides_per_batch):
    config = SamplerConfig(64, slides_per_batch, balance="spot")
    sampler = RegionSampler(config, SIZES, seed=3)
    batches = sampler.epoch(0, make_regions(SIZES, 40).__getitem__)
    assert spots_of(batches) == Counter((i, s) for i, n in enumerate(SIZES) for s in range(n))


@given(
    st.integers(1, 60),
    st.integers(1, 12),
    st.integers(1, 200),
    st.integers(0, 5),
)
@settings(max_examples=60)
def test_bins_hold_whole_regions_of_nearly_equal_load(n_regions, n_bins, n_spots, seed):
    regions = np.random.default_rng(seed).integers(0, n_regions, n_spots)
    bins = pack_regions(regions, n_bins, np.random.default_rng(seed))
    assert sorted(np.concatenate(bins).tolist()) == list(range(n_spots))
    for one in range(n_regions):
        assert sum(bool(np.any(regions[b] == one)) for b in bins) <= 1
    assert len(bins) == min(n_bins, len(np.unique(regions)))
    load = [len(b) for b in bins]
    assert max(load) - min(load) <= np.bincount(regions).max()  # else a region would move


def test_the_load_is_counted_in_spots_not_in_regions():
    regions = np.repeat(np.arange(6), [50, 10, 10, 10, 10, 10])
    bins = pack_regions(regions, 2, np.random.default_rng(0))
    assert sorted(len(b) for b in bins) == [50, 50]


@pytest.mark.parametrize("balance", ["spot", "slide"])
def test_whole_regions_are_never_split(balance):
    regions = make_regions(SIZES, 25)
    sampler = RegionSampler(SamplerConfig(64, 2, balance), SIZES, seed=0)
    for batch in sampler.epoch(1, regions.__getitem__):
        for slide, core in batch:
            inside = np.isin(np.arange(SIZES[slide]), core)
            for region in np.unique(regions[slide][core]):
                assert inside[regions[slide] == region].all()


def test_a_pure_function_of_seed_and_epoch():
    regions = make_regions(SIZES, 40)
    config = SamplerConfig(64)

    def epoch(seed: int, number: int) -> list:
        return plain(RegionSampler(config, SIZES, seed).epoch(number, regions.__getitem__))

    reused = RegionSampler(config, SIZES, 5)
    plain(reused.epoch(0, regions.__getitem__))
    assert plain(reused.epoch(1, regions.__getitem__)) == epoch(5, 1)
    assert epoch(5, 1) != epoch(5, 2)
    assert epoch(5, 1) != epoch(6, 1)


@pytest.mark.parametrize("balance", ["spot", "slide"])
@pytest.mark.parametrize("slides_per_batch", [1, 2, 3])
@pytest.mark.parametrize("n_regions", [1, 3, 40])
def test_an_epoch_has_as_many_batches_as_promised(balance, slides_per_batch, n_regions):
    sampler = RegionSampler(SamplerConfig(50, slides_per_batch, balance), SIZES, seed=1)
    for number in range(4):
        batches = sampler.epoch(number, make_regions(SIZES, n_regions, seed=number).__getitem__)
        assert len(batches) == sampler.n_batches()
        assert all(len(core) for batch in batches for _, core in batch)


def test_slide_balance_gives_every_slide_the_same_number_of_shares():
    sampler = RegionSampler(SamplerConfig(50, balance="slide"), SIZES, seed=1)
    count = Counter(
        slide
        for batch in sampler.epoch(0, make_regions(SIZES, 40).__getitem__)
        for slide, _ in batch
    )
    assert set(count) == {0, 1, 2}
    assert len(set(count.values())) == 1
    by_spot = RegionSampler(SamplerConfig(50, balance="spot"), SIZES, seed=1)
    assert by_spot.shares_per_slide(0).tolist() == [2, 1, 6]


def test_slide_balance_reaches_every_spot_over_epochs():
    sampler = RegionSampler(SamplerConfig(50, balance="slide"), SIZES, seed=1)
    regions = make_regions(SIZES, 40)
    seen = sum((spots_of(sampler.epoch(e, regions.__getitem__)) for e in range(12)), Counter())
    assert len(seen) == sum(SIZES)


def test_batches_are_about_as_large_as_asked():
    sampler = RegionSampler(SamplerConfig(64, balance="spot"), [640], seed=0)
    sizes = [len(batch[0][1]) for batch in sampler.epoch(0, make_regions([640], 200).__getitem__)]
    assert len(sizes) == 10
    assert max(sizes) <= 72


@pytest.mark.parametrize(
    "change",
    [
        {"window": 0},
        {"window": 3, "slides_per_batch": 4},
    ],
)
def test_settings_out_of_range(change):
    with pytest.raises(ValueError, match="needed"):
        SamplerConfig(**change)


# ------------------------------------------------------------------ batches one by one
def test_a_batch_is_the_same_whenever_it_is_asked_for():
    regions = make_regions(SIZES, 40)
    sampler = RegionSampler(SamplerConfig(40, 2), SIZES, seed=2)
    whole = plain(sampler.epoch(3, regions.__getitem__))
    for batch in (len(whole) - 1, 0, 2):
        alone = RegionSampler(SamplerConfig(40, 2), SIZES, seed=2).epoch(3, regions.__getitem__)
        assert plain([alone[batch]]) == [whole[batch]]
    for outside in (len(whole), -1):
        with pytest.raises(IndexError, match=f"of an epoch of {len(whole)}"):
            sampler.epoch(3, regions.__getitem__)[outside]


def test_only_the_slides_of_a_batch_are_read():
    """Ten thousand slides: a batch asks for the regions of its own and of no others."""
    read = []

    def regions_of(slide: int) -> np.ndarray:
        read.append(slide)
        return np.arange(100) // 10

    sampler = RegionSampler(SamplerConfig(50), [100] * 10_000, seed=0)
    batches = sampler.epoch(0, regions_of)
    assert len(batches) == 20_000
    assert read == []
    for batch in (0, 7, 19_999):
        read.clear()
        assert [slide for slide, _ in batches[batch]] == read


@pytest.mark.parametrize("window", [2, 3, 50])
def test_slides_come_window_by_window_and_are_read_once(window):
    read = []

    def regions_of(slide: int) -> np.ndarray:
        read.append(slide)
        return np.arange(120) // 3

    sampler = RegionSampler(SamplerConfig(30, window=window), [120] * 12, seed=1)
    order = [batch[0][0] for batch in sampler.epoch(0, regions_of)]
    assert Counter(order) == Counter(dict.fromkeys(range(12), 4))
    assert Counter(read) == Counter(range(12))
    for start in range(0, len(order), 4 * window):
        part = order[start : start + 4 * window]
        assert len(set(part)) == min(window, 12)
        assert part != sorted(part, key=part.index)  # mixed, not one slide after the other


# ------------------------------------------------------------------ weights
def shares(weights, epochs: int, sizes=None, **config) -> np.ndarray:
    """Shares of each slide in each epoch, (epochs, slides)."""
    sizes = [100] * len(weights) if sizes is None else sizes
    sampler = RegionSampler(SamplerConfig(50, **config), sizes, seed=4, weights=weights)
    found = np.stack([sampler.shares_per_slide(epoch) for epoch in range(epochs)])
    assert (found.sum(axis=1) == sampler.n_batches()).all()
    return found


def test_whole_weights_are_met_in_every_epoch():
    assert (shares([1.0, 2.0, 3.0, 0.0], 5) == [2, 4, 6, 0]).all()
    assert (shares([1.0, 3.0], 5, sizes=[100, 200], balance="spot") == [2, 12]).all()
    assert (shares([7.0] * 3, 3) == [14] * 3).all()


@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=8).filter(lambda w: sum(w) > 0.1),
)
@settings(max_examples=60)
def test_shares_are_the_wanted_number_rounded_up_or_down(weights):
    wanted = 2 * np.array(weights)
    wanted *= max(1, round(wanted.sum())) / wanted.sum()
    found = shares(weights, 20)
    assert (found >= np.floor(wanted - 1e-9)).all()
    assert (found <= np.ceil(wanted + 1e-9)).all()


def test_fractions_are_met_in_the_mean_of_epochs():
    found = shares([1.0] * 5 + [0.2] * 5, 4000).mean(axis=0)  # 10 + 2 shares an epoch
    np.testing.assert_allclose(found, [2.0] * 5 + [0.4] * 5, atol=0.03)  # 4 standard errors


def test_an_epoch_holds_the_shares_that_were_planned():
    regions = make_regions([100] * 3, 30)
    sampler = RegionSampler(SamplerConfig(50), [100] * 3, seed=0, weights=[0.5, 0.0, 2.3])
    for number in range(6):
        count = Counter(s for batch in sampler.epoch(number, regions.__getitem__) for s, _ in batch)
        assert [count[slide] for slide in range(3)] == sampler.shares_per_slide(number).tolist()
        assert count[1] == 0


def test_weights_that_cannot_be():
    for weights in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="expected one of 0 or more for each"):
            RegionSampler(SamplerConfig(), [10, 10], 0, weights)
    with pytest.raises(ValueError, match="every slide has weight 0"):
        RegionSampler(SamplerConfig(), [10, 10], 0, [0.0, 0.0])
