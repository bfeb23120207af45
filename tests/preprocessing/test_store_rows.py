"""Partial reads of the counts equal rows of the whole; intensities and outcome come back."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse import random as random_sparse

from preprocessing import DataError, SlideStore, SpotTable
from preprocessing.patches import PatchConfig
from preprocessing.slide_row import SlideRow
from preprocessing.store import verify_store, write_store

SPOTS, GENES = 60, 7


def spot_table(counts: csr_matrix, modality: str = "rna") -> SpotTable:
    names = np.array([f"G{g}" for g in range(counts.shape[1])])
    xy = np.random.default_rng(0).random((counts.shape[0], 2))
    barcodes = np.array([f"s{i}" for i in range(counts.shape[0])])
    return SpotTable(counts, names, names, barcodes, xy, xy, 1.0, modality=modality)


def write(path: Path, table: SpotTable, **more: object) -> SpotTable:
    row = SlideRow(path.stem, "P1", Path("c"), "csv", **more)  # type: ignore[arg-type]
    write_store(path, table, row, patches=None, patch=PatchConfig(100.0, 16))
    return table


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    counts = random_sparse(SPOTS, GENES, 0.3, "csr", random_state=1)
    counts.data = np.ceil(counts.data * 9)
    path = tmp_path_factory.mktemp("rows") / "S1.h5"
    write(path, spot_table(counts))
    with SlideStore(path) as opened:
        yield opened


ROWS = st.lists(st.integers(0, SPOTS - 1), max_size=80)
BOUND = st.one_of(st.none(), st.integers(-SPOTS - 3, SPOTS + 3))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS, start=BOUND, stop=BOUND, step=st.sampled_from([None, 1, 3, -1, -2]))
@pytest.mark.parametrize(("gap", "piece"), [(0, 10**6), (16_384, 10**6), (16_384, 9)])
def test_rows_equal_those_of_the_whole(store, monkeypatch, gap, piece, rows, start, stop, step):
    monkeypatch.setattr("preprocessing.store.layout._GAP", gap)
    monkeypatch.setattr("preprocessing.store.layout._PIECE", piece)
    whole = store.counts().toarray()
    index = np.array(rows, dtype=np.int64)
    mask = np.isin(np.arange(SPOTS), index)
    for chosen in (index, mask, slice(start, stop, step)):
        found = store.counts(chosen)
        assert isinstance(found, csr_matrix)
        assert found.dtype == np.int32
        found.check_format(full_check=True)
        np.testing.assert_array_equal(found.toarray(), whole[chosen])


def test_few_values_are_read_for_few_rows(store, monkeypatch):
    """A slice reads one piece of the values, scattered rows one piece a run."""
    monkeypatch.setattr("preprocessing.store.layout._GAP", 0)
    pieces = []
    real = h5py.Dataset.__getitem__

    def counted(self, key, *more):
        if self.name == "/counts/data":
            pieces.append((key.start, key.stop))
        return real(self, key, *more)

    indptr = store.counts().indptr
    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    store.counts(slice(10, 20))
    assert pieces == [(indptr[10], indptr[20])]
    pieces.clear()
    store.counts(np.array([41, 3, 4, 40, 5]))
    assert pieces == [(indptr[3], indptr[6]), (indptr[40], indptr[42])]


def test_rows_outside_are_refused(store):
    for rows in ([-1], [0, SPOTS]):
        with pytest.raises(DataError, match=r"S1\.h5: row .* asked, there are 0\.\.59"):
            store.counts(np.array(rows))
    with pytest.raises(DataError, match=r"mask of shape \(3,\) for 60 spots"):
        store.counts(np.ones(3, dtype=bool))


def test_damage_is_named_in_partial_reads(tmp_path: Path):
    write(tmp_path / "S1.h5", spot_table(csr_matrix(np.ones((6, 4), dtype=int))))
    with h5py.File(tmp_path / "S1.h5", "r+") as file:
        file["counts/indices"][:] = 77
    with SlideStore(tmp_path / "S1.h5") as opened, pytest.raises(DataError, match="damaged counts"):
        opened.counts(slice(0, 2))


def test_intensities_and_outcome_come_back(tmp_path: Path):
    values = np.random.default_rng(0).random((8, 12)).astype(np.float32)
    write(tmp_path / "S1.h5", spot_table(csr_matrix(values), "protein"), outcome="1")
    with SlideStore(tmp_path / "S1.h5") as opened:
        assert (opened.modality, opened.outcome) == ("protein", "1")
        assert opened.counts().dtype == np.float32
        np.testing.assert_array_equal(opened.counts().toarray(), values)
        np.testing.assert_array_equal(opened.counts(slice(2, 5)).toarray(), values[2:5])
        np.testing.assert_array_equal(opened.counts(np.array([7, 0])).toarray(), values[[7, 0]])
    assert [f.message for f in verify_store(tmp_path / "S1.h5")] == [
        "no image: only counts can be used"
    ]
    with h5py.File(tmp_path / "S1.h5", "r+") as file:
        file["counts/data"][3] = np.nan
    found = [f.message for f in verify_store(tmp_path / "S1.h5") if f.level == "FAIL"]
    assert "intensities are not finite numbers from 0 on" in found


def test_an_older_store_is_rna_of_unknown_outcome(tmp_path: Path):
    write(tmp_path / "S1.h5", spot_table(csr_matrix(np.ones((6, 4), dtype=int))))
    with h5py.File(tmp_path / "S1.h5", "r+") as file:
        del file.attrs["modality"], file.attrs["outcome"]
    with SlideStore(tmp_path / "S1.h5") as opened:
        assert (opened.modality, opened.outcome) == ("rna", "")


def test_verify_sees_small_panels_and_equal_places(tmp_path: Path):
    table = spot_table(csr_matrix(np.ones((6, 4), dtype=np.float32)), "protein")
    write(tmp_path / "S1.h5", table)
    assert "only 4 proteins" in [f.message for f in verify_store(tmp_path / "S1.h5")]
    same = np.ones((6, 2))
    write(tmp_path / "S1.h5", replace(table, xy_px0=same, xy_um=same))
    fails = [f.message for f in verify_store(tmp_path / "S1.h5") if f.level == "FAIL"]
    assert fails == ["all spots have the same coordinates"]
