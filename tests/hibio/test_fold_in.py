"""Genes never seen in training: artifacts and models extended by fold-in."""

import dataclasses

import numpy as np
import pytest
import torch

from hibio.artifacts import read_artifacts, write_artifacts
from hibio.config.files import ConfigError
from hibio.data.fitting import fit_artifacts
from hibio.data.fold_in import fold_in_genes, panel_genes
from hibio.data.slide import prepare_slide
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from tests.hibio.test_artifacts import assert_same
from tests.hibio.toy import GENES, OMICS, PATHWAYS, edit_store, make_model, rename_genes


@pytest.fixture(scope="module")
def cohort(toy_stores, tmp_path_factory):
    """Training stores whose panel lacks every third gene (renamed apart), and the whole ones."""
    folder = tmp_path_factory.mktemp("partial")
    with SlideStore(toy_stores / "sim001.h5") as store:
        names = store.gene_names.tolist()
    hidden = sorted(names)[::3]
    for path in stores_in(toy_stores)[:2]:
        own = [f"{path.stem}-{i}" if n in hidden else n for i, n in enumerate(names)]
        edit_store(path, folder / path.name, rename_genes(own))
    return stores_in(folder), stores_in(toy_stores), hidden


@pytest.fixture(scope="module")
def partial(cohort):
    return fit_artifacts(cohort[0], GENES, PATHWAYS)


@pytest.fixture(scope="module")
def extended(cohort, partial):
    return fold_in_genes(partial, cohort[1][:2], cohort[2])


def test_every_gene_is_accounted_for(cohort, partial, extended):
    artifacts, report = extended
    assert not set(cohort[2]) & set(partial.genes)
    assert set(report.folded_in) | set(report.dropped) == set(cohort[2])
    assert len(report.folded_in) > 60
    assert artifacts.n_genes == partial.n_genes + len(report.folded_in)
    assert artifacts.genes[partial.n_genes :].tolist() == list(report.folded_in)
    assert artifacts.n_folded_in == len(report.folded_in)
    assert panel_genes(cohort[1]) >= set(artifacts.genes)


def test_known_genes_keep_everything(partial, extended):
    artifacts, n = extended[0], partial.n_genes
    np.testing.assert_array_equal(artifacts.factors.components[:n], partial.factors.components)
    np.testing.assert_array_equal(artifacts.tfidf.idf[:n], partial.tfidf.idf)
    for new, old in zip(artifacts.gene_graphs, partial.gene_graphs, strict=True):
        kept = np.where(new.neighbour[:n] == artifacts.n_genes, n, new.neighbour[:n])
        np.testing.assert_array_equal(kept, old.neighbour)
        assert (new.neighbour[n:] == artifacts.n_genes).all()
    assert (artifacts.anchors.matrix[:n] != partial.anchors.matrix).nnz == 0
    assert artifacts.anchors.matrix[n:].nnz == 0


def test_extended_artifacts_are_written_and_read(extended, tmp_path):
    write_artifacts(tmp_path / "artifacts.h5", extended[0])
    assert_same(read_artifacts(tmp_path / "artifacts.h5"), extended[0])


def test_a_slide_of_known_genes_alone_is_embedded_as_before(cohort, partial):
    model = make_model(partial)
    longer, _ = model.fold_in(cohort[1][:2])
    plain, after = (
        m.encode_slide(prepare_slide(cohort[0][0], m.artifacts, None)).omics
        for m in (model, longer)
    )
    np.testing.assert_allclose(after, plain, atol=1e-5)


def test_a_slide_with_only_unseen_genes_lands_near_itself(cohort, partial, extended):
    """The spot vectors from the folded-in genes alone follow those from the known ones."""
    path = cohort[1][2]  # a patient that nothing was fitted on
    artifacts, report = extended
    known = prepare_slide(path, artifacts, None, hidden=report.folded_in)
    unseen = prepare_slide(path, artifacts, None, hidden=partial.genes)
    assert known.genes_folded_in == 0
    assert unseen.genes_matched == unseen.genes_folded_in == len(report.folded_in)
    first, second = known.vector_SV, unseen.vector_SV
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1)
    cosine /= np.linalg.norm(second, axis=1)
    shuffled = np.random.default_rng(0).permutation(len(first))
    chance = (first * second[shuffled]).sum(1) / np.linalg.norm(first, axis=1)
    chance /= np.linalg.norm(second[shuffled], axis=1)
    assert np.median(cosine) > 0.4
    assert abs(np.median(chance)) < 0.2
    assert np.isfinite(make_model(artifacts).encode_slide(unseen).omics).all()


def test_without_fold_in_the_same_slide_is_refused(cohort, partial):
    with pytest.raises(ConfigError, match=r"measures 0 of the \d+ genes .*--fold-in"):
        prepare_slide(cohort[1][2], partial, None, hidden=partial.genes)


def test_a_vocabulary_bound_table_gives_new_genes_no_identity(partial, extended):
    table = make_model(partial, omics=dataclasses.replace(OMICS, identity="table"))
    longer = table.with_artifacts(extended[0])
    weight = longer.omics.identity.weight
    n = partial.n_genes
    assert torch.equal(weight[:n], table.omics.identity.weight[:n])
    assert not weight[n:].any()


def test_nothing_to_fold_in_is_an_error(cohort, partial):
    with pytest.raises(ConfigError, match="no gene that the model lacks"):
        fold_in_genes(partial, cohort[1][:1], wanted=partial.genes[:5])
