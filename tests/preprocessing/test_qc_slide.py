"""Counts, limits and flags of a slide: slow counts, closed forms, and what must not be flagged."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_matrix

from preprocessing import DataError, SlideStore
from preprocessing.qc import slide as qc_counts
from preprocessing.qc.slide import (
    MEASURES,
    Limits,
    QcConfig,
    count_quality,
    robust_limits,
    slide_flags,
    slide_quality,
    store_count_quality,
)
from tests.preprocessing.qc_stores import GENES, draw_counts, write_slide
from tests.preprocessing.test_qc_patches import INK, glass, painted, tissue

NAMES = np.array(["MT-ND1", "mt-Co1", "ACTB", "MTOR"])
COUNTS = np.array([[1, 1, 2, 0], [0, 0, 0, 0], [0, 0, 3, 5], [4, 0, 0, 0]])


def test_counts_equal_a_slow_count():
    found = count_quality(csr_matrix(COUNTS), NAMES)
    for i, row in enumerate(COUNTS):
        assert found["depth"].iloc[i] == sum(row)
        assert found["n_genes"].iloc[i] == sum(value > 0 for value in row)
    np.testing.assert_array_equal(found["mito_fraction"], [0.5, np.nan, 0.0, 1.0])
    none = count_quality(csr_matrix(COUNTS), np.array(["A", "B", "C", "D"]))
    assert none["mito_fraction"].isna().all()
    proteins = count_quality(csr_matrix(COUNTS / 2), NAMES, "protein")
    assert proteins["depth"].tolist() == [2, 0, 4, 2]
    assert proteins["mito_fraction"].isna().all()  # MT-ND1 of a protein panel is no such share
    with pytest.raises(DataError, match="3 gene names for 4 columns"):
        count_quality(csr_matrix(COUNTS), NAMES[:3])


def test_a_store_is_counted_in_blocks(tmp_path, monkeypatch):
    counts = draw_counts(23)
    whole = count_quality(csr_matrix(counts), np.array(GENES))
    monkeypatch.setattr(qc_counts, "_ROWS", 5)
    with SlideStore(write_slide(tmp_path, "a", counts=counts)) as store:
        pd.testing.assert_frame_equal(store_count_quality(store), whole)
    picture = write_slide(tmp_path, "b", patches=tissue(3), image_only=True)
    with SlideStore(picture) as store, pytest.raises(DataError, match="no counts"):
        store_count_quality(store)


def test_limits_in_closed_form():
    limits = robust_limits(np.array([1.0, 2, 3, 4, 5, np.nan]))
    assert limits.median == 3
    assert limits.low == pytest.approx(3 - 3 * 1.4826)
    assert limits.high == pytest.approx(3 + 3 * 1.4826)
    powers = robust_limits(10.0 ** np.arange(1, 6), log=True)
    assert np.log10(powers.high) == pytest.approx(3 + 3 * 1.4826)
    assert robust_limits(np.array([0.0, 0, 0, 0, 0, 1]), least=0.05).high == 0.05


@pytest.mark.parametrize("values", [[1.0, 2, 3, 1000], [2.0, 2, 2, 2, 9, 2], [], [np.nan]])
def test_nothing_is_unusual_among_few_or_equal_values(values):
    limits = robust_limits(np.array(values))
    assert not (limits.below(np.array(values)) | limits.above(np.array(values))).any()
    assert not Limits().above(np.array([1e9])).any()


@given(
    arrays(float, st.integers(5, 30), elements=st.floats(1, 1000)),
    st.floats(0.01, 100),
    st.integers(0, 9),
)
def test_limits_do_not_depend_on_unit_or_order(values, unit, seed):
    limits = robust_limits(values, log=True)
    turned = np.random.default_rng(seed).permutation(values) * unit
    scaled = robust_limits(turned, log=True)
    np.testing.assert_allclose(
        [scaled.median, scaled.low, scaled.high],
        np.array([limits.median, limits.low, limits.high]) * unit,
        rtol=1e-6,
    )


def spots(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "depth": rng.lognormal(7, 0.3, n),
            "n_genes": rng.lognormal(5, 0.2, n),
            "mito_fraction": rng.uniform(0.05, 0.1, n),
            "tissue": np.ones(n),
            "glass": np.zeros(n),
            "pen": np.zeros(n),
            "focus": rng.lognormal(5, 0.3, n),
        }
    )


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("depth", 3.0, "low depth"),
        ("n_genes", 2.0, "few genes"),
        ("mito_fraction", 0.9, "high mitochondrial share"),
        ("tissue", 0.2, "little tissue"),
        ("glass", 0.95, "blank patch"),
        ("pen", 0.1, "pen mark"),
        ("focus", 0.5, "out of focus"),
    ],
)
def test_each_flag(column, value, reason):
    usual = slide_flags(spots())
    assert {name: flag.count for name, flag in usual.items() if flag.count} == {}
    table = spots()
    table.loc[7, column] = value
    flags = slide_flags(table)
    assert np.flatnonzero(flags[reason].spots).tolist() == [7]
    assert [name for name, flag in flags.items() if flag.count] == [reason]


def test_what_is_not_flagged():
    table = spots()
    table.loc[3, ["depth", "n_genes", "focus"]] *= 1000  # much is not bad
    table.loc[3, "mito_fraction"] = 0
    table.loc[4, ["glass", "focus"]] = [1.0, 0.001]  # blank already, so not also out of focus
    flags = slide_flags(table)
    assert {name: flag.count for name, flag in flags.items() if flag.count} == {"blank patch": 1}
    table.loc[5, "depth"] = 0.1
    assert not {"low depth", "few genes"} & set(slide_flags(table, protein=True))
    loose = QcConfig(blank=1.01, n_mads=1e6)
    assert not any(flag.count for flag in slide_flags(table, loose).values())


def test_a_slide_with_everything(tmp_path):
    patches = np.concatenate([tissue(12), glass(2), painted(INK["green"])])
    counts = draw_counts(15)
    counts[4] = [0, 0, 1, 0, 0]
    path = write_slide(tmp_path, "a", counts=counts, patches=patches)
    with SlideStore(path) as store:
        found = slide_quality(store)
        assert found.flags["low depth"].spots[4]
    assert np.flatnonzero(found.flags["blank patch"].spots).tolist() == [12, 13]
    assert np.flatnonzero(found.flags["pen mark"].spots).tolist() == [14]
    assert found.numbers["n_spots"] == len(found.spots) == 15
    assert found.numbers["n_left_out"] == 2
    assert found.numbers["share_pen_mark"] == pytest.approx(1 / 15)
    assert found.numbers["depth_median"] == np.median(counts.sum(axis=1))
    assert found.numbers["share_flagged"] >= 4 / 15
    assert set(found.numbers) == {measure.key for measure in MEASURES}


@pytest.mark.parametrize("form", ["counts", "protein", "image"])
def test_slides_with_a_part(tmp_path, form):
    how = {
        "counts": {"n_spots": 20},
        "protein": {"n_spots": 20, "modality": "protein"},
        "image": {"patches": tissue(8), "image_only": True},
    }[form]
    with SlideStore(write_slide(tmp_path, form, **how)) as store:
        found = slide_quality(store)
    assert ("depth" in found.spots) == (form != "image")
    assert ("focus" in found.spots) == (form == "image")
    assert (found.patches is not None) == (form == "image")
    assert ("low depth" in found.flags) == (form == "counts")
    assert np.isfinite(found.numbers["mito_median"]) == (form == "counts")
    assert set(found.numbers) <= {measure.key for measure in MEASURES}
