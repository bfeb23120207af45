"""Batches: offsets over slides, halo; embeddings do not depend on tiles, order or company."""

import dataclasses

import numpy as np
import pytest
import torch

from hibio.data.collate import collate, iter_tiles, with_halo
from tests.hibio.toy import make_model, make_slide, permuted, regions_of, whole_batch


@pytest.fixture(scope="module")
def slides(toy_stores, toy_artifacts):
    return [make_slide(toy_stores, toy_artifacts, name) for name in ("sim001", "sim002")]


@pytest.fixture(scope="module")
def model(toy_artifacts):
    return make_model(toy_artifacts)


def slow_halo(neighbour: np.ndarray, core: list[int], hops: int) -> set[int]:
    """Reference: breadth-first search by a plain loop."""
    reached = set(core)
    for _ in range(hops):
        reached |= {int(n) for spot in reached for n in neighbour[spot] if n >= 0}
    return reached


@pytest.mark.parametrize("hops", [0, 1, 2, 5, 50])
def test_halo_against_a_breadth_first_search(slides, hops):
    core = np.array([40, 3, 17])
    spots = with_halo(slides[0].neighbour_SN, core, hops)
    assert spots[:3].tolist() == core.tolist()
    assert len(set(spots.tolist())) == len(spots)
    assert set(spots.tolist()) == slow_halo(slides[0].neighbour_SN, core.tolist(), hops)


def test_a_spot_without_neighbours_has_no_halo():
    lonely = np.array([[-1, -1], [2, -1], [1, -1]])
    assert with_halo(lonely, np.array([0]), 3).tolist() == [0]


def test_offsets_over_slides(slides):
    cores = [np.arange(10, 30), np.arange(5, 45)]
    regions = [regions_of(slide) for slide in slides]
    parts = list(zip(slides, regions, cores, strict=True))
    batch = collate(parts, hops=1)
    alone = [collate([part], hops=1) for part in parts]
    n_first = alone[0].n_spots
    assert batch.n_spots == n_first + alone[1].n_spots
    assert batch.slide_ids == ("sim001", "sim002")
    assert batch.slide_of_spot_S.tolist() == [0] * n_first + [1] * alone[1].n_spots
    second = alone[1].neighbour_SN
    moved = torch.where(second >= 0, second + n_first, -1)
    assert torch.equal(batch.neighbour_SN, torch.cat([alone[0].neighbour_SN, moved]))
    for level in range(2):
        first, other = batch.region_of_spot_LS[level].split([n_first, alone[1].n_spots])
        shift = int(regions[0][level].max()) + 1
        one = alone[1].region_of_spot_LS[level]
        assert torch.equal(first, alone[0].region_of_spot_LS[level])
        assert torch.equal(other, torch.where(one >= 0, one + shift, -1))


def test_every_row_comes_from_its_spot_and_no_edge_leaves_the_batch(slides):
    slide, core = slides[0], np.array([50, 8, 9, 31])
    batch = collate([(slide, regions_of(slide), core)], hops=1)
    spots = with_halo(slide.neighbour_SN, core, 1)
    assert batch.core_S.tolist() == [True] * 4 + [False] * (len(spots) - 4)
    assert torch.equal(batch.xy_um_S2, torch.from_numpy(slide.xy_um[spots]))
    assert torch.equal(batch.features_SF, torch.from_numpy(slide.features_SF[spots]))
    assert torch.equal(batch.vector_scale_SV[2], torch.from_numpy(slide.vector_scale_V))
    assert batch.region_of_spot_LS[:, 4:].eq(-1).all()
    for row, spot in enumerate(spots):
        for place, neighbour in enumerate(slide.neighbour_SN[spot]):
            there = int(batch.neighbour_SN[row, place])
            inside = neighbour in spots
            assert (there >= 0) == inside
            assert bool(torch.isfinite(batch.distance_um_SN[row, place])) == inside
            if inside:
                assert spots[there] == neighbour
                want = np.linalg.norm(slide.xy_um[spot] - slide.xy_um[neighbour])
                assert float(batch.distance_um_SN[row, place]) == pytest.approx(want, rel=1e-4)


def test_the_halo_has_all_neighbours_of_the_core(slides):
    slide, core = slides[0], np.arange(20, 36)
    batch = collate([(slide, regions_of(slide), core)], hops=1)
    assert torch.equal(
        batch.neighbour_SN[:16] >= 0, torch.from_numpy(slide.neighbour_SN[core] >= 0)
    )


def test_a_slide_without_image_leaves_the_image_out(slides):
    blind = dataclasses.replace(slides[1], features_SF=None)
    assert whole_batch(slides[0]).has_image
    assert not whole_batch(slides[0], blind).has_image


def tiled(model, slide, hops: int, tile_spots: int) -> tuple[torch.Tensor, torch.Tensor]:
    omics, image = [], []
    with torch.inference_mode():
        for _, batch in iter_tiles(slide, hops, tile_spots):
            pair = model(batch)
            omics.append(pair.omics)
            image.append(pair.image)
    return torch.cat(omics), torch.cat(image)


def test_tiles_cover_the_slide_in_order(slides):
    cores = [core for core, _ in iter_tiles(slides[0], 1, 16)]
    assert np.concatenate(cores).tolist() == list(range(slides[0].n_spots))
    assert [len(core) for core in cores] == [16, 16, 16, 16, 6]


def test_tiled_embeddings_equal_whole_slide_ones(model, slides):
    assert model.halo == 3  # two spatial layers and the mean over neighbours
    whole = tiled(model, slides[0], 0, 1000)
    parts = tiled(model, slides[0], model.halo, 16)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-5, rtol=0)


def test_the_halo_is_as_deep_as_it_must_be(model, slides):
    whole, _ = tiled(model, slides[0], 0, 1000)
    errors = [float((tiled(model, slides[0], h, 16)[0] - whole).abs().max()) for h in range(4)]
    assert errors[0] > 1e-2
    assert errors[2] > 1e-5  # one hop less than halo is not enough
    assert errors[3] < 1e-5


def test_encode_slide_does_not_depend_on_the_tile(model, slides):
    small, large = (model.encode_slide(slides[0], tile_spots=n) for n in (7, 1000))
    for name in ("image", "omics", "tower"):
        np.testing.assert_allclose(getattr(small, name), getattr(large, name), atol=1e-5)


@torch.inference_mode()
def test_permuting_spots_permutes_the_embeddings(model, slides):
    batch = whole_batch(slides[0])
    order = np.random.default_rng(0).permutation(batch.n_spots)
    before, after = model(batch), model(permuted(batch, order))
    torch.testing.assert_close(after.omics, before.omics[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(after.image, before.image[order], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_embeddings_do_not_depend_on_the_company(model, slides):
    def levels(batch):
        spot = model(batch)
        return [spot, *(model.regions(spot, region_S)[0] for region_S in batch.region_of_spot_LS)]

    alone = levels(whole_batch(slides[0]))
    double = levels(whole_batch(slides[0], slides[0]))
    mixed = levels(whole_batch(slides[1], slides[0]))
    for level, pair in enumerate(alone):
        n = len(pair.omics)
        for tower in ("omics", "image"):
            own = getattr(pair, tower)
            first, second = getattr(double[level], tower).split([n, n])
            torch.testing.assert_close(first, own, atol=1e-5, rtol=0)
            torch.testing.assert_close(second, own, atol=1e-5, rtol=0)
            last = getattr(mixed[level], tower)[-n:]
            torch.testing.assert_close(last, own, atol=1e-5, rtol=0)
        assert double[level].group.tolist() == [0] * n + [1] * n
