"""Which spots are left out and why."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from preprocessing import DataError, SpotTable
from preprocessing.run.sifting import QualityConfig, drop_mask, drop_reasons

NAMES = np.array(["MT-ND1", "mt-Co1", "ACTB", "MTOR"])
COUNTS = np.array([[1, 1, 2, 0], [0, 0, 0, 0], [0, 0, 3, 5], [4, 0, 0, 0]])


def table(counts: np.ndarray = COUNTS, names: np.ndarray = NAMES) -> SpotTable:
    xy = np.arange(2.0 * len(counts)).reshape(-1, 2)
    barcodes = np.array([f"s{i}" for i in range(len(counts))])
    return SpotTable(csr_matrix(counts), names, names, barcodes, xy, xy, 1.0)


def test_each_spot_has_one_reason():
    fraction = np.array([1.0, 0.0, 0.01, 0.5])
    reasons = drop_reasons(table(), fraction)
    assert reasons["zero counts"].tolist() == [False, True, False, False]
    assert reasons["off tissue"].tolist() == [False, False, True, False]
    assert drop_mask(table(), fraction).tolist() == [False, True, True, False]
    assert drop_mask(table()).tolist() == [False, True, False, False]
    loose = QualityConfig(min_tissue=0.0)
    assert drop_mask(table(), fraction, loose).tolist() == [False, True, False, False]


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"3 of 4 spots are off tissue.*image_scale"):
        drop_mask(table(), np.zeros(4))
    with pytest.raises(DataError, match=r"no spot of 2 is left \(2 zero counts\)"):
        drop_mask(table(np.zeros((2, 4), dtype=int)))


def test_intensities_have_no_depth_limit():
    values = np.array([[0.01, 0, 0, 0], [0, 0, 0, 0], [900.5, 3, 3, 5]])
    xy = np.arange(6.0).reshape(-1, 2)
    names = np.array(["s0", "s1", "s2"])
    cells = SpotTable(csr_matrix(values), NAMES, NAMES, names, xy, xy, 1.0, modality="protein")
    reasons = drop_reasons(cells)
    assert {k: v.tolist() for k, v in reasons.items()} == {
        "all intensities are zero": [False, True, False]
    }


def test_nothing_is_changed():
    whole = table()
    before = whole.counts.copy()
    drop_mask(whole, np.ones(4))
    assert (whole.counts != before).nnz == 0
