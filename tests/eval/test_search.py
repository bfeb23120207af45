"""`hibio index` and `hibio search`: recall, filters, parts on disk, questions of every kind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from eval import index as build
from eval.embed import embed_to_anndata, load_checkpoint
from eval.index import index_folder
from eval.indexed import SPOT, Rows, exact
from eval.search import Index, gene_list, picture, write_found
from hibio.cli import main
from hibio.config.files import ConfigError
from hibio.data.splits import read_entries
from preprocessing.errors import DataError
from preprocessing.patches import read_patch
from preprocessing.slides import open_slide
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from tests.eval.image_cohort import Cohort

faiss = pytest.importorskip("faiss", reason='pip install "hibio[search]"')


@pytest.fixture(scope="module")
def indexed(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index")
    tables = index_folder(cohort.checkpoint, cohort.stores, out, part=150)
    assert {t.name for t in tables} >= {"spot.image", "spot.omics", "300um.image", "600um.omics"}
    assert all(value >= 0.99 for table in tables for value in table.recall.values())
    return out


def test_the_nearest_are_those_of_the_embeddings(cohort: Cohort, indexed: Path):
    checkpoint, index = load_checkpoint(cohort.checkpoint), Index(indexed)
    frames = [embed_to_anndata(checkpoint, e.path) for e in read_entries(stores_in(cohort.stores))]
    omics = np.concatenate([a.obsm["X_hibio_omics"] for a in frames if a.n_vars])
    names = [f"{a.obs.slide_id.iloc[0]}:{n}" for a in frames if a.n_vars for n in a.obs_names]
    question = frames[-1].obsm["X_hibio_image"][7]
    found = index.nearest(question, "omics", k=5)
    cosine = omics @ question
    assert len(index.nearest(question, "omics", k=10**9)) == len(names)  # all that there are
    assert found["distance"].tolist() == pytest.approx(np.sort(1 - cosine)[:5], abs=2e-3)
    place = {name: 1 - value for name, value in zip(names, cosine, strict=True)}
    np.testing.assert_allclose(found["distance"], [place[n] for n in found["name"]], atol=2e-3)
    one = frames[-1]
    own = index.rows.named("600um", one.obs["hibio_region_600um"].iloc[3])[1]["omics"]
    np.testing.assert_allclose(own, one.obsm["X_hibio_region"][3], atol=2e-3)


def test_many_lists_in_parts_find_what_all_rows_do(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build, "EXACT", 100)
    rng = np.random.default_rng(0)
    made = rng.standard_normal((8, 12)).astype(np.float32)
    (tmp_path / "slides").mkdir()
    for slide in ("a", "b", "c"):
        x = made[rng.integers(0, 8, 400)] + 0.4 * rng.standard_normal((400, 12))
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
        with build.h5py.File(tmp_path / "slides" / f"{slide}.h5", "w") as file:
            file["spot/image"] = x
            file["spot/name"] = np.array([f"{slide}:{i}" for i in range(400)]).astype(build.TEXT)
            file["spot/spot"], file["spot/xy_um"] = np.arange(400), np.zeros((400, 2))
    rows = Rows(tmp_path, ("a", "b", "c"))
    table = build._build(rows, SPOT, "image", 400)
    assert (tmp_path / "spot.image.lists").stat().st_size > 1200 * 12 * 2
    assert not list(tmp_path.glob(".*part"))
    assert (table.n, table.lists) == (1200, 35)
    assert 1 <= table.probed < 35
    assert table.recall["image"] >= 0.99
    question = np.concatenate([block[:3] for _, block in rows.vectors(SPOT, "image")])
    every = np.concatenate([block for _, block in rows.vectors(SPOT, "image")])
    number, cosine = exact(rows, SPOT, "image", question, 4)
    np.testing.assert_allclose(cosine, -np.sort(-(question @ every.T), axis=1)[:, :4], rtol=1e-5)
    assert number[:, 0].tolist() == [0, 1, 2, 400, 401, 402, 800, 801, 802]


def test_what_is_chosen_by_is_kept(indexed: Path, monkeypatch):
    index = Index(indexed)
    row, own = index.rows.named(SPOT, index.rows.described(SPOT, np.array([130]))["name"].iloc[0])
    assert row == 130
    where = {"slide_id": ["sim001", "sim003"], "tissue": ["simulated"]}
    mask = index.mask(SPOT, where)
    few = index.nearest(own["image"], "omics", k=8, mask=mask)
    assert set(few["slide_id"]) <= {"sim001", "sim003"}
    monkeypatch.setattr("eval.search.EXACT", 0)  # by the lists, as with many rows
    same = index.nearest(own["image"], "omics", k=8, mask=mask)
    pd.testing.assert_frame_equal(few, same, atol=1e-4)
    label = sorted(index.rows.columns)[0]
    value = few[label].iloc[0]
    found = index.nearest(own["image"], "omics", k=8, mask=index.mask(SPOT, {label: [value]}))
    assert set(found[label]) == {value}
    with monkeypatch.context() as named:  # as a column of an answer is
        named.setattr("eval.indexed.COLUMNS", (label, "slide_id"))
        index = Index(indexed)
        assert {f"{label}_"} <= index.rows.columns
        again = index.nearest(
            own["image"], "omics", k=8, mask=index.mask(SPOT, {f"{label}_": [value]})
        )
        assert again[f"{label}_"].tolist() == found[label].tolist()
    for wrong, told in (
        ({"organ": ["x"]}, "no 'organ'"),
        ({"tissue": ["x", "y"]}, "no spot has tissue=x or y$"),
    ):
        with pytest.raises(ConfigError, match=told):
            index.mask(SPOT, wrong)


def test_genes_a_patch_and_a_spot_are_questions(cohort: Cohort, indexed: Path, tmp_path: Path):
    checkpoint, index = load_checkpoint(cohort.checkpoint), Index(indexed)
    genes = checkpoint.model.artifacts.genes[:5].tolist()
    known = checkpoint.model.encode_gene_sets({"s": genes})[0]
    np.testing.assert_allclose(gene_list(checkpoint, [*genes, "nothing"]), known, rtol=1e-6)
    with pytest.raises(ConfigError, match="none of the genes nothing"):
        gene_list(checkpoint, ["nothing"])
    with SlideStore(cohort.stores / "sim001.h5") as store:
        Image.fromarray(store.patches(np.array([3]))[0]).save(tmp_path / "patch.png")
        barcode = store.barcodes[3]
    assert np.linalg.norm(picture(checkpoint, index, tmp_path / "patch.png")) == pytest.approx(1)
    there = ["--checkpoint", str(cohort.checkpoint)]
    for number, asked in enumerate(
        (
            ["--like", f"sim001:{barcode}", "--find", "image"],
            ["--genes", *genes, *there],
            ["--patch", str(tmp_path / "patch.png"), "--top", "3", *there],
        )
    ):
        out = tmp_path / str(number)
        assert main(["search", str(indexed), *asked, "--out", str(out)]) == 0
        table = pd.read_csv(out / "nearest.csv")
        assert len(table) == (3 if "--patch" in asked else 10)
        assert table["distance"].is_monotonic_increasing
        assert (out / "nearest.png").read_bytes().startswith(b"\x89PNG")
    itself = pd.read_csv(tmp_path / "0" / "nearest.csv").iloc[0]
    assert itself["name"] == f"sim001:{barcode}"
    assert itself["distance"] == pytest.approx(0, abs=2e-3)


def test_a_patch_in_a_file_is_embedded_as_the_spot_that_it_shows(
    cohort: Cohort, indexed: Path, tmp_path: Path
):
    """Three patch widths of the slide, of which the middle one is the spot's own patch."""
    checkpoint, index = load_checkpoint(cohort.checkpoint), Index(indexed)
    index.rows.slides = ("sim001",)  # whose colours the picture has
    with SlideStore(cohort.stores / "sim001.h5") as store:
        um, mpp, xy = store.attrs["patch_um"], store.mpp, store.xy_px0
    (image,) = (cohort.stores.parent / "cohort" / "slides").glob("sim001.*")
    for spot in (3, 40, 80):
        with open_slide(image) as slide:
            pixels = read_patch(slide, tuple(xy[spot]), mpp, 3 * um, round(3 * um / mpp))
        Image.fromarray(pixels).save(tmp_path / "patch.png")
        asked = picture(checkpoint, index, tmp_path / "patch.png")
        every = next(Rows(indexed, ("sim001",)).vectors(SPOT, "image"))[1] @ asked
        assert every.argmax() == spot
        assert every[spot] > 0.99 > np.median(every) + 0.05
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) << 8).save(tmp_path / "deep.png")
    with pytest.raises(ConfigError, match=r"deep.png .*more than 8 bits a pixel"):
        picture(checkpoint, index, tmp_path / "deep.png")


def test_another_checkpoint_and_no_index_are_refused(
    cohort: Cohort, indexed: Path, tmp_path: Path, capsys
):
    before = {path: path.stat().st_mtime_ns for path in (indexed / "slides").iterdir()}
    index_folder(cohort.checkpoint, cohort.stores, indexed, part=150)  # resumed: no slide anew
    assert {path: path.stat().st_mtime_ns for path in before} == before
    text = (indexed / "index.json").read_text()
    other = tmp_path / "other"
    other.mkdir()
    sealed = text.replace(load_checkpoint(cohort.checkpoint).sha256, "0" * 64)
    (other / "index.json").write_text(sealed)
    with pytest.raises(ConfigError, match="is the index of another checkpoint"):
        index_folder(cohort.checkpoint, cohort.stores, other)
    line = ["search", str(tmp_path), "--like", "sim001:x", "--out", str(tmp_path / "o")]
    assert main(line) == 1
    assert "is no index" in capsys.readouterr().err
    assert main(["search", str(indexed), *line[2:]]) == 1
    assert "no spot 'sim001:x' in the index" in capsys.readouterr().err
    assert main(["search", str(indexed), *line[2:], "--where", "tissue"]) == 1
    assert "--where 'tissue': expected KEY=VALUE" in capsys.readouterr().err


def edited(change: Callable[[h5py.File], object]) -> Callable[[Path], object]:
    """A damage of an index: a change of the file of a slide."""

    def damage(index: Path) -> None:
        with h5py.File(index / "slides" / "sim001.h5", "r+") as file:
            change(file)

    return damage


def said(**changes: object) -> Callable[[Path], object]:
    """A damage of an index: other values in its summary."""

    def damage(index: Path) -> None:
        summary = json.loads((index / "index.json").read_text())
        (index / "index.json").write_text(json.dumps({**summary, **changes}))

    return damage


def other(name: str, value: object) -> Callable[[Path], object]:
    """A damage of an index: another dataset in the file of a slide."""

    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edited(change)


@pytest.mark.parametrize(
    "damage",
    [
        edited(lambda file: file.__delitem__("spot/name")),
        edited(lambda file: file.__setitem__("more", 3)),
        edited(lambda file: file["spot/spot"].write_direct(np.full(120, 10**9))),
        edited(lambda file: file["spot/spot"].write_direct(np.full(120, -1))),
        edited(lambda file: file.__setitem__("outside", h5py.ExternalLink("/etc/hosts", "x"))),
        other("spot/name", np.arange(120)),
        other("spot/image", np.ones((120, 3))),
        other("spot/image", np.full((120, 16), np.nan)),
        other("spot/xy_um", np.full((120, 2), np.nan)),
        other("spot/label", 3),
        said(slides={"../sim001": {}}),
        said(slides=[1]),
        said(tables=[{"name": "spot.image"}]),
        said(tables=3),
        lambda index: (index / "index.json").write_text("[" * 10**5),
        lambda index: (index / "spot.image.faiss").write_bytes(b"x"),
        lambda index: (index / "spot.image.faiss").unlink(),
        lambda index: shutil.copy(index / "600um.image.faiss", index / "spot.image.faiss"),
        lambda index: (index / "slides" / "sim001.h5").write_bytes(b"x"),
    ],
)
def test_a_damaged_index_is_told(indexed: Path, tmp_path: Path, monkeypatch, capsys, damage):
    index, out = tmp_path / "index", tmp_path / "out"
    shutil.copytree(indexed, index)
    slide = h5py.File(index / "slides" / "sim001.h5")
    name = slide["spot/name"].asstr()[0]
    slide.close()
    line = ["search", str(index), "--like", name, "--find", "image", "--out", str(out)]
    damage(index)
    assert main([*line, "--top", "2"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("hibio: ")
    assert "unexpected" not in told
    assert str(index) in told
    assert not out.exists()


def test_an_index_on_a_full_disk_is_told(cohort: Cohort, tmp_path: Path, monkeypatch):
    def full(index, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("Error in fwrite: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match="make room and run again"):
        index_folder(cohort.checkpoint, cohort.stores, tmp_path)
    assert not list(tmp_path.glob("*.faiss"))
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ConfigError, match="was not finished"):
        Index(tmp_path)


def test_a_table_is_safe_in_a_spreadsheet_and_one_of_others_stays(indexed: Path, tmp_path: Path):
    index, mine = Index(indexed), tmp_path / "mine" / "nearest.csv"
    found = index.rows.described(SPOT, np.array([3, 4])).assign(**{"=1+1": "@x"})
    found.insert(0, "distance", [0.0, 1.0])
    (path, _) = write_found(found, index, tmp_path / "out")
    assert "'=1+1" in path.read_text().splitlines()[0]
    assert path.read_text().splitlines()[1].endswith("'@x")
    write_found(found, index, tmp_path / "out")  # its own is written anew
    mine.parent.mkdir()
    mine.write_text("my distances\n")
    with pytest.raises(DataError, match="was not made by this command"):
        write_found(found, index, mine.parent)
    assert mine.read_text() == "my distances\n"
