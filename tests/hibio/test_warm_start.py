"""model.omics.init_from: one omics branch, pretrained alone or with images, starts another run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.embed import load_checkpoint
from eval.folds.assemble import JobGroup, split_entries
from hibio import keys
from hibio.config.files import ConfigError
from hibio.config.run import DataConfig
from hibio.config.training import StageConfig
from hibio.data.fitting import fit_artifacts
from hibio.data.splits import read_entries
from hibio.model import HiBio
from hibio.run import build, expand, start_of, train_all
from preprocessing.store.read import stores_in
from tests.hibio.test_artifacts import assert_same
from tests.hibio.toy import GENES, MASKED, MODEL, OMICS, PATHWAYS, make_model, run_config


def omics_only(stores: Path, out: Path, **changes):
    stage = StageConfig(
        "heist", 1, {**MASKED, keys.TERM_SPATIAL: 0.1, keys.TERM_DECORRELATION: 0.1}
    )
    return run_config(stores, out, data=DataConfig(stores, image=None), stages=(stage,), **changes)


@pytest.fixture(scope="module")
def pretrained(toy_stores, tmp_path_factory) -> Path:
    """An omics-only checkpoint that has not seen patient03."""
    out = tmp_path_factory.mktemp("pretrained")
    return train_all(omics_only(toy_stores, out))[0]


def starting_from(checkpoint: Path | str, stores: Path, out: Path, **changes):
    omics = dataclasses.replace(OMICS, init_from=Path(checkpoint))
    return run_config(stores, out, model=dataclasses.replace(MODEL, omics=omics), **changes)


def trainer_of(config):
    return build(expand(config)[0])


def test_the_multimodal_run_starts_with_the_pretrained_tower(pretrained, toy_stores, tmp_path):
    trainer = trainer_of(starting_from(pretrained, toy_stores, tmp_path))
    source = HiBio.from_checkpoint(pretrained)
    for name, weight in source.omics.state_dict().items():
        assert torch.equal(trainer.model.omics.state_dict()[name], weight), name
    ours, theirs = trainer.model.artifacts, source.artifacts
    for part in ("tfidf", "factors", "groups", "gene_graphs"):
        assert_same(getattr(ours, part), getattr(theirs, part))
    assert ours.settings.pretrain_slides == ("sim001", "sim002")
    assert trainer.model.vision is not None
    fresh = trainer_of(run_config(toy_stores, tmp_path / "fresh")).model
    assert not torch.equal(fresh.omics.value[0].weight, trainer.model.omics.value[0].weight)


def test_a_multimodal_checkpoint_serves_an_omics_run(toy_stores, tmp_path):
    first = train_all(run_config(toy_stores, tmp_path / "both"))[0]
    omics = dataclasses.replace(OMICS, init_from=first)
    config = omics_only(toy_stores, tmp_path / "omics")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, omics=omics))
    trainer = trainer_of(config)
    source = HiBio.from_checkpoint(first)
    for name, weight in source.omics.state_dict().items():
        assert torch.equal(trainer.model.omics.state_dict()[name], weight), name


def test_a_warm_start_is_trained_resumed_and_loaded(pretrained, toy_stores, tmp_path):
    config = starting_from(pretrained, toy_stores, tmp_path)
    whole = HiBio.from_checkpoint(train_all(config)[0]).state_dict()
    parts = starting_from(pretrained, toy_stores, tmp_path / "parts")
    build(expand(parts)[0]).fit(until_step=3)
    resumed = HiBio.from_checkpoint(train_all(parts, resume=True)[0]).state_dict()
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_a_start_that_saw_the_test_slides_is_refused(pretrained, toy_stores, tmp_path):
    config = starting_from(pretrained, toy_stores, tmp_path, folds=("patient01",))
    with pytest.raises(ConfigError, match=r"trained on 1 test slides of fold patient01 \(sim001"):
        trainer_of(config)


def test_what_an_earlier_start_saw_is_remembered_and_never_measured_on(
    pretrained, toy_stores, tmp_path
):
    start = HiBio.from_checkpoint(pretrained).artifacts
    older = dataclasses.replace(
        start,
        train_slides=("sim001",),
        settings=dataclasses.replace(start.settings, pretrain_slides=("sim003",)),
    )
    paths = stores_in(toy_stores)
    chained = fit_artifacts(paths[:2], GENES, PATHWAYS, start=older)
    assert chained.settings.pretrain_slides == ("sim001", "sim003")
    checkpoint = load_checkpoint(pretrained)
    run = dataclasses.replace(checkpoint.run, folds=("patient03",))
    checkpoint = dataclasses.replace(checkpoint, model=make_model(chained), run=run)
    group = JobGroup("patient03", 0, (checkpoint,))
    with pytest.raises(ConfigError, match=r"1 test slides were seen .*sim003"):
        split_entries(group, read_entries(paths))


def test_fold_and_seed_stand_for_the_jobs_own(pretrained, toy_stores, tmp_path):
    run = pretrained.parents[2]
    config = starting_from(run / "fold-{fold}" / "seed-{seed}", toy_stores, tmp_path)
    assert start_of(expand(config)[0]) == pretrained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genes": {"rank": 6}}, r"rank: 6 here, 8 there"),
        ({"omics": {"layers": 1}}, r"layers: 1 here, 2 there"),
    ],
)
def test_other_settings_are_named(pretrained, toy_stores, tmp_path, changes, message):
    config = starting_from(pretrained, toy_stores, tmp_path)
    genes = dataclasses.replace(config.genes, **changes.get("genes", {}))
    omics = dataclasses.replace(config.model.omics, **changes.get("omics", {}))
    model = dataclasses.replace(config.model, omics=omics)
    with pytest.raises(ConfigError, match=message):
        trainer_of(dataclasses.replace(config, genes=genes, model=model))


def test_no_such_checkpoint_is_an_error(toy_stores, tmp_path):
    with pytest.raises(ConfigError, match="not a HiBio checkpoint"):
        trainer_of(starting_from(tmp_path / "nowhere", toy_stores, tmp_path))


def test_omics_only_embeds_and_imputes(pretrained, toy_stores):
    from hibio.data.slide import prepare_slide

    model = HiBio.from_checkpoint(pretrained)
    hidden = model.artifacts.genes[:40].tolist()
    slide = prepare_slide(toy_stores / "sim003.h5", model.artifacts, None, hidden)
    whole = model.impute(slide, hidden)
    assert whole.shape == (70, 40)
    assert np.isfinite(whole).all()
    np.testing.assert_allclose(model.impute(slide, hidden, tile_spots=9), whole, atol=2e-5)
    alone = model.impute(slide, hidden[:32])
    np.testing.assert_allclose(alone, whole[:, :32], atol=2e-5)  # asked in groups of 32
