"""`hibio.data.SlideDataset`: pairs against the stores themselves, by a plain torch DataLoader."""

import copy
import inspect
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hibio import fit
from hibio.config.files import ConfigError
from hibio.data import RegionBatches, SlideDataset
from hibio.model import HiBio
from preprocessing.errors import DataError
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def test_the_page_does_what_it_says(
    toy_stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training, pairs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stores").symlink_to(toy_stores)
    known: dict = {}
    exec(compile(pairs, str(PAGE), "exec"), known)
    assert known["batch"]["image"].shape[:2] == (32, 3)
    assert known["batch"]["profile"].shape == (32, 400)
    assert known["region"]["profile"].shape[1] == 2
    assert len(known["train"]) == 2
    calls: list[inspect.BoundArguments] = []
    bind = inspect.signature(fit.fit).bind
    monkeypatch.setattr(HiBio, "fit", lambda *a, **k: calls.append(bind(*a, **k)))
    monkeypatch.setattr("anndata.read_h5ad", lambda path: path)
    exec(compile(training, str(PAGE), "exec"), known)
    assert calls[0].arguments["columns"] == {"patient_id": ["A", "B"], "mpp": 0.5}


def test_every_pair_is_that_of_its_store(toy_stores: Path):
    data = SlideDataset(toy_stores)
    raw = SlideDataset(toy_stores, "handcrafted", [data.genes[5], data.genes[2]], counts=True)
    order = np.random.default_rng(0).permutation(len(data))[:9]
    pairs, others = data.__getitems__(order.tolist()), raw.__getitems__(order.tolist())
    assert len({pair["slide"] for pair in pairs}) > 1
    for index, pair, other in zip(order.tolist(), pairs, others, strict=True):
        assert data.slide_of_spot[index] == pair["slide"] == other["slide"]
        spot = pair["spot"]
        with SlideStore(data.slides[pair["slide"]].path) as store:
            counts = store.counts([spot]).toarray()[0].astype(float)
            place = {name: column for column, name in enumerate(store.gene_names)}
            np.testing.assert_array_equal(
                pair["image"], store.patches([spot])[0].transpose(2, 0, 1)
            )
            np.testing.assert_array_equal(other["image"], store.features("handcrafted")[spot])
            np.testing.assert_allclose(pair["xy_um"], store.xy_um[spot], rtol=1e-6)
        value = np.log1p(1e4 * counts / counts.sum())
        np.testing.assert_allclose(
            pair["profile"], value[[place[g] for g in data.genes]], rtol=1e-5
        )
        np.testing.assert_array_equal(other["profile"], counts[[place[g] for g in raw.genes]])
    assert data[-1]["spot"] == data[len(data) - 1]["spot"] == data.slides[-1].n_spots - 1
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_region_is_a_batch_and_every_spot_comes_once(toy_stores: Path):
    data = SlideDataset(toy_stores, "handcrafted")
    sampler = RegionBatches(data, 400.0)
    batches = list(DataLoader(data, batch_sampler=sampler))
    seen = torch.cat([torch.stack([b["slide"], b["spot"]], dim=1) for b in batches])
    assert len(batches) == len(sampler) > len(data.slides)
    assert len(seen) == len(data) == len(torch.unique(seen, dim=0))
    side = 400.0 * np.sqrt(np.pi) / 2
    assert all(len(set(b["slide"].tolist())) == 1 for b in batches)
    assert max(float(np.ptp(b["xy_um"].numpy(), axis=0).max()) for b in batches) <= side
    first, second = (tuple(batch[0] for batch in sampler) for _ in "12")
    assert first != second
    assert sorted(first) == sorted(second)
    alike = [list(RegionBatches(data, 400.0, seed=3)) for _ in "12"]
    assert alike[0] == alike[1]
    few = RegionBatches(data, 400.0, least=9, shuffle=False)
    assert 0 < len(few) < len(sampler)
    assert all(len(one) >= 9 for one in few)
    with pytest.raises(ConfigError, match="ask for fewer"):
        RegionBatches(data, 100.0, least=500)


def test_workers_and_copies_read_through_files_of_their_own(toy_stores: Path):
    data = SlideDataset(toy_stores, "handcrafted")
    here = data[3]  # opens a file before the fork
    loader = DataLoader(data, batch_size=40, num_workers=1)
    there = torch.cat([batch["image"] for batch in loader])
    np.testing.assert_array_equal(there[3], here["image"])
    assert len(there) == len(data)
    again = copy.deepcopy(data)  # as workers that are started anew get it
    assert not again._open
    np.testing.assert_array_equal(again[3]["image"], here["image"])


def test_a_gene_that_a_slide_lacks_is_not_a_number_and_bad_input_is_told(
    toy_stores: Path, tmp_path: Path
):
    stores = stores_in(toy_stores)
    with pytest.raises(ConfigError, match=r"measured on no slide, such as 'NO_GENE'"):
        SlideDataset(stores, genes=["NO_GENE"])
    with pytest.raises(DataError, match="no features 'none'"):
        SlideDataset(stores, "none")
    wider = tmp_path / "wider.h5"
    shutil.copyfile(stores[0], wider)
    with h5py.File(wider, "r+") as file:
        file.attrs["slide_id"], file.attrs["patch_um"] = "wider", 2 * file.attrs["patch_um"]
    with pytest.raises(ConfigError, match=r"patches are of several widths .* um on wider\)"):
        SlideDataset([*stores, wider])
    data = SlideDataset(stores, "handcrafted", ["ZEB2"])
    data.genes = np.array(["OF_ANOTHER_PANEL", "ZEB2"])
    profile = data[0]["profile"]
    assert profile[0].isnan()
    assert profile[1].isfinite()
    gone = tmp_path / stores[0].name
    shutil.copyfile(stores[0], gone)
    data = SlideDataset([gone], "handcrafted")
    gone.unlink()
    with pytest.raises(DataError, match=r"slide 'sim001' cannot be read"):
        data[0]
