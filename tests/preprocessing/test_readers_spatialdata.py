"""SpatialData zarr: tables, shapes old and new, transformations, and what is refused."""

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import DataError
from preprocessing.files import file_sha256
from preprocessing.manifest import draft_manifest
from preprocessing.readers import spatialdata as reader
from preprocessing.readers.format import read_spots, source_files
from preprocessing.readers.geometry import (
    polygon_centroid,
    ragged_centroids,
    transform_matrix,
    wkb_centroids,
)
from tests.preprocessing.cell_sources import CELLS, NAMES, cell_row, draw_xy, toy_anndata
from tests.preprocessing.sources import draw_counts, zarr_group
from tests.preprocessing.test_slides_ome_zarr import picture
from tests.preprocessing.test_slides_ome_zarr import write as write_picture

zarr = pytest.importorskip("zarr", reason="SpatialData folders need zarr")
pytestmark = pytest.mark.filterwarnings("ignore:Writing zarr v2 data")
AXES = [{"name": name, "type": "space", "unit": "unit"} for name in "xy"]
SCALE = {"type": "scale", "scale": [2.0, 4.0]}


def placed(transform: dict[str, object], name: str = "global", unit: str = "unit"):
    """A transformation as SpatialData writes it."""
    axes = [axis | {"unit": unit} for axis in AXES]
    return transform | {
        "input": {"name": "xy", "axes": AXES},
        "output": {"name": name, "axes": axes},
    }


def write_table(root: Path, region: object = "cells", name: str = "table", **more: object) -> None:
    data = toy_anndata(spatial=None)
    data.obs["region"] = pd.Categorical(["cells"] * CELLS)
    data.obs["instance_id"] = np.arange(CELLS) + 5
    if region is not None:
        attrs = {"region": region, "region_key": "region", "instance_key": "instance_id"}
        data.uns["spatialdata_attrs"] = attrs
    for key, value in more.items():
        data.obsm[key] = value
    write_elem(zarr_group(root / "tables" / name), "/", data)


def sdata(root: Path, transforms: list | None = None, *, kind: str = "POINT") -> Path:
    """A folder with one table of 12 cells and their shapes in the layout of version 0.1."""
    root.mkdir(parents=True)
    group = zarr_group(root)
    group.attrs["spatialdata_attrs"] = {"version": "0.1"}
    write_table(root)
    shapes = group.require_group("shapes").require_group("cells")
    order = np.random.default_rng(4).permutation(CELLS)
    xy = draw_xy()[order]
    shapes["Index"] = (np.arange(CELLS) + 5)[order]
    if kind == "POINT":
        shapes["coords"], shapes["radius"] = xy, np.full(CELLS, 3.0)
    else:  # squares around the places
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)], dtype=float)
        shapes["coords"] = (xy[:, None] + corners).reshape(-1, 2)
        shapes["offset0"], shapes["offset1"] = np.arange(CELLS + 1) * 5, np.arange(CELLS + 1)
    number = {"POINT": 0, "POLYGON": 3}[kind]
    shapes.attrs["spatialdata_attrs"] = {"geos": {"name": kind, "type": number}, "version": "0.1"}
    shapes.attrs["coordinateTransformations"] = transforms or [placed({"type": "identity"})]
    return root


@pytest.mark.parametrize("kind", ["POINT", "POLYGON"])
def test_a_table_and_its_shapes(kind: str, tmp_path: Path) -> None:
    root = sdata(tmp_path / "a.zarr", kind=kind)
    row = cell_row(root, "spatialdata")
    table = read_spots(row)
    np.testing.assert_array_equal(table.counts.toarray(), draw_counts(CELLS, len(NAMES)))
    np.testing.assert_allclose(table.xy_px0, draw_xy())
    np.testing.assert_allclose(table.xy_um, draw_xy() * 0.5)
    assert table.diameter_um == (3.0 if kind == "POINT" else None)
    assert table.labels["kind"].tolist()[:3] == ["a", "b", ""]
    assert "instance_id" not in table.labels
    assert "places are centres in the coordinate system 'global'" in table.notes
    np.testing.assert_array_equal(
        read_spots(replace(row, counts=root / "tables" / "table")).xy_px0, table.xy_px0
    )
    files = source_files(row)
    assert files == {"counts": root / "tables/table", "shapes/cells": root / "shapes/cells"}
    hashes = {role: file_sha256(path) for role, path in files.items()}
    (root / "shapes" / "cells" / "coords" / "0.0").write_bytes(b"other")
    changed = {role: file_sha256(path) for role, path in files.items()}
    assert [role for role in files if changed[role] != hashes[role]] == ["shapes/cells"]
    (draft,) = draft_manifest(tmp_path)
    assert (draft.slide_id, draft.format, draft.counts) == ("a", "spatialdata", root)


def test_micrometres_by_unit_and_pseudo_spots(tmp_path: Path) -> None:
    root = sdata(tmp_path / "a.zarr", [placed(SCALE, unit="micrometer")])
    row = cell_row(root, "spatialdata", mpp=None)
    table = read_spots(row)
    np.testing.assert_allclose(table.xy_um, draw_xy() * [2.0, 4.0])
    assert table.mpp == 1.0
    assert table.diameter_um == pytest.approx(6 * np.sqrt(8))
    squares = read_spots(replace(row, pitch_um=500.0))
    assert squares.diameter_um == 500.0
    assert squares.counts.sum() == table.counts.sum()


def test_coordinate_systems(tmp_path: Path) -> None:
    other = placed({"type": "translation", "translation": [7.0, 0.0]}, "other")
    row = cell_row(sdata(tmp_path / "a.zarr", [other, placed(SCALE)]), "spatialdata")
    np.testing.assert_allclose(read_spots(row).xy_px0, draw_xy() * [2.0, 4.0])
    row = cell_row(sdata(tmp_path / "b.zarr", [other]), "spatialdata")
    np.testing.assert_allclose(read_spots(row).xy_px0, draw_xy() + np.array([7.0, 0.0]))
    root = sdata(tmp_path / "c.zarr", [other, placed(SCALE, "third")])
    with pytest.raises(DataError, match=r"coordinate systems other, third; expected 'global'"):
        read_spots(cell_row(root, "spatialdata"))
    root = sdata(tmp_path / "d.zarr", [placed({"type": "byDimension"})])
    with pytest.raises(DataError, match="transformation of type 'byDimension'"):
        read_spots(cell_row(root, "spatialdata"))
    with pytest.raises(DataError, match=r"mpp is unknown.*0\.2125"):
        read_spots(cell_row(tmp_path / "a.zarr", "spatialdata", mpp=None))


def point_wkb(x: float, y: float) -> bytes:
    return struct.pack("<BI2d", 1, 1, x, y)


def test_parquet_shapes_and_zarr_3(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    root = tmp_path / "a.zarr"
    root.mkdir()
    group = zarr_group(root, 3)
    write_table(root)
    shapes = group.require_group("shapes").require_group("cells")
    shapes.attrs["coordinateTransformations"] = [placed(SCALE)]
    frame = pd.DataFrame(
        {"geometry": [point_wkb(x, y) for x, y in draw_xy()], "radius": 2.0},
        index=np.arange(CELLS) + 5,
    )
    frame.to_parquet(root / "shapes" / "cells" / "shapes.parquet")
    table = read_spots(cell_row(root, "spatialdata"))
    np.testing.assert_allclose(table.xy_px0, draw_xy() * [2.0, 4.0])
    frame["geometry"] = b"no"
    frame.to_parquet(root / "shapes" / "cells" / "shapes.parquet")
    with pytest.raises(DataError, match="the geometry of row 1 is not a point or polygon"):
        read_spots(cell_row(root, "spatialdata"))


def test_points_and_obsm(tmp_path: Path) -> None:
    write_table(tmp_path / "b", region=None, spatial=draw_xy())
    (tmp_path / "b" / ".zgroup").write_text('{"zarr_format": 2}')
    table = read_spots(cell_row(tmp_path / "b", "spatialdata"))
    np.testing.assert_allclose(table.xy_px0, draw_xy())
    assert "places are obsm['spatial']" in table.notes
    write_table(tmp_path / "c", region="gone")
    with pytest.raises(DataError, match=r"annotates no shapes or points .* no obsm\['spatial'\]"):
        read_spots(cell_row(tmp_path / "c", "spatialdata"))


def test_refused_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="holds no tables"):
        read_spots(cell_row(tmp_path, "spatialdata"))
    for name in ("one", "two"):
        write_table(tmp_path / "a", name=name)
    with pytest.raises(DataError, match=r"holds the tables one, two; give one of them as counts"):
        read_spots(cell_row(tmp_path / "a", "spatialdata"))
    write_table(tmp_path / "b", region=["s1", "s2"])
    with pytest.raises(DataError, match=r"annotates s1, s2"):
        read_spots(cell_row(tmp_path / "b", "spatialdata"))
    write_table(tmp_path / "c", region="../../b", spatial=draw_xy())
    assert "places are obsm['spatial']" in read_spots(cell_row(tmp_path / "c", "spatialdata")).notes
    row = cell_row(sdata(tmp_path / "d.zarr"), "spatialdata")
    monkeypatch.setattr(reader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs zarr: pip install .hibio\[spatialdata"):
        read_spots(row)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sdata(tmp_path / "a.zarr")
    monkeypatch.setitem(sys.modules, "pickle_was_used", None)
    for path in (root / "tables/table/obs/depth/.zarray", root / "shapes/cells/coords/.zarray"):
        old = path.read_text()
        content = json.loads(old) | {"filters": [{"id": "pickle", "protocol": 5}]}
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"\.zarray holds pickled objects"):
            read_spots(cell_row(root, "spatialdata"))
        path.write_text(old)
    (root / "tables/table/zarr.json").write_text('{"codecs": [{"name": "numcodecs.pickle"}]}')
    with pytest.raises(DataError, match=r"zarr\.json holds pickled objects"):
        read_spots(cell_row(root, "spatialdata"))


def test_arrays_that_claim_more_than_their_chunks_hold(tmp_path: Path) -> None:
    root = sdata(tmp_path / "a.zarr")
    table = root / "tables/table"
    path = table / "X/data/.zarray"
    old = path.read_text()
    for changes in ({"shape": [5 * 10**12]}, {"chunks": [5 * 10**12]}):
        path.write_text(json.dumps(json.loads(old) | changes))
        with pytest.raises(DataError, match=r"claims [\d,]+\.\d GiB in [\d,]+ bytes"):
            read_spots(cell_row(root, "spatialdata"))
    path.write_text(json.dumps(json.loads(old) | {"shape": "many"}))
    with pytest.raises(DataError, match="no shape of numbers"):
        read_spots(cell_row(root, "spatialdata"))
    path.write_text(old)
    huge = {"metadata": {"X/data/.zarray": json.loads(old) | {"shape": [5 * 10**12]}}}
    newer = {"consolidated_metadata": {"metadata": {"X/data": {"shape": [5 * 10**12]}}}}
    for name, content in ((".zmetadata", huge), ("zarr.json", newer)):
        (table / name).write_text(json.dumps(content))
        with pytest.raises(DataError, match=rf"{name}: an array claims"):
            read_spots(cell_row(root, "spatialdata"))
        (table / name).unlink()
    chunk = table / "X/data/0"
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link to another place"):
        read_spots(cell_row(root, "spatialdata"))


@pytest.mark.parametrize("part", ["tables/table/X/data", "tables/table/obs/kind", "tables/table/X"])
def test_damaged_folders(part: str, tmp_path: Path) -> None:
    root = sdata(tmp_path / "a.zarr")
    for path in sorted((root / part).rglob("*")):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:3])
    with pytest.raises(DataError, match="is damaged"):
        read_spots(cell_row(root, "spatialdata"))


# --- an image of the folder ------------------------------------------------------------------

CYX = [{"name": name} for name in "cyx"]
AFFINE = {"type": "affine", "affine": [[1, 0, 0, 0], [0, 0, -4, 900], [0, 2, 0, 30]]}
STEPS = [{"type": "scale", "scale": [1, 2, 2]}, {"type": "translation", "translation": [0, 7, 9]}]


def with_image(root: Path, *told: dict, version: str = "0.4", level: float = 1.0) -> Path:
    """An image of 90 x 110 pixels beside the shapes, placed by transformations of c, y, x."""
    folder = write_picture(root / "images" / "he", picture(), version=version, unit=None)
    group = zarr.open_group(str(folder), mode="r+")
    about = group.attrs.asdict()
    scales = about.get("ome", about)["multiscales"][0]
    scales["coordinateTransformations"] = list(told)
    scales["datasets"][0]["coordinateTransformations"][0]["scale"] = [1.0, level, level]
    group.attrs.update(about)
    return folder


def of_pixels(told, name: str = "global"):
    return told | {"input": {"axes": CYX}, "output": {"name": name, "axes": CYX}}


@pytest.mark.parametrize(
    ("told", "oracle"),
    [
        (AFFINE, lambda x, y: (2 * y + 30, -4 * x + 900)),
        ({"type": "scale", "scale": [1.0, 5.0, 4.0]}, lambda x, y: (4 * x, 5 * y)),
        ({"type": "translation", "translation": [0, 20, 10]}, lambda x, y: (x + 10, y + 20)),
        ({"type": "sequence", "transformations": STEPS}, lambda x, y: (2 * x + 9, 2 * y + 7)),
    ],
)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_places_lie_on_the_image_as_both_are_placed(tmp_path, told, oracle, version) -> None:
    """Pixel -> system, one by one, gives back where the system has the shapes."""
    root = sdata(tmp_path / "a.zarr", [placed(SCALE)])
    image = with_image(root, of_pixels(told), version=version, level=0.5)
    table = read_spots(cell_row(root, "spatialdata", image=image))
    x, y = table.xy_px0.T * 0.5
    np.testing.assert_allclose(np.column_stack(oracle(x, y)), draw_xy() * [2.0, 4.0])
    assert "he and its shapes to 'global'" in table.notes[-1]
    assert table.mpp == 0.5
    per_unit = np.sqrt(abs(np.linalg.det(table.image_transform[:2, :2])))
    assert table.diameter_um == pytest.approx(6.0 * np.sqrt(8) * per_unit * 0.5)
    for other in (root, root / "images"):  # the only image of the folder
        again = read_spots(cell_row(root, "spatialdata", image=other))
        np.testing.assert_array_equal(again.xy_px0, table.xy_px0)
    free = cell_row(root, "spatialdata", image=image, image_transform="flip_x")
    np.testing.assert_allclose(read_spots(free).xy_px0, draw_xy() * [2.0, 4.0])


def test_systems_that_image_and_shapes_share(tmp_path) -> None:
    shapes = [placed(SCALE, "b"), placed({"type": "identity"}, "c", unit="micrometer")]
    root = sdata(tmp_path / "a.zarr", shapes)
    half = of_pixels({"type": "scale", "scale": [1, 0.5, 0.5]}, "c")
    image = with_image(root, of_pixels(AFFINE, "a"), half)
    table = read_spots(cell_row(root, "spatialdata", image=image, mpp=None))
    np.testing.assert_allclose(table.xy_px0, draw_xy() * 2)
    assert table.mpp == pytest.approx(0.5)  # the shapes are in micrometres there
    with_image(root, of_pixels(AFFINE, "a"))
    with pytest.raises(DataError, match=r"systems b, c, the image a: none in common; .*shift:0 0"):
        read_spots(cell_row(root, "spatialdata", image=image))
    with_image(root, of_pixels({"type": "byDimension"}, "c"))
    with pytest.raises(DataError, match="he: its transformation is not read"):
        read_spots(cell_row(root, "spatialdata", image=image))
    plain = with_image(root, of_pixels({"type": "identity"}, "c"))
    row = cell_row(root, "spatialdata", image=plain, mpp=1.0)
    assert read_spots(row).image_transform is None
    write_picture(root / "images" / "if", picture(), unit=None)
    with pytest.raises(DataError, match="images/he, images/if: name one of them"):
        read_spots(replace(row, image=root))


# --- geometry --------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), st.booleans())
def test_points_in_wkb(places: list[tuple[float, float]], big: bool) -> None:
    order = ">" if big else "<"
    values = [struct.pack(f"{order}BI2d", int(not big), 1, x, y) for x, y in places]
    deep = [struct.pack(f"{order}BI3d", int(not big), 1001, x, y, 9.0) for x, y in places]
    for data in (values, deep):
        np.testing.assert_array_equal(wkb_centroids(data, "f"), np.array(places))


def ring_wkb(points: np.ndarray) -> bytes:
    return struct.pack("<I", len(points)) + np.asarray(points, dtype="<f8").tobytes()


def polygon_wkb(*rings: np.ndarray) -> bytes:
    return struct.pack("<BII", 1, 3, len(rings)) + b"".join(map(ring_wkb, rings))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(3, 12), st.floats(1.0, 50.0), numbers, numbers, st.floats(0.0, 6.0), st.booleans()
)
def test_regular_polygons_have_their_centre(
    corners: int, radius: float, x: float, y: float, turn: float, reverse: bool
) -> None:
    angle = np.arange(corners) / corners * 2 * np.pi + turn
    ring = np.column_stack([x + radius * np.cos(angle), y + radius * np.sin(angle)])
    ring = ring[::-1] if reverse else ring
    area = corners / 2 * radius**2 * np.sin(2 * np.pi / corners)
    centre, found = polygon_centroid([ring])
    np.testing.assert_allclose(centre, [x, y], atol=1e-7 * (1 + abs(x) + abs(y)))
    assert found == pytest.approx(area)
    closed = np.vstack([ring, ring[:1]])
    np.testing.assert_allclose(wkb_centroids([polygon_wkb(closed)], "f")[0], centre, atol=1e-6)


def test_holes_parts_and_lines() -> None:
    square = np.array([(0, 0), (4, 0), (4, 4), (0, 4), (0, 0)], dtype=float)
    hole = square / 4 + [0.0, 1.5]  # area 1, centre (0.5, 2)
    centre, area = polygon_centroid([square, hole[::-1]])
    assert area == pytest.approx(15.0)
    np.testing.assert_allclose(centre, [(16 * 2 - 0.5) / 15, 2.0])
    parts = [polygon_wkb(square), polygon_wkb(square / 2 + 10)]  # areas 16 and 4
    whole = struct.pack("<BII", 1, 6, 2) + b"".join(parts)
    np.testing.assert_allclose(wkb_centroids([whole], "f"), [[(16 * 2 + 4 * 11) / 20] * 2])
    coords = np.vstack([square, square / 2 + 10])
    offsets = [np.array([0, 5, 10]), np.array([0, 1, 2]), np.array([0, 2])]
    np.testing.assert_allclose(ragged_centroids(coords, offsets, 6, "f"), [[76 / 20] * 2])
    np.testing.assert_array_equal(polygon_centroid([square[[0, 1, 0]]])[0], [4 / 3, 0.0])
    for bad in (b"", b"\x01", struct.pack("<BI", 1, 2), polygon_wkb(square)[:-8], "text"):
        with pytest.raises(DataError, match="row 1 is not a point or polygon"):
            wkb_centroids([bad], "f")


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=10, max_size=10), numbers, numbers)
def test_transformations_one_point_at_a_time(v: list[float], x: float, y: float) -> None:
    steps = [
        {"type": "scale", "scale": v[:2]},
        {"type": "translation", "translation": v[2:4]},
        {"type": "affine", "affine": [v[4:7], v[7:10]]},
        {"type": "mapAxis", "mapAxis": {"x": "y", "y": "x"}},
    ]
    a, b = x * v[0] + v[2], y * v[1] + v[3]
    a, b = v[4] * a + v[5] * b + v[6], v[7] * a + v[8] * b + v[9]
    found = transform_matrix({"type": "sequence", "transformations": steps}) @ [x, y, 1.0]
    np.testing.assert_allclose(found[:2], [b, a], rtol=1e-6, atol=1e-3)


def test_axes_by_name() -> None:
    axes = [{"name": name} for name in "cyx"]
    told = {"type": "scale", "scale": [1.0, 3.0, 5.0], "input": {"axes": axes}}
    np.testing.assert_array_equal(transform_matrix(told), np.diag([5.0, 3.0, 1.0]))
    full = [[1, 0, 0, 0], [0, 3, 0, 7], [0, 0, 5, 9], [0, 0, 0, 1]]
    told = {"type": "affine", "affine": full, "input": {"axes": axes}, "output": {"axes": axes}}
    expected = [[5.0, 0.0, 9.0], [0.0, 3.0, 7.0], [0.0, 0.0, 1.0]]
    np.testing.assert_array_equal(transform_matrix(told), expected)
    with pytest.raises(ValueError, match="scale of 1 numbers"):
        transform_matrix({"type": "scale", "scale": [1.0]})
    with pytest.raises(ValueError, match="not finite"):
        transform_matrix({"type": "scale", "scale": [1.0, float("nan")]})
