"""The whole command on a folder from the simulator; embeddings; what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from eval.hest_bench import HestBenchConfig, hest_bench
from eval.hest_bench.encoders import ComputedEmbeddings, HandcraftedPatch, PatchReader
from eval.hest_bench.layout import read_tasks
from eval.hest_bench.samples import read_facts, read_targets
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from tests.eval.hest_bench.bench_folder import SAMPLES, TASK, write_embeddings, write_split

STORED = ("random",)


def measured(bench: Path, tmp_path: Path, **changes) -> dict:
    root = bench / TASK
    write_embeddings(root, tmp_path / "given", "random", 40)
    config = HestBenchConfig(encoders=STORED, embeddings=tmp_path / "given", **changes)
    hest_bench(bench, tmp_path / "out", config)
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_the_published_number_equals_scikit_learn_written_out(bench: Path, tmp_path: Path) -> None:
    body = measured(bench, tmp_path)
    root = bench / TASK
    vectors = write_embeddings(root, tmp_path / "again", "random", 40)
    (task,) = read_tasks(bench)
    y = {s.sample_id: read_targets(s, read_facts(s).barcodes, task.genes) for s in task.samples}
    with h5py.File(root / "adata" / "sim001.h5ad") as file:
        assert file["X"].attrs["encoding-type"] == "csr_matrix"
    means = []
    for test in SAMPLES:
        train = [name for name in SAMPLES if name != test]
        x = np.concatenate([vectors[name] for name in train])
        scaler = StandardScaler().fit(x)
        pca = PCA(40, random_state=1).fit(scaler.transform(x))
        ridge = Ridge(alpha=100 / (40 * 12), solver="lsqr", fit_intercept=False, max_iter=1000)
        z = pca.transform(scaler.transform(x)).astype(np.float32)
        ridge.fit(z, np.concatenate([y[name] for name in train]))
        held = pca.transform(scaler.transform(vectors[test])).astype(np.float32)
        pairs = zip(y[test].T, ridge.predict(held).T, strict=True)
        means.append(np.mean([pearsonr(a, b)[0] for a, b in pairs]))
    found = body["data"]["published"]["tasks"][TASK]["random"]
    np.testing.assert_allclose(found["mean_per_split"], means, atol=1e-4)
    assert found["mean"] == pytest.approx(np.mean(means), abs=1e-4)
    assert found["std"] == pytest.approx(np.std(means), abs=1e-4)
    assert list(found["genes"]) == list(task.genes)
    metrics = body["tasks"][f"hest_bench/{TASK}"]["models"]["random"]
    assert metrics["pearson/published"]["values"] == found["mean_per_split"]
    assert metrics["pearson/published"]["keys"] == [f"{k}/1/pooled" for k in range(3)]
    assert metrics["pearson/per_slide"]["keys"] == [f"{k}/1/{s}" for k, s in enumerate(SAMPLES)]
    np.testing.assert_allclose(metrics["pearson/per_slide"]["values"], means, atol=1e-4)


def test_targets_are_the_logarithm_of_counts_without_depth_scaling(bench: Path) -> None:
    (task,) = read_tasks(bench)
    sample = task.samples[0]
    facts = read_facts(sample)
    (column,) = np.flatnonzero(facts.sums.genes == task.genes[2])
    found = read_targets(sample, facts.barcodes, task.genes)[:, 2]
    assert np.expm1(found).sum() == pytest.approx(facts.sums.total[column])
    np.testing.assert_allclose(np.expm1(found), np.rint(np.expm1(found)), atol=1e-9)
    turned = read_targets(sample, facts.barcodes[::-1], task.genes)[:, 2]
    np.testing.assert_array_equal(turned, found[::-1])
    with pytest.raises(DataError, match="did you mean"):
        read_targets(sample, facts.barcodes, [task.genes[0] + "x"])


def test_test_samples_do_not_choose_genes(bench: Path, tmp_path: Path) -> None:
    before = measured(bench, tmp_path)["data"]["genes_of_training_samples"][TASK]
    with h5py.File(bench / TASK / "adata" / "sim001.h5ad", "r+") as file:
        values = file["X/data"][:]
        file["X/data"][:] = np.random.default_rng(0).permutation(values) * 3
    after = measured(bench, tmp_path)["data"]["genes_of_training_samples"][TASK]
    assert after["0"] == before["0"]
    assert after["1"] != before["1"]


def test_a_constant_gene_is_counted_and_makes_the_published_number_undefined(
    bench: Path, tmp_path: Path
) -> None:
    (task,) = read_tasks(bench)
    path = bench / TASK / "adata" / "sim001.h5ad"
    names = anndata.read_h5ad(path).var_names.tolist()
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        data[file["X/indices"][:] == names.index(task.genes[0])] = 0
        file["X/data"][:] = data
    body = measured(bench, tmp_path)
    metrics = body["tasks"][f"hest_bench/{TASK}"]["models"]["random"]
    assert metrics["constant_genes/pooled"]["values"] == [1, 0, 0]
    assert metrics["pearson/published"]["values"][0] is None
    assert metrics["pearson/varying_genes"]["values"][0] is not None
    assert "undefined" in (tmp_path / "out" / "results.md").read_text()


def test_a_leak_is_in_the_results_and_strict_refuses(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(bench / TASK, 0, SAMPLES, ["sim001"])
    body = measured(bench, tmp_path)
    leaks = [f for f in body["data"]["audit"] if f["kind"] == "leak"]
    assert [(f["check"], f["split"]) for f in leaks] == [("sample", "0")]
    assert "LEAK TOY, fold 0" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 leaks"):
        measured(bench, tmp_path, strict=True)


def test_hand_made_features_beat_random_vectors_and_stand_beside_them(
    bench: Path, tmp_path: Path
) -> None:
    random = measured(bench, tmp_path)["data"]["published"]["average"]["random"]
    names = ("handcrafted", "handcrafted_patch")
    text = hest_bench(bench, tmp_path / "two", HestBenchConfig(encoders=names))
    body = json.loads((tmp_path / "two" / "results.json").read_text())
    for name in names:
        assert body["data"]["published"]["average"][name] > random + 0.1
        assert f"| {name} |" in text
    assert "HEST-Bench" in (tmp_path / "two" / "report.html").read_text()


class Counting(HandcraftedPatch):
    """Counts how often a sample is encoded."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, patches: Path, barcodes: np.ndarray) -> np.ndarray:
        self.calls += 1
        return np.stack([p.mean(axis=(0, 1)) for p in PatchReader(patches)(range(len(barcodes)))])


def test_embeddings_are_kept_until_the_patches_change(bench: Path, tmp_path: Path) -> None:
    (task,) = read_tasks(bench)
    sample = task.samples[0]
    barcodes = read_facts(sample).barcodes
    encoder = Counting()
    source = ComputedEmbeddings(tmp_path, encoder)
    first = source.of(task, sample, barcodes)
    np.testing.assert_array_equal(source.of(task, sample, barcodes[::-1]), first[::-1])
    assert encoder.calls == 1
    with h5py.File(sample.patches, "r+") as file:
        file["img"][0] = 0
    assert source.of(task, sample, barcodes)[0].max() == 0.0
    assert encoder.calls == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("embeddings"), "no dataset embeddings"),
        (lambda f: f["embeddings"].write_direct(np.full((70, 40), np.nan, np.float32)), "finite"),
        (lambda f: f["barcodes"].write_direct(f["barcodes"][:][::-1].copy()), None),
        (lambda f: f.pop("barcodes"), "no dataset barcode"),
    ],
)
def test_given_embeddings_that_do_not_fit_are_refused(
    bench: Path, tmp_path: Path, change, words: str | None
) -> None:
    root = bench / TASK
    write_embeddings(root, tmp_path / "given", "random", 40)
    config = HestBenchConfig(encoders=STORED, embeddings=tmp_path / "given")
    hest_bench(bench, tmp_path / "out", config)
    with h5py.File(tmp_path / "given" / TASK / "random" / "sim001.h5", "r+") as file:
        change(file)
    if words is None:  # only the order of the names changed: other spots, other numbers
        before = (tmp_path / "out" / "results.md").read_text()
        assert hest_bench(bench, tmp_path / "out", config) != before
        return
    with pytest.raises(DataError, match=words):
        hest_bench(bench, tmp_path / "out", config)


def test_patches_without_their_spot_are_refused(bench: Path, tmp_path: Path) -> None:
    with h5py.File(bench / TASK / "patches" / "sim001.h5", "r+") as file:
        names = file["barcode"][:]
        names[0] = b"nobody"
        file["barcode"][:] = names
    with pytest.raises(DataError, match="1 of 70 patches have no spot"):
        measured(bench, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stores": Path("stores")}, "give --checkpoint too"),
        ({"weights": Path("w.bin")}, "none is computed"),
        ({"weights": Path("w.bin"), "encoders": ("a", "b")}, "several backbones"),
    ],
)
def test_options_that_nothing_would_read_are_refused(bench: Path, tmp_path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        hest_bench(bench, tmp_path / "out", HestBenchConfig(**changes))
    assert not (tmp_path / "out").exists()
