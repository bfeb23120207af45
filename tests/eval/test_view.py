"""`hibio view`: it answers what the other commands write; odd requests; the page as files."""

import base64
import io
import json
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import anndata
import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from eval.embed import embed_folder, embed_slide, image_embedding
from eval.predict import Wanted, predict_folder
from eval.query import query_folder
from eval.tables import read_table, region_outlines, write_table
from eval.view import page
from eval.view.cohort import Cohort as Viewed
from eval.view.export import _heats, export_page
from eval.view.model import UnknownName
from eval.view.server import application, serve
from eval.view.slide import compared
from eval.view.tiles import DeepZoom
from hibio.cli import main
from hibio.config.files import ConfigError
from preprocessing.errors import DataError
from preprocessing.store import SlideStore
from tests.eval.image_cohort import Cohort

SLIDE = "sim001"


@pytest.fixture(scope="module")
def checkpoint(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may get a read-out."""
    return Path(shutil.copytree(cohort.checkpoint, tmp_path_factory.mktemp("view") / "checkpoint"))


@pytest.fixture(scope="module", autouse=True)
def vendor(tmp_path_factory: pytest.TempPathFactory):
    """OpenSeadragon, of which these tests need the name alone."""
    folder = tmp_path_factory.mktemp("vendor")
    (folder / page.SCRIPT).write_text("// here is OpenSeadragon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "VENDOR", folder)
        yield folder


@pytest.fixture(scope="module")
def viewed(cohort: Cohort, checkpoint: Path) -> Viewed:
    slides = cohort.stores.parent / "cohort" / "slides"
    return Viewed(checkpoint, cohort.stores, slides=slides, sets="default")


def client_of(viewed: Viewed, token: str = ""):
    """Visits the page as a browser on this machine does."""
    testing = pytest.importorskip("starlette.testclient", reason="needs hibio[view]")
    return testing.TestClient(application(viewed, token=token), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def client(viewed: Viewed):
    return client_of(viewed)


def heat(client, slide: str, name: str, kind: str) -> tuple[np.ndarray, dict]:
    answer = client.get(f"/data/slides/{slide}/heat", params={"q": name, "kind": kind})
    assert answer.status_code == 200, answer.text
    return np.frombuffer(answer.content, "<f4"), json.loads(answer.headers["hibio-about"])


def regions(client, slide: str, level: str) -> tuple[list[int], np.ndarray]:
    data = client.get(f"/data/slides/{slide}/regions/{level}").content
    n = client.get(f"/data/slides/{slide}/slide.json").json()["spots"]
    return np.frombuffer(data, "<u4", n).tolist(), np.frombuffer(data[4 * n :], "<f4").reshape(
        -1, 4
    )


def test_a_heatmap_is_what_query_and_predict_write(
    client, viewed: Viewed, cohort: Cohort, checkpoint: Path, tmp_path: Path
):
    query_folder(checkpoint, cohort.stores, "default", tmp_path)
    predict_folder(checkpoint, [cohort.stores / f"{SLIDE}.h5"], tmp_path)
    sets = anndata.read_h5ad(tmp_path / f"{SLIDE}.query.h5ad")
    for name in sets.var_names[[0, 7]]:
        for kind, values in (("measured", sets.layers["measured"]), ("predicted", sets.X)):
            found, about = heat(client, SLIDE, name, kind)
            np.testing.assert_allclose(found, values[:, sets.var_names == name].ravel(), rtol=1e-3)
            assert about["genes"] == list(viewed.model.database.genes_of(name))
    genes = anndata.read_h5ad(tmp_path / f"{SLIDE}.predict.h5ad")
    gene = str(genes.var["reliability"].idxmax())
    found, about = heat(client, SLIDE, gene, "predicted")
    np.testing.assert_allclose(found, genes[:, gene].X.ravel(), rtol=1e-3, atol=1e-5)
    row = genes.var.loc[gene]
    assert about["reliability"] == pytest.approx(row["reliability"], rel=1e-3)
    assert (about["reliability_n"], about["note"]) == (row["reliability_n"], row["note"])
    filed = Viewed(checkpoint, cohort.stores, predictions=tmp_path, only=[SLIDE, "sim002"])
    again = filed.slide(SLIDE).heat(gene, "predicted")
    np.testing.assert_array_equal(again.values, genes[:, gene].X.ravel())
    assert again.about == about | {"from": f"{SLIDE}.predict.h5ad"}
    assert "from" not in filed.slide("sim002").heat(gene, "predicted").about  # it has no file
    folder = tmp_path / "zarr"
    write_table(folder / f"{SLIDE}.predict.zarr", genes)
    zarr = Viewed(checkpoint, cohort.stores, predictions=folder).slide(SLIDE)
    found = zarr.heat(gene, "predicted")
    np.testing.assert_array_equal(found.values, again.values)
    assert found.about == about | {"from": f"{SLIDE}.predict.zarr"}
    shutil.copy(tmp_path / f"{SLIDE}.predict.h5ad", tmp_path / "sim002.predict.h5ad")
    with pytest.raises(ConfigError, match="another store than is shown"):
        Viewed(checkpoint, cohort.stores, predictions=tmp_path).slide("sim002").heat(
            gene, "predicted"
        )
    measured, about = heat(client, SLIDE, gene, "measured")
    with SlideStore(cohort.stores / f"{SLIDE}.h5") as store:
        counts = store.counts()[:, store.gene_names == gene].toarray().ravel()
    assert ((measured > 0) == (counts > 0)).all()
    assert np.corrcoef(measured, np.log1p(counts))[0, 1] > 0.9
    assert about["unit"].startswith("log expression")


def test_predictions_are_read_from_spatialdata_too(
    cohort: Cohort, checkpoint: Path, tmp_path: Path
):
    pytest.importorskip("spatialdata", reason='pip install "hibio[interop]"')
    wanted = Wanted(form="spatialdata")
    (path,) = predict_folder(checkpoint, [cohort.stores / f"{SLIDE}.h5"], tmp_path, wanted)
    genes = read_table(path)
    gene = genes.var_names[1]
    found = Viewed(checkpoint, cohort.stores, predictions=tmp_path).slide(SLIDE)
    heat = found.heat(gene, "predicted")
    np.testing.assert_array_equal(heat.values, genes[:, gene].X.ravel())
    assert heat.about["from"] == path.name == f"{SLIDE}.predict.sdata.zarr"


def test_a_pasted_list_is_a_set(client, viewed: Viewed):
    name = viewed.model.database.names[3]
    genes = viewed.model.database.genes_of(name)
    whole, _ = heat(client, SLIDE, name, "measured")
    for text in (", ".join(genes), "\n".join([*genes, "NO_SUCH_GENE"]), ";".join(genes * 2)):
        listed, about = heat(client, SLIDE, text, "measured")
        np.testing.assert_allclose(listed, whole, rtol=1e-4, atol=1e-5)
        assert about["title"].startswith(f"list of {len(genes)} of")
    one, _ = heat(client, SLIDE, ", ".join(genes), "predicted")  # its penalty is its own
    assert np.corrcoef(one, heat(client, SLIDE, name, "predicted")[0])[0, 1] > 0.9


def test_the_likes_of_a_spot_are_the_nearest_in_other_slides(
    client, cohort: Cohort, checkpoint: Path, tmp_path: Path
):
    embed_folder(checkpoint, cohort.stores, tmp_path)
    files = {path.stem: anndata.read_h5ad(path) for path in tmp_path.glob("*.h5ad")}
    for by, key in (("image", "X_hibio_image"), ("omics", "X_hibio_omics")):
        mine = files[SLIDE].obsm[key][5]
        others = {s: a.obsm[key] @ mine for s, a in files.items() if s != SLIDE and key in a.obsm}
        best = sorted(((c, s, i) for s, of in others.items() for i, c in enumerate(of)))[::-1]
        near = client.get(f"/data/slides/{SLIDE}/near/{by}/5.json").json()
        assert [(n["slide"], n["spot"]) for n in near] == [(s, i) for _, s, i in best[: len(near)]]
        np.testing.assert_allclose([n["cosine"] for n in near], [b[0] for b in best[:6]], atol=1e-3)
    spot = client.get(f"/data/slides/{SLIDE}/spots/5.json").json()
    within = client.get(f"/data/slides/{SLIDE}/within/5.json").json()
    region = files[SLIDE].obs["hibio_region_600um"]
    same, drawn = regions(client, SLIDE, "600um")
    assert within["600um"] == same[5]
    assert len(set(zip(same, region, strict=True))) == len(set(same)) == region.nunique()
    with SlideStore(cohort.stores / f"{SLIDE}.h5") as store:
        rings = [
            ring
            for of_one in region_outlines(store.xy_px0, np.array(same)).values()
            for piece in of_one
            for ring in piece
        ]
    ends = [np.hstack(pair) for ring in rings for pair in pairwise(ring)]
    np.testing.assert_allclose(drawn, ends, rtol=1e-6)
    assert spot["barcode"] == files[SLIDE].obs_names[5]
    patch = client.get(f"/data/slides/{SLIDE}/patches/5.jpg")
    assert patch.headers["content-type"] == "image/jpeg"
    assert len(client.get("/data/slides/grid/near/image/0.json").json()) == 6
    assert client.get("/data/slides/grid/near/omics/0.json").status_code == 404


def test_an_area_is_compared_with_the_rest(client, viewed: Viewed):
    inside = np.zeros(120, dtype=bool)
    inside[[3, 4, 50]] = True
    found = client.post(f"/data/slides/{SLIDE}/area", json={"spots": [3, 4, 50, 3]}).json()
    assert (found["kind"], found["spots"]) == ("measured", 3)
    gene = found["genes"]["name"][10]
    values = heat(client, SLIDE, gene, "measured")[0].astype(np.float64)
    assert found["genes"]["inside"][10] == pytest.approx(values[inside].mean(), rel=1e-3)
    assert found["genes"]["outside"][10] == pytest.approx(values[~inside].mean(), rel=1e-3)
    assert found["genes"]["sd"][10] == pytest.approx(values.std(), rel=1e-3)
    assert found["sets"]["name"] == list(viewed.model.database.names)
    grid = client.post("/data/slides/grid/area", json={"spots": [0]}).json()
    assert grid["kind"] == "predicted"
    whole = client.post(f"/data/slides/{SLIDE}/area", json={"spots": list(range(120))}).json()
    assert set(whole["genes"]["outside"]) == {None}


def test_who_asks_for_no_embedding_waits_for_none(
    cohort: Cohort, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    embedding, go_on = threading.Event(), threading.Event()

    def slow(*given):
        embedding.set()
        assert go_on.wait(60)
        return image_embedding(*given)

    monkeypatch.setattr("eval.view.model.image_embedding", slow)
    viewed = Viewed(checkpoint, cohort.stores, only=[SLIDE])
    client, gene = client_of(viewed), str(viewed.model.artifacts.genes[3])
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(heat, client, SLIDE, gene, "predicted")
        try:
            assert embedding.wait(60)
            assert client.get(f"/data/slides/{SLIDE}/tiles/8/0_0.jpg").status_code == 200
            heat(client, SLIDE, gene, "measured")
            (told,) = client.get("/data/doing.json").json()
            assert re.fullmatch(rf"embedding the image of {SLIDE} \(\d+ s\)", told)
        finally:
            go_on.set()
        assert len(asked.result()[0]) == viewed.entries[SLIDE].n_spots
    assert client.get("/data/doing.json").json() == []
    slide = viewed.slide(SLIDE)
    assert slide.spots([7])[0]["keywords"] == slide._keywords(slide.tfidf[0][0].tocsr()[[7]])[0]


def test_embeddings_are_read_where_embed_wrote_them(
    client, cohort: Cohort, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parts = ("near/image/5", "near/omics/5", "within/5")
    paths = [f"/data/slides/{SLIDE}/{part}.json" for part in parts]
    paths += ["/data/slides/grid/near/image/0.json", "/data/slides/grid/within/0.json"]
    made = [client.get(path).json() for path in paths]
    embed_folder(checkpoint, cohort.stores, tmp_path)
    for name in ("image_embedding", "embed_slide"):
        monkeypatch.setattr(f"eval.view.model.{name}", lambda *_: 1 / 0)
    filed = client_of(Viewed(checkpoint, cohort.stores, embeddings=tmp_path, sets="default"))
    for path, answer in zip(paths, made, strict=True):
        assert filed.get(path).json() == answer
    level = f"/data/slides/{SLIDE}/regions/600um"
    assert filed.get(level).content == client.get(level).content
    shutil.copy(tmp_path / f"{SLIDE}.h5ad", tmp_path / "sim002.h5ad")
    other = client_of(Viewed(checkpoint, cohort.stores, embeddings=tmp_path))
    told = other.get("/data/slides/sim002/near/image/0.json").json()["error"]
    assert "another store than is shown" in told
    assert "leave --embeddings out" in told


def test_the_nearest_by_image_do_not_wait_for_the_counts(
    cohort: Cohort, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    embedding, go_on = threading.Event(), threading.Event()

    def slow(*given):
        embedding.set()
        assert go_on.wait(60)
        return embed_slide(*given)

    monkeypatch.setattr("eval.view.model.embed_slide", slow)
    viewed = Viewed(checkpoint, cohort.stores, only=[SLIDE, "sim002"])
    client, near = client_of(viewed), f"/data/slides/{SLIDE}/near"
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.get, f"{near}/omics/3.json")
        try:
            assert embedding.wait(60)
            assert len(client.get(f"{near}/image/3.json").json()) == 6
            assert client.get(f"/data/slides/{SLIDE}/spots/3.json").json()["keywords"]
            told = " ".join(client.get("/data/doing.json").json())
            assert f"embedding the counts of {SLIDE}, 120 spots" in told
        finally:
            go_on.set()
        assert len(asked.result().json()) == 6


def test_how_many_spots_are_read_at_once_changes_no_answer(
    viewed: Viewed, cohort: Cohort, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("eval.view.slide.BLOCK", 50)
    monkeypatch.setattr("eval.view.cohort.MOST", 300)
    other = Viewed(checkpoint, cohort.stores, sets="default")
    for name in (str(viewed.model.artifacts.genes[3]), viewed.model.database.names[1]):
        whole, parts = (one.slide(SLIDE).heat(name, "measured").values for one in (viewed, other))
        np.testing.assert_allclose(parts, whole, atol=1e-6)
    for slide in (SLIDE, "grid"):
        whole, parts = (one.slide(slide).area([3, 40, 9]) for one in (viewed, other))
        for part in ("genes", "sets"):
            for column in ("inside", "outside", "sd"):
                np.testing.assert_allclose(parts[part][column], whole[part][column], atol=2e-3)
    assert other.near(SLIDE, range(9), "omics") == viewed.near(SLIDE, range(9), "omics")


def test_of_large_slides_fewer_are_kept(viewed: Viewed, monkeypatch: pytest.MonkeyPatch):
    for most, kept in ((1000, 3), (130, 2), (0, 1)):
        monkeypatch.setattr("eval.view.cohort.KEPT_SPOTS", most)
        for slide in ("sim003", "grid", "sim001", "sim002"):
            viewed.slide(slide)
        assert list(viewed._seen) == ["grid", "sim001", "sim002"][-kept:]


def test_a_store_that_opens_slowly_holds_up_no_other_slide(
    cohort: Cohort, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    opening, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> SlideStore:
        if path.stem == SLIDE:
            opening.set()
            assert go_on.wait(60)
        return SlideStore(path)

    monkeypatch.setattr("eval.view.slide.SlideStore", slow)
    viewed = Viewed(checkpoint, cohort.stores, only=[SLIDE, "sim002"])
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(viewed.slide, SLIDE) for _ in range(2)]
        try:
            assert opening.wait(60)
            other = pool.submit(viewed.slide, "sim002").result(timeout=10)
            assert other.entry.slide_id == "sim002"
        finally:
            go_on.set()
        assert asked[0].result() is asked[1].result()


def test_sparse_and_dense_values_compare_alike():
    values = np.random.default_rng(0).poisson(0.5, (20, 4)).astype(float)
    inside = np.arange(20) < 7
    found = compared("abcd", [values], inside)
    assert found == compared("abcd", [values[:9], sparse.csc_matrix(values[9:])], inside)
    np.testing.assert_allclose(found["outside"], values[~inside].mean(axis=0), rtol=1e-3)


def test_tiles_are_the_slide_and_say_when_they_are_not(
    cohort: Cohort, viewed: Viewed, client, tmp_path: Path
):
    facts = client.get(f"/data/slides/{SLIDE}/slide.json").json()
    slides = cohort.stores.parent / "cohort" / "slides"
    with Image.open(slides / f"{SLIDE}.tif") as picture:
        assert (facts["tiles"]["width"], facts["tiles"]["height"]) == picture.size
        true = np.asarray(picture.convert("RGB").crop((0, 0, 511, 511)))
    finest = facts["tiles"]["levels"] - 1
    tile = client.get(f"/data/slides/{SLIDE}/tiles/{finest}/0_0.jpg").content
    found = np.asarray(Image.open(io.BytesIO(tile)))
    assert np.abs(found.astype(int) - true).mean() < 8
    assert facts["tiles"]["words"] == ""
    with SlideStore(cohort.stores / f"{SLIDE}.h5") as store:
        small = DeepZoom(store)
        assert "thumbnail" in small.words
        np.testing.assert_allclose(small.size_px0, facts["tiles"]["size_px0"], rtol=0.01)
        Image.new("RGB", (640, 480)).save(tmp_path / f"{SLIDE}.tif")
        with pytest.raises(ConfigError, match=r"640 x 480 pixels.*--slides"):
            DeepZoom(store, tmp_path)


ODD = [
    *("/data/slides/nobody/slide.json", f"/data/slides/{SLIDE}/spots/120.json"),
    *(f"/data/slides/{SLIDE}/spots/{n}.json" for n in ("-1", "1e3", "999999999999", "٣", "NaN")),
    *(f"/data/slides/{SLIDE}/tiles/{n}.jpg" for n in ("99/0_0", "0/9_9", "9" * 300 + "/0_0")),
    *(f"/data/slides/{SLIDE}/regions/{n}" for n in ("5um", "..", "%00")),
    *(f"/data/slides/{SLIDE}/patches/{n}.jpg" for n in ("120", "x")),
    *("/data/slides/..%2f..%2fcheckpoint/slide.json", "/page/..%2f..%2fsetup.cfg", "/page/nothing"),
    *("/../../etc/passwd", "/page/../server.py", "/%2e%2e/%2e%2e/etc/passwd"),
    *("/data/slides/%00/slide.json", "/data/slides/" + "a" * 5000 + "/slide.json", "/nothing"),
    *(f"/data/slides/{SLIDE}/area", "/data/slides//slide.json", "/page/%ff.js"),
]
QUESTIONS = ["", " ", "\0", "A" * 10_000, "NO_SUCH", "../../my.gmt", "os:system", "hallmark"]
QUESTIONS += ["/etc/passwd", "sim001", "<script>alert(1)</script>", "G1 G2", ",,,,", "é" * 50]
BODIES = [b"", b"{", b"[]", b"null", b'{"spots": 1}', b'{"spots": ["1"]}', b'{"spots": [1.5]}']
BODIES += [b'{"spots": [true]}', b'{"spots": []}', b'{"spots": [-1]}', b'{"spots": [1e99]}']
BODIES += [b'{"spots": [' + b"[" * 5000, b'{"spots": [99999999999999999999]}', b"\xff\xfe"]


def test_a_hundred_odd_requests_get_a_sentence(client):
    area = f"/data/slides/{SLIDE}/area"
    answers = [client.get(path) for path in ODD]
    for kind in ("measured", "predicted", "../x", ""):
        answers += [
            client.get(f"/data/slides/{SLIDE}/heat", params={"q": q, "kind": kind})
            for q in QUESTIONS
        ]
    answers += [client.post(area, content=body) for body in BODIES]
    answers += [client.post(path) for path in ODD[:3]]
    answers += [client.get("/", headers={"host": "evil.example"})]
    assert len(answers) > 100
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.url
        assert "Traceback" not in answer.text
        if answer.headers["content-type"] == "application/json":
            assert len(answer.json()["error"]) > 10
    assert client.post(area, content=b"[" * (17 << 20)).status_code == 413
    near = client.get(f"/data/slides/{SLIDE}/heat", params={"q": "BCEL", "kind": "measured"})
    assert re.search("the nearest: '", near.json()["error"]) or "no gene" in near.json()["error"]


def test_the_page_names_no_other_host(client):
    for name in ("", "page/view.js", "page/view.css", "page/openseadragon.min.js"):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert "http" not in answer.text.replace('xmlns="http', "")
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


def test_a_token_is_asked_for_where_one_is_set(viewed: Viewed):
    client = client_of(viewed, token="secret")
    for path in (
        "/",
        "/?token=wrong",
        "/?token=",
        "/data/cohort.json",
        "/?token=s%00",
        "/?token=é",
    ):
        assert client.get(path).status_code == 401, path
    assert client.get("/?token=secret").status_code == 200
    assert client.get("/data/cohort.json").status_code == 200  # by its cookie
    cookie = client_of(viewed, token="secret").get("/?token=secret").headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict"} <= set(cookie.split("; "))


def test_a_port_in_use_says_what_to_do(viewed: Viewed):
    pytest.importorskip("uvicorn", reason="needs hibio[view]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="--port"):
            serve(viewed, port=port)
    with pytest.raises(ConfigError, match="--port"):
        serve(viewed, port=99999)


def scripted(path: Path):
    """The value of a file of the page."""
    text = path.read_text()
    return json.loads(text.removeprefix("hibioFile(").removesuffix(");\n"))


def test_the_exported_page_holds_the_same_answers(
    cohort: Cohort, checkpoint: Path, tmp_path: Path, monkeypatch
):
    viewed = Viewed(checkpoint, cohort.stores, sets="default", only=[SLIDE, "grid"])
    client = client_of(viewed)
    names = [viewed.model.database.names[0], str(viewed.model.artifacts.genes[3])]
    index = export_page(viewed, tmp_path / "page", names)
    assert "<html data-files " in index.read_text()
    data = index.parent / "data"
    assert scripted(data / "cohort.js")["exported"] == names
    found = scripted(data / "slides" / SLIDE / "predicted.js")
    values = np.frombuffer(base64.b64decode(found["values"]), "<f4").reshape(2, -1)
    for row, name in zip(values, names, strict=True):
        np.testing.assert_array_equal(row, heat(client, SLIDE, name, "predicted")[0])
    spot = scripted(data / "slides" / SLIDE / "spots" / "0.js")[7]
    for part in ("near/image", "near/omics", "within"):
        answer = client.get(f"/data/slides/{SLIDE}/{part}/7.json").json()
        assert spot.pop(part.replace("/", "_")) == answer
    assert spot == client.get(f"/data/slides/{SLIDE}/spots/7.json").json()
    assert [one["id"] for one in scripted(data / "cohort.js")["slides"]] == [SLIDE, "grid"]
    tile = f"slides/{SLIDE}/tiles/8/0_0.jpg"
    assert (data / tile).read_bytes() == client.get(f"/data/{tile}").content
    missing = scripted(data / "slides" / "grid" / "measured.js")["missing"]
    assert all("has no counts" in missing[name] for name in names)
    with monkeypatch.context() as bankless:  # genes are there without gene sets
        bankless.setattr(viewed.model, "bank", None)
        bankless.setitem(viewed.model.missing, "gene sets", "no bank")
        pasted = ", ".join(viewed.model.artifacts.genes[:3])
        few = _heats(viewed.slide(SLIDE), [pasted, names[1]], "predicted")
    assert (few["names"], few["missing"]) == (names[1:], {pasted: "no bank"})
    assert few["about"][names[1]] == found["about"][names[1]]
    assert Image.open(data / "slides" / SLIDE / "spots" / "0.jpg").size == (32 * 64, 4 * 64)
    with monkeypatch.context() as stopped:
        stopped.setattr("eval.view.export._slide_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_page(viewed, tmp_path / "page", names[:1])
    assert not index.exists()  # a page is there when all of it is
    export_page(viewed, tmp_path / "page", names[:1])  # its own folder is written anew
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="was not made by this command"):
        export_page(viewed, tmp_path / "other", names)
    with pytest.raises(UnknownName, match="nearest"):
        export_page(viewed, tmp_path / "new", [names[1] + "x"])
    assert not (tmp_path / "new").exists()


def test_without_openseadragon_or_a_folder_the_command_says_so(
    vendor: Path, cohort: Cohort, checkpoint: Path, tmp_path: Path, capsys, monkeypatch
):
    line = ["view", "--checkpoint", str(checkpoint), "--data", str(cohort.images)]
    monkeypatch.setattr(page, "VENDOR", tmp_path / "none")
    assert main([*line, "--export", str(tmp_path / "out")]) == 1
    assert "make view-assets" in capsys.readouterr().err
    for wrong, told in (("--slides",) * 2, ("--embeddings",) * 2, ("--only", "no slide")):
        assert main([*line, wrong, str(tmp_path / "none")]) == 1
        assert told in capsys.readouterr().err
