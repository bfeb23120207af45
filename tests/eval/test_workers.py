"""Slides of embed, query, predict and features, and jobs of ablate, on two workers of a cluster."""

import multiprocessing
import shutil
from functools import partial
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest

from eval.ablation import run as ablation
from eval.embed import embed_folder
from eval.predict import Wanted, predict_folder
from eval.query import query_folder
from hibio.backbones.features import features_report
from hibio.cli import main
from preprocessing.errors import DataError
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.workers import Lost, each
from tests.eval.image_cohort import Cohort, picture
from tests.hibio.ablation_grids import grid_of
from tests.hibio.test_features import write_weights


def same(one: Path, other: Path) -> None:
    a, b = anndata.read_h5ad(one), anndata.read_h5ad(other)
    assert a.obs.equals(b.obs)
    for left, right in ((a.X, b.X), *((a.obsm[name], b.obsm[name]) for name in a.obsm)):
        np.testing.assert_allclose(
            *(x.toarray() if hasattr(x, "toarray") else x for x in (left, right)), atol=1e-5
        )


def test_a_cluster_writes_what_one_process_does(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    distributed = pytest.importorskip("distributed", reason='pip install "hibio[cluster]"')
    stores = Path(shutil.copytree(cohort.images, tmp_path / "stores"))
    monkeypatch.chdir(tmp_path)  # relative paths, while the workers are elsewhere
    weights, encoder = write_weights(tmp_path / "vit.safetensors", "test_vit"), "test_vit"
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address=None,
        silence_logs=50,
        host="127.0.0.1",
    ) as cluster:
        there = {"scheduler": cluster.scheduler_address}
        many, one = Path("many"), Path("one")
        features_report(Path("stores"), encoder, weights=Path(weights.name), device="cpu", **there)
        embed_folder(cohort.checkpoint, Path("stores"), many, **there)
        query_folder(cohort.checkpoint, Path("stores"), "default", many, **there)
        predict_folder(cohort.checkpoint, [Path("stores")], many, Wanted(("AR",)), **there)
        told = Wanted(("AR",), mpp=1.0)  # which is of the picture, and no worker's business
        slide = tmp_path / f"new{picture(cohort).suffix}"
        slide.symlink_to(picture(cohort))
        for out, place in ((Path("pictured"), there), (Path("here"), {})):
            predict_folder(cohort.checkpoint, [slide], out, told, **place)
        same(*(next(out.glob("*.h5ad")) for out in (Path("pictured"), Path("here"))))
        embed_folder(cohort.checkpoint, stores, one)
        query_folder(cohort.checkpoint, stores, "default", one)
        predict_folder(cohort.checkpoint, [stores], one, Wanted(("AR",)))
        written = sorted(path.name for path in one.iterdir())
        assert sorted(path.name for path in many.iterdir()) == written
        assert {"bare.h5ad", "bare.query.png", "grid.predict.h5ad", "embed.json"} <= set(written)
        for path in one.glob("*.h5ad"):
            same(path, many / path.name)
        assert (many / "embed.json").read_text() == (one / "embed.json").read_text()
        for path in stores_in(stores):
            with SlideStore(path) as store:
                assert encoder in store.feature_names
        before = {path: path.stat().st_mtime_ns for path in many.glob("*.query.*")}
        for path in many.glob("bare.query.*"):  # done again, the others are kept
            path.unlink()
        query_folder(cohort.checkpoint, Path("stores"), "default", many, **there)
        kept = {path.name for path, time in before.items() if time == path.stat().st_mtime_ns}
        assert len(before) == 6
        assert kept == {"grid.query.csv", "grid.query.h5ad", "grid.query.png"}
        with h5py.File(stores / "grid.h5", "r+") as file:
            del file["features/handcrafted"]
        shutil.rmtree(many)
        line = ["--checkpoint", str(cohort.checkpoint), "--data", "stores", "--out", "many"]
        assert main(["embed", *line, "--scheduler", cluster.scheduler_address]) == 1
        told = capsys.readouterr().err
        assert "1 of 2 slide(s) failed, and the same command does these again: grid: store" in told
        assert (many / "bare.h5ad").is_file()


def test_failures_are_told_after_all_others_and_jobs_of_a_grid_are_tasks(
    toy_stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"a": int, "b": partial(int, "x"), "c": int}
    with pytest.raises(DataError, match=r"1 of 3 slide\(s\) failed.*b: "):
        each(calls, 0, None, "try")
    with pytest.raises(DataError, match="workers is -1"):
        each(calls, -1, None, "try")
    assert each({"a": int}, 0, None, "try") == [0]
    assert Lost("x").seconds == 0
    grid, tried = grid_of(tmp_path, toy_stores), []

    def stand_in(calls, workers, scheduler, what, unit):
        for name, call in calls.items():
            here, there = multiprocessing.Pipe()
            here.send(call)
            again = there.recv()
            tried.append((name, again.func, again.args[0] == grid, again.keywords["index"]))
        raise DataError("so far")

    monkeypatch.setattr(ablation, "each", stand_in)
    with pytest.raises(DataError, match="so far"):
        ablation.run_grid(grid, workers=2)
    jobs = ablation.plan(grid)
    assert tried == [(job.name, ablation.run_grid, True, job.number) for job in jobs]
