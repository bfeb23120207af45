"""The model: levels, pooling of regions, temperatures, loading a checkpoint, what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

from hibio import HiBio, SlideBatch
from hibio.checkpoint import write_checksums
from hibio.config.files import ConfigError, dump_config, to_dict
from hibio.config.model import VisionConfig
from hibio.training.checkpoint import save_checkpoint
from hibio.training.objective import draw_mask
from tests.hibio.toy import OMICS, make_model, make_slide, regions_of, run_config, whole_batch


@pytest.fixture(scope="module")
def slide(toy_stores, toy_artifacts):
    return make_slide(toy_stores, toy_artifacts)


@pytest.fixture(scope="module")
def batch(slide):
    return whole_batch(slide)


@pytest.fixture
def model(toy_artifacts):
    return make_model(toy_artifacts)


@pytest.fixture
def checkpoint(model, toy_stores, tmp_path):
    config = dataclasses.replace(run_config(toy_stores, tmp_path), model=model.config)
    return save_checkpoint(tmp_path, model, lambda path: dump_config(config, path))


def test_public_names():
    assert HiBio.__name__ == "HiBio"
    assert SlideBatch.__name__ == "SlideBatch"
    import hibio

    with pytest.raises(AttributeError, match="no attribute 'HiBoi'"):
        _ = hibio.HiBoi


@torch.no_grad()
def test_levels_are_the_spots_and_the_regions(model, batch, slide):
    spot = model(batch)
    for regions, region_S in zip(regions_of(slide), batch.region_of_spot_LS, strict=True):
        pair, place_S = model.regions(spot, region_S)
        assert torch.equal(place_S, region_S)
        assert torch.equal(pair.group, torch.zeros(len(pair.omics), dtype=torch.long))
        for tower in ("image", "omics"):
            rows = getattr(spot, tower)
            pooled = getattr(pair, tower)
            assert len(pooled) == regions.max() + 1
            for region in (0, int(regions.max())):
                member = rows[regions == region]
                weight = model.pool.score(member).softmax(dim=0)
                expected = F.normalize((weight * member).sum(dim=0), dim=0)
                torch.testing.assert_close(pooled[region], expected, atol=1e-5, rtol=0)
    assert all(
        torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
        for one in (spot, pair)
        for rows in (one.image, one.omics)
    )


@torch.no_grad()
def test_only_core_spots_come_out(model, slide):
    from hibio.data.collate import collate

    core = np.arange(10, 22)
    part = collate([(slide, regions_of(slide), core)], hops=model.halo)
    assert part.n_spots > 12
    spot = model(part)
    assert spot.omics.shape == spot.image.shape == (12, 16)
    pair, _ = model.regions(spot, part.region_of_spot_LS[0, part.core_S])
    assert len(pair.omics) == len(np.unique(regions_of(slide)[0][core]))


@torch.no_grad()
def test_without_an_image_there_is_only_omics(toy_artifacts, model, batch):
    blind = dataclasses.replace(batch, features_SF=None)
    assert model(blind).image is None
    assert model(batch, image=False).image is None
    counts_only = make_model(toy_artifacts, vision=VisionConfig(name="none"))
    spot = counts_only(batch)
    assert spot.image is None
    assert counts_only.regions(spot, batch.region_of_spot_LS[0])[0].image is None
    with pytest.raises(ConfigError, match="no vision tower"):
        counts_only.project_image(batch)


@torch.no_grad()
def test_temperatures_start_where_asked_and_stay_above_a_hundredth(toy_artifacts):
    model = make_model(toy_artifacts, temperature=0.2, anchor_temperature=0.05)
    assert float(model.temperature) == pytest.approx(0.2)
    assert float(model.anchor_temperature) == pytest.approx(0.05)
    model.log_scale.fill_(50.0)
    model.log_scale_anchor.fill_(50.0)
    assert float(model.temperature) == pytest.approx(0.01)
    assert float(model.anchor_temperature) == pytest.approx(0.01)


def test_the_halo_follows_from_the_layers(toy_artifacts):
    assert make_model(toy_artifacts).halo == OMICS.layers + 1
    deep = make_model(toy_artifacts, omics=dataclasses.replace(OMICS, layers=4))
    assert deep.halo == 5


@pytest.mark.parametrize("training", [True, False])
def test_encoding_is_in_evaluation_mode_and_leaves_the_mode_alone(model, slide, training):
    first = model.encode_slide(slide)
    model.train(training)
    second = model.encode_slide(slide)
    sets = model.encode_gene_sets({"x": model.artifacts.genes[:9].tolist()})
    assert model.training == training
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.omics, second.omics)
    assert not np.isnan(sets).any()
    assert first.image.dtype == first.tower.dtype == np.float32
    assert first.tower.shape == (slide.n_spots, OMICS.width)


def test_a_slide_without_counts_has_no_omics_embedding(model, slide):
    blank = dataclasses.replace(slide, has_counts=False)
    embedding = model.encode_slide(blank)
    assert embedding.omics is None
    assert embedding.tower is None
    np.testing.assert_array_equal(embedding.image, model.encode_slide(slide).image)


# ------------------------------------------------------------------ checkpoints
def test_a_checkpoint_gives_the_same_model(checkpoint, model, slide):
    loaded = HiBio.from_checkpoint(checkpoint)
    assert not loaded.training
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for name in ("image", "omics", "tower"):
        got, want = (getattr(m.encode_slide(slide), name) for m in (loaded, model))
        np.testing.assert_array_equal(got, want)
    assert HiBio.from_checkpoint(str(checkpoint)).config == model.config


@pytest.mark.parametrize("name", ["config.yaml", "artifacts.h5", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ConfigError, match=rf"no {name}, so this is not a HiBio checkpoint"):
        HiBio.from_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.yaml", "artifacts.h5", "model.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_a_truncated_file_is_refused(checkpoint, name, share):
    path = checkpoint / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ConfigError, match=name):
        HiBio.from_checkpoint(checkpoint)


def test_an_encoder_without_a_masked_view_says_so(toy_artifacts, batch):
    flat = make_model(toy_artifacts, omics=dataclasses.replace(OMICS, name="mlp"))
    mask = draw_mask(batch.gene_SK < 400, 0.2, 0.1)
    with pytest.raises(ConfigError, match="'mlp' has no masked view; leave the omics/ terms out"):
        flat.masked_view(batch, mask)


def test_weights_of_another_model_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    state["own_head.weight"] = torch.zeros(3, 3)
    save_file(state, path)
    write_checksums(checkpoint)
    with pytest.raises(ConfigError, match=r"does not fit config\.yaml"):
        HiBio.from_checkpoint(checkpoint)


def test_a_checkpoint_from_before_the_niche_head_embeds_as_before(checkpoint, model, slide):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    for name in ("weight", "bias"):
        del state[f"niche_head.{name}"]
        state[f"around_head.{name}"] = state[f"own_head.{name}"].clone()
    save_file(state, path)
    write_checksums(checkpoint)
    old = HiBio.from_checkpoint(checkpoint).encode_slide(slide).omics
    np.testing.assert_array_equal(old, model.eval().encode_slide(slide).omics)


def test_an_unknown_key_in_a_checkpoint_is_told(checkpoint, model):
    settings = yaml.safe_load((checkpoint / "config.yaml").read_text())
    settings["model"]["embed_dims"] = 4
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(settings))
    write_checksums(checkpoint)
    with pytest.raises(ConfigError, match=r"config\.yaml.*model\.embed_dims"):
        HiBio.from_checkpoint(checkpoint)
    assert "embed_dim" in to_dict(model.config)


def test_a_checkpoint_needs_no_other_weights_file(toy_artifacts, toy_stores, tmp_path, monkeypatch):
    """What a backbone started from is in the checkpoint; its file and the network are not asked."""
    vision = VisionConfig(name="timm", timm_name="test_resnet")
    source = make_model(toy_artifacts, vision=vision)
    import timm  # after the tower, which makes torchvision importable

    weights = tmp_path / "backbone.safetensors"
    save_file(source.vision.backbone.state_dict(), weights)
    started = dataclasses.replace(vision, weights=weights, pretrained=True)
    source.config = dataclasses.replace(source.config, vision=started)
    weights.unlink()
    config = dataclasses.replace(run_config(toy_stores, tmp_path), model=source.config)
    folder = save_checkpoint(tmp_path, source, lambda path: dump_config(config, path))
    make = timm.create_model

    def offline(name: str, *, pretrained: bool, num_classes: int):
        assert not pretrained
        return make(name, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", offline)
    loaded = HiBio.from_checkpoint(folder)
    patches = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(loaded.encode_image(patches), source.encode_image(patches))
