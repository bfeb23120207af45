"""Expression rows on request: lazy equals kept, hidden genes, thinned counts, query genes."""

import dataclasses

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import hibio.data.slide as expression_module
from hibio.config.files import ConfigError
from hibio.data.counts import ArrayCounts, PanelMap
from hibio.data.dataset import slide_of_anndata
from hibio.data.slide import expression_slide, prepare_slide
from preprocessing.coexpression import spot_vectors
from preprocessing.store import SlideStore
from tests.hibio.toy import all_rows, dense, edit_store, make_model, make_slide, rename_genes


@pytest.fixture
def lazy(monkeypatch):
    """Slides are streamed in blocks of 16 spots and no rows are kept."""
    monkeypatch.setattr(expression_module, "IN_MEMORY_SPOTS", 0)
    monkeypatch.setattr(expression_module, "CHUNK_SPOTS", 16)


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts):
    return make_slide(toy_stores, toy_artifacts)


def assert_same_rows(one, other, spots: np.ndarray) -> None:
    got, wanted = (vars(slide.expression.rows(spots)) for slide in (one, other))
    for name, value in wanted.items():
        if value is None:
            assert got[name] is None
        else:
            np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)


def test_rows_from_the_store_equal_rows_in_memory(slide, lazy, toy_stores, toy_artifacts):
    streamed = make_slide(toy_stores, toy_artifacts)
    assert streamed.expression.kept is None
    assert slide.expression.kept is not None
    np.testing.assert_allclose(streamed.vector_SV, slide.vector_SV, atol=1e-6)
    spots = np.array([40, 3, 3, 69, 0])
    assert_same_rows(streamed, slide, spots)


def test_rows_of_niches_do_not_depend_on_where_they_come_from(
    toy_stores, niche_artifacts, monkeypatch
):
    """Streamed in blocks, row by row or kept: the counts of neighbours come along."""
    kept = make_slide(toy_stores, niche_artifacts)
    monkeypatch.setattr(expression_module, "IN_MEMORY_SPOTS", 0)
    monkeypatch.setattr(expression_module, "CHUNK_SPOTS", 16)
    streamed = make_slide(toy_stores, niche_artifacts)
    np.testing.assert_allclose(streamed.vector_SV, kept.vector_SV, atol=1e-6)
    for spots in (np.array([40, 3, 3, 69, 0]), np.array([11])):
        assert_same_rows(streamed, kept, spots)
    _, value, part, _ = streamed.expression.thinned(spots, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(value, kept.expression.rows(spots).value_SK, atol=1e-6)
    np.testing.assert_allclose(part, kept.expression.rows(spots).part_SK, atol=1e-6)
    alone = dataclasses.replace(kept.expression, niche_SN=None, kept=None).rows(spots)
    assert np.abs(alone.value_SK - kept.expression.rows(spots).value_SK).max() > 1e-3


def test_embeddings_do_not_depend_on_tiles_nor_on_where_rows_come_from(
    slide, lazy, toy_stores, toy_artifacts
):
    model = make_model(toy_artifacts)
    streamed = make_slide(toy_stores, toy_artifacts)
    whole = model.encode_slide(slide, tile_spots=1000).omics
    for tile in (7, 33):
        np.testing.assert_allclose(model.encode_slide(streamed, tile).omics, whole, atol=2e-5)


def test_embeddings_follow_the_spots_in_any_order(toy_stores, toy_artifacts):
    with SlideStore(toy_stores / "sim001.h5") as store:
        panel = PanelMap.between(store.gene_names, toy_artifacts.genes)
        counts = panel.align(store.counts())
        xy = store.xy_um + np.random.default_rng(0).normal(scale=5.0, size=store.xy_um.shape)
    order = np.random.default_rng(1).permutation(len(xy))
    model = make_model(toy_artifacts)
    near = {"slide_id": "x", "matched": panel.matched, "measured": panel.measured}
    plain, moved = (
        model.encode_slide(
            expression_slide(ArrayCounts(counts[rows]), xy[rows], toy_artifacts, **near), 20
        ).omics
        for rows in (np.arange(len(xy)), order)
    )
    np.testing.assert_allclose(moved, plain[order], atol=2e-5)


def test_hidden_genes_take_no_part(toy_stores, toy_artifacts, tmp_path):
    """The same as a panel that never had them: other counts of them change nothing."""
    hidden = toy_artifacts.genes[10:60].tolist()
    path = toy_stores / "sim001.h5"
    with SlideStore(path) as store:
        names = store.gene_names.tolist()
    renamed = [f"gone{i}" if name in hidden else name for i, name in enumerate(names)]
    without = edit_store(path, tmp_path / "sim001.h5", rename_genes(renamed))
    ours = prepare_slide(path, toy_artifacts, None, hidden)
    other = prepare_slide(without, toy_artifacts, None)
    assert ours.genes_matched == other.genes_matched == 350
    assert ours.genes_dropped == 0  # hidden is not measured
    np.testing.assert_array_equal(ours.vector_SV, other.vector_SV)
    np.testing.assert_array_equal(all_rows(ours).value_SK, all_rows(other).value_SK)
    gone = np.isin(toy_artifacts.genes, hidden)
    assert not np.isin(all_rows(ours).gene_SK, np.flatnonzero(gone)).any()


def test_hiding_too_much_is_an_error(toy_stores, toy_artifacts):
    with pytest.raises(ConfigError, match=r"measures 15 of the \d+ genes .* at least 20"):
        prepare_slide(toy_stores / "sim001.h5", toy_artifacts, None, toy_artifacts.genes[15:])


def test_thinned_counts_are_a_binomial_draw(slide, toy_artifacts):
    spots = np.arange(30)
    rng = np.random.default_rng(4)
    gene, value, _, raw = slide.expression.thinned(spots, 0.6, rng)
    counts = slide.expression.source.rows(spots)
    drawn = counts.copy()
    drawn.data = np.random.default_rng(4).binomial(counts.data.astype(np.int64), 0.6)
    assert 0.55 < drawn.data.sum() / counts.data.sum() < 0.65
    tfidf = toy_artifacts.tfidf.transform(drawn)
    np.testing.assert_allclose(raw, spot_vectors(tfidf, toy_artifacts.factors), atol=1e-6)
    shown = np.take_along_axis(dense(tfidf), gene, axis=1)
    np.testing.assert_allclose(value, shown, atol=1e-6)


def test_nothing_is_thinned_when_everything_is_kept_nor_of_intensities(slide, toy_artifacts):
    spots = np.arange(20)
    rows = slide.expression.rows(spots)
    _, value, _, _ = slide.expression.thinned(spots, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(value, rows.value_SK, atol=1e-6)
    settings = dataclasses.replace(toy_artifacts.settings, modality="protein")
    protein = dataclasses.replace(
        slide.expression, artifacts=dataclasses.replace(toy_artifacts, settings=settings)
    )
    _, value, _, _ = protein.thinned(spots, 0.1, np.random.default_rng(0))
    np.testing.assert_allclose(value, rows.value_SK, atol=1e-6)


def test_query_genes_are_never_keywords_and_carry_their_value(slide, toy_artifacts):
    spots = np.arange(70)
    gene, value, _ = slide.expression.queries(spots, 40, np.random.default_rng(0))
    rows = slide.expression.rows(spots)
    row = dense(toy_artifacts.tfidf.transform(slide.expression.source.rows(spots)))
    padded = np.hstack([row, np.zeros((70, 1))])
    np.testing.assert_allclose(value, np.take_along_axis(padded, gene, axis=1), atol=1e-6)
    for spot in spots:
        asked = gene[spot][gene[spot] < toy_artifacts.n_genes]
        assert len(asked) > 20
        assert len({*asked}) == len(asked)
        assert not {*asked} & {*rows.gene_SK[spot]}


def test_a_panel_map_counts_what_is_measured():
    panel = PanelMap.between(np.array(["b", "x", "a", "c"]), np.array(["a", "b", "c"]), ["c", "q"])
    assert (panel.matched, panel.measured) == (2, 3)
    counts = sparse.csr_matrix(np.array([[1, 2, 3, 4]], dtype=np.int32))
    assert panel.align(counts).toarray().tolist() == [[3, 1, 0]]
    assert panel.align(counts).dtype == np.int32
    floats = panel.align(counts.astype(np.float32) / 2)
    assert floats.toarray().tolist() == [[1.5, 0.5, 0]]


def as_adata(toy_stores, n_spots: int, **changes) -> anndata.AnnData:
    with SlideStore(toy_stores / "sim003.h5") as store:
        adata = anndata.AnnData(store.counts()[:n_spots].astype(np.float32))
        adata.var_names = store.gene_names.astype(str)
        adata.obsm["spatial"] = changes.get("xy", store.xy_um[:n_spots])
    return adata


def test_one_cell_and_islands_of_tissue_are_embedded(toy_stores, toy_artifacts):
    model = make_model(toy_artifacts)
    alone = model.encode_omics(as_adata(toy_stores, 1))
    assert alone.shape == (1, 16)
    assert np.isfinite(alone).all()
    with SlideStore(toy_stores / "sim003.h5") as store:
        near = store.xy_um[:60]
    apart = near + np.where(np.arange(60)[:, None] < 30, 0.0, 5e5)
    slide = slide_of_anndata(as_adata(toy_stores, 60, xy=apart), toy_artifacts)
    for spot in range(60):
        partners = slide.neighbour_SN[spot][slide.neighbour_SN[spot] >= 0]
        assert ((partners < 30) == (spot < 30)).all()  # no edge from island to island
    assert np.isfinite(model.encode_slide(slide).omics).all()


def test_micrometres_under_their_own_name_come_before_pixels(toy_stores, toy_artifacts):
    model = make_model(toy_artifacts)
    adata = as_adata(toy_stores, 40)
    wanted = model.encode_omics(adata)
    named = pd.DataFrame(adata.obsm["spatial"][:, ::-1], adata.obs_names, ["y", "x"])
    adata.obsm["spatial_um"], adata.obsm["spatial"] = named, np.zeros((40, 2))
    np.testing.assert_array_equal(model.encode_omics(adata), wanted)
    with pytest.raises(ConfigError, match="lie at one place"):
        model.encode_omics(adata, "spatial")


def test_cells_without_a_place_are_refused(toy_stores, toy_artifacts):
    model = make_model(toy_artifacts)
    with pytest.raises(ConfigError, match="all 9 spots lie at one place"):
        model.encode_omics(as_adata(toy_stores, 9, xy=np.ones((9, 2))))
    with pytest.raises(ConfigError, match="9 spots have no finite coordinates"):
        model.encode_omics(as_adata(toy_stores, 9, xy=np.full((9, 2), np.nan)))


def test_rounded_normalised_values_are_warned_of(toy_stores, toy_artifacts):
    adata = as_adata(toy_stores, 40)
    values = sparse.csr_matrix(adata.X).toarray().astype(np.float64)
    slide_of_anndata(adata, toy_artifacts)
    adata.X = np.rint(values / values.sum(axis=1, keepdims=True) * 1e5)
    with pytest.warns(UserWarning, match="a total of about 100,0"):
        slide_of_anndata(adata, toy_artifacts)


def test_negative_missing_and_repeated_values_are_refused(toy_stores, toy_artifacts):
    model = make_model(toy_artifacts)
    adata = as_adata(toy_stores, 9)
    for bad in (-1.0, np.nan):
        wrong = adata.copy()
        wrong.X[0, wrong.X[0].indices[0]] = bad
        with pytest.raises(ConfigError, match="negative or non-finite"):
            model.encode_omics(wrong)
    twice = adata.copy()
    twice.var_names = [twice.var_names[0], *twice.var_names[:-1]]
    with pytest.raises(ConfigError, match="holds a gene twice"):
        model.encode_omics(twice)
