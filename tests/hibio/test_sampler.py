"""Sampler: whole regions, every spot once, a pure function of (seed, epoch), slide balance."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hibio.data.sampler import RegionSampler, SamplerConfig, pack_regions


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
    batches = sampler.epoch(0, make_regions(SIZES, 40))
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
    for batch in sampler.epoch(1, regions):
        for slide, core in batch:
            inside = np.isin(np.arange(SIZES[slide]), core)
            for region in np.unique(regions[slide][core]):
                assert inside[regions[slide] == region].all()


def test_a_pure_function_of_seed_and_epoch():
    regions = make_regions(SIZES, 40)
    config = SamplerConfig(64)

    def epoch(seed: int, number: int) -> list:
        return plain(RegionSampler(config, SIZES, seed).epoch(number, regions))

    reused = RegionSampler(config, SIZES, 5)
    reused.epoch(0, regions)
    assert plain(reused.epoch(1, regions)) == epoch(5, 1)
    assert epoch(5, 1) != epoch(5, 2)
    assert epoch(5, 1) != epoch(6, 1)


@pytest.mark.parametrize("balance", ["spot", "slide"])
@pytest.mark.parametrize("slides_per_batch", [1, 2, 3])
@pytest.mark.parametrize("n_regions", [1, 3, 40])
def test_an_epoch_has_as_many_batches_as_promised(balance, slides_per_batch, n_regions):
    sampler = RegionSampler(SamplerConfig(50, slides_per_batch, balance), SIZES, seed=1)
    for number in range(4):
        batches = sampler.epoch(number, make_regions(SIZES, n_regions, seed=number))
        assert len(batches) == sampler.n_batches()
        assert all(len(core) for batch in batches for _, core in batch)


def test_slide_balance_gives_every_slide_the_same_number_of_shares():
    sampler = RegionSampler(SamplerConfig(50, balance="slide"), SIZES, seed=1)
    count = Counter(
        slide for batch in sampler.epoch(0, make_regions(SIZES, 40)) for slide, _ in batch
    )
    assert set(count) == {0, 1, 2}
    assert len(set(count.values())) == 1
    by_spot = RegionSampler(SamplerConfig(50, balance="spot"), SIZES, seed=1)
    assert by_spot.batches_per_slide() == [2, 1, 6]


def test_slide_balance_reaches_every_spot_over_epochs():
    sampler = RegionSampler(SamplerConfig(50, balance="slide"), SIZES, seed=1)
    regions = make_regions(SIZES, 40)
    seen = sum((spots_of(sampler.epoch(e, regions)) for e in range(12)), Counter())
    assert len(seen) == sum(SIZES)


def test_batches_are_about_as_large_as_asked():
    sampler = RegionSampler(SamplerConfig(64, balance="spot"), [640], seed=0)
    sizes = [len(batch[0][1]) for batch in sampler.epoch(0, make_regions([640], 200))]
    assert len(sizes) == 10
    assert max(sizes) <= 72


@pytest.mark.parametrize(
    "change", [{"batch_spots": 1}, {"slides_per_batch": 0}, {"halo": -1}, {"balance": "patient"}]
)
def test_settings_out_of_range(change):
    with pytest.raises(ValueError, match=r"needed|slide or spot"):
        SamplerConfig(**change)
