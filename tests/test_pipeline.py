"""Planted truth through the whole pipeline: files -> stores -> training -> held-out metrics.

At the default signal the model must find what was planted; at signal 0 image and expression are
independent and every cross-modal metric must be at chance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.run import evaluate
from hibio.cli import main
from hibio.config.files import load_config
from hibio.config.run import RunConfig
from hibio.run import train_all
from pathways import load_pathways
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.tfidf import TfidfReweighter

CONFIG = """
out: {out}
data: {{stores: {stores}}}
folds: [patient03]
genes: {{keyword_genes: 16, min_spots: 3, rank: 12, graph_edges: 8}}
model: {{embed_dim: 32, vision: {{width: 64}}, omics: {{width: 32, layers: 1, heads: 2}}}}
sampler: {{batch_spots: 150}}
stages:
  - {{name: spot, epochs: 12, lr: 2e-3, weights: {{spot/contrastive: 1.0, image/expression: 1.0}}}}
  - name: region
    epochs: 2
    lr: 5e-4
    rebuild_every: 1
    weights:
      {{spot/contrastive: 1.0, pathway/kl: 0.25, region/contrastive: 0.25, region/member: 0.25}}
variants:
  shuffled: {{data: {{shuffle_pairs: true}}, model: {{omics: {{name: mlp}}}}}}
"""


def run_cohort(folder: Path, signal: float, text: str = CONFIG) -> dict[str, Any]:
    """Results of a small cohort of 6 slides and 3 patients, one patient held out."""
    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    config = SimulateConfig(n_slides=6, n_patients=3, n_spots=150, signal=signal, mpp=2.0, seed=3)
    manifest = simulate_cohort(folder / "cohort", programmes, config)
    report = prepare(manifest, folder / "stores", patch=PatchConfig(patch_px=32))
    assert not report.failed
    path = folder / "run.yaml"
    path.write_text(text.format(out=folder / "run", stores=folder / "stores"))
    train_all(load_config(RunConfig, path))
    tasks = ["retrieval", "pathway_query", "regions"]
    evaluate(folder / "run", folder / "stores", folder / "eval", tasks)
    return json.loads((folder / "eval" / "results.json").read_text())["tasks"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("planted")
    return folder, run_cohort(folder, signal=0.8)


@pytest.fixture(scope="module")
def null(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    main_run, _, _ = CONFIG.partition("variants:")
    return run_cohort(tmp_path_factory.mktemp("null"), 0.0, main_run)


def mean(tasks: dict[str, Any], task: str, metric: str, model: str = "hibio") -> float:
    return float(tasks[task]["models"][model][metric]["mean"])


def test_retrieval_and_queries_find_what_was_planted(planted: tuple[Path, dict[str, Any]]) -> None:
    tasks = planted[1]
    for direction in ("image_to_omics", "omics_to_image"):
        assert mean(tasks, "retrieval", f"{direction}/recall@10%") >= 0.3
    assert mean(tasks, "pathway_query", "spearman_planted/default/median") >= 0.4
    assert mean(tasks, "regions", "ari/matched") >= 0.4


def test_shuffled_pairs_are_at_chance(planted: tuple[Path, dict[str, Any]]) -> None:
    recall = mean(planted[1], "retrieval", "image_to_omics/recall@10%", "shuffled")
    assert abs(recall - 0.1) < 0.06


def test_without_signal_every_cross_modal_metric_is_at_chance(null: dict[str, Any]) -> None:
    for direction in ("image_to_omics", "omics_to_image"):
        assert abs(mean(null, "retrieval", f"{direction}/recall@10%") - 0.1) < 0.06
        assert abs(mean(null, "retrieval", f"{direction}/median_rank") - 0.5) < 0.1
    for readout in ("default", "ridge", "retrieval", "anchor"):
        assert abs(mean(null, "pathway_query", f"spearman/{readout}/median")) < 0.12
        assert abs(mean(null, "pathway_query", f"spearman_planted/{readout}/median")) < 0.15


def test_housekeeping_genes_have_the_lowest_weights(planted: tuple[Path, dict[str, Any]]) -> None:
    from preprocessing.store import SlideStore
    from preprocessing.store.read import stores_in

    truth = json.loads((planted[0] / "cohort" / "truth.json").read_text())
    tfidf = TfidfReweighter()
    for path in stores_in(planted[0] / "stores"):
        with SlideStore(path) as store:
            tfidf.partial_fit(store.counts())
            names = store.gene_names
    rank = np.argsort(np.argsort(np.asarray(tfidf.idf))) / len(names)
    block = rank[np.isin(np.asarray(names, dtype=str), truth["housekeeping"])]
    assert len(block) == len(truth["housekeeping"])
    assert np.median(block) <= 0.1
    assert (block <= 0.1).mean() >= 0.75  # the block alone fills that tenth


def test_embed_and_query_write_what_they_promise(
    planted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import anndata

    folder = planted[0]
    arguments = ["--checkpoint", str(folder / "run" / "hibio"), "--data", str(folder / "stores")]
    assert main(["embed", *arguments, "--out", str(tmp_path / "embed")]) == 0
    adata = anndata.read_h5ad(tmp_path / "embed" / "sim005.h5ad")
    assert adata.obsm["X_hibio_image"].shape == adata.obsm["X_hibio_omics"].shape == (150, 32)
    assert {"X_hibio_region", "spatial"} <= set(adata.obsm)
    assert [c for c in adata.obs if c.startswith("hibio_region_")] != []
    before = (tmp_path / "embed" / "sim005.h5ad").stat().st_mtime_ns
    assert main(["embed", *arguments, "--out", str(tmp_path / "embed")]) == 0
    assert (tmp_path / "embed" / "sim005.h5ad").stat().st_mtime_ns == before  # kept, same hashes
    query = ["query", *arguments, "--gene-set", "default", "--out", str(tmp_path / "query")]
    assert main(query) == 0
    assert (tmp_path / "query" / "sim005.query.png").stat().st_size > 5000
    scores = anndata.read_h5ad(tmp_path / "query" / "sim005.query.h5ad")
    assert scores.layers["measured"].shape == scores.shape


def test_several_checkpoints_are_refused_where_one_is_needed(
    planted: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted[0]
    code = main(
        [
            "embed",
            *("--checkpoint", str(folder / "run"), "--data", str(folder / "stores")),
            *("--out", str(tmp_path / "out")),
        ]
    )
    assert code == 1
    assert "choose one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
