"""One slide is one section: several in one file are refused, and the manifest takes one of them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest

from hibio.config.files import ConfigError
from hibio.data.dataset import slide_of_anndata
from preprocessing.errors import DataError
from preprocessing.manifest import draft_manifest, read_manifest, write_manifest
from preprocessing.readers.format import read_spots
from preprocessing.run import prepare
from preprocessing.sections import SUFFIX, section_mask, several_sections
from preprocessing.slide_row import SlideRow
from tests.preprocessing.sources import draw_counts, hex_positions, legacy_slide

ARRAY, XY = hex_positions()
N = len(XY)
NAMES = np.array([f"BC{i}-{k}" for k in "12" for i in range(N)], dtype=object)


def two(column: str | None = None, apart: float = 0.0) -> tuple[np.ndarray, pd.DataFrame]:
    """Places (2 N, 2) of a section twice, and a column that tells the copies apart."""
    xy = np.vstack([XY, XY + np.array([apart, 0.0])])
    columns = pd.DataFrame({"score": np.arange(2 * N) / 3})
    return xy, columns if column is None else columns.assign(**{column: ["A1"] * N + ["B1"] * N})


@pytest.mark.parametrize("column", ["Sample.Name", "slideID", "donor_id", "orig ident", None])
def test_sections_that_are_told_by_names_of_columns_or_barcodes(column) -> None:
    """Joined tables, the second a little aside: names by any spelling, or barcodes that return."""
    xy, columns = two(column, 7.0)
    bases = ["".join("ACGT"[i // 4**k % 4] for k in range(16)) for i in range(N)]
    joined = [f"{base}-1-{k}" for k in "01" for base in bases]
    own = np.array([f"s{i}" for i in range(2 * N)], dtype=object)
    names = own if column else np.array(joined, dtype=object)
    several = several_sections(xy, columns, names)
    assert several is not None
    assert several.column == (column or SUFFIX)
    assert set(several.sizes.values()) == {N}
    assert several_sections(xy, two()[1], own) is None
    once = np.array([f"{base}-{k}" for k in "12" for base in bases[: N // 2]][:N], dtype=object)
    half = np.array([f"{b}-1" for b in bases[: N - N // 5]] + [f"{b}-2" for b in bases[: N // 5]])
    assert several_sections(XY, pd.DataFrame(index=range(N)), once) is not None
    assert several_sections(XY, pd.DataFrame(index=range(N)), half.astype(object)) is None


@pytest.mark.parametrize(
    ("column", "apart", "found"),
    [
        ("donor", 0.0, "donor"),  # any column that tells them apart
        (None, 0.0, SUFFIX),
        ("library_id", 10_000.0, "library_id"),
        ("sample", 11.0, "sample"),  # nothing coincides, but they are mixed
        ("sample", 10_000.0, None),
        ("donor", 11.0, "donor"),
        ("kind", 11.0, None),
        (None, 11.0, None),
    ],
)
def test_what_shows_several(column: str | None, apart: float, found: str | None) -> None:
    xy, columns = two(column, apart)
    several = several_sections(xy, columns, NAMES)
    assert (several and several.column) == found
    if several:
        parts = {"1": N, "2": N} if found == SUFFIX else {"A1": N, "B1": N}
        assert several.sizes == parts
        text = str(several.error("FILE"))
        assert all(word in text for word in ("FILE", f"'{found}'", f"section, such as {found}="))
        for value in parts:  # what the remedy takes is one section
            mask = section_mask(f"{found}={value}", columns, NAMES, "FILE")
            assert mask.sum() == N
            assert several_sections(xy[mask], columns[mask], NAMES[mask]) is None


def test_arrays_and_libraries() -> None:
    xy, columns = two(apart=10_000.0)
    array = np.vstack([ARRAY, ARRAY])
    assert several_sections(xy, columns, NAMES, array=array).column == SUFFIX
    assert several_sections(xy, columns, NAMES, array=array + np.arange(2 * N)[:, None]) is None
    assert "libraries A, B" in str(several_sections(XY, columns[:N], NAMES[:N], ["A", "B"]))
    one = columns[:N].assign(library_id="A")
    assert several_sections(XY, one, NAMES[:N], ["A", "B"]) is None  # a part of a larger table
    few = XY.copy()
    few[1] = few[0]  # cells whose centres were rounded; of an array this cannot be
    assert several_sections(few, columns[:N], NAMES[:N]) is None
    assert several_sections(few, columns[:N], NAMES[:N], spots=True).column == ""
    with pytest.raises(DataError, match=r"FILE: section 'x=1': there is no column 'x'"):
        section_mask("x=1", columns, NAMES, "FILE")
    with pytest.raises(DataError, match=r"the values of 'suffix' are 1, 2"):
        section_mask("suffix=3", columns, NAMES, "FILE")


def merged(apart: float = 0.0, column: str = "library_id") -> anndata.AnnData:
    """Two Visium sections of different scale put together, as squidpy's tutorial does."""
    xy, columns = two(column, apart)
    xy[N:] *= 2
    data = anndata.AnnData(draw_counts(2 * N, 9).astype(np.float32), obs=columns.set_index(NAMES))
    data.obs[["array_row", "array_col"]] = np.vstack([ARRAY, ARRAY])
    data.obsm["spatial"] = xy
    factors = {"A1": {"microns_per_pixel": 2.0}, "B1": {"microns_per_pixel": 1.0}}
    data.uns["spatial"] = {name: {"scalefactors": one} for name, one in factors.items()}
    return data


def test_one_library_of_an_anndata_file(tmp_path: Path) -> None:
    merged().write_h5ad(tmp_path / "a.h5ad")
    row = SlideRow("S1", "P1", tmp_path / "a.h5ad", "h5ad")
    with pytest.raises(DataError, match=r"several sections.*'library_id'.*A1: 48.*library_id=A1"):
        read_spots(row)
    rows = draft_manifest(tmp_path)
    assert [one.section for one in rows] == ["library_id=A1", "library_id=B1"]
    assert [one.slide_id for one in rows] == ["a_A1", "a_B1"]
    write_manifest(rows, tmp_path / "m.csv")
    for k, one in enumerate(read_manifest(tmp_path / "m.csv")):
        table = read_spots(one)
        own = slice(k * N, (k + 1) * N)
        np.testing.assert_array_equal(table.counts.toarray(), draw_counts(2 * N, 9)[own])
        assert table.barcodes.tolist() == NAMES[own].tolist()
        np.testing.assert_allclose(table.xy_um, XY * 2.0)  # each by its own scale
    assert not prepare(rows, tmp_path / "out").failed
    (tmp_path / "m.csv").write_text("slide_id,patient_id,counts,section\nS1,P1,a.h5ad,A1\n")
    with pytest.raises(DataError, match=r"section 'A1' is not COLUMN=VALUE"):
        read_manifest(tmp_path / "m.csv")


def aggregate(folder: Path, plain: bool) -> None:
    """What `spaceranger aggr` leaves of two libraries."""
    import gzip

    from scipy.io import mmwrite
    from scipy.sparse import csc_matrix

    matrix = folder / "filtered_feature_bc_matrix"
    matrix.mkdir(parents=True)
    genes = "\n".join(f"ENSG{g}\tG{g}\tGene Expression" for g in range(9))
    (matrix / "features.tsv.gz").write_bytes(gzip.compress(genes.encode()))
    (matrix / "barcodes.tsv.gz").write_bytes(gzip.compress("\n".join(NAMES).encode()))
    mmwrite(matrix / "matrix.mtx", csc_matrix(draw_counts(2 * N, 9).T), field="integer")
    lines = ["barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"]
    lines += [
        f"{name},1,{ARRAY[i % N, 0]},{ARRAY[i % N, 1]},{XY[i % N, 1]},{XY[i % N, 0]}"
        for i, name in enumerate(NAMES)
    ]
    spatial = folder / "spatial"
    for library in ("left", "right"):
        (spatial / library).mkdir(parents=True)
        factors = json.dumps({"tissue_hires_scalef": 0.5, "spot_diameter_fullres": 27.5})
        (spatial / library / "scalefactors_json.json").write_text(factors)
    name = "spatial/tissue_positions.csv" if plain else "aggr_tissue_positions.csv"
    (folder / name).write_text("\n".join(lines) + "\n")
    if not plain:
        (folder / "aggregation.csv").write_text("library_id,molecule_h5\nleft,a.h5\nright,b.h5\n")


@pytest.mark.parametrize("plain", [False, True])
def test_aggregated_space_ranger(tmp_path: Path, plain: bool) -> None:
    aggregate(tmp_path / "agg" / "outs", plain)
    with pytest.raises(DataError, match=r"end in -1 and -2, as `spaceranger aggr`.*suffix=1"):
        read_spots(SlideRow("S1", "P1", tmp_path / "agg" / "outs", "visium"))
    rows = draft_manifest(tmp_path)
    assert [row.section for row in rows] == ["suffix=1", "suffix=2"]
    assert [row.slide_id for row in rows] == (["agg_1", "agg_2"] if plain else ["left", "right"])
    for k, row in enumerate(rows):
        table = read_spots(row)
        own = slice(k * N, (k + 1) * N)
        np.testing.assert_array_equal(table.counts.toarray(), draw_counts(2 * N, 9)[own])
        np.testing.assert_allclose(table.xy_px0, XY)
        assert table.mpp == pytest.approx(2.0)


def test_an_array_position_twice_in_a_spot_table(tmp_path: Path) -> None:
    row, _ = legacy_slide(tmp_path, image=False)
    lines = row.spots.read_text().splitlines()
    row.spots.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(DataError, match=r"several sections.*1 positions of the array"):
        read_spots(row)


def test_cells_of_two_sections(tmp_path: Path) -> None:
    """Any table of cells, by the same rule."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 500, (80, 2))
    lines = ["cell,sample,x_um,y_um,G0,G1"]
    lines += [f"c{i},{'AB'[i % 2]},{x:.2f},{y:.2f},1,2" for i, (x, y) in enumerate(xy)]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    row = SlideRow("S1", "P1", tmp_path / "t.csv", "csv")
    with pytest.raises(DataError, match=re.escape("'sample' tells them apart (A: 40 spots, B: 40")):
        read_spots(row)
    table = read_spots(SlideRow(**(vars(row) | {"section": "sample=B"})))
    assert table.barcodes.tolist() == [f"c{i}" for i in range(1, 80, 2)]


def test_encoding_of_two_sections_is_refused() -> None:
    artifacts = SimpleNamespace(modality="rna")
    with pytest.raises(ConfigError, match=re.escape("adata.obs['library_id'].astype(str) == 'A1'")):
        slide_of_anndata(merged(), artifacts, "spatial")
