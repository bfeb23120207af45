"""The same folders by spatialdata-io and squidpy: counts, places and scale as those read them.

An optional step: `pip install spatialdata-io squidpy` beside HiBio, then this file. What the two
read otherwise is said where it is compared, and in docs/data.md.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile

from preprocessing import SpotTable
from preprocessing.readers.format import read_spots
from preprocessing.slide_row import SlideRow
from tests.preprocessing.cell_sources import (
    BARCODES,
    cell_row,
    cosmx_folder,
    merscope_folder,
    xenium_folder,
)
from tests.preprocessing.hd_cell_sources import segmented_folder
from tests.preprocessing.sources import NO_REAL_DATA, REAL_DATA, visium_folder
from tests.preprocessing.test_readers_stereoseq import write_bins as write_stereoseq_bins
from tests.preprocessing.test_readers_stereoseq import write_cells as write_stereoseq_cells
from tests.preprocessing.test_readers_visium_hd import PX, hd_sample

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(scope="session")
def squidpy() -> Any:
    return pytest.importorskip("squidpy", reason="optional: pip install squidpy")


@pytest.fixture(scope="session")
def spatialdata_io() -> Any:
    return pytest.importorskip("spatialdata_io", reason="optional: pip install spatialdata-io")


def same(ours: SpotTable, theirs: anndata.AnnData, xy: np.ndarray, places: np.ndarray) -> None:
    """Counts by barcode and gene, and ``places`` of ours (S, 2) as ``xy`` of theirs, are equal."""
    theirs = theirs.copy()
    theirs.var_names_make_unique()
    rows = pd.Index(theirs.obs_names.astype(str)).get_indexer(ours.barcodes)
    columns = theirs.var_names.get_indexer(ours.gene_names)
    assert min(rows.min(), columns.min()) >= 0
    counts = theirs.X.toarray() if hasattr(theirs.X, "toarray") else theirs.X
    np.testing.assert_array_equal(ours.counts.toarray(), counts[np.ix_(rows, columns)])
    np.testing.assert_allclose(places, np.asarray(xy, dtype=np.float64)[rows], rtol=1e-6)
    left_out = np.setdiff1d(np.arange(theirs.n_obs), rows)
    if "in_tissue" in theirs.obs:  # they keep spots off the tissue that the matrix has
        assert (theirs.obs["in_tissue"].iloc[left_out] == 0).all()
    else:
        assert len(left_out) == 0


def centres(shapes: Any) -> np.ndarray:
    return np.column_stack([shapes.geometry.centroid.x, shapes.geometry.centroid.y])


def with_genome(matrix: Path) -> Path:
    """Scanpy asks for the genome of every feature, as Space Ranger writes it."""
    with h5py.File(matrix, "a") as file:
        file["matrix/features/genome"] = np.array(["x"] * len(file["matrix/features/id"]), "S")
    return matrix.parent


def visium_folders(folder: Path) -> dict[str, Path]:
    made = {}
    for header in (True, False):
        visium_folder(folder / f"{header}", header=header)
        made[f"made {header}"] = with_genome(folder / f"{header}" / "filtered_feature_bc_matrix.h5")
    if REAL_DATA.is_dir():
        made["real"] = REAL_DATA / "reader_samples" / "visium_v1_h5"
    return made


def test_visium(tmp_path: Path, squidpy: Any, spatialdata_io: Any):
    for name, folder in visium_folders(tmp_path).items():
        ours = read_spots(SlideRow("s", "p", folder, "visium"))
        theirs = squidpy.read.visium(folder, library_id="s", load_images=name == "real")
        if name == "real":
            same(ours, theirs, theirs.obsm["spatial"], ours.xy_px0)
        data = spatialdata_io.visium(folder, dataset_id="s")
        same(ours, data["table"], centres(data["s"]), ours.xy_px0)
        diameter = 2 * data["s"]["radius"].iloc[0]
        assert ours.diameter_um is not None
        assert ours.diameter_um / ours.mpp == pytest.approx(diameter)


def test_visium_as_they_write_it(tmp_path: Path, spatialdata_io: Any):
    """A SpatialData folder that spatialdata-io wrote, by our reader of those."""
    visium_folder(tmp_path / "v")
    folder = with_genome(tmp_path / "v" / "filtered_feature_bc_matrix.h5")
    data = spatialdata_io.visium(folder, dataset_id="global")
    data.write(tmp_path / "v.zarr")
    ours = read_spots(cell_row(tmp_path / "v.zarr", "spatialdata", mpp=2.0))
    same(ours, data["table"], centres(data["global"]), ours.xy_px0)


def feature_slice(folder: Path) -> None:
    """The file whose description of the slide spatialdata-io reads."""
    layout = json.dumps({"file_format": "1.0", "transform": np.eye(3).ravel().tolist()})
    with h5py.File(folder / "feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps({"hd_layout_json": layout})


def test_visium_hd(tmp_path: Path, spatialdata_io: Any):
    row = hd_sample(tmp_path, (8,), form="parquet")
    square = tmp_path / "outs" / "binned_outputs" / "square_008um"
    with_genome(square / "filtered_feature_bc_matrix.h5")
    factors = json.loads((square / "spatial" / "scalefactors_json.json").read_text())
    factors |= {"tissue_lowres_scalef": 0.1, "spot_diameter_fullres": 8 * PX}
    (square / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors))
    feature_slice(tmp_path / "outs")
    data = spatialdata_io.visium_hd(
        tmp_path / "outs", dataset_id="s", load_segmentations_only=False, bins_as_squares=False
    )
    ours = read_spots(replace(row, bin_um=8))
    same(ours, data["square_008um"], centres(data["s_square_008um"]), ours.xy_px0)
    assert ours.mpp * 2 * data["s_square_008um"]["radius"].iloc[0] == pytest.approx(8.0)


def on_picture(image: Any, xy: np.ndarray, system: str) -> np.ndarray:
    """Places (S, 2) of their coordinate system, on a picture that they laid in it."""
    transformations = pytest.importorskip("spatialdata.transformations")
    to_system = transformations.get_transformation(image, to_coordinate_system=system)
    matrix = np.linalg.inv(to_system.to_affine_matrix(("x", "y"), ("x", "y")))
    return (np.column_stack([xy, np.ones(len(xy))]) @ matrix.T)[:, :2]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_the_small_picture_of_visium(spatialdata_io: Any):
    folder = REAL_DATA / "reader_samples" / "visium_v1_h5"
    for name in ("hires", "lowres"):
        image = folder / "spatial" / f"tissue_{name}_image.png"
        ours = read_spots(SlideRow("s", "p", folder, "visium", image=image))
        data = spatialdata_io.visium(folder, dataset_id="s")
        xy = on_picture(data[f"s_{name}_image"], centres(data["s"]), "s")
        same(ours, data["table"], xy, ours.xy_px0)


def test_visium_hd_cells(tmp_path: Path, spatialdata_io: Any):
    segmented_folder(tmp_path / "segmented_outputs")
    folder = with_genome(tmp_path / "segmented_outputs" / "filtered_feature_cell_matrix.h5")
    feature_slice(tmp_path)
    data = spatialdata_io.visium_hd(tmp_path, dataset_id="s", load_segmentations_only=True)
    ours = read_spots(cell_row(folder, "visium_hd_cells", mpp=None))
    theirs = data["cell_segmentations"]
    shapes = data[theirs.obs["region"].iloc[0]].loc[theirs.obs["cell_id"]]
    same(ours, theirs, centres(shapes), ours.xy_px0)


def xenium_extras(folder: Path) -> None:
    """What spatialdata-io asks for beside the matrix and the cells; of Xenium before 1.3."""
    with_genome(folder / "cell_feature_matrix.h5")
    cells = pd.read_csv(folder / "cells.csv.gz").set_index("cell_id").loc[BARCODES].reset_index()
    cells.to_parquet(folder / "cells.parquet")  # in the order of the matrix, as 10x writes it
    specs = {"pixel_size": 0.2125, "analysis_sw_version": "xenium-1.0.0.0"}
    (folder / "experiment.xenium").write_text(json.dumps(specs))
    zarr = pytest.importorskip("zarr")
    with zarr.storage.ZipStore(folder / "cells.zarr.zip", mode="w") as store:
        zarr.group(store)


def test_xenium(tmp_path: Path, spatialdata_io: Any):
    folder = tmp_path / "x"
    xenium_folder(folder)
    xenium_extras(folder)
    absent = ("cells_boundaries", "nucleus_boundaries", "cells_labels", "nucleus_labels")
    absent += ("transcripts", "morphology_mip", "morphology_focus", "aligned_images")
    data = spatialdata_io.xenium(folder, cells_as_circles=True, **dict.fromkeys(absent, False))
    ours = read_spots(cell_row(folder, "xenium", mpp=None))
    same(ours, data["table"], centres(data["cell_circles"]), ours.xy_um)
    told = np.array([[0, -2, 900.0], [2, 0, -40], [0, 0, 1]])  # a picture taken after the run
    alignment, image = folder / "s_he_imagealignment.csv", folder / "s_he_image.ome.tif"
    np.savetxt(alignment, told, delimiter=",")
    tifffile.imwrite(image, np.zeros((3, 40, 50), dtype=np.uint8))
    picture = spatialdata_io.xenium_aligned_image(image, alignment)
    xy = on_picture(picture, centres(data["cell_circles"]) / 0.2125, "global")
    on_it = read_spots(cell_row(folder, "xenium", mpp=None, image=image))
    same(on_it, data["table"], xy, on_it.xy_px0)
    data.write(tmp_path / "x.zarr")  # in pixels of 0.2125 um there
    again = read_spots(cell_row(tmp_path / "x.zarr", "spatialdata", mpp=0.2125))
    same(again, data["table"], centres(data["cell_circles"]), again.xy_um)


def test_merscope(tmp_path: Path, squidpy: Any, spatialdata_io: Any):
    folder = tmp_path / "m"
    merscope_folder(folder)
    (folder / "images").mkdir()
    np.savetxt(folder / "images" / "micron_to_mosaic_pixel_transform.csv", np.diag([9.0, 9, 1]))
    ours = read_spots(cell_row(folder, "merscope", mpp=None))
    files = {"counts_file": "cell_by_gene.csv", "meta_file": "cell_metadata.csv"}
    theirs = squidpy.read.vizgen(folder, **files)
    same(ours, theirs, theirs.obsm["spatial"], ours.xy_um)
    data = spatialdata_io.merscope(
        folder, transcripts=False, cells_boundaries=False, mosaic_images=False
    )
    same(ours, data["table"], data["table"].obsm["spatial"], ours.xy_um)


def turned(table: anndata.AnnData) -> anndata.AnnData:
    """Their names of CosMx cells are <cell_ID>_<fov>, ours <fov>_<cell_ID>; cell_ID 0 is none."""
    table = table[[not name.startswith("0_") for name in table.obs_names]].copy()
    table.obs_names = ["_".join(reversed(name.split("_"))) for name in table.obs_names]
    return table


@pytest.mark.parametrize("program", ["squidpy", "spatialdata_io"])
def test_cosmx(tmp_path: Path, program: str, request: pytest.FixtureRequest):
    module = request.getfixturevalue(program)
    cosmx_folder(tmp_path)
    cells = pd.read_csv(tmp_path / "S_metadata_file.csv.gz")
    cells["CenterX_local_px"] = np.arange(len(cells)) % 5 + 1.0
    cells["CenterY_local_px"] = cells["CenterX_local_px"] ** 2
    cells.to_csv(tmp_path / "S_metadata_file.csv", index=False)
    (tmp_path / "S_metadata_file.csv.gz").unlink()
    (tmp_path / "S_fov_positions_file.csv").write_text(
        "fov,x_global_px,y_global_px\n1,0,0\n2,4000,0\n"
    )
    for name in ("CellComposite", "CellLabels"):
        (tmp_path / name).mkdir()
    ours = read_spots(cell_row(tmp_path, "cosmx", mpp=0.12))
    if program == "squidpy":
        files = {"counts_file": "S_exprMat_file.csv", "meta_file": "S_metadata_file.csv"}
        theirs = module.read.nanostring(tmp_path, **files)
        theirs.obsm["global"] = theirs.obsm["spatial_fov"]
    else:
        theirs = module.cosmx(tmp_path, transcripts=False)["table"]
    theirs = turned(theirs)
    same(ours, theirs, theirs.obsm["global"], ours.xy_px0)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=NO_REAL_DATA)
def test_hd_sample_of_other_authors():
    """Its files contradict each other (docs/data.md), so counts and places are compared alone."""
    scanpy = pytest.importorskip("scanpy", reason="optional: pip install squidpy")
    folder = REAL_DATA / "reader_samples" / "visium_hd_square_008um"
    ours = read_spots(SlideRow("s", "p", folder, "visium_hd", mpp=0.27376126715315274))
    theirs = scanpy.read_10x_h5(folder / "filtered_feature_bc_matrix.h5")
    theirs.var_names_make_unique()
    places = pd.read_parquet(folder / "spatial" / "tissue_positions.parquet").set_index("barcode")
    theirs = theirs[theirs.obs_names.isin(places.index)].copy()
    theirs.obs["in_tissue"] = places["in_tissue"].reindex(theirs.obs_names)
    xy = places[["pxl_col_in_fullres", "pxl_row_in_fullres"]].reindex(theirs.obs_names)
    same(ours, theirs, xy.to_numpy(), ours.xy_px0)


def stereoseq_folder(folder: Path) -> Path:
    """The results of SAW as far as spatialdata-io looks at them; returns the bins of one DNB.

    Its cells come from a second file with counts (.h5ad), which HiBio does not read: none here.
    """
    for name in ("02.count", "03.register", "041.cellcut", "04.tissuecut", "051.cellcluster"):
        (folder / name).mkdir(parents=True)
    write_stereoseq_cells(folder / "041.cellcut" / "s.cellbin.gef")
    with h5py.File(folder / "041.cellcut" / "s.cellbin.gef", "a") as file:
        group = file["cellBin"]
        cells, genes = group["cell"][:], group["gene"][:]
        del group["cell"], group["gene"]
        more = ["dnbCount", "area", "cellTypeID", "clusterID"]
        names = ["id", "x", "y", "offset", "geneCount", "expCount", *more]
        group["cell"] = np.array(
            [(*cell, 1, 1, 40, 0, 0) for cell in cells.tolist()], [(n, "i4") for n in names]
        )
        columns = [("geneName", "S64"), *((f"c{i}", "i4") for i in range(4))]
        group["gene"] = np.array([(g[1], 0, 1, 1, 1) for g in genes.tolist()], columns)
        group["geneExp"] = np.zeros(len(group["cellExp"]), [("cellID", "i4"), ("count", "i4")])
        for name, size in (("cellExon", 6), ("geneExon", 3), ("cellTypeList", 1)):
            group[name] = np.zeros(size)
        for name in ("cellExpExon", "geneExpExon"):
            group[name] = np.zeros(len(group["cellExp"]))
        group["blockIndex"], group["blockSize"] = np.zeros(1), np.zeros(4)
        ring = np.full((6, 32, 2), 32767)
        ring[:, :4] = [[-2, -2], [2, -2], [2, 2], [-2, 2]]
        group["cellBorder"] = ring
    table = anndata.AnnData(np.ones((6, 3)))
    table.write_h5ad(folder / "051.cellcluster" / "s.cell.cluster.h5ad")
    bins = write_stereoseq_bins(folder / "04.tissuecut" / "s.gef", new=False)
    with h5py.File(bins, "a") as file:
        lines = file["geneExp/bin1/expression"][:]
        del file["geneExp/bin50"], file["geneExp/bin1/expression"]
        signed = [(name, "i4") for name in lines.dtype.names]  # they take no unsigned places
        file["geneExp/bin1/expression"] = lines.astype(signed)
        names = file["geneExp/bin1/gene"][:]
        names["gene"] = [b"B", b"A", b"C"]  # nor two genes of one name
        file["geneExp/bin1/gene"][:] = names
        file["geneExp/bin1/expression"].attrs["resolution"] = np.array([500])
    (folder / "02.count" / "s.gef").write_bytes(bins.read_bytes())
    return bins


def test_stereoseq(tmp_path: Path, spatialdata_io: Any):
    bins = stereoseq_folder(tmp_path)
    data = spatialdata_io.stereoseq(tmp_path, dataset_id="s")
    ours = read_spots(SlideRow("s", "p", bins, "stereoseq", bin_um=0.5))
    theirs, xy = data["bin1_table"], data["bin1_genes"].compute()[["x", "y"]].to_numpy()
    theirs.obs_names = [f"{x}_{y}" for x, y in xy.tolist()]
    same(ours, theirs, xy, ours.xy_px0)
    same(ours, theirs, 0.5 * xy, ours.xy_um)
    write_stereoseq_cells(tmp_path / "c.cellbin.gef")
    cells = read_spots(SlideRow("c", "p", tmp_path / "c.cellbin.gef", "stereoseq"))
    np.testing.assert_allclose(cells.xy_px0, centres(data["cells_circles"]))
