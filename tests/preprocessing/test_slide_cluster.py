"""Slides on a Dask cluster: a real scheduler with two worker processes of this machine."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preprocessing import DataError, prepare, stores_in
from preprocessing import workers as slide_cluster
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig
from preprocessing.run.sifting import SlideTask
from preprocessing.workers import Lost, on_cluster
from tests.preprocessing import faulty
from tests.preprocessing.same_store import assert_same_store
from tests.preprocessing.sources import legacy_slide

PATCH = PatchConfig(200.0, 16)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason='pip install "hibio[cluster]"')
    import dask

    patience = {
        "distributed.scheduler.allowed-failures": 1,  # a lost worker's task is tried once more
        "distributed.worker.memory.terminate": False,
        "distributed.comm.timeouts.connect": "20s",
    }
    with (
        dask.config.set(patience),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            silence_logs=50,
            host="127.0.0.1",
        ) as found,
    ):
        yield found


def test_a_cluster_gives_the_same_stores_and_continues(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [legacy_slide(tmp_path, name)[0] for name in ("A1", "B1", "C1")]
    bad = replace(rows[0], slide_id="X1", spots=tmp_path / "none.tsv")
    write_manifest([*rows, bad], tmp_path / "m.csv")
    monkeypatch.chdir(tmp_path)  # relative paths, while the workers are elsewhere
    address = cluster.scheduler_address
    report = prepare("m.csv", "out", patch=PATCH, scheduler=address)
    assert [r.status for r in report.rows] == ["done", "done", "done", "failed"], str(report)
    assert "none.tsv does not exist" in report.rows[3].reason
    prepare("m.csv", "alone", patch=PATCH)
    for one, two in zip(stores_in("out"), stores_in("alone"), strict=True):
        assert_same_store(one, two)
    again = prepare("m.csv", "out", patch=PATCH, scheduler=address)
    assert [r.status for r in again.rows] == ["skipped"] * 3 + ["failed"]


def test_a_lost_worker_is_the_reason_of_its_slide_only(tmp_path: Path, cluster: Any) -> None:
    row, _ = legacy_slide(tmp_path, "A1", image=False)
    rows = [replace(row, slide_id=name) for name in ("A1", "crash", "B1")]
    tasks = {r.slide_id: SlideTask(r, tmp_path / f"{r.slide_id}.h5", PATCH) for r in rows}
    found = dict(on_cluster(faulty.attempt, tasks, cluster.scheduler_address))
    assert isinstance(found["crash"], Lost)
    for name in ("A1", "B1"):  # skipped: finished, and the result was lost with the other slide
        assert found[name].status in ("done", "skipped"), found
    assert "its worker was lost" in found["crash"].reason


def test_no_scheduler_no_worker_and_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, _ = legacy_slide(tmp_path, "A1", image=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "distributed", None)
        with pytest.raises(DataError, match=r'pip install "hibio\[cluster\]"'):
            prepare([row], tmp_path / "out", scheduler="tcp://127.0.0.1:1")
    pytest.importorskip("distributed", reason='pip install "hibio[cluster]"')
    monkeypatch.setattr(slide_cluster, "CONNECT_S", 0.5)
    with pytest.raises(DataError, match="no Dask scheduler answers at"):
        prepare([row], tmp_path / "out", scheduler="tcp://127.0.0.1:1")
    with pytest.raises(DataError, match="answers at 'nonsense:"):
        prepare([row], tmp_path / "out", scheduler="nonsense://x")
