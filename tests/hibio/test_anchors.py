"""Pathways through the omics branch: queries equal anchors, the cache, gradients, new sets."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hibio.config.files import ConfigError
from hibio.encoders.omics import AnchorTable, set_batch, sets_matrix
from preprocessing.coexpression.spot_groups import SpotGroups
from tests.hibio.toy import dense, make_model


@pytest.fixture
def model(toy_artifacts):
    return make_model(toy_artifacts)


def sets_of(artifacts) -> dict[str, list[str]]:
    return {name: list(artifacts.database.genes_of(name)) for name in artifacts.anchors.names}


def test_a_database_set_as_a_query_is_its_anchor(model, toy_artifacts):
    with torch.no_grad():
        anchors = model.anchor_embeddings()
    got = model.encode_gene_sets(sets_of(toy_artifacts))
    np.testing.assert_allclose(got, anchors.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, atol=1e-5)
    assert not np.allclose(got[0], got[1], atol=1e-3)


def test_sets_do_not_depend_on_each_other_or_on_order_of_genes(model, toy_artifacts):
    sets = sets_of(toy_artifacts)
    name = next(iter(sets))
    together = model.encode_gene_sets(sets)[0]
    alone = model.encode_gene_sets({name: sets[name][::-1]})[0]
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_a_set_never_seen_is_embedded_and_unknown_genes_are_left_out(model, toy_artifacts):
    genes = toy_artifacts.genes[[3, 50, 111, 200, 317]].tolist()
    got = model.encode_gene_sets({"new": [*genes, "NOT_A_GENE", genes[0]], "same": genes})
    np.testing.assert_allclose(got[0], got[1], atol=1e-6)
    assert np.isfinite(got).all()
    known = model.encode_gene_sets(sets_of(toy_artifacts))
    assert (known @ got[0]).max() < 0.9999


def test_a_set_without_a_known_gene_is_an_error(model):
    with pytest.raises(ConfigError, match=r"'mouse': none of its 2 genes \(Trp53, Cd8a .*id type"):
        model.encode_gene_sets({"mouse": ["Trp53", "Cd8a"]})


def test_rows_of_the_set_matrix(toy_artifacts):
    genes = toy_artifacts.genes[[5, 2]].tolist()
    matrix = dense(sets_matrix({"x": genes}, toy_artifacts))
    weight = toy_artifacts.tfidf.idf[[2, 5]]
    expected = np.zeros((1, toy_artifacts.n_genes))
    expected[0, [2, 5]] = weight / np.linalg.norm(weight)
    np.testing.assert_allclose(matrix, expected)


def test_the_set_matrix_is_the_anchor_matrix(toy_artifacts):
    ours = dense(sets_matrix(sets_of(toy_artifacts), toy_artifacts))
    np.testing.assert_allclose(ours, dense(toy_artifacts.anchors.matrix).T, atol=1e-6)


def test_a_set_batch_has_no_neighbours(toy_artifacts):
    matrix = toy_artifacts.anchors.matrix.T.tocsr()
    batch = set_batch(*toy_artifacts.set_inputs(matrix, 16))
    assert batch.n_spots == toy_artifacts.n_pathways
    assert batch.neighbour_SN.eq(-1).all()
    assert batch.core_S.all()
    assert not batch.spot_group_S.any()


def test_a_set_reads_the_gene_graph_of_the_nearest_group(toy_artifacts):
    inputs = toy_artifacts.set_inputs(toy_artifacts.anchors.matrix.T.tocsr(), 16)
    groups = SpotGroups(inputs[2][[3, 0]])
    batch = set_batch(*inputs, groups)
    assert batch.spot_group_S[[0, 3]].tolist() == [1, 0]
    np.testing.assert_array_equal(batch.spot_group_S, groups.assign(inputs[2]))
    table = AnchorTable(dataclasses.replace(toy_artifacts, groups=groups), 8, learned=False)
    seen = []
    table.embed(
        lambda sets: seen.append(sets.spot_group_S) or torch.zeros(2, 8), torch.tensor([3, 0])
    )
    assert seen[0].tolist() == [0, 1]


def test_fresh_rows_are_encoded_and_the_others_come_from_the_cache(model):
    n_sets = model.artifacts.n_pathways
    fresh = torch.tensor([4, 1])
    with torch.no_grad():
        whole = model.anchor_embeddings().clone()  # fills the cache
        torch.testing.assert_close(model.anchors.cache_MD, whole)
        for parameter in model.omics_head.parameters():
            parameter.mul_(1.5).add_(0.1)
        mixed = model.anchor_embeddings(fresh)
        moved = model.anchor_embeddings()
    rest = [row for row in range(n_sets) if row not in (1, 4)]
    assert torch.equal(mixed[rest], whole[rest])
    torch.testing.assert_close(mixed[fresh], moved[fresh], atol=1e-5, rtol=0)
    assert (mixed[fresh] - whole[fresh]).abs().max() > 1e-2


def test_what_is_encoded_enters_the_cache(model):
    with torch.no_grad():
        one = model.anchor_embeddings(torch.tensor([2]))
    assert torch.equal(model.anchors.cache_MD[2], one[2])
    assert not model.anchors.cache_MD[[0, 1, 3]].any()
    assert "anchors.cache_MD" in model.state_dict()  # a resumed run goes on with it


def test_gradients_flow_into_fresh_rows_only(model):
    model.anchor_embeddings()
    fresh = torch.tensor([0, 3])
    rest = [row for row in range(model.artifacts.n_pathways) if row not in (0, 3)]
    out = model.anchor_embeddings(fresh)
    probe = torch.randn_like(out)
    (out[rest] * probe[rest]).sum().backward(retain_graph=True)
    assert all(not p.grad.any() for p in model.omics.parameters() if p.grad is not None)
    (out[fresh] * probe[fresh]).sum().backward()
    assert model.omics.spot_vector.weight.grad.abs().sum() > 0


def test_a_learned_table_is_the_baseline(toy_artifacts):
    model = make_model(toy_artifacts, anchor="table")
    table = model.anchors.table_MD
    torch.testing.assert_close(model.anchor_embeddings(), F.normalize(table, dim=1))
    model.anchor_embeddings(torch.tensor([1])).sum().backward()
    assert table.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.omics.parameters())
