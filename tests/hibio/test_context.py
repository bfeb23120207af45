"""Context patches end to end: a signal that only they show is learned; what lacks them is told."""

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.embed import load_checkpoint
from hibio.config.files import ConfigError
from hibio.config.model import ImageInput, VisionConfig
from hibio.config.run import DataConfig
from hibio.config.training import StageConfig
from hibio.data.fitting import fit_artifacts
from hibio.data.slide import prepare_slide
from hibio.encoders.vision import build_vision_encoder
from hibio.model import HiBio
from hibio.run import train_all
from preprocessing.manifest import write_manifest
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from tests.hibio.toy import (
    GENES,
    MODEL,
    PATHWAYS,
    SPOT,
    assert_refused,
    run_config,
    whole_batch,
)
from tests.preprocessing.sources import legacy_slide

TIMM = VisionConfig(name="timm", timm_name="test_resnet")
CONTEXT = dataclasses.replace(TIMM, context="patch")
PX = 32


@pytest.fixture(scope="module")
def wide_stores(toy_cohort, tmp_path_factory) -> Path:
    """The toy cohort with a context of 448 um, raw patches."""
    folder = tmp_path_factory.mktemp("wide")
    report = prepare(toy_cohort, folder, patch=PatchConfig(112.0, PX, 448.0), images="raw")
    assert not report.failed, str(report)
    return folder


@pytest.fixture(scope="module")
def wide_artifacts(wide_stores):
    return fit_artifacts(stores_in(wide_stores)[:2], GENES, PATHWAYS)


def wide_slide(stores: Path, artifacts, name: str = "sim003", vision: VisionConfig = CONTEXT):
    return prepare_slide(stores / f"{name}.h5", artifacts, vision.image_input("patches"))


# ------------------------------------------------------------------ what it is for
def plant(path: Path, vector_SV: np.ndarray, seed: int) -> None:
    """Noise as patches; as context the colour that the first three gene factors paint on noise."""
    rng = np.random.default_rng(seed)
    colour = vector_SV[:, :3] / vector_SV[:, :3].std(axis=0)
    with h5py.File(path, "r+") as file:
        for group, strength in (("patches", 0.0), ("context", 40.0)):
            noise = rng.integers(60, 196, (len(colour), PX, PX, 3))
            picture = np.clip(noise + strength * colour[:, None, None], 0, 255).astype(np.uint8)
            in_file = np.empty_like(picture)
            in_file[file[group]["start"][:] // (PX * PX * 3)] = picture
            file[group]["bytes"][:] = in_file.reshape(-1)


@pytest.fixture(scope="module")
def planted_stores(wide_stores, wide_artifacts, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(wide_stores, tmp_path_factory.mktemp("planted") / "stores"))
    for seed, path in enumerate(stores_in(folder)):
        plant(path, prepare_slide(path, wide_artifacts, None).vector_SV, seed)
    return folder


def found_on_a_new_slide(stores: Path, artifacts, vision: VisionConfig) -> float:
    """Share of the held-out spots whose profile is among the 7 of 70 nearest to their image."""
    torch.manual_seed(0)
    model = HiBio(dataclasses.replace(MODEL, vision=vision), artifacts).train()
    train = [whole_batch(wide_slide(stores, artifacts, n, vision)) for n in ("sim001", "sim002")]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for batch in train * 8:
        spot = model(batch)
        logits = spot.image @ spot.omics.T / 0.1
        own = torch.arange(len(logits))
        loss = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.encode_slide(wide_slide(stores, artifacts, "sim003", vision))
    similarity = found.image @ found.omics.T
    return float(((similarity > np.diag(similarity)[:, None]).sum(axis=1) < 7).mean())


def test_a_signal_that_only_the_context_shows_is_learned(planted_stores, wide_artifacts):
    """Chance is 0.10."""
    assert found_on_a_new_slide(planted_stores, wide_artifacts, CONTEXT) > 0.4
    assert found_on_a_new_slide(planted_stores, wide_artifacts, TIMM) < 0.2


# ------------------------------------------------------------------ how it is computed
@torch.no_grad()
def test_both_patches_go_through_one_backbone_side_by_side(wide_stores, wide_artifacts):
    slide = wide_slide(wide_stores, wide_artifacts)
    batch = whole_batch(slide)
    torch.manual_seed(0)
    tower = build_vision_encoder(CONTEXT).eval()
    plain = build_vision_encoder(TIMM).eval()
    plain.load_state_dict(tower.state_dict())  # no weights of its own
    around = dataclasses.replace(batch, patches_SCHW=batch.context_SCHW)
    expected = torch.cat([plain(batch), plain(around)], dim=1)
    assert tower.embed_dim == 2 * plain.embed_dim == expected.shape[1]
    torch.testing.assert_close(tower(batch), expected, atol=1e-5, rtol=1e-5)
    with SlideStore(slide.path) as store:
        wide = store.context()
    order = batch.context_SCHW.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(order, wide)


def test_tiles_and_plain_arrays_give_the_embedding_of_the_slide(wide_stores, wide_artifacts):
    torch.manual_seed(0)
    model = HiBio(dataclasses.replace(MODEL, vision=CONTEXT), wide_artifacts).eval()
    slide = wide_slide(wide_stores, wide_artifacts)
    whole = model.encode_slide(slide).image
    np.testing.assert_allclose(model.encode_slide(slide, tile_spots=9).image, whole, atol=1e-5)
    with SlideStore(slide.path) as store:
        own = model.encode_image(store.patches(), store.context())
        with pytest.raises(ConfigError, match="without context patches"):
            model.encode_image(store.patches())
        with pytest.raises(ConfigError, match="not for features"):
            model.encode_image(store.features("handcrafted"), store.context())
    assert (own * whole).sum(axis=1).min() > 0.99  # standardised over all patches, not over 64


def test_context_is_read_only_when_it_is_asked_for(wide_stores, wide_artifacts):
    plain = whole_batch(wide_slide(wide_stores, wide_artifacts, vision=TIMM))
    assert plain.context_SCHW is None
    assert whole_batch(wide_slide(wide_stores, wide_artifacts)).context_SCHW is not None
    with pytest.raises(ConfigError, match="without context patches"):
        build_vision_encoder(CONTEXT)(plain)


def test_a_run_trains_embeds_and_remembers_it(wide_stores, tmp_path):
    config = run_config(
        wide_stores,
        tmp_path / "run",
        stages=(StageConfig("spot", 1, SPOT),),
        data=DataConfig(wide_stores, image="patches"),
        model=dataclasses.replace(MODEL, vision=CONTEXT),
    )
    (path,) = train_all(config)
    checkpoint = load_checkpoint(path)
    assert checkpoint.image_input == ImageInput("patches", context=True)
    artifacts = checkpoint.model.artifacts
    assert artifacts.settings.context_um == (448.0,)
    slide = prepare_slide(wide_stores / "sim003.h5", artifacts, checkpoint.image_input)
    assert checkpoint.model.encode_slide(slide).image.shape == (70, 16)


@pytest.mark.parametrize(("um", "found"), [("600", 600.0), ("0", None)])
def test_the_command_prepares_it(run, tmp_path, um, found):
    row, _ = legacy_slide(tmp_path)
    write_manifest([row], tmp_path / "m.csv")
    options = ("--patch-um", "200", "--patch-px", "16", "--context-um", um)
    code, out, told = run("prepare", tmp_path / "m.csv", "--out", "stores", *options)
    assert code == 0, out + told
    with SlideStore(Path("stores") / "A1.h5") as store:
        assert store.context_um == found


def test_the_command_refuses_a_narrow_context(run, tmp_path):
    widths = ("--patch-um", "200", "--context-um", "50")
    result = run("prepare", tmp_path / "m.csv", "--out", "stores", *widths)
    assert_refused(result, "context_um is 50", "wider than the patch")


# ------------------------------------------------------------------ what is told
def test_a_store_without_context_is_told(toy_stores, wide_artifacts):
    with pytest.raises(ConfigError, match=r"sim003\.h5: no context patches.*--context-um"):
        wide_slide(toy_stores, wide_artifacts)


def test_another_context_width_is_refused(wide_stores, wide_artifacts):
    settings = dataclasses.replace(wide_artifacts.settings, context_um=(600.0,))
    other = dataclasses.replace(wide_artifacts, settings=settings)
    with pytest.raises(ConfigError, match=r"448 um wide.*600 um.*--context-um 600"):
        wide_slide(wide_stores, other)
    assert wide_slide(wide_stores, other, vision=TIMM).has_image  # not read, so it does not matter


def test_settings_that_would_not_be_used_are_refused(toy_stores, tmp_path):
    with pytest.raises(ConfigError, match=r"stored features 'handcrafted'.*--scale both"):
        ImageInput("handcrafted", context=True)
    with pytest.raises(ConfigError, match=r"stored features 'handcrafted'"):
        run_config(toy_stores, tmp_path, model=dataclasses.replace(MODEL, vision=CONTEXT))
    with pytest.raises(ConfigError, match="neighbours is for stored features"):
        build_vision_encoder(dataclasses.replace(TIMM, context="neighbours"))
    with pytest.raises(ConfigError, match="the features tower reads none"):
        build_vision_encoder(VisionConfig(context="patch", feature_dim=3))
    assert VisionConfig(context="patch").image_input(None) is None  # counts only
