"""A prepared slide against the definitions of docs/method.md 1-3; the dataset; AnnData as input."""

import dataclasses
from contextlib import nullcontext

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from hibio.config.data import GenesConfig
from hibio.config.files import ConfigError
from hibio.data import fitting
from hibio.data.counts import ArrayCounts, align_columns
from hibio.data.dataset import PreparedSlides, image_batch, shuffled_pairs, slide_of_anndata
from hibio.data.slide import expression_slide, prepare_slide, random_neighbours
from hibio.data.splits import read_entries
from hibio.data.stored_features import standardise_columns
from preprocessing.graphs import DelaunayGraph
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from tests.hibio.toy import all_rows, dense, edit_store, make_model, make_slide, rename_genes
from tests.preprocessing.sources import hex_positions


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts):
    return make_slide(toy_stores, toy_artifacts, "sim003")


@pytest.fixture(scope="module")
def counts(toy_stores, toy_artifacts):
    with SlideStore(toy_stores / "sim003.h5") as store:
        names = store.gene_names.tolist()
        return dense(store.counts())[:, [names.index(gene) for gene in toy_artifacts.genes]]


def test_inputs_against_the_definitions(slide, counts, toy_artifacts):
    tf = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    row = tf * toy_artifacts.tfidf.idf
    row /= np.linalg.norm(row, axis=1, keepdims=True)
    np.testing.assert_allclose(all_rows(slide).value_SK, -np.sort(-row, axis=1)[:, :16], atol=1e-6)
    shown = np.take_along_axis(row, all_rows(slide).gene_SK, axis=1)
    np.testing.assert_allclose(all_rows(slide).value_SK, shown, atol=1e-6)
    factors = toy_artifacts.factors
    raw = row @ factors.components
    weight = np.sqrt(factors.spread / factors.spread.max())
    vector = (raw - raw.mean(axis=0)) / raw.std(axis=0) * weight
    np.testing.assert_allclose(slide.vector_SV, vector, atol=1e-4)
    np.testing.assert_allclose(slide.vector_scale_V, weight / raw.std(axis=0), rtol=1e-4)


def test_targets_against_the_definitions(slide, counts, toy_artifacts):
    norm = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    target = norm[:, toy_artifacts.target_genes]
    varying = target.std(axis=0) > 0
    expected = (target - target.mean(axis=0)) / np.where(varying, target.std(axis=0), 1.0)
    np.testing.assert_allclose(all_rows(slide).expression_SH, expected, atol=1e-4)
    share = (counts / np.linalg.norm(counts, axis=1, keepdims=True))[:, toy_artifacts.target_genes]
    expected = (share - share.mean(axis=0)) / np.where(varying, share.std(axis=0), 1.0)
    np.testing.assert_allclose(all_rows(slide).frequency_SH, expected, atol=1e-4)
    total = all_rows(slide).target_SM.sum(axis=1)
    assert np.all(np.isclose(total, 1.0, atol=1e-5) | (total == 0))
    assert (all_rows(slide).target_SM > 0).sum(axis=1).max() <= 5
    best = toy_artifacts.anchors.match(toy_artifacts.tfidf.transform(counts))
    assert np.array_equal(all_rows(slide).target_SM.argmax(axis=1), best.argmax(axis=1))


def test_features_are_standardised_over_the_slide(slide, toy_stores):
    with SlideStore(toy_stores / "sim003.h5") as store:
        raw = store.features("handcrafted").astype(np.float64)
    varying = raw.std(axis=0) > 1e-8
    assert varying.sum() > 100
    expected = (raw - raw.mean(axis=0))[:, varying] / raw.std(axis=0)[varying]
    np.testing.assert_allclose(slide.features_SF[:, varying], expected, atol=1e-3)
    assert not slide.features_SF[:, ~varying].any()


def test_patches_of_another_width_than_in_training_are_refused(toy_stores, toy_artifacts):
    assert toy_artifacts.settings.patch_um == pytest.approx(112.0)
    settings = dataclasses.replace(toy_artifacts.settings, patch_um=200.0)
    other = dataclasses.replace(toy_artifacts, settings=settings)
    with pytest.raises(ConfigError, match=r"112 um wide.*200 um.*--patch-um 200"):
        prepare_slide(toy_stores / "sim003.h5", other, "handcrafted")
    assert prepare_slide(toy_stores / "sim003.h5", other, None).features_SF is None  # no image read


def test_neighbours_are_the_nearest_spots(slide):
    distance = np.linalg.norm(slide.xy_um[:, None] - slide.xy_um[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert slide.neighbour_SN.shape == (slide.n_spots, 6)
    for spot in range(slide.n_spots):
        present = slide.neighbour_SN[spot] >= 0
        near = slide.neighbour_SN[spot][present]
        np.testing.assert_allclose(distance[spot, near], slide.distance_um_SN[spot][present], 1e-4)
        assert np.all(distance[spot, near] < 3.01 * np.median(distance.min(axis=1)))
        assert np.isinf(slide.distance_um_SN[spot][~present]).all()


@pytest.mark.parametrize("n_spots", [2, 3, 40])
def test_random_neighbours_are_other_spots_at_their_true_distance(n_spots):
    """The control of docs/method.md 6: a shared graph that says nothing about the tissue."""
    xy = np.random.default_rng(0).uniform(0, 1000, (n_spots, 2))
    chosen, distance = random_neighbours(xy, 6)
    assert chosen.shape == distance.shape == (n_spots, 6)
    assert (chosen != np.arange(n_spots)[:, None]).all()
    assert 0 <= chosen.min() <= chosen.max() < n_spots
    for spot in range(n_spots):
        expected = [np.hypot(*(xy[spot] - xy[other])) for other in chosen[spot]]
        np.testing.assert_allclose(distance[spot], expected, rtol=1e-5)
    np.testing.assert_array_equal(random_neighbours(xy, 6)[0], chosen)


def test_the_random_graph_replaces_the_neighbours_and_nothing_else(
    toy_stores, toy_artifacts, slide
):
    genes = dataclasses.replace(toy_artifacts.settings.genes, graph="random")
    other = dataclasses.replace(
        toy_artifacts, settings=dataclasses.replace(toy_artifacts.settings, genes=genes)
    )
    random = make_slide(toy_stores, other, "sim003")
    shared = (np.sort(random.neighbour_SN, axis=1) == np.sort(slide.neighbour_SN, axis=1)).mean()
    assert shared < 0.2
    assert random.neighbour_SN.min() >= 0
    for name in ("vector_SV", "features_SF"):
        np.testing.assert_array_equal(getattr(random, name), getattr(slide, name))
    for name in ("value_SK", "target_SM"):
        ours, theirs = (getattr(all_rows(one), name) for one in (random, slide))
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(random.graph.indices, slide.graph.indices)  # regions keep theirs


def test_the_delaunay_graph_is_the_one_of_fit_slide_and_regions(toy_stores, toy_artifacts, slide):
    genes = dataclasses.replace(toy_artifacts.settings.genes, graph="delaunay")
    other = dataclasses.replace(
        toy_artifacts, settings=dataclasses.replace(toy_artifacts.settings, genes=genes)
    )
    delaunay = make_slide(toy_stores, other, "sim003")
    with SlideStore(delaunay.path) as store:
        wanted = DelaunayGraph().build(store.xy_um)
    np.testing.assert_array_equal(delaunay.graph.indices, wanted.indices)
    assert not np.array_equal(delaunay.graph.indptr, slide.graph.indptr)
    np.testing.assert_array_equal(delaunay.neighbour_SN, wanted.neighbours(genes.neighbours)[0])
    fitted = fitting._graph(delaunay.path, GenesConfig(graph="delaunay"))
    np.testing.assert_array_equal(fitted.indices, wanted.indices)


def test_standardise_columns_closed_form():
    values = np.array([[1.0, 5.0, 1e-12], [3.0, 5.0, 0.0]])
    assert standardise_columns(values).tolist() == [[-1, 0, 0], [1, 0, 0]]


def test_patches_and_stain(toy_stores, toy_artifacts):
    slide = make_slide(toy_stores, toy_artifacts, image="patches")
    with SlideStore(slide.path) as store:
        pixels = store.patches()
    assert slide.has_image
    assert slide.features_SF is None
    assert np.array_equal(slide.patches(np.array([5, 0])), pixels[[5, 0]])
    whole = pixels.reshape(-1, 3) / 255.0
    np.testing.assert_allclose(slide.stain_6[:3], whole.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(slide.stain_6[3:], whole.std(axis=0), atol=0.02)


def test_patches_of_a_feature_slide_are_an_error(slide):
    with pytest.raises(ConfigError, match="'sim003' has no patches"):
        slide.patches(np.array([0]))


def test_unknown_features_list_what_there_is(toy_stores, toy_artifacts):
    with pytest.raises(ConfigError, match=r"no features 'uni' \(it has: handcrafted\)"):
        prepare_slide(toy_stores / "sim001.h5", toy_artifacts, "uni")


def test_ensembl_ids_against_symbols_are_an_error(toy_stores, toy_artifacts, tmp_path):
    names = [f"ENSG{i:011d}" for i in range(400)]
    path = edit_store(toy_stores / "sim001.h5", tmp_path / "x.h5", rename_genes(names))
    with pytest.raises(ConfigError, match=r"measures 0 of the \d+ genes .*gene id type"):
        prepare_slide(path, toy_artifacts, None)


def test_some_genes_more_or_less_are_counted(toy_stores, toy_artifacts, tmp_path):
    with SlideStore(toy_stores / "sim001.h5") as store:
        names = [f"X{i}" if i < 100 else n for i, n in enumerate(store.gene_names)]
    path = edit_store(toy_stores / "sim001.h5", tmp_path / "x.h5", rename_genes(names))
    slide = prepare_slide(path, toy_artifacts, None)
    assert slide.genes_dropped == 100
    assert slide.genes_matched == 300
    assert np.isfinite(slide.vector_SV).all()


def test_a_slide_without_counts(toy_artifacts):
    xy = np.argwhere(np.ones((4, 4))) * 100.0
    slide = expression_slide(
        ArrayCounts(sparse.csr_matrix((16, toy_artifacts.n_genes), dtype=np.int32)),
        xy,
        toy_artifacts,
        slide_id="blank",
        matched=0,
        measured=0,
    )
    assert not slide.has_counts
    assert (all_rows(slide).gene_SK == toy_artifacts.n_genes).all()
    assert not all_rows(slide).target_SM.any()
    assert np.isfinite(slide.vector_SV).all()


def test_align_columns_by_name():
    counts = sparse.csr_matrix(np.array([[1, 2, 3], [4, 5, 6]]))
    got = align_columns(counts, np.array(["b", "x", "a"]), np.array(["a", "b", "c"]))
    assert got.toarray().tolist() == [[3, 1, 0], [6, 4, 0]]


@pytest.fixture
def entries(toy_stores):
    return read_entries(stores_in(toy_stores))


def test_the_cache_is_bounded_and_keeps_the_latest(entries, toy_artifacts):
    dataset = PreparedSlides(entries, toy_artifacts, "handcrafted", cache=2)
    first, second = dataset[0], dataset[1]
    assert dataset[0] is first
    assert dataset[2].slide_id == "sim003"  # pushes out 1, which was used least recently
    assert dataset[0] is first
    again = dataset[1]
    assert again is not second
    assert np.array_equal(again.features_SF, second.features_SF)
    assert len(dataset) == 3


def test_shuffled_pairs_move_images_and_nothing_else(entries, toy_artifacts):
    plain = PreparedSlides(entries, toy_artifacts, "handcrafted")[0]
    first, second = (
        PreparedSlides(entries, toy_artifacts, "handcrafted", shuffle_pairs=True)[0] for _ in "12"
    )
    assert np.array_equal(first.features_SF, second.features_SF)
    same = (first.features_SF == plain.features_SF).all(axis=1)
    assert same.mean() < 0.1
    order = np.lexsort(plain.features_SF.T), np.lexsort(first.features_SF.T)
    assert np.array_equal(plain.features_SF[order[0]], first.features_SF[order[1]])
    for name in ("vector_SV", "xy_um"):
        assert np.array_equal(getattr(first, name), getattr(plain, name))
    assert np.array_equal(all_rows(first).value_SK, all_rows(plain).value_SK)


def test_patches_cannot_be_shuffled(slide, toy_stores, toy_artifacts):
    patches = make_slide(toy_stores, toy_artifacts, image="patches")
    with pytest.raises(ConfigError, match="shuffle_pairs needs stored features"):
        shuffled_pairs(patches, seed=0)
    blind = dataclasses.replace(slide, features_SF=None)
    assert shuffled_pairs(blind, seed=0) is blind


def adata_of(path) -> anndata.AnnData:
    with SlideStore(path) as store:
        var = pd.DataFrame(index=pd.Index(store.gene_names))
        adata = anndata.AnnData(X=store.counts().astype(np.float32), var=var)
        adata.obsm["spatial"] = store.xy_um
    return adata


def test_anndata_gives_the_embeddings_of_the_store(toy_stores, toy_artifacts, slide):
    model = make_model(toy_artifacts)
    adata = adata_of(toy_stores / "sim003.h5")
    embedding = model.encode_slide(slide)
    np.testing.assert_allclose(model.encode_omics(adata), embedding.omics, atol=1e-5)
    turned = adata[:, ::-1].copy()  # genes in another order
    np.testing.assert_allclose(model.encode_omics(turned), embedding.omics, atol=1e-5)
    with SlideStore(toy_stores / "sim003.h5") as store:
        features = store.features("handcrafted")
    np.testing.assert_allclose(model.encode_image(features), embedding.image, atol=1e-5)
    with pytest.raises(
        ConfigError, match=f"have 5 columns, and the model reads {features.shape[1]}"
    ):
        model.encode_image(features[:, :5])


def test_anndata_without_coordinates_or_raw_counts(toy_stores, toy_artifacts):
    adata = adata_of(toy_stores / "sim001.h5")
    with pytest.raises(ConfigError, match=r"no 'xy' \(it has: spatial\)"):
        slide_of_anndata(adata, toy_artifacts, "xy")
    adata.X = adata.X * 0.5
    with pytest.raises(ConfigError, match="not raw counts"):
        slide_of_anndata(adata, toy_artifacts)


@pytest.mark.parametrize(
    "form", ["backed", "backed dense", "layer", "X empty", "log1p", "<f2", ">f4", ">i4", "csc"]
)
def test_anndata_in_any_form_gives_the_same_slide(tmp_path, toy_stores, toy_artifacts, form: str):
    adata = adata_of(toy_stores / "sim001.h5")
    plain, layer, said = slide_of_anndata(adata.copy(), toy_artifacts), "", nullcontext()
    counts = adata.X.copy()
    if form.startswith("backed"):
        adata.X = counts.toarray() if "dense" in form else counts
        adata.write_h5ad(tmp_path / "a.h5ad")
        adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif form == "layer":
        adata.layers["raw"], adata.X, layer = counts, np.log1p(counts), "raw"
    elif form in ("X empty", "log1p"):
        adata.layers["counts"], adata.X = counts, None if form == "X empty" else np.log1p(counts)
        said = pytest.warns(UserWarning, match=r"adata.layers\['counts'\] taken")
    else:
        adata.X = counts.tocsc() if form == "csc" else counts.toarray().astype(form)
    with said:
        found = slide_of_anndata(adata, toy_artifacts, layer=layer)
    np.testing.assert_array_equal(found.vector_SV, plain.vector_SV)
    np.testing.assert_array_equal(found.neighbour_SN, plain.neighbour_SN)


def test_other_layers_and_units_are_named(toy_stores, toy_artifacts):
    adata = adata_of(toy_stores / "sim001.h5")
    with pytest.raises(ConfigError, match=r"no 'raw' \(it has: nothing\)"):
        slide_of_anndata(adata, toy_artifacts, layer="raw")
    um = adata.obsm["spatial"]
    for factor, unit in ((1e-3, "millimetres"), (40.0, "pixels")):
        adata.obsm["spatial"] = um * factor
        with pytest.raises(ConfigError, match=f"not micrometres.*they look like {unit}"):
            slide_of_anndata(adata, toy_artifacts)
    array, xy = hex_positions()
    visium = adata[: len(array)].copy()
    visium.obs["array_row"], visium.obs["array_col"] = array.T
    visium.obsm["spatial"] = xy  # neighbours are 50 px apart
    with pytest.raises(ConfigError, match="50 apart, not 100 um; multiply by 2"):
        slide_of_anndata(visium, toy_artifacts)
    visium.obsm["spatial"] = xy * 2
    assert slide_of_anndata(visium, toy_artifacts).n_spots == len(array)


def test_image_batch_standardises_patches_by_their_own_stain(toy_artifacts):
    patches = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    patches[:2] = 255
    batch = image_batch(patches, toy_artifacts)
    assert batch.patches_SCHW.shape == (4, 3, 8, 8)
    np.testing.assert_allclose(batch.stain_S6.numpy(), 0.5)
