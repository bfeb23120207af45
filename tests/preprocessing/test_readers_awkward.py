"""Space Ranger's files as R, GEO, Seurat, Macs and hands leave them: read right, or refused.

Every case is the folder of `visium_folder`, changed as its function says.
"""

import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.io import mmread, mmwrite

from preprocessing import DataError
from preprocessing.manifest import draft_manifest
from preprocessing.readers.format import read_spots, source_files
from preprocessing.readers.joins import match_rows
from preprocessing.slide_row import SlideRow
from preprocessing.store.read import stores_in
from tests.preprocessing.cell_sources import cell_row, toy_anndata, write_h5ad
from tests.preprocessing.sources import Truth, visium_folder
from tests.preprocessing.test_readers_visium import assert_is

APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(80)
MEX = "filtered_feature_bc_matrix"
POSITIONS = "spatial/tissue_positions.csv"


def row_of(counts: Path, **more: object) -> SlideRow:
    return replace(SlideRow("s", "s", counts, "visium", mpp=2.0), **more)  # type: ignore[arg-type]


def lines_of(path: Path, change: Callable[[str], str]) -> None:
    """Change every line of a text, gzipped or not."""
    packed = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if packed else path.read_text()
    text = "\n".join(map(change, text.splitlines())) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


def quoted(line: str) -> str:
    return "\t".join(f'"{cell}"' for cell in line.split("\t"))


def in_words(folder: Path) -> None:
    """in_tissue as R prints a logical."""
    frame = pd.read_csv(folder / POSITIONS)
    frame["in_tissue"] = np.where(frame["in_tissue"] == 1, "TRUE", "FALSE")
    frame.to_csv(folder / POSITIONS, index=False)


def in_quotes(folder: Path) -> None:
    """Matrix files written again by R's write.table."""
    for name in ("features", "barcodes"):
        lines_of(folder / MEX / f"{name}.tsv.gz", quoted)


def without_ending(folder: Path) -> None:
    lines_of(folder / MEX / "barcodes.tsv.gz", lambda line: line.removesuffix("-1"))


def positions_without_ending(folder: Path) -> None:
    lines_of(folder / POSITIONS, lambda line: line.replace("-1,", ",", 1))


def of_seurat(folder: Path) -> None:
    """write.csv of the coordinates of a Seurat object."""
    frame = pd.read_csv(folder / POSITIONS, index_col=0)
    frame.columns = pd.Index(["tissue", "row", "col", "imagerow", "imagecol"])
    frame.index.name = None
    frame.to_csv(folder / POSITIONS, quoting=2)


def broken_factors(folder: Path) -> None:
    path = folder / "spatial/scalefactors_json.json"
    path.write_text(path.read_text().replace("}", ', "regist_target_img_scalef": 0.0}'))


def apple(folder: Path) -> None:
    """An AppleDouble file beside every file."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(APPLE)


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        (in_words, "2 spots outside the tissue"),
        (in_quotes, ""),
        (without_ending, "joined without the ending '-1'"),
        (positions_without_ending, "joined without the ending '-1'"),
        (of_seurat, "2 spots outside the tissue"),
        (broken_factors, "not used: regist_target_img_scalef 0"),
        (apple, ""),
    ],
)
def test_read_as_the_folder_before_the_change(
    tmp_path: Path, change: Callable[[Path], None], noted: str
):
    truth = visium_folder(tmp_path / "s", h5=False)
    change(tmp_path / "s")
    table = read_spots(row_of(tmp_path / "s"))
    if change in (without_ending, positions_without_ending):
        bare = [name.removesuffix("-1") for name in table.barcodes]
        assert bare == [name.removesuffix("-1") for name in truth.barcodes]
        table = replace(table, barcodes=np.array(truth.barcodes, dtype=object))
    assert_is(table, truth, mpp=2.0)
    assert any(noted in note for note in table.notes)
    (drafted,) = draft_manifest(tmp_path)
    assert drafted.counts == tmp_path / "s"


def flat(folder: Path, marks: tuple[str, ...]) -> list[Truth]:
    """The flat folder of a GEO series: every file with the mark of its sample."""
    truths = []
    folder.mkdir()
    for number, mark in enumerate(marks):
        made = folder.parent / f"made{number}"
        truths.append(visium_folder(made, h5=False, header=False))
        matrix = made / MEX / "matrix.mtx"
        mmwrite(matrix, mmread(matrix) * (number + 1), field="integer")
        for path in [*(made / MEX).iterdir(), *(made / "spatial").iterdir()]:
            shutil.copy(path, folder / f"{mark}{path.name}")
        truths[-1].counts[:] *= number + 1
    return truths


def test_the_flat_folder_of_geo(tmp_path: Path):
    (truth,) = flat(tmp_path / "one", ("GSM1_A_",))
    assert_is(read_spots(row_of(tmp_path / "one")), truth, mpp=2.0)
    (row,) = draft_manifest(tmp_path / "one")
    assert row.slide_id == "GSM1_A"
    assert {path.name.partition("A_")[0] for path in source_files(row).values()} == {"GSM1_"}


def test_several_samples_in_a_flat_folder_are_rows_of_their_own(tmp_path: Path):
    truths = flat(tmp_path / "two", ("GSM1_A_", "GSM2_B_"))
    with pytest.raises(DataError, match="prefixes of their names; write one row a sample"):
        read_spots(row_of(tmp_path / "two"))
    rows = draft_manifest(tmp_path / "two")
    assert [row.slide_id for row in rows] == ["GSM1_A", "GSM2_B"]
    for row, truth in zip(rows, truths, strict=True):
        assert_is(read_spots(replace(row, mpp=2.0)), truth, mpp=2.0)
    alone = row_of(tmp_path / "two" / "GSM2_B_matrix.mtx")  # its positions have its mark
    assert_is(read_spots(alone), truths[1], mpp=2.0)
    (tmp_path / "two" / "GSM1_A_barcodes.tsv.gz").unlink()
    with pytest.raises(DataError, match=r"no GSM1_A_barcodes\.tsv"):
        read_spots(rows[0])


@pytest.mark.parametrize("kind", ["int", "bool", "category", "text"])
def test_in_tissue_of_cells_is_that_of_positions(tmp_path: Path, kind: str):
    data = toy_anndata()
    inside = np.arange(data.n_obs) % 3 > 0
    data.obs["in_tissue"] = {
        "int": inside.astype(int),
        "bool": inside,
        "category": pd.Categorical(inside.astype(int).astype(str)),
        "text": np.where(inside, "TRUE", "FALSE"),
    }[kind]
    table = read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))
    assert list(table.barcodes) == list(data.obs_names[inside])
    assert "4 spots outside the tissue (in_tissue 0) left out" in table.notes
    assert "in_tissue" not in table.labels
    data.obs["in_tissue"] = ["maybe", *["1"] * (data.n_obs - 1)]
    with pytest.raises(DataError, match=r"'in_tissue' are neither 1 nor 0.*data row 1, 'maybe'"):
        read_spots(cell_row(write_h5ad(tmp_path, data), "h5ad"))


def joined(keys: list[str], known: list[str]) -> tuple[list[int], list[int], list[str]]:
    notes: list[str] = []
    rows, places = match_rows(keys, known, "nothing joins", notes, "left out")
    return rows.tolist(), places.tolist(), notes


def test_rows_join_by_a_plain_loop_with_and_without_an_ending():
    keys, known = ["c", "a", "x", "b"], ["a", "b", "c"]
    loop = [(i, known.index(key)) for i, key in enumerate(keys) if key in known]
    rows, places, notes = joined(keys, known)
    assert list(zip(rows, places, strict=True)) == loop
    assert notes == ["1 left out"]
    told = "joined without the ending '-1', which one of the tables lacks"
    ended = [f"{key}-1" for key in keys]
    assert joined(ended, known) == (rows, places, [told, "1 left out"])
    assert joined(keys, [f"{key}-1" for key in known]) == (rows, places, [told, "1 left out"])
    assert joined(ended, ["a-1"])[2] == ["3 left out"]  # nothing is removed where names join


@pytest.mark.parametrize(
    ("keys", "known", "said"),
    [
        (["a-1", "b-1", "a-2"], ["a", "b"], r"\(-1, -2 here, none there\).*another section"),
        (["a-2", "b-2"], ["a-1", "b-1"], r"\(-2 here, -1 there\)"),
        ([f"cell-{i}" for i in range(9)], [f"cell-{i}" for i in range(9, 19)], "nothing joins$"),
    ],
)
def test_endings_of_several_sections_do_not_join(keys: list[str], known: list[str], said: str):
    with pytest.raises(DataError, match=said):
        joined(keys, known)


def test_hidden_files_are_no_stores(tmp_path: Path):
    for name in ("a.h5", "._a.h5"):
        (tmp_path / name).write_bytes(APPLE)
    assert [path.name for path in stores_in(tmp_path)] == ["a.h5"]
