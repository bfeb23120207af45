"""Fitted artifacts: written and read back, torn files refused, node genes, inputs of gene sets."""

import dataclasses

import h5py
import numpy as np
import pytest
from scipy import sparse

from hibio.artifacts import read_artifacts, write_artifacts
from hibio.config.files import ConfigError
from preprocessing.coexpression import spot_vectors
from preprocessing.store import SlideStore
from tests.hibio.toy import dense
from tests.preprocessing.full_disk import on_a_full_disk

WRITE = """
from pathlib import Path
from hibio.artifacts import read_artifacts, write_artifacts
artifacts = read_artifacts(Path(sys.argv[1]))
attempt(lambda: write_artifacts(Path(sys.argv[2]), artifacts))
"""


def assert_same(left, right) -> None:
    """Equal to the last bit, dataclass by dataclass."""
    assert type(left) is type(right)
    if dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif sparse.issparse(left):
        assert left.shape == right.shape
        assert (left != right).nnz == 0
    elif isinstance(left, np.ndarray):
        assert left.shape == right.shape
        assert np.array_equal(left, right)
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif hasattr(left, "equals"):
        assert left.equals(right)
    elif hasattr(left, "state"):
        for name, value in left.state().items():
            assert np.array_equal(value, right.state()[name]), name
    else:
        assert left == right


@pytest.fixture(scope="module")
def with_nodes(toy_artifacts):
    return dataclasses.replace(toy_artifacts, node_genes=np.arange(0, 60, 2))


@pytest.mark.parametrize("nodes", [False, True])
def test_round_trip(toy_artifacts, with_nodes, tmp_path, nodes):
    artifacts = with_nodes if nodes else toy_artifacts
    write_artifacts(tmp_path / "artifacts.h5", artifacts)
    assert_same(read_artifacts(tmp_path / "artifacts.h5"), artifacts)
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts.h5"]


def test_writing_twice_gives_equal_artifacts_and_replaces_the_file(toy_artifacts, tmp_path):
    path = tmp_path / "artifacts.h5"
    path.write_text("something else")
    write_artifacts(path, toy_artifacts)
    write_artifacts(path, read_artifacts(path))
    assert_same(read_artifacts(path), toy_artifacts)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(toy_artifacts, tmp_path, share):
    path = tmp_path / "artifacts.h5"
    write_artifacts(path, toy_artifacts)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match=r"artifacts\.h5: .*\.previous"):
        read_artifacts(path)


def test_a_missing_file_and_one_that_is_no_hdf5(tmp_path):
    for path in (tmp_path / "none.h5", tmp_path / "text.h5"):
        if path.stem == "text":
            path.write_text("slide_id,patient_id\n")
        with pytest.raises(ConfigError, match=path.name):
            read_artifacts(path)


@pytest.mark.parametrize(
    "part", ["genes", "tfidf", "factors", "anchors", "database", "gene_graphs"]
)
def test_a_missing_part_is_refused(toy_artifacts, tmp_path, part):
    path = tmp_path / "artifacts.h5"
    write_artifacts(path, toy_artifacts)
    with h5py.File(path, "r+") as file:
        del file[part]
    with pytest.raises(ConfigError, match="cannot be read as HiBio artifacts"):
        read_artifacts(path)


@pytest.mark.parametrize(
    "part", ["anchors/mean", "factors/spread", "tfidf/df", "gene_graphs/0/weight"]
)
def test_a_missing_array_is_refused(toy_artifacts, tmp_path, part):
    path = tmp_path / "artifacts.h5"
    write_artifacts(path, toy_artifacts)
    with h5py.File(path, "r+") as file:
        del file[part]
    with pytest.raises(ConfigError, match="cannot be read as HiBio artifacts"):
        read_artifacts(path)


def test_another_schema_names_both_versions(toy_artifacts, tmp_path):
    path = tmp_path / "artifacts.h5"
    write_artifacts(path, toy_artifacts)
    with h5py.File(path, "r+") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(ConfigError, match="schema 99, this HiBio reads up to 3; update HiBio"):
        read_artifacts(path)


@pytest.fixture(scope="module")
def tfidf(toy_stores, toy_artifacts):
    with SlideStore(toy_stores / "sim001.h5") as store:
        assert store.gene_names.tolist() != toy_artifacts.genes.tolist()  # sorted in the vocabulary
        order = np.argsort(store.gene_names.astype(str))
        return toy_artifacts.tfidf.transform(store.counts()[:, order])


def test_keywords_are_the_largest_values(toy_artifacts, tfidf):
    gene, value = toy_artifacts.keywords(tfidf, 12)
    table = dense(tfidf)
    for row in range(len(table)):
        best = np.sort(table[row])[::-1][:12]
        np.testing.assert_allclose(value[row], best, rtol=1e-6)
        np.testing.assert_allclose(table[row, gene[row]], best, rtol=1e-6)


def test_node_genes_are_the_only_keywords(with_nodes, tfidf):
    gene, value = with_nodes.keywords(tfidf, 12)
    table = dense(tfidf)
    allowed = set(with_nodes.node_genes.tolist())
    assert set(gene[value > 0].tolist()) <= allowed
    only = table[:, with_nodes.node_genes]
    np.testing.assert_allclose(value, -np.sort(-only, axis=1)[:, :12], rtol=1e-6)
    assert (gene[value == 0] == with_nodes.n_genes).all()


def test_set_inputs_are_a_spot_of_typical_length(toy_artifacts):
    matrix = toy_artifacts.anchors.matrix.T.tocsr()
    gene, value, vector = toy_artifacts.set_inputs(matrix, 16)
    factors = toy_artifacts.factors
    assert gene.shape == value.shape == (toy_artifacts.n_pathways, 16)
    assert vector.shape == (toy_artifacts.n_pathways, factors.rank)
    typical = np.sqrt((factors.spread / factors.spread.max()).sum())
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), typical, rtol=1e-5)
    raw = spot_vectors(matrix, factors).astype(np.float64)
    direction = (raw - factors.mean) / factors.sd * np.sqrt(factors.spread / factors.spread.max())
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(vector / typical, direction, atol=1e-4)
    for row, name in enumerate(toy_artifacts.anchors.names):
        members = set(toy_artifacts.database.genes_of(name))
        shown = toy_artifacts.genes[gene[row][value[row] > 0]]
        assert set(shown) <= members
        assert len(shown) == min(16, len(members))


def test_a_full_disk_is_an_error_and_no_crash(toy_artifacts, tmp_path):
    write_artifacts(tmp_path / "artifacts.h5", toy_artifacts)
    old = tmp_path / "out" / "artifacts.h5"
    old.parent.mkdir()
    old.write_text("what was there")
    told = on_a_full_disk(WRITE, tmp_path / "artifacts.h5", old, limit=9_000)
    assert "MiB are free: make room and run again" in told
    assert [path.read_text() for path in old.parent.iterdir()] == ["what was there"]


def replaced(name, change):
    def craft(file: h5py.File) -> None:
        values = change(file[name][()])
        del file[name]
        file[name] = values

    return craft


def sealed(text):
    return replaced("seals", lambda _: text)


def beyond(values):
    values = values.copy()
    values.flat[0] = 10**6
    return values


@pytest.mark.parametrize(
    ("craft", "words"),
    [
        (replaced("genes", lambda v: v[:-7]), "vocabulary has 393"),
        (replaced("genes", lambda v: np.where(np.arange(len(v)) == 1, v[0], v)), "different ones"),
        (replaced("target_genes", beyond), "target_genes names genes beyond"),
        (replaced("target_genes", lambda v: v - 10**6), "target_genes names genes beyond"),
        (replaced("target_genes", lambda v: v.astype("f4")), "target_genes names genes beyond"),
        (replaced("gene_graphs/0/neighbour", beyond), "gene_graphs/0 names genes beyond"),
        (replaced("gene_graphs/0/weight", lambda v: v * np.nan), "gene_graphs/0: not all are"),
        (replaced("factors/spread", lambda v: v * np.inf), "spread: not all are finite"),
        (
            replaced("factors/components", lambda v: v[:-1]),
            r"factors has shape \(399, 8\), the vocabulary has 400",
        ),
        (replaced("anchors/mean", lambda v: v * np.nan), "mean: not all are finite"),
        (replaced("anchors/indices", beyond), "cannot be read"),
        (replaced("anchors/indptr", beyond), "cannot be read"),
        (replaced("tfidf/df", lambda v: v[:-1]), "cannot be read"),
        (replaced("tfidf/df", beyond), r"tfidf: -\d.* is below 0"),
        (replaced("scales/use", lambda v: v[:-1]), r"scales/use has shape \(399,\)"),
        (replaced("scales/spread", lambda v: v[:, None]), r"scales/spread has shape \(400, 1\)"),
        (replaced("scales/spread", lambda v: 0 * v), "a spread is not above 0"),
        (lambda f: f["scales"].attrs.__setitem__("edge_spread", "0.0"), "a spread is not above 0"),
        (replaced("groups", lambda v: v[:, :-1]), "groups are not of the"),
        (lambda f: f.attrs.__setitem__("n_folded_in", 10**6), "were folded in"),
        (replaced("database/weight", lambda v: 2 * v), "the gene sets have sha256"),
        (sealed("-1"), "cannot be read"),
        (sealed('{"a": 3}'), "cannot be read"),
        (sealed('{"a": {"counts": 3}}'), "cannot be read"),
    ],
)
def test_crafted_artifacts_are_refused(toy_artifacts, tmp_path, craft, words):
    path = tmp_path / "artifacts.h5"
    write_artifacts(path, toy_artifacts)
    with h5py.File(path, "r+") as file:
        craft(file)
    with pytest.raises(ConfigError, match=words):
        read_artifacts(path)
