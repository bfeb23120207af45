"""`HiBio.fit`: a run from Python is the run that the commands make of the same slides."""

from pathlib import Path

import anndata
import numpy as np
import openslide
import pandas as pd
import pytest

from hibio.cli import main
from hibio.config.files import ConfigError
from hibio.model import HiBio
from preprocessing import read_manifest
from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig
from preprocessing.store import SlideStore

TINY = {
    "genes": {"keyword_genes": 16, "rank": 6, "min_spots": 5, "target_genes": 20},
    "model": {
        "embed_dim": 16,
        "vision": {"width": 16},
        "omics": {"name": "mlp", "width": 16, "heads": 2},
    },
    "stages": [
        {
            "name": "spot",
            "steps": 3,
            "lr": 2e-3,
            "weights": {"spot/contrastive": 1.0, "image/expression": 1.0},
        }
    ],
}


def section(store: Path) -> anndata.AnnData:
    """What a user has in memory."""
    with SlideStore(store) as opened:
        adata = anndata.AnnData(
            opened.counts().astype(np.float32),
            obs=pd.DataFrame(index=opened.barcodes),
            var=pd.DataFrame(index=opened.gene_names),
        )
        adata.obsm["spatial"] = opened.xy_px0
    return adata


def test_five_lines_of_python_train_what_the_commands_train(
    toy_cohort: Path, toy_stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    rows = read_manifest(toy_cohort)[:2]
    a, b = (section(toy_stores / f"{row.slide_id}.h5") for row in rows)
    a.obs["text"] = "mine"
    kind = a.obs["text"].dtype
    with openslide.OpenSlide(rows[1].image) as slide:
        pixels = slide.read_region((0, 0), 0, slide.dimensions)
    slides = {"a": a, "b": b}
    images = {"a": rows[0].image, "b": np.asarray(pixels)[..., :3]}
    more = {"patch": PatchConfig(112.0, 16), "mpp": 4.0, "patient_id": ["A", "B"]}
    model = HiBio.fit(slides, images, TINY, **more)
    assert a.obs["text"].dtype == kind  # what was given is as it was
    assert model.artifacts.train_slides == ("a", "b")
    assert {seal["patient"] for seal in model.artifacts.seals.values()} == {"A", "B"}
    with SlideStore(tmp_path / "runs/python/stores/b.h5") as store:
        features, known = store.features("handcrafted"), store.xy_px0
        np.testing.assert_array_equal(np.sort(known, axis=0), np.sort(b.obsm["spatial"], axis=0))
    assert model.predict(features).shape == (b.n_obs, model.artifacts.n_genes)
    config = tmp_path / "runs/python/config.yaml"
    asked = ["train", "--config", str(config), "--set", f"out={tmp_path / 'again'}"]
    assert main(asked) == 0
    again = HiBio.from_checkpoint(next((tmp_path / "again").rglob("checkpoint")))
    np.testing.assert_array_equal(again.encode_image(features), model.encode_image(features))
    stores = {path: path.read_bytes() for path in (tmp_path / "runs/python/stores").glob("*.h5")}
    named = {"a": images["a"], "c": images["b"]}
    for resume in (False, True):  # would take the place of its stores, or go beside them
        with pytest.raises(ConfigError, match=r"holds a run of other slides \(a, b: gone, new"):
            HiBio.fit({"a": b, "b": a}, images, TINY, resume=resume, **more)
        with pytest.raises(ConfigError, match=r"holds a run of other slides \(b, c: gone, new"):
            HiBio.fit({"a": a, "c": b}, named, TINY, resume=resume, **more)
    with pytest.raises(ConfigError, match=r"already holds .*\(from Python: resume=True\)"):
        HiBio.fit(slides, images, TINY, **more)
    HiBio.fit(slides, images, {**TINY, "seeds": [1]}, **more)
    assert len(list((tmp_path / "runs/python").glob("*/fold-*/seed-*"))) == 2
    assert not list((tmp_path / "runs/python").glob(".fit-*"))
    folder = tmp_path / "runs/python/stores"
    assert stores == {path: path.read_bytes() for path in folder.glob("*.h5")}


def test_counts_alone_train_the_omics_tower(toy_stores: Path, tmp_path: Path):
    adata = section(toy_stores / "sim001.h5")
    small = {"genes": TINY["genes"], "sampler": {"batch_spots": 400}}
    tower = {"embed_dim": 16, "omics": {"width": 16, "layers": 1, "heads": 2}}
    model = HiBio.fit(adata, config={**small, "model": tower}, out=tmp_path, mpp=4.0)
    assert model.vision is None
    assert model.artifacts.train_slides == ("slide1",)
    assert HiBio.from_checkpoint(model.save_pretrained(tmp_path / "shared")).vision is None
    assert "| image |" not in (tmp_path / "shared" / "README.md").read_text()


def test_what_cannot_be_is_told(toy_stores: Path, tmp_path: Path):
    adata = section(toy_stores / "sim001.h5")
    for words, images, more in (
        ("images: 1 given for 2 slides", ["x.tif"], {}),
        (r"images: no slide 'c' \(slides: slide1, slide2\)", {"c": "x.tif"}, {}),
        (r"images: float64 \(4, 4\)", [np.zeros((4, 4))] * 2, {}),
        ("colour: no column of a manifest", None, {"colour": "red"}),
        ("^mpp 'x' is not a number", None, {"mpp": ["4", "x"]}),
        ("^role 'tst' is unknown", None, {"role": "tst", "mpp": 4.0}),
        ("asks for 1 folds, 2 seeds", None, {"config": {"seeds": [0, 1]}, "mpp": 4.0}),
        (
            "config: unknown key .seedz.; did you mean .seeds.",
            None,
            {"config": {"seedz": [0]}, "mpp": 4.0},
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            HiBio.fit([adata, adata], images, out=tmp_path, **more)
    with pytest.raises(ConfigError, match="adatas: slide1 is a str, expected AnnData"):
        HiBio.fit("A1.h5ad", out=tmp_path)
    adata.X = adata.X * 0.5
    with pytest.raises(DataError, match="1 of 1 slides cannot be prepared: slide1: "):
        HiBio.fit(adata, out=tmp_path, mpp=4.0)
