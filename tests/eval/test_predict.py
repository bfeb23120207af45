"""`hibio predict`: the read-out against slow versions, its intervals, files from slide images."""

import dataclasses
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge

from eval.embed import embed_to_anndata, load_checkpoint
from eval.predict import Wanted, fit_look, fit_readout, predict_folder, readout_of
from eval.predict.fit import (
    TrainingRows,
    gene_set_readout,
    half_widths,
    label_probes,
    over_units,
)
from eval.predict.labels import calibration_error, fit_labels
from eval.predict.run import _given
from hibio import keys
from hibio.checkpoint import add_checksum
from hibio.cli import main
from hibio.config.files import ConfigError
from hibio.data import stored_features
from hibio.data.stored_features import StoredFeatures, standardise_columns
from hibio.model import HiBio
from hibio.readout import (
    LabelProbe,
    Look,
    Readout,
    add_labels,
    read_readout,
    verdict,
    write_readout,
)
from pathways.errors import PathwayError
from preprocessing.hdf5 import write_h5ad
from preprocessing.store import SlideStore
from tests.eval.image_cohort import Cohort, picture


def spots(n_patients: int, seed: int, n: int = 60, noise: float = 1.0):
    """Inputs, a target of them, and names of patients; a patient shifts its targets by 0.3 sd."""
    rng = np.random.default_rng(seed)
    patient = np.repeat([f"p{i}" for i in range(n_patients)], n)
    x = rng.standard_normal((n_patients * n, 6))
    for one in np.unique(patient):
        x[patient == one] -= x[patient == one].mean(axis=0)
        x[patient == one] /= x[patient == one].std(axis=0)
    shift = np.repeat(0.3 * rng.standard_normal(n_patients), n)
    weights = np.random.default_rng(0).standard_normal((6, 3)) * [[1.0, 0.5, 0.0]]
    y = x @ weights + noise * rng.standard_normal((len(x), 3)) + shift[:, None]
    return x, y, patient


def rows_of(x, patient, slide=None) -> TrainingRows:
    xy = np.random.default_rng(0).uniform(0, 1000, size=(len(x), 2))
    return TrainingRows.of(x, x, patient, patient if slide is None else slide, xy)


@pytest.fixture(scope="module")
def fitted() -> Readout:
    x, y, patient = spots(12, 1)
    return fit_readout(rows_of(x, patient), y, ["a", "b", "noise"])


def test_a_spot_of_a_new_patient_lies_inside_as_often_as_said(fitted: Readout):
    x, y, _ = spots(60, 2)
    predicted = x @ fitted.weights * fitted.spread + fitted.mean
    inside = (np.abs(y - predicted) <= fitted.width).mean(axis=0)
    np.testing.assert_allclose(inside, fitted.coverage, atol=0.02)
    np.testing.assert_allclose(fitted.covered, fitted.coverage, atol=0.02)


def test_the_reliability_is_that_of_new_patients_and_its_interval_says_so(fitted: Readout):
    x, y, patient = spots(60, 2)
    predicted = x @ fitted.weights
    new = [
        np.mean(
            [
                pearsonr(predicted[own, t], y[own, t])[0]
                for own in (patient[:, None] == np.unique(patient)).T
            ]
        )
        for t in range(3)
    ]
    assert ((fitted.low < new) & (new < fitted.high)).all()
    assert fitted.reliability[0] > fitted.reliability[1] > 0.2 > abs(fitted.reliability[2])
    assert (fitted.unit, fitted.n_units.tolist()) == ("patients", [12, 12, 12])
    var = fitted.var(0.2)
    assert var["trusted"].tolist() == [True, True, False]
    assert var["note"].tolist() == ["", "", "reliability below 0.2"]


def test_the_weights_are_those_of_scikit_learn():
    x, y, patient = spots(4, 3)
    readout = fit_readout(rows_of(x, patient), y, ["a", "b", "c"])
    z = np.concatenate(
        [
            (y[own] - y[own].mean(0)) / y[own].std(0)
            for own in (patient == f"p{i}" for i in range(4))
        ]
    )
    scale = np.abs(readout.weights).max()
    errors = [
        np.abs(Ridge(alpha=a * len(x)).fit(x, z).coef_.T - readout.weights).max() / scale
        for a in 10.0 ** np.arange(-4, 5.01, 0.5)
    ]
    assert min(errors) < 1e-5  # of one of the penalties that are tried


def test_a_gene_that_never_varies_is_not_predictable_and_one_patient_is_said():
    x, y, patient = spots(1, 4)
    y[:, 1] = 2.0
    one = fit_readout(rows_of(x, patient), y, ["a", "flat", "c"])
    assert one.unit == "blocks"
    assert "nothing is known of other slides" in one.words
    assert "not predictable" in one.var(0.1)["note"]["flat"]
    np.testing.assert_allclose(one.values(x)[:, 1], 2.0)
    two = fit_readout(rows_of(x, patient, np.repeat(["s", "t"], 30)), y, ["a", "flat", "c"])
    assert two.unit == "slides"
    assert "cannot be known" in two.words
    assert np.isnan(two.low).all()
    assert not two.var(-1.0)["trusted"].any()
    assert two.var(-1.0)["note"]["a"].endswith("an order only")


def test_half_widths_by_hand():
    residual = np.array([[1.0], [2.0], [3.0], [10.0]])
    groups, fold = np.array(["a", "a", "a", "b"]), np.array([0, 0, 0, 1])
    width, covered = half_widths(residual, groups, fold, 0.5)
    assert width.tolist() == [3.0]  # a third of one half each, then the other half
    assert covered.tolist() == [0.5]  # a lies inside b's 10, b not inside a's 2


def test_familiarity_by_hand():
    """As far as none, two and all of three held-out spots; one more is counted, itself."""
    look = Look(np.zeros(1), np.ones(1), np.eye(1), np.zeros((1, 1)), np.array([1.0, 2.0, 3.0]))
    assert look.familiarity(np.array([[5.0], [2.0], [0.0]])).tolist() == [0.25, 0.75, 1.0]


def test_a_slide_of_another_look_is_foreign():
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c"], 100)
    look = fit_look(rng.standard_normal((300, 5)), groups)
    like = look.familiarity(rng.standard_normal((400, 5)))
    assert 0.02 < (like < 0.05).mean() < 0.1
    assert verdict(like) == ""
    apart = 3.0 * rng.standard_normal((8, 5))  # patients that differ, and one more of the kind
    rows = [place + rng.standard_normal((60, 5)) for place in apart]
    differing = fit_look(np.concatenate(rows[1:]), np.repeat(list("bcdefgh"), 60))
    assert verdict(differing.familiarity(rows[0])) == ""
    other = look.familiarity(rng.standard_normal((50, 5)) + 6.0)
    assert verdict(other).startswith("100% of the patches look like nothing")


def test_the_file_keeps_all_and_unknown_genes_name_the_nearest(fitted: Readout, tmp_path: Path):
    look = fit_look(np.random.default_rng(0).standard_normal((90, 4)), np.repeat(["a", "b"], 45))
    whole = dataclasses.replace(fitted, source={"patch_px": 32}, look=look)
    write_readout(tmp_path / "readout.h5", whole)
    again = read_readout(tmp_path / "readout.h5")
    for name in ("weights", "reliability", "width", "low"):
        np.testing.assert_allclose(getattr(again, name), getattr(fitted, name), rtol=1e-6)
    assert again.of(["noise", "a", "a"]).names.tolist() == ["noise", "a"]
    with pytest.raises(ConfigError, match=r"'nois' \(nearest: 'noise'\)"):
        again.of(["a", "nois"])
    for name, change, told in (
        ("look/scale", lambda v: v * np.inf, "not finite"),
        ("look/reference", lambda v: v[:, :-1], "look/reference has shape"),
        ("look/held_out", lambda v: v[:, None], "look/held_out has shape"),
        ("weights", lambda v: v * np.nan, "not finite"),
    ):
        write_readout(tmp_path / "other.h5", again)
        with h5py.File(tmp_path / "other.h5", "r+") as file:
            values = change(file[name][:])
            del file[name]
            file[name] = values
        with pytest.raises(ConfigError, match=told):
            read_readout(tmp_path / "other.h5")
    write_readout(tmp_path / "other.h5", dataclasses.replace(again, source={"patch_px": 0}))
    with pytest.raises(ConfigError, match=r"settings are .*patch_px.: 0"):
        read_readout(tmp_path / "other.h5")
    (tmp_path / "readout.h5").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="remove the file"):
        read_readout(tmp_path / "readout.h5")


def test_features_that_stay_in_their_store_are_those_in_memory(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stored_features, "FEATURE_ROWS", 17)
    with SlideStore(cohort.images / "bare.h5") as store:
        kept = StoredFeatures.of(store, "handcrafted")
        values = store.features("handcrafted")
    whole = standardise_columns(values)
    spots = np.random.default_rng(0).permutation(len(values))[:30]
    assert kept.shape == whole.shape
    np.testing.assert_allclose(kept[spots], whole[spots], atol=1e-5)
    np.testing.assert_allclose(kept[10:40], whole[10:40], atol=1e-5)


@pytest.fixture(scope="module")
def checkpoint(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with its read-out, without touching that of the other tests."""
    path = tmp_path_factory.mktemp("predict") / "checkpoint"
    shutil.copytree(cohort.checkpoint, path)
    readout_of(load_checkpoint(path))
    return path


def test_a_slide_image_is_enough_and_what_is_whole_is_kept(
    cohort: Cohort, checkpoint: Path, tmp_path: Path
):
    slide = tmp_path / f"new{picture(cohort).suffix}"
    slide.symlink_to(picture(cohort))
    wanted = Wanted(gene_sets="default")
    (first,) = predict_folder(checkpoint, [slide], tmp_path, wanted)
    adata = anndata.read_h5ad(first)
    with SlideStore(tmp_path / "stores" / f"{slide.stem}.h5") as store:
        np.testing.assert_array_equal(adata.obsm["spatial"], store.xy_px0)
        features = store.features("handcrafted")
        shape = store.thumbnail.shape
    placed = adata.uns["spatial"][slide.stem]
    assert placed["images"]["hires"].shape == shape
    assert placed["scalefactors"]["spot_diameter_fullres"] > 0
    genes = (adata.var["feature_type"] == "gene").to_numpy()
    assert 0 < genes.sum() < len(genes)
    direct = HiBio.from_checkpoint(checkpoint).predict(features)
    np.testing.assert_allclose(adata.X[:, genes], direct.X, atol=2e-3)
    np.testing.assert_allclose(adata.obs["familiarity"], direct.obs["familiarity"], atol=1e-6)
    assert (adata.layers["lower"] < adata.X).all()
    assert (adata.layers["upper"] > adata.X).all()
    state = first.stat().st_mtime_ns
    assert predict_folder(checkpoint, [slide], tmp_path, wanted) == [first]
    assert first.stat().st_mtime_ns == state
    predict_folder(checkpoint, [slide], tmp_path, Wanted(genes=(adata.var_names[0],)))
    assert anndata.read_h5ad(first).shape == (len(adata), 1)
    other = tmp_path / "elsewhere" / slide.name
    other.parent.mkdir()
    Image.open(slide).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    with pytest.raises(ConfigError, match="was made of another picture; give another --out"):
        predict_folder(checkpoint, [other], tmp_path, Wanted(mpp=1.0))
    told = pytest.warns(UserWarning, match="new.h5: mpp: its sources differ")
    with told, SlideStore(tmp_path / "stores" / f"{slide.stem}.h5") as store:
        um = 2 * store.mpp
        predict_folder(checkpoint, [slide], tmp_path / "doubled", Wanted(mpp=um))


def test_anndata_and_one_gene_in_python(checkpoint: Path, cohort: Cohort):
    model = HiBio.from_checkpoint(checkpoint)
    gene = str(model.artifacts.genes[3])
    with SlideStore(cohort.images / "bare.h5") as store:
        features = store.features("handcrafted")
    given = anndata.AnnData(np.zeros((len(features), 0)), obsm={"handcrafted": features})
    given.obs["mine"] = 1
    found = model.predict(given, genes=[gene])
    np.testing.assert_allclose(found.X, model.predict(features).X[:, [3]], rtol=1e-5)
    assert {"mine", "familiarity"} <= set(found.obs)
    with pytest.warns(UserWarning, match="features of one spot, .* give all spots of its slide"):
        model.predict(features[:1])
    features[3, 5] = np.nan  # would make every spot NaN
    for bad, told in (
        (features, "features of 1 of"),
        (features[:0], "expected the spots of one slide"),
        (features[0], "expected the spots of one slide"),
        (features[0].tolist(), "expected the spots of one slide"),
        (np.zeros((2, 8, 8, 3)), r"the image is float64 \(2, 8, 8, 3\)"),
    ):
        with pytest.raises(ConfigError, match=told):
            model.encode_image(bad)
        with pytest.raises(ConfigError, match=told):
            model.predict(bad)
    with pytest.raises(ConfigError, match=r"adata.obsm has no 'handcrafted' \(it has: nothing\)"):
        model.predict(anndata.AnnData(np.ones((3, 1))))


def test_a_gene_set_is_read_out_as_a_gene_is(checkpoint: Path):
    loaded = load_checkpoint(checkpoint)
    readout = readout_of(loaded)
    sets = gene_set_readout(loaded, readout, "default")
    joined = readout.beside(sets)
    x = np.random.default_rng(0).standard_normal((5, len(readout.weights)))
    embedding = x[:, -len(sets.weights) :]
    np.testing.assert_allclose(
        joined.values(x)[:, -len(sets.names) :], sets.values(embedding), rtol=1e-5
    )
    named = dataclasses.replace(sets, names=readout.names[: len(sets.names)])
    with pytest.raises(ConfigError, match="has the name of a gene that is predicted beside it"):
        readout.beside(named)
    with pytest.raises(ConfigError, match="of different spots"):
        gene_set_readout(
            loaded, dataclasses.replace(readout, untrained=np.zeros((1, 1))), "default"
        )


def test_bad_input_is_told_and_nothing_is_written(
    cohort: Cohort, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (64, 64), "white").save(pictures / name)
    for options, words in (
        (["--data", pictures / "a.png"], "Three ways out: --mpp UM"),
        (["--data", pictures, "--mpp", "1"], "two slides of the name 'a'"),
        (["--data", cohort.images, "--genes", "NO_SUCH"], "does not know the gene(s) 'NO_SUCH'"),
        (["--data", tmp_path], "neither stores (*.h5) nor slide images"),
        (["--data", tmp_path / "none.svs"], "none.svs is not there; --data takes stores"),
        (["--data", cohort.images, "--gene-sets", "no_such"], "no_such"),
        (["--data", pictures / "a.png", "--mpp", "1"], "could not be read: a: "),
        (["--data", cohort.images, "--mpp", "1"], "--mpp is for slide images, and"),
        (["--data", cohort.images, "--weights", "x.pt"], "--weights is for slide images"),
        (["--data", pictures / "a.png", "--weights", "x.pt"], "--weights is for an encoder, and"),
    ):
        out = tmp_path / "out"
        code = main(
            ["predict", "--checkpoint", str(checkpoint), "--out", str(out), *map(str, options)]
        )
        assert code == 1
        assert words in capsys.readouterr().err
        assert not list(out.glob("*.h5ad"))
    trained = sorted(load_checkpoint(checkpoint).model.artifacts.train_slides)[0]
    shutil.copyfile(pictures / "a.png", tmp_path / f"{trained}.png")
    asked = ["predict", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main([*asked, "--data", str(tmp_path / f"{trained}.png"), "--mpp", "1"]) == 1
    told = capsys.readouterr().err
    assert f"would be the slide '{trained}', a name that" in told
    assert f"--data STORES/{trained}.h5" in told
    bare = tmp_path / "bare_checkpoint"
    shutil.copytree(cohort.checkpoint, bare)
    (bare / "readout.h5").unlink(missing_ok=True)
    text = (bare / "config.yaml").read_text().replace(str(cohort.stores), str(tmp_path / "gone"))
    (bare / "config.yaml").write_text(text)
    (bare / "checksums.json").unlink()
    with (
        pytest.warns(UserWarning, match="damage cannot be told"),
        pytest.raises(ConfigError, match=r"no readout[.]h5, which predictions need"),
    ):
        predict_folder(bare, [cohort.images], tmp_path / "out")


def labelled(n_patients: int, seed: int, n: int = 60):
    """Three classes by a known softmax of the inputs, whose offset differs between patients."""
    x, _, patient = spots(n_patients, seed, n)
    rng = np.random.default_rng([seed, 1])
    shift = np.repeat(0.3 * rng.standard_normal((n_patients, 3)), n, axis=0)
    logits = x @ (2.0 * np.random.default_rng(9).standard_normal((6, 3))) + shift
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    chosen = (rng.random((len(x), 1)) > share.cumsum(axis=1)).sum(axis=1)
    return x, np.array(["a", "b", "c"])[np.minimum(chosen, 2)], patient


def test_a_label_of_a_new_patient_is_right_as_often_as_said():
    x, y, patient = labelled(12, 1)
    frame = pd.DataFrame({"tissue": y, "depth": 1.0, "whole": patient}).astype({"depth": float})
    frame[["tissue", "whole"]] = frame[["tissue", "whole"]].astype(object)
    rows = rows_of(x, patient)
    (probe,) = label_probes(rows, frame)
    assert probe.name == "tissue"  # no measurement, and no label of a whole slide
    new, truth, _ = labelled(60, 2)
    share = probe.probabilities(new)
    np.testing.assert_allclose(share.sum(axis=1), 1.0, rtol=1e-5)
    assert calibration_error(share, truth, probe.classes) < 0.03
    right = probe.classes[share.argmax(axis=1)]
    found = np.mean([(right[truth == one] == one).mean() for one in probe.classes])
    assert probe.low < found < probe.high
    assert (probe.n_units, probe.unit, probe.told["note"]) == (12, "patients", "")
    sharper = dataclasses.replace(probe, weights=3.0 * probe.weights, bias=3.0 * probe.bias)
    assert calibration_error(sharper.probabilities(new), truth, probe.classes) > 0.05


def test_calibration_error_by_hand():
    share = np.array([[0.75, 0.25], [0.75, 0.25], [0.05, 0.95]])
    y, classes = np.array(["a", "b", "b"]), np.array(["a", "b"])
    assert calibration_error(share, y, classes) == pytest.approx((2 * 0.25 + 0.05) / 3)


def test_labels_few_classes_and_one_patient():
    x, y, patient = labelled(3, 3)
    y[(patient == "p0") & (y == "c")] = "a"  # a class that a patient lacks
    y[::7] = ""
    arguments = (x, x), patient, patient
    probe = fit_labels("t", y, *arguments, unit="patients", interval=over_units)
    assert np.isfinite(probe.weights).all()
    two = np.where(y == "c", "", y)
    assert fit_labels("t", two, *arguments, unit="patients", interval=over_units).weights.shape == (
        6,
        2,
    )
    one = fit_labels(
        "t", np.where(patient == "p1", y, ""), *arguments, unit="patients", interval=over_units
    )
    assert np.isnan(one.accuracy)
    assert one.temperature == 1.0
    assert one.told["note"] == "fewer than 3 patients were held out"


def test_labels_and_classes_of_odd_names_keep_columns_of_their_own(tmp_path: Path):
    told = {"temperature": 1.0, "accuracy": 0.5, "low": 0.0, "high": 1.0, "n_units": 3}
    classes, weights = np.array(["DCIS/invasive", "stroma"]), np.eye(2)
    probes = [
        LabelProbe(name, classes, weights * sign, np.zeros(2), error=0.0, unit="patients", **told)
        for name, sign in (("a b", 1.0), ("A_b", -1.0))
    ]
    adata = anndata.AnnData(np.zeros((2, 1), np.float32), uns={"hibio": {}})
    adata.obs_names = ["s0", "s1"]
    x = np.array([[3.0, 0.0], [0.0, 3.0]])
    add_labels(adata, SimpleNamespace(labels=probes), [x[:1], x[1:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # what of a name anndata will not write
        write_h5ad(tmp_path / "a.h5ad", adata)
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert found.obs["predicted_a_b"].tolist() == classes.tolist()
    assert found.obs["predicted_A_b_"].tolist() == classes[::-1].tolist()
    assert list(found.obsm["probability_a_b"]) == ["DCIS_invasive", "stroma"]
    assert found.uns["hibio"]["labels"]["A_b_"]["label"] == "A_b"
    models = pytest.importorskip("spatialdata.models", reason="spatialdata is not installed")
    assert models.TableModel.parse(found).n_obs == 2


def test_labels_and_regions_are_written_and_labels_of_a_checkpoint_without_refused(
    cohort: Cohort, checkpoint: Path, tmp_path: Path
):
    (path,) = predict_folder(
        checkpoint,
        [cohort.images / "bare.h5"],
        tmp_path / "a",
        Wanted(labels=True, regions=True),
    )
    adata = anndata.read_h5ad(path)
    embedded = embed_to_anndata(load_checkpoint(checkpoint), cohort.images / "bare.h5").obs
    levels = [keys.OBS_REGION + "300um", keys.OBS_REGION + "600um"]
    assert set(levels) <= set(adata.obs)
    for level in levels:
        assert adata.obs[level].tolist() == embedded[level].tolist()
        assert adata.obs[level].nunique() > 1
    name = min(adata.uns["hibio"]["labels"])
    share = adata.obsm[f"probability_{name}"]
    np.testing.assert_allclose(share.sum(axis=1), 1.0, rtol=1e-5)
    assert adata.obs[f"predicted_{name}"].tolist() == share.idxmax(axis=1).tolist()
    told = adata.uns["hibio"]["labels"][name]
    assert 0 < told["accuracy"] <= 1
    with SlideStore(cohort.images / "bare.h5") as store:
        direct = HiBio.from_checkpoint(checkpoint).predict(store.features("handcrafted"))
    np.testing.assert_allclose(direct.obsm[f"probability_{name}"], share, atol=1e-3)
    older = tmp_path / "older"
    shutil.copytree(checkpoint, older)
    readout = read_readout(older / "readout.h5")
    write_readout(older / "readout.h5", dataclasses.replace(readout, labels=()))
    add_checksum(older / "readout.h5")
    with pytest.raises(ConfigError, match="predicts no labels: none of its training slides"):
        predict_folder(older, [cohort.images], tmp_path / "b", Wanted(labels=True))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"genes": (",",)}, "',' names no gene"),
        ({"min_reliability": float("nan")}, "--min-reliability is nan, expected -1 to 1"),
        ({"min_reliability": 5.0}, "--min-reliability is 5.0"),
        ({"mpp": 0.0}, "--mpp is 0.0, expected micrometres a pixel from"),
        ({"mpp": float("nan")}, "--mpp is nan"),
        ({"mpp": float("inf")}, "--mpp is inf"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(asked: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        _ = Wanted(**asked).names


def test_a_folder_gives_its_stores_or_else_pictures_of_every_kind(tmp_path: Path, capsys):
    (tmp_path / "d.zarr").mkdir()
    for name in ("a.j2k", "b.czi", ".c.png", "notes.txt", "d.zarr/.zgroup"):
        (tmp_path / name).touch()
    assert [path.name for path in _given([tmp_path])[1]] == ["a.j2k", "b.czi", "d.zarr"]
    (tmp_path / "s.h5").touch()
    assert len(_given([tmp_path])[1]) == 0
    assert "its 1 stores are read, not its 3" in capsys.readouterr().out


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_genes_is_a_file_of_any_usual_kind(tmp_path: Path, codec: str):
    path = tmp_path / "genes.csv"
    path.write_text("ERBB2,CD74\r\n\r\nPCP4\n", encoding=codec)
    assert Wanted(genes=(str(path),)).names == ("ERBB2", "CD74", "PCP4")
    assert Wanted(genes=("ERBB2, CD74", "Pan CK")).names == ("ERBB2", "CD74", "Pan CK")
    path.write_bytes(b"\x89PNG\x80")
    with pytest.raises(PathwayError, match="is not UTF-8; expected a text file"):
        _ = Wanted(genes=(str(path),)).names
