"""`hibio view --embeddings`: files of `hibio embed` that were changed since; what is kept."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import pytest

from eval.embed import embed_folder, embed_slide
from eval.view.cohort import Cohort as Viewed
from eval.view.export import MADE, export_page
from eval.view.model import once
from hibio import keys
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from tests.eval.image_cohort import Cohort
from tests.eval.test_view import SLIDE, client_of


def half(adata: anndata.AnnData) -> anndata.AnnData:
    return adata[::2].copy()


def without_image(adata: anndata.AnnData) -> anndata.AnnData:
    del adata.obsm[keys.OBSM_IMAGE]
    return adata


@pytest.mark.parametrize(
    ("change", "said"),
    [(half, "does not hold the spots of"), (without_image, "lacks what `hibio embed` wrote")],
)
def test_they_are_refused(cohort: Cohort, tmp_path: Path, change, said: str):
    store, path = cohort.stores / f"{SLIDE}.h5", tmp_path / f"{SLIDE}.h5ad"
    embed_folder(cohort.checkpoint, store, tmp_path)
    change(anndata.read_h5ad(path)).write_h5ad(path)
    viewed = client_of(Viewed(cohort.checkpoint, store, embeddings=tmp_path))
    answer = viewed.get(f"/data/slides/{SLIDE}/near/image/5.json")
    assert answer.status_code < 500
    assert said in answer.json()["error"]


def test_an_export_refuses_files_of_other_slides_before_the_page_that_is_there_goes(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, path = cohort.stores / f"{SLIDE}.h5", tmp_path / f"{SLIDE}.h5ad"
    (other,) = embed_folder(cohort.checkpoint, cohort.stores / "sim002.h5", tmp_path)
    for options, ending in (
        ({"predictions": tmp_path}, ".predict"),
        ({"embeddings": tmp_path}, ""),
    ):
        with pytest.raises(ConfigError, match=f"no file of the .* as {SLIDE}{ending}.h5ad"):
            Viewed(cohort.checkpoint, store, **options)
    path.touch()
    monkeypatch.setattr("eval.view.export.page_files", dict)
    viewed = Viewed(cohort.checkpoint, store, embeddings=tmp_path)
    (tmp_path / "page").mkdir()
    for name in ("index.html", MADE):
        (tmp_path / "page" / name).touch()
    for put, told in ((b"half", "no whole file of HiBio"), (other.read_bytes(), "another store")):
        path.write_bytes(put)
        with pytest.raises((ConfigError, DataError), match=f"{told}.* leave --embeddings out"):
            export_page(viewed, tmp_path / "page", [str(viewed.model.artifacts.genes[0])])
    assert (tmp_path / "page" / "index.html").exists()


def test_slides_are_embedded_before_anybody_asks(cohort: Cohort, monkeypatch: pytest.MonkeyPatch):
    done = []

    def embed(checkpoint, store: Path, image):
        done.append(store.stem)
        if store.stem == SLIDE:
            raise ConfigError("told to whoever asks")
        return embed_slide(checkpoint, store, image)

    monkeypatch.setattr("eval.view.model.embed_slide", embed)
    viewed = Viewed(cohort.checkpoint, cohort.stores, only=[SLIDE, "sim002", "sim003", "grid"])
    sizes = [viewed.entries[name].n_spots for name in ("sim003", SLIDE, "sim002")]
    monkeypatch.setattr("eval.view.cohort.AHEAD_SPOTS", sum(sizes[1:]))

    def waited(*expected: str) -> bool:
        limit = time.monotonic() + 60
        while done != list(expected) and time.monotonic() < limit:
            time.sleep(0.01)
        return done == list(expected)

    threads = threading.active_count()
    with viewed.embedding_ahead():
        time.sleep(0.05)
        assert not done
        viewed.slide("sim003")
        assert waited("sim003", SLIDE, "sim002")
        time.sleep(0.05)
        assert len(done) == 3  # no more of those that nobody looked at
        viewed.slide("grid")
        assert waited("sim003", SLIDE, "sim002", "grid")
    assert threading.active_count() == threads
    done.clear()
    with pytest.raises(ConfigError, match="told to whoever asks"):
        viewed.slide(SLIDE).within([0])
    assert viewed.slide("sim003").within([0])
    assert done == [SLIDE]


def test_a_property_is_computed_once_whoever_asks():
    class Slow:
        asked = 0

        @once
        def value(self) -> int:
            self.asked += 1
            time.sleep(0.02)
            return self.asked

    slow = Slow()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: slow.value, range(8))) == [1] * 8
