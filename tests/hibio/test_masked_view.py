"""The masked view: what is hidden reaches no prediction; what is left is exactly the rest."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse

from hibio.data.slide import PreparedSlide
from hibio.encoders.genes import OmicsMask
from hibio.training.objective import draw_mask
from preprocessing.coexpression import spot_vectors
from preprocessing.store import SlideStore
from tests.hibio.toy import all_rows, make_model, make_slide, permuted, whole_batch


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts) -> PreparedSlide:
    return make_slide(toy_stores, toy_artifacts)


@pytest.fixture(scope="module")
def batch(slide):
    """A whole slide, with fewer genes in some spots so that there is padding."""
    batch = whole_batch(slide)
    for spot in range(0, batch.n_spots, 3):
        batch.gene_SK[spot, 16 - spot % 13 :] = 400
        batch.value_SK[spot, 16 - spot % 13 :] = 0.0
    return batch


@pytest.fixture(scope="module")
def model(toy_artifacts):
    return make_model(toy_artifacts)


@pytest.fixture(scope="module")
def mask(batch) -> OmicsMask:
    torch.manual_seed(3)
    return draw_mask(batch.gene_SK < 400, 0.3, 0.15)


def test_drawn_masks_hide_shares_of_genes_and_whole_spots():
    torch.manual_seed(0)
    present = torch.rand(2000, 20) < 0.8
    drawn = draw_mask(present, 0.2, 0.15)
    assert not (drawn.gene_SK & ~present).any()
    assert torch.equal(drawn.gene_SK[drawn.spot_S], present[drawn.spot_S])
    assert float(drawn.spot_S.float().mean()) == pytest.approx(0.15, abs=0.03)
    rest = ~drawn.spot_S
    assert float(drawn.gene_SK[rest][present[rest]].float().mean()) == pytest.approx(0.2, abs=0.02)


@torch.no_grad()
def test_hidden_values_reach_no_prediction(model, batch, mask):
    """Values of hidden genes change, the spot vector with them: no prediction of anything does."""
    torch.manual_seed(5)
    change = torch.rand_like(batch.value_SK) * mask.gene_SK
    moved = torch.einsum("sk,skv->sv", change, model.omics.factors_GV[batch.gene_SK])
    other = dataclasses.replace(
        batch,
        value_SK=batch.value_SK + change,
        vector_SV=batch.vector_SV + moved * batch.vector_scale_SV,
    )
    before, after = model.masked_view(batch, mask), model.masked_view(other, mask)
    for name in ("value_SK", "own_SV", "niche_SH"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), atol=2e-4, rtol=0)
    leaky = dataclasses.replace(batch, value_SK=batch.value_SK + change)  # vector left as it was
    assert not torch.allclose(model.masked_view(leaky, mask).own_SV, before.own_SV, atol=1e-3)
    shown = dataclasses.replace(batch, value_SK=batch.value_SK + change.flip(1) * ~mask.gene_SK)
    assert not torch.allclose(model.masked_view(shown, mask).value_SK, before.value_SK, atol=1e-3)


@torch.no_grad()
def test_the_own_vector_of_a_hidden_spot_reaches_nobody(model, batch, mask):
    other = dataclasses.replace(
        batch, vector_SV=batch.vector_SV + 9.0 * mask.spot_S[:, None].float()
    )
    before, after = model.masked_view(batch, mask), model.masked_view(other, mask)
    for name in ("value_SK", "own_SV", "niche_SH"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert not torch.equal(model.omics(batch), model.omics(other))  # unmasked it does


@torch.no_grad()
def test_the_neighbours_mean_of_a_masked_view_is_over_shown_spots(model, batch, mask):
    seen = []
    handle = model.omics.spot_vector.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    model.omics.encode(batch, mask)
    handle.remove()
    own, around = seen[0].chunk(2, dim=1)
    visible = model.omics.visible_vector(batch, mask)
    assert torch.equal(own, visible)
    n_hidden = 0
    for spot in range(batch.n_spots):
        near = [int(n) for n in batch.neighbour_SN[spot] if n >= 0]
        shown = [n for n in near if not mask.spot_S[n]]
        n_hidden += len(near) - len(shown)
        torch.testing.assert_close(around[spot], visible[shown].mean(0), atol=1e-5, rtol=0)
    assert n_hidden > 10


def test_the_visible_vector_is_that_of_the_row_without_the_hidden_genes(
    model, toy_artifacts, slide, toy_stores
):
    """Recomputed from TF-IDF rows without those entries, not normalised again; same slide scale."""
    batch = whole_batch(slide)
    torch.manual_seed(3)
    mask = draw_mask(batch.gene_SK < 400, 0.3, 0.15)
    with SlideStore(toy_stores / "sim001.h5") as store:
        names = store.gene_names.tolist()
        counts = store.counts()[:, [names.index(g) for g in toy_artifacts.genes]]
    tfidf = toy_artifacts.tfidf.transform(counts).toarray()
    raw = spot_vectors(sparse.csr_matrix(tfidf), toy_artifacts.factors)
    mean, sd = raw.mean(axis=0), raw.std(axis=0)
    row, place = np.nonzero(mask.gene_SK.numpy())
    tfidf[row, all_rows(slide).gene_SK[row, place]] = 0.0
    left = spot_vectors(sparse.csr_matrix(tfidf), toy_artifacts.factors)
    expected = (left - mean) / sd * toy_artifacts.factors.weight
    expected[mask.spot_S.numpy()] = 0.0
    got = model.omics.visible_vector(batch, mask).numpy()
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert np.abs(got - slide.vector_SV).max() > 0.1


@torch.no_grad()
def test_hidden_genes_leave_a_spot_vector_of_another_weighting(toy_stores, niche_artifacts):
    """Keyword genes by niche, spot vector by log TF-IDF: what is taken off is the vector's part."""
    fitted = niche_artifacts
    assert (fitted.tfidf.variant, fitted.vector_tfidf.variant) == ("shrunken", "log")
    slide = make_slide(toy_stores, fitted)
    batch = whole_batch(slide)
    assert not torch.equal(batch.part_SK, batch.value_SK)
    torch.manual_seed(3)
    mask = draw_mask(batch.gene_SK < fitted.n_genes, 0.3, 0.15)
    got = make_model(fitted).omics.visible_vector(batch, mask).numpy()
    counts = slide.expression.source.rows(np.arange(slide.n_spots))
    rows = fitted.vector_tfidf.transform(counts).toarray()
    raw = spot_vectors(sparse.csr_matrix(rows), fitted.factors)
    row, place = np.nonzero(mask.gene_SK.numpy())
    rows[row, batch.gene_SK.numpy()[row, place]] = 0.0
    left = spot_vectors(sparse.csr_matrix(rows), fitted.factors)
    expected = (left - raw.mean(axis=0)) / raw.std(axis=0) * fitted.factors.weight
    expected[mask.spot_S.numpy()] = 0.0
    np.testing.assert_allclose(got, expected, atol=2e-4)


@torch.no_grad()
def test_the_masked_view_of_nothing_is_the_plain_one(model, batch):
    nothing = OmicsMask(torch.zeros_like(batch.gene_SK, dtype=torch.bool), ~batch.core_S)
    spot, gene = model.omics.encode(batch, nothing)
    plain, plain_gene = model.omics.encode(batch)
    torch.testing.assert_close(spot, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(gene, plain_gene, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_order_of_spots_does_not_matter_to_the_masked_view(model, batch, mask):
    order = np.random.default_rng(1).permutation(batch.n_spots)
    turned = OmicsMask(mask.gene_SK[order], mask.spot_S[order])
    before = model.masked_view(batch, mask)
    after = model.masked_view(permuted(batch, order), turned)
    torch.testing.assert_close(after.own_SV, before.own_SV[order], atol=1e-5, rtol=0)
    torch.testing.assert_close(after.value_SK, before.value_SK[order], atol=1e-5, rtol=0)
