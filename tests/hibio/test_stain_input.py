"""Stain normalisation where patches are read: training, embedding, plain arrays; refusals."""

import dataclasses

import numpy as np
import pytest
import torch

from eval.embed import load_checkpoint
from hibio.config.files import ConfigError
from hibio.config.model import ImageInput, VisionConfig
from hibio.config.run import DataConfig
from hibio.config.training import StageConfig
from hibio.data.slide import prepare_slide
from hibio.encoders.vision import build_vision_encoder
from hibio.model import HiBio
from hibio.run import build, expand, train_all
from preprocessing.errors import DataError
from preprocessing.stain import sample_patches, stain_normaliser
from preprocessing.store import SlideStore
from tests.hibio.toy import MODEL, SPOT, edit_store, make_slide, run_config, whole_batch

TIMM = VisionConfig(name="timm", timm_name="test_resnet", stain="macenko")
METHODS = ("macenko", "reinhard")


@pytest.mark.parametrize("method", METHODS)
def test_patches_are_normalised_by_their_own_slide_when_they_are_read(
    toy_stores, toy_artifacts, method
):
    slide = make_slide(toy_stores, toy_artifacts, image=ImageInput("patches", stain=method))
    with SlideStore(slide.path) as store:
        raw, normaliser = store.patches(), stain_normaliser(method, sample_patches(store))
    expected = normaliser(raw)
    assert np.abs(expected.astype(int) - raw).mean() > 5
    np.testing.assert_array_equal(slide.patches(np.array([5, 0])), expected[[5, 0]])
    batch = whole_batch(slide)
    assert batch.stain == method
    np.testing.assert_array_equal(batch.patches_SCHW.permute(0, 2, 3, 1), expected)
    pixels = expected.reshape(-1, 3) / 255.0
    np.testing.assert_allclose(slide.stain_6[:3], pixels.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(slide.stain_6[3:], pixels.std(axis=0), atol=0.02)


def test_none_reads_them_as_they_are(toy_stores, toy_artifacts):
    slide = make_slide(toy_stores, toy_artifacts, image="patches")
    with SlideStore(slide.path) as store:
        np.testing.assert_array_equal(slide.patches(np.arange(70)), store.patches())
    assert whole_batch(slide).stain == "none"


@torch.no_grad()
def test_a_tower_refuses_patches_of_another_stain(toy_stores, toy_artifacts):
    """Otherwise a checkpoint could be embedded with patches that it was not trained on."""
    raw = whole_batch(make_slide(toy_stores, toy_artifacts, image="patches"))
    with pytest.raises(ConfigError, match=r"stain: macenko, and got patches of stain none"):
        build_vision_encoder(TIMM)(raw)
    image = TIMM.image_input("patches")
    normalised = whole_batch(make_slide(toy_stores, toy_artifacts, image=image))
    with pytest.raises(ConfigError, match=r"stain: none, and got patches of stain macenko"):
        build_vision_encoder(dataclasses.replace(TIMM, stain="none"))(normalised)
    assert build_vision_encoder(TIMM).eval()(normalised).shape == (70, 96)


def test_plain_arrays_are_normalised_as_the_slide_is(toy_stores, toy_artifacts):
    torch.manual_seed(0)
    model = HiBio(dataclasses.replace(MODEL, vision=TIMM), toy_artifacts).eval()
    image = TIMM.image_input("patches")
    slide = make_slide(toy_stores, toy_artifacts, image=image)
    with SlideStore(slide.path) as store:
        own = model.encode_image(store.patches())
        with pytest.raises(ConfigError, match="not for features"):
            model.encode_image(store.features("handcrafted"))
    whole = model.encode_slide(slide).image
    assert (own * whole).sum(axis=1).min() > 0.99  # measured on all patches, not on 64


def test_a_run_trains_on_it_and_its_checkpoint_remembers(toy_stores, tmp_path):
    config = run_config(
        toy_stores,
        tmp_path / "run",
        stages=(StageConfig("spot", 1, SPOT),),
        data=DataConfig(toy_stores, image="patches"),
        model=dataclasses.replace(MODEL, vision=TIMM),
    )
    trainer = build(expand(config)[0])
    assert trainer.plan.dataset[0].stain == "macenko"
    (path,) = train_all(config)
    checkpoint = load_checkpoint(path)
    assert checkpoint.image_input == ImageInput("patches", stain="macenko")
    slide = prepare_slide(
        toy_stores / "sim003.h5", checkpoint.model.artifacts, checkpoint.image_input
    )
    assert checkpoint.model.encode_slide(slide).image.shape == (70, 16)


def test_stored_features_cannot_be_normalised(toy_stores, tmp_path):
    with pytest.raises(ConfigError, match=r"'handcrafted'.*hibio features --stain reinhard"):
        ImageInput("handcrafted", stain="reinhard")
    with pytest.raises(ConfigError, match=r"model\.vision\.stain is macenko, but data\.image"):
        run_config(toy_stores, tmp_path, model=dataclasses.replace(MODEL, vision=TIMM))
    with pytest.raises(ConfigError, match="the features tower reads none"):
        build_vision_encoder(VisionConfig(stain="macenko", feature_dim=3))


def whiten(file) -> None:
    file.attrs["patch_encoding"] = "raw"
    for name in ("bytes", "start", "size"):
        del file[f"patches/{name}"]
    spots, one = len(file["spots/barcode"]), 32 * 32 * 3
    file["patches/bytes"] = np.full(spots * one, 250, dtype=np.uint8)
    file["patches/start"] = np.arange(spots) * one
    file["patches/size"] = np.full(spots, one)


@pytest.mark.parametrize("method", METHODS)
def test_a_slide_without_stain_is_told(toy_stores, toy_artifacts, tmp_path, method):
    path = edit_store(toy_stores / "sim001.h5", tmp_path / "sim001.h5", whiten)
    with pytest.raises(ConfigError, match=r"sim001\.h5: .*stained.*model\.vision\.stain: none"):
        prepare_slide(path, toy_artifacts, ImageInput("patches", stain=method))
    glass = np.full((2, 32, 32, 3), 250, dtype=np.uint8)
    model = HiBio(dataclasses.replace(MODEL, vision=TIMM), toy_artifacts)
    with pytest.raises(DataError, match="stained"):
        model.encode_image(glass)
