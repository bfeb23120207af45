"""Image-only slides behind a trained checkpoint: queried and embedded, never trained or tested on.

A tiny model is trained on a simulated cohort that has an image-only slide beside the paired ones.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from eval.embed import embed_folder, embed_slide, image_embedding, load_checkpoint
from eval.query import query_folder
from eval.report.figures.heatmaps import pathway_heatmaps
from eval.run import evaluate
from eval.tables import require_finite
from eval.view.cohort import Cohort as Viewed
from hibio.cli.pathways import run as pathways_command
from hibio.config.files import ConfigError
from hibio.data.slide import prepare_slide
from hibio.data.splits import read_entries, with_counts
from hibio.model import HiBio
from hibio.run import train_all
from preprocessing import SlideStore, stores_in
from preprocessing.errors import DataError
from tests.eval.image_cohort import Cohort, tiny_run


def held_out(cohort: Cohort) -> str:
    artifacts = HiBio.from_checkpoint(cohort.checkpoint).artifacts
    (slide,) = {"sim001", "sim002", "sim003"} - set(artifacts.train_slides)
    return slide


def test_a_slide_without_its_counts_scores_the_same(cohort: Cohort, tmp_path: Path):
    paired = held_out(cohort)
    query_folder(cohort.checkpoint, cohort.stores, "default", tmp_path / "paired")
    query_folder(cohort.checkpoint, cohort.images, "default", tmp_path / "images")
    with_them = pd.read_csv(tmp_path / "paired" / f"{paired}.query.csv", index_col=0)
    without = pd.read_csv(tmp_path / "images" / "bare.query.csv", index_col=0)
    assert without.to_numpy().std() > 0.1
    pd.testing.assert_frame_equal(with_them, without, rtol=1e-4, atol=1e-5)
    assert "measured" in anndata.read_h5ad(tmp_path / "paired" / f"{paired}.query.h5ad").layers
    assert "measured" not in anndata.read_h5ad(tmp_path / "images" / "bare.query.h5ad").layers


def laid_out(adata: anndata.AnnData, store: SlideStore) -> None:
    """What scanpy and squidpy look for: pixels of level 0, and a picture of a known scale."""
    np.testing.assert_array_equal(adata.obsm["spatial"], store.xy_px0)
    assert set(adata.obs["slide_id"]) == {store.slide_id}
    (library,) = adata.uns["spatial"]
    section, scale = adata.uns["spatial"][library], "tissue_hires_scalef"
    assert library == store.slide_id
    picture, factors = section["images"]["hires"], section["scalefactors"]
    place = adata.obsm["spatial"] * factors[scale]
    assert (place < np.array(picture.shape[1::-1])).all()
    # the picture under a spot is the picture of its patch
    half = max(1, round(store.attrs["patch_um"] / store.mpp * factors[scale] / 2))
    colour = []
    for x, y in place.astype(int):
        window = picture[max(0, y - half) : y + half, max(0, x - half) : x + half]
        colour.append(window.mean(axis=(0, 1)))
    true = store.patches().mean(axis=(1, 2))
    far = np.abs(np.array(colour) - true).mean()
    assert far < 0.4 * np.abs(np.array(colour)[::-1] - true).mean()
    pitch = np.sort(np.linalg.norm(store.xy_px0 - store.xy_px0[0], axis=1))[1]
    assert factors["spot_diameter_fullres"] == pytest.approx(pitch, rel=0.05)
    assert factors["microns_per_pixel"] == store.mpp


@pytest.mark.parametrize("readout", ["default", "ridge", "retrieval", "anchor"])
def test_the_grid_is_queried(cohort: Cohort, tmp_path: Path, readout: str):
    written = query_folder(cohort.checkpoint, cohort.images, "default", tmp_path, readout)
    assert {path.name for path in written} >= {
        "grid.query.csv",
        "grid.query.h5ad",
        "grid.query.png",
    }
    scores = pd.read_csv(tmp_path / "grid.query.csv", index_col=0)
    adata = anndata.read_h5ad(tmp_path / "grid.query.h5ad")
    with SlideStore(cohort.images / "grid.h5") as store:
        assert scores.index.tolist() == list(store.barcodes) == adata.obs_names.tolist()
        np.testing.assert_array_equal(adata.obsm["spatial_um"], store.xy_um)
        laid_out(adata, store)
    assert np.isfinite(scores.to_numpy()).all()
    assert (scores.std() > 0).all()
    np.testing.assert_allclose(adata.X, scores.to_numpy(), atol=5.1e-5)  # four decimals
    assert (tmp_path / "grid.query.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_slide_of_another_panel_does_not_measure_is_told(cohort: Cohort, tmp_path: Path):
    """Its image is read all the same; no score is made of genes that nobody counted."""
    slide, panel = held_out(cohort), tmp_path / "panel"
    source = cohort.stores / f"{slide}.h5"
    loaded = load_checkpoint(cohort.checkpoint)
    genes = [str(name) for name in loaded.model.artifacts.genes[:8]]
    (tmp_path / "own.gmt").write_text("\t".join(["A", "", *genes[:4], "\nB", "", *genes[4:]]))
    panel.mkdir()
    shutil.copyfile(source, panel / source.name)
    with h5py.File(panel / source.name, "r+") as file:
        names = file["genes/name"].asstr()[:]
        file["genes/name"][:] = [name if name in genes[2:] else f"other-{name}" for name in names]
    own = image_embedding(loaded, panel / source.name)
    np.testing.assert_array_equal(own, image_embedding(loaded, source))
    with pytest.raises(ConfigError, match="measures 6 of the"):
        embed_folder(cohort.checkpoint, panel, tmp_path / "embedded")
    found, whole = (
        anndata.read_h5ad(query_folder(cohort.checkpoint, data, str(tmp_path / "own.gmt"), out)[0])
        for data, out in ((panel, tmp_path / "q"), (source, tmp_path / "whole"))
    )
    np.testing.assert_array_equal(found.X, whole.X)
    assert np.isfinite(whole.layers["measured"]).all()
    assert np.isnan(found.layers["measured"][:, 0]).all()
    assert np.isfinite(found.layers["measured"][:, 1]).all()
    viewed = Viewed(cohort.checkpoint, panel, sets=str(tmp_path / "own.gmt")).slide(slide)
    for asked, told in (
        (genes[0], f"'{slide}' does not measure {genes[0]}"),
        ("A", "measures 2 of the 4 genes of A"),
        (", ".join(genes[:3]), "measures 1 of the 3 genes of list"),
    ):
        with pytest.raises(ConfigError, match=told):
            viewed.heat(asked, "measured")
    assert viewed.heat(genes[3], "measured").values.any()
    area = viewed.area(range(30))
    assert sorted(area["genes"]["name"]) == sorted(genes[2:])
    assert len(area["genes"]["sd"]) == len(genes[2:])
    assert area["sets"]["name"] == ["B"]


def test_no_file_of_another_is_written_over(cohort: Cohort, tmp_path: Path):
    first = embed_folder(cohort.checkpoint, cohort.images, tmp_path)
    before = [path.read_bytes() for path in first]
    query_folder(cohort.checkpoint, cohort.images, "default", tmp_path)
    query_folder(cohort.checkpoint, cohort.images, "default", tmp_path)  # over its own
    assert [path.read_bytes() for path in first] == before
    for name, command in (("grid.h5ad", embed_folder), ("grid.query.csv", query_folder)):
        out = tmp_path / command.__name__
        out.mkdir()
        (out / name).write_text("somebody's")
        more = ("default",) if command is query_folder else ()
        with pytest.raises(DataError, match=rf"{name} is there and was not made by"):
            command(cohort.checkpoint, cohort.images, *more, out)
        assert (out / name).read_text() == "somebody's"


def test_results_that_are_not_finite_are_counted_by_spot():
    values = np.ones((60, 3))
    require_finite("s", {"X": values})
    values[7] = np.nan
    with pytest.raises(ConfigError, match="slide 's': X of 1 of 60 spots are not finite"):
        require_finite("s", {"X": values})


def test_the_grid_is_embedded(cohort: Cohort, tmp_path: Path):
    written = embed_folder(cohort.checkpoint, cohort.images, tmp_path)
    assert [path.name for path in written] == ["bare.h5ad", "grid.h5ad"]
    adata = anndata.read_h5ad(written[1])
    older = adata.copy()  # micrometres, as HiBio wrote them before
    older.obsm["spatial"] = older.obsm.pop("spatial_um")
    del older.uns["hibio"]["layout"]
    older.write_h5ad(written[1])
    embed_folder(cohort.checkpoint, cohort.images, tmp_path)
    np.testing.assert_array_equal(
        anndata.read_h5ad(written[1]).obsm["spatial"], adata.obsm["spatial"]
    )
    assert adata.shape == (prepared(cohort, "grid").n_spots, 0)
    assert "X_hibio_omics" not in adata.obsm
    for name in ("X_hibio_image", "X_hibio_region"):
        np.testing.assert_allclose(np.linalg.norm(adata.obsm[name], axis=1), 1.0, rtol=1e-5)
    assert adata.obs["hibio_region_300um"].nunique() > adata.obs["hibio_region_600um"].nunique() > 1
    with SlideStore(cohort.images / "grid.h5") as store:
        laid_out(adata, store)
    for column in ("hibio_region_300um", "hibio_region_600um"):
        regions = [anndata.read_h5ad(path).obs[column].cat for path in written]
        names = [name for region in regions for name in region.categories]
        assert len(set(names)) == len(names)
        assert all(region.ordered for region in regions)
        assert names == sorted(names)
    assert adata.obs_names[0].startswith("x0")


def prepared(cohort: Cohort, name: str):
    artifacts = HiBio.from_checkpoint(cohort.checkpoint).artifacts
    return prepare_slide(cohort.images / f"{name}.h5", artifacts, "handcrafted")


def test_a_slide_without_counts_has_padding_and_no_targets(cohort: Cohort):
    slide = prepared(cohort, "grid")
    artifacts = HiBio.from_checkpoint(cohort.checkpoint).artifacts
    assert (slide.has_counts, slide.has_image) == (False, True)
    rows = slide.expression.rows(np.arange(slide.n_spots))
    assert (rows.gene_SK == artifacts.n_genes).all()
    for zeros in (rows.value_SK, slide.vector_SV, rows.target_SM, rows.expression_SH):
        assert not zeros.any()
    assert np.isfinite(slide.vector_scale_V).all()


def test_training_and_evaluation_leave_it_out_and_say_so(
    cohort: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "training: 1 of 4 slides skipped, image only: grid" in cohort.printed
    assert cohort.printed.count("skipped") == 1
    artifacts = HiBio.from_checkpoint(cohort.checkpoint).artifacts
    assert "grid" not in artifacts.train_slides
    evaluate(cohort.checkpoint, cohort.stores, tmp_path, ["pathway_query"])
    assert "evaluation: 1 of 4 slides skipped, image only: grid" in capsys.readouterr().out
    assert "grid" not in (tmp_path / "results.json").read_text()


def test_what_needs_counts_refuses_image_only_slides(cohort: Cohort, tmp_path: Path):
    entries = read_entries(stores_in(cohort.images))
    assert [entry.has_counts for entry in entries] == [False, False]
    with pytest.raises(ConfigError, match=r"none of the 2 slides has counts, which training needs"):
        with_counts(entries, "training")
    with pytest.raises(ConfigError, match="which evaluation needs"):
        evaluate(cohort.checkpoint, cohort.images, tmp_path)
    run = tiny_run(tmp_path, "x")
    with pytest.raises(ConfigError, match="which training needs"):
        train_all(replace(run, data=replace(run.data, stores=cohort.images)))
    checkpoint = load_checkpoint(cohort.checkpoint)
    checkpoint.model.vision = None
    with pytest.raises(ConfigError, match=r"'grid' has no counts, and .* reads no image"):
        embed_slide(checkpoint, cohort.images / "grid.h5")
    options = argparse.Namespace(action="coverage", name="default", data=cohort.images)
    with pytest.raises(ConfigError, match="no slide with counts"):
        pathways_command(options)


def test_heatmaps_leave_out_what_was_not_measured():
    xy = np.stack(np.meshgrid(np.arange(8.0), np.arange(6.0)), axis=-1).reshape(-1, 2) * 20
    score = np.sin(xy[:, 0] / 30)
    alone = pathway_heatmaps(None, xy, [("A", score, None, None)])
    both = pathway_heatmaps(None, xy, [("A", score, score, None), ("B", score, None, None)])
    assert "no counts" in alone.caption
    assert "measured counts" in both.caption
    assert width(alone.png) < width(both.png)
    planted = pathway_heatmaps(None, xy, [("A", score, None, score)])
    assert width(alone.png) < width(planted.png)
    with pytest.raises(DataError, match="predicted"):
        pathway_heatmaps(None, xy, [("A", score[1:], None, None)])


def width(png: bytes) -> int:
    return int.from_bytes(png[16:20], "big")
