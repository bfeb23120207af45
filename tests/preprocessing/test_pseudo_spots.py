"""Pseudo-spots: every count stays, every cell lies in its square, labels by majority."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import csr_matrix

from preprocessing import DataError, SlideStore, SpotTable, prepare
from preprocessing.patches import PatchConfig
from preprocessing.pseudo_spots import beyond_picture, pseudo_spots
from preprocessing.readers.format import read_spots
from preprocessing.slide_row import SlideRow
from tests.preprocessing.cell_sources import (
    cell_row,
    cosmx_folder,
    draw_xy,
    toy_anndata,
    write_h5ad,
    xenium_folder,
)
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA


def cells_table(xy: np.ndarray, seed: int = 0, modality: str = "rna") -> SpotTable:
    rng = np.random.default_rng(seed)
    values = rng.poisson(1.0, (len(xy), 4)).astype(float)
    if modality == "protein":
        values *= 0.25
    names = np.array([f"G{g}" for g in range(4)], dtype=object)
    kinds = rng.choice(["", "a", "b", "c"], len(xy)).astype(object)
    size = np.where(rng.random(len(xy)) < 0.2, np.nan, rng.random(len(xy)))
    return SpotTable(
        counts=csr_matrix(values),
        gene_ids=names,
        gene_names=names,
        barcodes=np.array([f"c{i}" for i in range(len(xy))], dtype=object),
        xy_px0=xy / 0.5,
        xy_um=xy,
        mpp=0.5,
        labels=pd.DataFrame({"kind": kinds, "size": size}),
        modality=modality,
    )


def slow(xy: np.ndarray, pitch: float) -> dict[tuple[int, int], list[int]]:
    """Cells of each square, one by one."""
    squares: dict[tuple[int, int], list[int]] = {}
    for i, (x, y) in enumerate(xy):
        squares.setdefault((int(np.floor(y / pitch)), int(np.floor(x / pitch))), []).append(i)
    return squares


places = st.lists(
    st.tuples(st.floats(-500, 500), st.floats(-500, 500)), min_size=2, max_size=40
).map(lambda values: np.array(values, dtype=float))


@settings(max_examples=60, deadline=None)
@given(places, st.floats(0.5, 400), st.sampled_from(["rna", "protein"]))
def test_equals_one_cell_at_a_time(xy: np.ndarray, pitch: float, modality: str) -> None:
    table = cells_table(xy, modality=modality)
    squares = slow(xy, pitch)
    if len(squares) < 2:
        with pytest.raises(DataError, match="lie in one square"):
            pseudo_spots(table, pitch)
        return
    found = pseudo_spots(table, pitch)
    keys = sorted(squares)
    assert found.barcodes.tolist() == [f"x{x}_y{y}" for y, x in keys]
    values = table.counts.toarray()
    for spot, key in enumerate(keys):
        rows = squares[key]
        own = values[rows].mean(axis=0) if modality == "protein" else values[rows].sum(axis=0)
        np.testing.assert_allclose(found.counts[spot].toarray().ravel(), own, rtol=1e-6)
        kinds = Counter(k for k in table.labels["kind"].iloc[rows] if k)
        best = min(kinds, key=lambda k: (-kinds[k], k)) if kinds else ""
        assert found.labels["kind"].iloc[spot] == best
        share = kinds[best] / sum(kinds.values()) if kinds else np.nan
        np.testing.assert_allclose(found.labels["kind share"].iloc[spot], share)
        np.testing.assert_allclose(
            found.labels["size"].iloc[spot], table.labels["size"].iloc[rows].mean()
        )
        assert found.labels["cells"].iloc[spot] == len(rows)
        centre = (np.array(key[::-1]) + 0.5) * pitch
        np.testing.assert_allclose(found.xy_um[spot], centre)
        reach = np.abs(table.xy_um[rows] - found.xy_um[spot]).max()
        assert reach <= pitch / 2 * (1 + 1e-9)
    np.testing.assert_allclose(found.xy_um, found.xy_px0 * found.mpp)


@settings(max_examples=40, deadline=None)
@given(places, st.integers(-3, 3), st.integers(-3, 3))
def test_total_and_shift_by_whole_squares(xy: np.ndarray, right: int, down: int) -> None:
    xy = np.concatenate([np.round(xy), [[-600.0, 0.0]]])
    table, pitch = cells_table(xy), 64.0
    found = pseudo_spots(table, pitch)
    assert found.counts.sum() == table.counts.sum()
    assert found.counts.dtype == np.int32
    np.testing.assert_array_equal(found.counts.sum(axis=0), table.counts.sum(axis=0))
    moved = replace(table, xy_um=xy + np.array([right, down]) * pitch)
    again = pseudo_spots(moved, pitch)
    np.testing.assert_array_equal(again.counts.toarray(), found.counts.toarray())
    np.testing.assert_allclose(again.xy_um, found.xy_um + np.array([right, down]) * pitch)


def test_one_cell_a_square_changes_nothing_but_places() -> None:
    xy = np.array([(x * 10.0 + 3, y * 10.0 + 4) for y in range(4) for x in range(5)])
    table = cells_table(xy)
    found = pseudo_spots(table, 10.0)
    np.testing.assert_array_equal(found.counts.toarray(), table.counts.toarray())
    np.testing.assert_allclose(found.xy_um, xy + np.array([2.0, 1.0]))
    assert (found.labels["cells"] == 1).all()
    assert found.labels["kind"].tolist() == table.labels["kind"].tolist()
    assert found.diameter_um == 10.0
    assert "20 cells put together into 20 squares of 10 um (median 1 cells)" in found.notes


def test_xenium_cells_become_pseudo_spots(tmp_path: Path) -> None:
    counts = xenium_folder(tmp_path)[:, :5]
    table = read_spots(cell_row(tmp_path, "xenium", mpp=None, pitch_um=300.0))
    squares = slow(draw_xy(), 300.0)
    expected = [counts[squares[key]].sum(axis=0).tolist() for key in sorted(squares)]
    assert table.counts.toarray().tolist() == expected
    assert set(table.labels.columns) == {
        "segmentation_method",
        "segmentation_method share",
        "cells",
    }
    with pytest.raises(DataError, match=r"slide s1.*all 12 cells lie in one square of 5000 um"):
        read_spots(cell_row(tmp_path, "xenium", mpp=None, pitch_um=5000.0))


def test_other_tables_of_cells_too(tmp_path: Path) -> None:
    cosmx_folder(tmp_path / "c")
    rows = [
        cell_row(tmp_path / "c", "cosmx"),
        cell_row(write_h5ad(tmp_path, toy_anndata()), "h5ad"),
    ]
    for row in rows:
        cells, spots = read_spots(row), read_spots(replace(row, pitch_um=150.0))
        assert spots.n_spots < cells.n_spots
        np.testing.assert_array_equal(spots.counts.sum(axis=0), cells.counts.sum(axis=0))


# ------------------------------------------------------------------ the edge of the picture
inside = st.lists(
    st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=2, max_size=30, unique=True
).map(lambda values: np.array(values, dtype=float))


@settings(max_examples=60, deadline=None)
@given(inside, st.floats(5, 90))
def test_cells_in_the_picture_give_centres_in_it_or_half_a_pitch_beyond(
    xy: np.ndarray, pitch: float
) -> None:
    """The picture has 600 x 400 px of 0.5 um; every square beyond it is found, and no other."""
    table = cells_table(np.concatenate([xy, [[0.0, 0.0], [300.0, 200.0]]]))
    found = pseudo_spots(table, pitch)
    beyond = beyond_picture(found, pitch, (600, 400))
    for (x, y), told in zip(found.xy_px0.tolist(), beyond, strict=True):
        assert told == (not (0 <= x <= 600 and 0 <= y <= 400))


def test_centres_far_beyond_the_picture_are_an_error_of_the_coordinates() -> None:
    xy = np.array([(5.0, 5.0), (29.0, 5.0), (31.0, 5.0), (36.0, 5.0), (-4.0, 5.0), (5.0, 27.0)])
    table = replace(cells_table(xy), xy_px0=xy * 2)
    beyond = beyond_picture(table, 10.0, (60, 40))
    assert beyond.tolist() == [False, False, True, False, True, False]


def edge_row(folder: Path, width: int) -> SlideRow:
    """40 cells on stained tissue of 400 x 400 px at 1 um, the last column 2 um from its edge."""
    xy = np.array([(x, y) for y in range(50, 400, 100) for x in [*range(5, 360, 40), 398]], float)
    picture = np.full((400, width, 3), (190, 110, 170), dtype=np.uint8)
    picture += np.random.default_rng(0).integers(0, 40, picture.shape).astype(np.uint8)
    Image.fromarray(picture).save(folder / "he.png")
    cells = anndata.AnnData(X=np.full((len(xy), 3), 2.0, dtype=np.float32))
    cells.obsm["spatial"] = xy
    cells.write_h5ad(folder / "cells.h5ad")
    image, counts = folder / "he.png", folder / "cells.h5ad"
    return SlideRow("c1", "P", counts, "h5ad", image=image, mpp=1.0, pitch_um=90.0)


def test_pseudo_spots_beyond_the_edge_are_left_out_and_counted(tmp_path: Path) -> None:
    """Columns of 90 um: the fifth begins at 360 of 400 um, its centre lies at 405."""
    report = prepare([edge_row(tmp_path, 400)], tmp_path / "out", patch=PatchConfig(90.0, 16))
    (result,) = report.rows
    assert (result.status, result.n_spots) == ("done", 4 * 4), str(report)
    assert "4 spots left out: centre beyond the edge of the picture" in result.reason
    with SlideStore(tmp_path / "out" / "c1.h5") as store:
        assert store.attrs["dropped"] == {"centre beyond the edge of the picture": 4}
        assert store.xy_px0[:, 0].max() == 315.0
        assert store.labels()["cells"].sum() == 36


def test_a_picture_that_is_much_too_small_still_fails(tmp_path: Path) -> None:
    (result,) = prepare([edge_row(tmp_path, 200)], tmp_path / "out").rows
    assert result.status == "failed"
    assert "lie outside the picture" in result.reason


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_real_starmap_cells_keep_their_counts() -> None:
    path = REAL_DATA / "single_cell" / "starmap_visual_cortex.h5ad"
    row = SlideRow("s", "s", path, "h5ad", mpp=0.078)
    cells, spots = read_spots(row), read_spots(replace(row, pitch_um=50.0))
    np.testing.assert_array_equal(spots.counts.sum(axis=0), cells.counts.sum(axis=0))
    assert spots.labels["cells"].sum() == cells.n_spots == 1549
    assert spots.labels["cluster_name share"].dropna().between(0, 1).all()
