"""The simulated cohort: files that other tools open, planted facts, determinism, errors."""

import json
from pathlib import Path

import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
from scipy import sparse, stats

from preprocessing.errors import DataError
from preprocessing.simulate import SimulateConfig, simulate_cohort

PROGRAMMES = {f"P{p:02d}": [f"GENE{(9 * p + g) % 260}" for g in range(12)] for p in range(26)}
CONFIG = SimulateConfig(n_slides=6, n_patients=3, n_spots=130, n_genes=400, seed=5)


class Cohort:
    """A written cohort, read back with other libraries than those that the package uses."""

    def __init__(self, manifest: Path) -> None:
        self.root = manifest.parent
        self.rows = pd.read_csv(manifest)
        self.truth = json.loads((self.root / "truth.json").read_text())

    def matrix(self, slide: str) -> h5py.File:
        return h5py.File(self.root / slide / "filtered_feature_bc_matrix.h5")

    def counts(self, slide: str) -> tuple[np.ndarray, np.ndarray]:
        with self.matrix(slide) as file:
            part = file["matrix"]
            arrays = (part["data"][:], part["indices"][:], part["indptr"][:])
            counts = sparse.csc_matrix(arrays, shape=part["shape"][:]).T.toarray()
            return counts, part["features/name"][:].astype(str)

    def labels(self, slide: str) -> pd.DataFrame:
        return pd.read_csv(self.root / slide / "labels.csv")

    def positions(self, slide: str) -> pd.DataFrame:
        return pd.read_csv(self.root / slide / "spatial" / "tissue_positions.csv")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Cohort:
    return Cohort(simulate_cohort(tmp_path_factory.mktemp("cohort"), PROGRAMMES, CONFIG))


def test_openslide_opens_pyramids_with_mpp(cohort):
    assert len(cohort.rows) == 6
    for image in cohort.rows.image:
        with openslide.OpenSlide(cohort.root / image) as slide:
            assert slide.level_count >= 2
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(CONFIG.mpp)
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(CONFIG.mpp)
            assert slide.level_downsamples[1] == pytest.approx(2, abs=0.01)
    with tifffile.TiffFile(cohort.root / cohort.rows.image[0]) as file:
        assert [page.is_tiled for page in file.pages] == [True] * len(file.pages)
        assert [page.is_reduced for page in file.pages] == [False] + [True] * (len(file.pages) - 1)


def test_mpp_scales_the_picture_and_positions(tmp_path, cohort):
    config = SimulateConfig(n_slides=1, n_patients=1, n_spots=130, n_genes=400, seed=5, mpp=2.0)
    coarse = Cohort(simulate_cohort(tmp_path, PROGRAMMES, config))
    wide = openslide.OpenSlide(cohort.root / cohort.rows.image[0]).dimensions
    small = openslide.OpenSlide(coarse.root / coarse.rows.image[0]).dimensions
    assert small == (wide[0] // 2, wide[1] // 2)
    columns = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    np.testing.assert_allclose(
        coarse.positions("sim001")[columns] * 2, cohort.positions("sim001")[columns], atol=2e-3
    )


def test_matrix_has_the_10x_v3_layout(cohort):
    with cohort.matrix("sim001") as file:
        matrix = file["matrix"]
        n_genes, n_spots = matrix["shape"][:]
        assert (n_genes, n_spots) == (400, 130)
        assert len(matrix["indptr"]) == n_spots + 1
        assert np.issubdtype(matrix["data"].dtype, np.integer)
        assert matrix["indices"][:].max() < n_genes
        for column in ("id", "name", "feature_type", "genome"):
            assert len(matrix["features"][column]) == n_genes
        assert set(matrix["features/feature_type"][:]) == {b"Gene Expression"}
        ids, barcodes = matrix["features/id"][:].astype(str), matrix["barcodes"][:].astype(str)
    assert ids[0] == "ENSGSIM00000001"
    assert len(set(ids)) == n_genes
    assert len(set(barcodes)) == n_spots
    assert pd.Series(barcodes).str.fullmatch("[ACGT]{16}-1").all()
    in_tissue = cohort.positions("sim001").query("in_tissue == 1")
    assert list(in_tissue.barcode) == list(barcodes) == list(cohort.labels("sim001").barcode)


def test_lattice_is_hexagonal_with_100_um_pitch(cohort):
    positions = cohort.positions("sim002")
    assert not positions.duplicated(["array_row", "array_col"]).any()
    assert not positions.barcode.duplicated().any()
    assert ((positions.array_row + positions.array_col) % 2 == 0).all()
    assert set(positions.in_tissue) == {0, 1}
    x, y = positions.pxl_col_in_fullres.to_numpy(), positions.pxl_row_in_fullres.to_numpy()
    apart = np.hypot(x[:, None] - x, y[:, None] - y)
    touching = (apart > 1) & (apart < 101)
    np.testing.assert_allclose(apart[touching], 100, atol=0.01)
    assert touching.sum(axis=1).max() == 6


def test_spots_lie_on_tissue_and_glass_is_white(cohort):
    for row in cohort.rows.itertuples():
        picture = tifffile.imread(cohort.root / row.image, key=0)
        spots = cohort.positions(row.slide_id).query("in_tissue == 1")
        at = spots.pxl_row_in_fullres.astype(int), spots.pxl_col_in_fullres.astype(int)
        colour = _box_mean(picture, *at, half=40)
        saturation = colour.max(axis=1) - colour.min(axis=1)
        assert (saturation > 15).mean() > 0.97
        border = np.concatenate([picture[:20].reshape(-1, 3), picture[:, :20].reshape(-1, 3)])
        assert border.mean() > 235


def _box_mean(picture, rows, columns, half):
    return np.array(
        [
            picture[max(0, r - half) : r + half, max(0, c - half) : c + half].mean(axis=(0, 1))
            for r, c in zip(rows, columns, strict=True)
        ]
    )


def test_fine_domains_nest_in_coarse_and_are_contiguous(cohort):
    seen = set()
    for slide in cohort.rows.slide_id:
        labels, spots = cohort.labels(slide), cohort.positions(slide).query("in_tissue == 1")
        assert (labels.domain_fine.str[:-1] == labels.domain_coarse).all()
        seen |= set(labels.domain_fine)
        x, y = spots.pxl_col_in_fullres.to_numpy(), spots.pxl_row_in_fullres.to_numpy()
        apart = np.hypot(x[:, None] - x, y[:, None] - y)
        touching = (apart > 1) & (apart < 101)
        for column, at_least in (("domain_coarse", 0.65), ("domain_fine", 0.5)):
            same = labels[column].to_numpy()[:, None] == labels[column].to_numpy()
            assert same[touching].mean() > at_least > 1.3 * same.mean()
    assert seen == set(cohort.truth["domains"])
    assert {d["coarse"] for d in cohort.truth["domains"].values()} == {"D1", "D2", "D3", "D4", "D5"}


def test_planted_programmes_are_many_and_every_fine_domain_raises_several(cohort):
    truth = cohort.truth
    assert len(truth["programmes"]) == 24 >= 20
    for name, genes in truth["programmes"].items():
        assert set(genes) <= set(PROGRAMMES[name])
        assert len(genes) + truth["genes_left_out"][name] == len(set(PROGRAMMES[name]))
    assert min(len(d["raised_programmes"]) for d in truth["domains"].values()) >= 2
    assert set(truth["image_visible_programmes"]) <= set(truth["programmes"])
    assert len(truth["image_visible_programmes"]) >= 20
    labels = pd.concat([cohort.labels(slide) for slide in cohort.rows.slide_id])
    mean = labels.filter(like="activity:").groupby(labels.domain_fine).mean()
    planted = pd.DataFrame({k: d["mean_activity"] for k, d in truth["domains"].items()}).T
    planted = planted.loc[mean.index]
    assert np.corrcoef(mean.to_numpy().ravel(), planted.to_numpy().ravel())[0, 1] > 0.95


def test_programme_genes_follow_the_planted_activity(cohort):
    for slide in ("sim001", "sim006"):
        counts, names = cohort.counts(slide)
        shares = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
        labels = cohort.labels(slide)
        r = [
            np.corrcoef(shares[:, np.isin(names, genes)].mean(axis=1), labels[f"activity:{p}"])[
                0, 1
            ]
            for p, genes in cohort.truth["programmes"].items()
        ]
        assert np.median(r) > 0.7
        assert min(r) > 0.4


def test_housekeeping_genes_are_detected_most(cohort):
    detected = {"housekeeping": [], "fillers": [], "programme": []}
    for slide in cohort.rows.slide_id:
        counts, names = cohort.counts(slide)
        rate = (counts > 0).mean(axis=0)
        housekeeping = np.isin(names, cohort.truth["housekeeping"])
        fillers = np.isin(names, cohort.truth["fillers"])
        assert housekeeping.sum() == CONFIG.n_housekeeping
        detected["housekeeping"].append(rate[housekeeping])
        detected["fillers"].append(rate[fillers])
        detected["programme"].append(rate[~housekeeping & ~fillers])
    mean = {kind: np.mean(rates) for kind, rates in detected.items()}
    assert mean["housekeeping"] > np.percentile(np.concatenate(detected["programme"]), 90)
    assert mean["housekeeping"] > 0.98 > mean["programme"] > mean["fillers"] + 0.2


def test_depth_varies_between_slides_as_recorded(cohort):
    median = [np.median(cohort.counts(slide)[0].sum(axis=1)) for slide in cohort.rows.slide_id]
    shift = [cohort.truth["slides"][slide]["log_depth_shift"] for slide in cohort.rows.slide_id]
    assert np.std(np.log(median)) > 0.1
    assert stats.pearsonr(np.log(median), shift)[0] > 0.95


def test_slides_of_a_patient_share_the_patient_effect(cohort):
    profile = {}
    for row in cohort.rows.itertuples():
        counts, names = cohort.counts(row.slide_id)
        chosen = np.isin(names, cohort.truth["housekeeping"])
        share = np.log(counts[:, chosen].sum(axis=0))
        profile[row.slide_id] = share - share.mean()
    r = pd.DataFrame(profile)
    r = r.sub(r.mean(axis=1), axis=0).corr().to_numpy()
    patient = cohort.rows.patient_id.to_numpy()
    same = (patient[:, None] == patient) & ~np.eye(len(patient), dtype=bool)
    assert patient.tolist() == ["patient01"] * 2 + ["patient02"] * 2 + ["patient03"] * 2
    assert r[same].min() > 0.5 > 0.2 > r[patient[:, None] != patient].max()


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    def files(folder: str, seed: int) -> dict[str, bytes]:
        config = SimulateConfig(n_slides=2, n_patients=2, n_spots=40, n_genes=400, seed=seed)
        manifest = simulate_cohort(tmp_path / folder, PROGRAMMES, config)
        paths = sorted(p for p in manifest.parent.rglob("*") if p.is_file())
        return {str(p.relative_to(manifest.parent)): p.read_bytes() for p in paths}

    first, again, other = files("a", 3), files("b", 3), files("c", 4)
    assert first == again
    assert len(first) == 2 + 2 * 5
    for name in ("slides/sim001.tif", "sim001/filtered_feature_bc_matrix.h5"):
        assert first[name] != other[name]


def test_manifest_names_files_that_exist(cohort):
    for row in cohort.rows.itertuples():
        for path in (row.image, row.counts, row.labels):
            assert (cohort.root / path).exists()
    assert set(cohort.rows["format"]) == {"visium"}
    assert set(cohort.rows.mpp) == {CONFIG.mpp}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signal": 1.2}, r"signal=1\.2 is outside 0 to 1"),
        ({"n_spots": 3}, "n_spots=3 is outside"),
        ({"n_slides": 2.5}, "not a whole number"),
        ({"depth": float("nan")}, "not a finite number"),
        ({"n_slides": 2, "n_patients": 3}, "every patient needs a slide"),
        ({"n_housekeeping": 800}, "leaves no room"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        SimulateConfig(**settings)


def test_impossible_cohorts_are_refused(tmp_path):
    with pytest.raises(DataError, match="26 programmes given"):
        simulate_cohort(tmp_path / "a", PROGRAMMES, SimulateConfig(n_programmes=27))
    with pytest.raises(DataError, match="raise n_genes"):
        simulate_cohort(tmp_path / "a", PROGRAMMES, SimulateConfig(n_genes=100))
    with pytest.raises(DataError, match="set mpp to at least"):
        simulate_cohort(tmp_path / "a", PROGRAMMES, SimulateConfig(n_spots=20_000, mpp=0.25))
    (tmp_path / "manifest.csv").write_text("slide_id\n")
    with pytest.raises(DataError, match="not a simulated cohort"):
        simulate_cohort(tmp_path, PROGRAMMES, CONFIG)
    with pytest.raises(DataError, match="is a file"):
        simulate_cohort(tmp_path / "manifest.csv", PROGRAMMES, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.csv"]
