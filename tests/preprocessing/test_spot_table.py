"""SpotTable: checks of shapes and values, unique names, the Hilbert order."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from preprocessing import DataError, SpotTable
from preprocessing.spot_table import hilbert_order, integer_counts, intensities, unique_names


def table(**change: object) -> SpotTable:
    values: dict[str, object] = {
        "counts": csr_matrix(np.array([[1, 0, 2], [0, 3, 0]])),
        "gene_ids": np.array(["g1", "g2", "g3"]),
        "gene_names": np.array(["A", "B", "C"]),
        "barcodes": np.array(["s1", "s2"]),
        "xy_px0": np.array([[0.0, 1.0], [2.0, 3.0]]),
        "xy_um": np.array([[0.0, 2.0], [4.0, 6.0]]),
        "mpp": 2.0,
        "labels": pd.DataFrame({"domain": ["x", ""]}),
    }
    return SpotTable(**(values | change))  # type: ignore[arg-type]


def test_take_keeps_rows_together():
    taken = table().take(np.array([1, 0]))
    assert taken.counts.toarray().tolist() == [[0, 3, 0], [1, 0, 2]]
    assert taken.barcodes.tolist() == ["s2", "s1"]
    assert taken.xy_um.tolist() == [[4.0, 6.0], [0.0, 2.0]]
    assert taken.labels["domain"].tolist() == ["", "x"]
    assert taken.labels.index.tolist() == [0, 1]
    assert taken.counts.dtype == np.int32


@pytest.mark.parametrize("name", ["xy_px0", "xy_um"])
def test_a_spot_without_a_place_is_counted_and_named(name):
    places = np.array([[0.0, 2.0], [np.nan, 6.0]])
    with pytest.raises(DataError, match=r"1 spots have no finite coordinates \(first: s2\)"):
        table(**{name: places})


def test_no_labels_gives_an_empty_table_of_spots():
    assert table(labels=pd.DataFrame()).labels.shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": csr_matrix((0, 3))}, "empty matrix"),
        ({"counts": csr_matrix((2, 0))}, "empty matrix"),
        ({"counts": csr_matrix(np.array([[0.5, 0, 2], [0, 3, 0]]))}, "0.5.*raw counts"),
        ({"counts": csr_matrix(np.array([[-1, 0, 2], [0, 3, 0]]))}, "-1.*raw counts"),
        ({"counts": csr_matrix(np.array([[np.nan, 0, 2], [0, 3, 0]]))}, "nan.*raw counts"),
        ({"counts": csr_matrix(np.array([[2**31, 0, 2], [0, 3, 0]]))}, "2147483648"),
        ({"barcodes": np.array(["s1", "s1"])}, "'s1'.*unique"),
        ({"gene_names": np.array(["A", "B", "A"])}, "'A'.*unique"),
        ({"gene_ids": np.array(["g1"])}, r"gene_ids \(1,\) \(expected \(3,\)\)"),
        ({"xy_um": np.zeros((3, 2))}, "xy_um"),
        ({"xy_px0": np.array([[np.nan, 1.0], [2.0, 3.0]])}, "1 spots have no finite.*s1"),
        ({"mpp": 0.0}, "mpp is 0.0"),
        ({"labels": pd.DataFrame({"a": [1.0]})}, "labels rows"),
        ({"modality": "atac"}, "modality 'atac' is unknown; choose rna or protein"),
        ({"counts": csr_matrix(np.array([[1, 0, 2], [0, 0.5, 0]]))}, r"0\.5, cell 's2', 'B'"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, object], said: str):
    with pytest.raises(DataError, match=said):
        table(**change)


def test_integer_counts_sums_duplicates_and_leaves_the_input_alone():
    given_matrix = csr_matrix((np.array([1.0, 2.0, 0.0]), np.array([0, 0, 1]), [0, 3]), (1, 2))
    result = integer_counts(given_matrix)
    assert result.toarray().tolist() == [[3, 0]]
    assert result.nnz == 1
    assert given_matrix.data.tolist() == [1.0, 2.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.25, 1e300])
def test_bad_intensities_are_named(bad: float):
    values = csr_matrix(np.array([[1.5, 0, 2], [0, bad, 0]]))
    with pytest.raises(DataError, match=rf"\(first: {re.escape(str(bad))}, cell 's2', 'B'\)"):
        table(counts=values, modality="protein")


def test_intensities_are_float32_and_left_alone():
    given_matrix = csr_matrix((np.array([0.25, 0.5, 0.0]), np.array([0, 0, 1]), [0, 3]), (1, 2))
    result = intensities(given_matrix)
    assert result.dtype == np.float32
    assert result.toarray().tolist() == [[0.75, 0]]
    assert result.nnz == 1
    assert given_matrix.data.tolist() == [0.25, 0.5, 0.0]
    assert np.shares_memory(intensities(result).data, result.data)
    taken = table(counts=csr_matrix([[0.5, 0, 2], [0, 3, 0]]), modality="protein").take([1])
    assert (taken.modality, taken.counts.dtype) == ("protein", np.float32)


@given(st.lists(st.sampled_from(["A", "B", "A-1", "A-2", "B-1"]), max_size=12))
def test_unique_names_are_unique_and_keep_the_first(names: list[str]):
    result, renamed = unique_names(names)
    assert len(set(result)) == len(names)
    assert renamed == sum(a != b for a, b in zip(names, result, strict=True))
    assert renamed >= len(names) - len(set(names))
    for i, name in enumerate(names):
        assert result[i] == name or result[i].startswith(f"{name}-")


def slow_hilbert(x: int, y: int, side: int) -> int:
    """Textbook xy -> distance along the curve, one point."""
    distance, s = 0, side // 2
    while s > 0:
        rx, ry = int((x & s) > 0), int((y & s) > 0)
        distance += s * s * ((3 * rx) ^ ry)
        if ry == 0:
            if rx == 1:
                x, y = side - 1 - x, side - 1 - y
            x, y = y, x
        s //= 2
    return distance


def test_hilbert_order_equals_the_textbook_and_steps_to_neighbours():
    side = 16
    grid = np.array([(x, y) for x in range(side) for y in range(side)], dtype=float)
    order = hilbert_order(grid)
    assert sorted(order.tolist()) == list(range(side * side))
    steps = np.abs(np.diff(grid[order], axis=0)).sum(axis=1)
    raster = np.abs(np.diff(grid, axis=0)).sum(axis=1)
    assert steps.sum() < raster.sum()
    cell = np.floor(grid / (side - 1) * (2**16 - 1)).astype(int)
    slow = [slow_hilbert(int(x), int(y), 2**16) for x, y in cell]
    assert order.tolist() == np.argsort(slow, kind="stable").tolist()


def test_hilbert_order_ignores_shift_and_unit():
    xy = np.random.default_rng(0).random((200, 2))
    assert hilbert_order(xy).tolist() == hilbert_order(xy * 4 + 8).tolist()
    assert hilbert_order(np.array([[5.0, 5.0]])).tolist() == [0]
