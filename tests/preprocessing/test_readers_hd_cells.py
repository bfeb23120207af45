"""Segmented cells of Space Ranger 4: their places are the centroids of their outlines."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import DataError, SlideStore, prepare
from preprocessing.manifest import draft_manifest, read_manifest, write_manifest
from preprocessing.patches import PatchConfig
from preprocessing.readers import hd_cells as geojson
from preprocessing.readers.format import read_spots, source_files
from preprocessing.readers.hd_cells import read_centroids, read_features
from preprocessing.slide_row import SlideRow
from tests.preprocessing.hd_cell_sources import (
    BARCODES,
    CELLS,
    MPP,
    NAMES,
    cell_centres,
    feature,
    segmented_folder,
    square,
    write_outlines,
)
from tests.preprocessing.test_readers_visium_hd import hd_sample


def cells_row(counts: Path, **more: object) -> SlideRow:
    return SlideRow("s1", "p1", counts, "visium_hd_cells", **more)  # type: ignore[arg-type]


def outlines(folder: Path) -> Path:
    return folder / "cell_segmentations.geojson"


@pytest.mark.parametrize("given_root", [".", "outs", "outs/segmented_outputs"])
def test_cells_at_the_centroids_of_their_outlines(tmp_path: Path, given_root: str) -> None:
    counts = segmented_folder(tmp_path / "outs" / "segmented_outputs")
    row = cells_row(tmp_path / given_root)
    table = read_spots(row)
    np.testing.assert_array_equal(table.counts.toarray(), counts)
    assert table.barcodes.tolist() == BARCODES
    assert table.gene_names.tolist() == NAMES
    np.testing.assert_allclose(table.xy_px0, cell_centres())
    np.testing.assert_allclose(table.xy_um, cell_centres() * MPP)
    assert table.mpp == MPP
    assert table.diameter_um is None
    assert set(source_files(row)) == {"counts", "outlines", "scale_factors"}
    sums = read_spots(replace(row, pitch_um=30.0))
    assert sums.counts.sum() == counts.sum()
    assert sums.n_spots < CELLS


def test_on_the_images_of_space_ranger_and_on_the_microscopes(tmp_path: Path) -> None:
    segmented_folder(tmp_path)
    scaled = read_spots(cells_row(tmp_path, image=tmp_path / "spatial" / "tissue_hires_image.png"))
    np.testing.assert_allclose(scaled.xy_px0, cell_centres() * 0.5)
    np.testing.assert_allclose(scaled.xy_um, cell_centres() * MPP)
    assert scaled.mpp == MPP / 0.5
    full = read_spots(cells_row(tmp_path, image=tmp_path / "full.tif"), image_mpp=0.26)
    np.testing.assert_allclose(full.xy_px0, cell_centres())
    assert full.mpp == 0.26


def test_clusters_of_space_ranger_are_labels(tmp_path: Path) -> None:
    segmented_folder(tmp_path)
    path = tmp_path / "clusters.csv"
    path.write_text("Barcode,Cluster\n" + "".join(f"{b},{i % 3}\n" for i, b in enumerate(BARCODES)))
    table = read_spots(cells_row(tmp_path, labels=path))
    assert table.labels["Cluster"].tolist() == [str(i % 3) for i in range(CELLS)]


def test_from_a_folder_to_a_store(tmp_path: Path) -> None:
    segmented_folder(tmp_path / "brain" / "segmented_outputs")
    (row,) = draft_manifest(tmp_path)
    assert (row.slide_id, row.format, row.technology) == ("brain", "visium_hd_cells", "Visium HD")
    assert row.image is not None
    write_manifest([row], tmp_path / "m.csv")
    (again,) = read_manifest(tmp_path / "m.csv")
    assert again.format == row.format
    report = prepare(tmp_path / "m.csv", tmp_path / "out", patch=PatchConfig(12.0, 16))
    assert not report.failed, str(report)
    with SlideStore(tmp_path / "out" / "brain.h5") as store:
        assert store.n_spots == CELLS
        assert set(store.barcodes) == set(BARCODES)


def test_a_sample_with_bins_is_drafted_by_its_bins_only(tmp_path: Path) -> None:
    """They are of the same tissue; two rows of one slide would count it twice."""
    hd_sample(tmp_path / "h", (8,))
    segmented_folder(tmp_path / "h" / "outs" / "segmented_outputs")
    assert [row.format for row in draft_manifest(tmp_path)] == ["visium_hd"]


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    segmented_folder(tmp_path)
    shapes = [feature(i + 3, [square(cell_centres()[i])]) for i in range(2, CELLS)]
    shapes += [feature(900, [square(np.zeros(2))]), feature(901, []), feature(3, [[]])]
    write_outlines(outlines(tmp_path), shapes)
    table = read_spots(cells_row(tmp_path))
    assert table.n_spots == CELLS - 2
    told = " ".join(table.notes)
    assert "2 cells without an outline left out" in told
    assert "1 outlines without counts left out" in told
    assert "2 outlines without points left out" in told


def test_the_annotated_outlines_do_as_well(tmp_path: Path) -> None:
    segmented_folder(tmp_path)
    outlines(tmp_path).rename(tmp_path / "graphclust_annotated_cell_segmentations.geojson")
    np.testing.assert_allclose(read_spots(cells_row(tmp_path)).xy_px0, cell_centres())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "filtered_feature_cell_matrix.h5").unlink(), "no filtered_feature_cell"),
        (lambda f: outlines(f).unlink(), r"none of cell_segmentations\.geojson"),
        (lambda f: (f / "spatial" / "scalefactors_json.json").unlink(), "mpp is unknown.*states"),
        (lambda f: outlines(f).write_text("{}"), "has no 'features'"),
        (lambda f: outlines(f).write_text("[]"), r"not complete JSON \('\[' where '{'"),
        (lambda f: outlines(f).write_bytes(outlines(f).read_bytes()[:-90]), "not complete JSON"),
        (lambda f: write_outlines(outlines(f), []), "no cell of"),
        (lambda f: write_outlines(outlines(f), [feature(99, [square(np.ones(2))])]), "no cell of"),
        (lambda f: write_outlines(outlines(f), [feature("x", [])]), "feature 1: cell_id is 'x'"),
        (lambda f: write_outlines(outlines(f), [feature(-1, [])]), "feature 1: cell_id is '-1'"),
        (lambda f: write_outlines(outlines(f), [feature(1, 0, "Point")]), "geometry is 'Point'"),
        (lambda f: write_outlines(outlines(f), [feature(1, [[1, 2]])]), "feature 1: "),
        (lambda f: write_outlines(outlines(f), [feature(1, [["ab"]])]), "feature 1: "),
        (lambda f: write_outlines(outlines(f), [{"type": "Feature"}]), "no property 'cell_id'"),
        (
            lambda f: write_outlines(outlines(f), [feature(3, [square(np.ones(2))])] * 2),
            "cell 3 has two outlines",
        ),
        (
            lambda f: write_outlines(
                outlines(f),
                [feature(i + 3, [square(np.array([np.nan, 1]))]) for i in range(CELLS)],
            ),
            "no finite coordinates",
        ),
    ],
)
def test_refused(tmp_path: Path, change, words: str) -> None:
    segmented_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=words):
        read_spots(cells_row(tmp_path))


def test_manifest_columns_that_would_be_ignored(tmp_path: Path) -> None:
    segmented_folder(tmp_path)
    (tmp_path / "m.csv").write_text(
        "slide_id,patient_id,counts,format,bin_um,spots\ns1,p1,.,visium_hd_cells,8,x.csv\n"
    )
    with pytest.raises(DataError, match=r"brings its own coord.*has no bins"):
        read_manifest(tmp_path / "m.csv")


def test_centroids_of_holes_and_parts(tmp_path: Path) -> None:
    hole = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]], [[0, 0], [2, 0], [2, 4], [0, 4], [0, 0]]
    two = [[square(np.array([0.0, 0.0]), 1.0)], [square(np.array([10.0, 0.0]), 2.0)], [[]]]
    shapes = [feature(7, hole), feature(8, two, "MultiPolygon")]
    numbers, centres, empty = read_centroids(
        write_outlines(tmp_path / "a.geojson", shapes), "cell_id"
    )
    assert (numbers, empty) == ([7, 8], 0)
    np.testing.assert_allclose(centres, [[3, 2], [8, 0]])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(JSON, max_size=5),
    before=st.dictionaries(st.text(max_size=6).filter(lambda k: k != "features"), JSON, max_size=3),
    indent=st.sampled_from([None, 1]),
    piece=st.sampled_from([1, 3, 17, 1 << 20]),
    packed=st.booleans(),
)
def test_any_json_is_read_as_the_json_module_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[object],
    before: dict[str, object],
    indent: int | None,
    piece: int,
    packed: bool,
) -> None:
    document = before | {"features": values} | {"after": [1]}
    data = json.dumps(document, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.mktemp("json") / "a.geojson"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(geojson, "_PIECE", piece)
        assert list(read_features(path)) == values
        path.write_bytes(data[:-2])  # cut off
        with pytest.raises(DataError, match="not complete JSON"):
            list(read_features(path))


def test_deep_and_endless_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.geojson"
    path.write_text('{"features": ' + "[" * 100_000)
    with pytest.raises(DataError, match="not complete JSON"):
        list(read_features(path))
    monkeypatch.setattr(geojson, "_LONGEST", 1 << 21)
    path.write_text('{"a": "' + "x" * (1 << 23))
    with pytest.raises(DataError, match="not complete JSON"):
        list(read_features(path))
