"""A run: jobs in order, variants, resuming, banks, folds of its own patients, counts alone."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from hibio import HiBio
from hibio.bank import read_bank
from hibio.checkpoint import NAME, find_checkpoint, load_trainer_state
from hibio.config.files import ConfigError, load_config, to_dict
from hibio.config.run import DataConfig, RunConfig
from hibio.config.training import StageConfig
from hibio.run import build, expand, finish, split_of, train_all
from preprocessing.manifest import read_manifest
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.store import SlideStore
from tests.hibio.toy import MASKED, OMICS, SPOT, edit_store, rename_genes, run_config

QUICK = (StageConfig("spot", 1, SPOT),)
FLAT = {"model": {"omics": {"name": "mlp"}}}


def quick(stores, out, **changes) -> RunConfig:
    return run_config(stores, out, **{"stages": QUICK, **changes})


# ------------------------------------------------------------------ the plan
def test_jobs_in_order_and_their_folders(toy_stores, tmp_path):
    config = run_config(
        toy_stores, tmp_path, folds=("each",), seeds=(0, 1), variants={"flat": FLAT}
    )
    jobs = expand(config)
    expected = [
        f"{variant}/fold-patient0{patient}/seed-{seed}"
        for patient in (1, 2, 3)
        for seed in (0, 1)
        for variant in ("hibio", "flat")
    ]
    assert [job.name for job in jobs] == expected
    assert [job.folder for job in jobs] == [tmp_path / name for name in expected]
    for job in jobs:
        assert job.config.folds == (job.fold,)
        assert job.config.seeds == (job.seed,)
        assert job.config.variants == {}
        assert not job.finished


def test_a_variant_differs_in_what_it_names_and_nothing_else(toy_stores, tmp_path):
    patch = {"model": {"omics": {"name": "mlp"}}, "data": {"shuffle_pairs": True}}
    config = run_config(toy_stores, tmp_path, variants={"shuffled": patch})
    main, variant = (to_dict(job.config) for job in expand(config))
    assert variant["variant"] == "shuffled"
    assert main["variant"] == "hibio"
    assert (main["model"]["omics"]["name"], variant["model"]["omics"]["name"]) == (
        "graph_hierarchy",
        "mlp",
    )
    assert (main["data"]["shuffle_pairs"], variant["data"]["shuffle_pairs"]) == (False, True)
    variant["variant"] = "hibio"
    variant["model"]["omics"]["name"] = "graph_hierarchy"
    variant["data"]["shuffle_pairs"] = False
    assert variant == main


def test_a_variant_replaces_the_stages_as_a_whole(toy_stores, tmp_path):
    stages = [{"name": "only", "epochs": 7, "weights": {"spot/contrastive": 1.0}}]
    config = run_config(toy_stores, tmp_path, variants={"flat": {"stages": stages}})
    (stage,) = expand(config)[1].config.stages
    assert (stage.name, stage.epochs) == ("only", 7)


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({"v": {"modell": {}}}, r"variants\.v.*did you mean .*model'\?"),
        ({"v": {"model": {"omics": {"widht": 3}}}}, r"variants\.v.*omics\.width"),
        ({"v": {"model": {"embed_dim": "wide"}}}, r"variants\.v.*embed_dim.*whole number"),
        ({"v": {"stages": []}}, r"variants\.v: .*stages is empty"),
        ({"hibio": {}}, r"variants\.hibio: .*not 'hibio'"),
        ({"../x": {}}, r"variants\.\.\./x: .*letters, digits"),
    ],
)
def test_variants_that_cannot_be(toy_stores, tmp_path, variants, words):
    with pytest.raises(ConfigError, match=words):
        expand(run_config(toy_stores, tmp_path, variants=variants))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": ()}, "stages is empty"),
        ({"folds": ()}, "at least one entry"),
        ({"seeds": ()}, "at least one entry"),
    ],
)
def test_settings_out_of_range(toy_stores, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        run_config(toy_stores, tmp_path, **change)


def test_the_split_and_the_artifacts_are_of_the_fold(toy_stores, tmp_path):
    config = quick(toy_stores, tmp_path)
    split = split_of(config, "patient02")
    assert [entry.slide_id for entry in split.train] == ["sim001", "sim003"]
    (job,) = expand(dataclasses.replace(config, folds=("patient02",)))
    trainer = build(job)
    assert trainer.model.artifacts.train_slides == ("sim001", "sim003")
    assert [entry.slide_id for entry in trainer.plan.dataset.entries] == ["sim001", "sim003"]


def test_fewer_training_patients_leave_the_test_slides_alone(toy_stores, tmp_path):
    config = quick(toy_stores, tmp_path, data=DataConfig(toy_stores, train_patients=1))
    split = split_of(config, "patient02")
    assert [entry.slide_id for entry in split.train] == ["sim001"]
    assert [entry.slide_id for entry in split.test] == ["sim002"]


# ------------------------------------------------------------------ training it
@pytest.fixture(scope="module")
def done(toy_stores, tmp_path_factory):
    """A finished run of two variants."""
    out = tmp_path_factory.mktemp("done")
    stages = [{"name": "spot", "epochs": 2, "weights": {"spot/contrastive": 1.0}}]
    flat = {**FLAT, "stages": stages}
    checkpoints = train_all(quick(toy_stores, out / "run", variants={"flat": flat}))
    return out / "run", checkpoints


def test_a_run_leaves_checkpoints_banks_its_settings_and_what_ran(done, toy_stores):
    out, checkpoints = done
    assert checkpoints == [out / v / "fold-patient03" / "seed-0" / NAME for v in ("hibio", "flat")]
    for checkpoint in checkpoints:
        names = sorted(path.name for path in checkpoint.iterdir())
        assert names == [
            "artifacts.h5",
            "bank.h5",
            "checksums.json",
            "config.yaml",
            "model.safetensors",
            "trainer.pt",
        ]
        assert load_trainer_state(checkpoint)["finished"]
        assert set(read_bank(checkpoint / "bank.h5").patient) == {"patient01", "patient02"}
        assert HiBio.from_checkpoint(checkpoint).artifacts.train_slides == ("sim001", "sim002")
    whole = load_config(RunConfig, out / "config.yaml")
    assert to_dict(whole) == to_dict(
        quick(
            toy_stores, out, variants=yaml.safe_load((out / "config.yaml").read_text())["variants"]
        )
    )
    one = load_config(RunConfig, checkpoints[1] / "config.yaml")
    assert one.variant == "flat"
    assert one.model.vision.feature_dim == 184
    told = json.loads((out / "provenance.json").read_text())
    assert told["packages"]["torch"]
    assert told["machine"]


def test_a_folder_in_use_is_refused_and_left_alone(done, toy_stores):
    out, checkpoints = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(ConfigError, match=r"already holds 1 checkpoint.*--resume .*--set out=DIR"):
        train_all(quick(toy_stores, out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_resume_skips_what_is_finished_and_trains_the_rest(done, toy_stores):
    out, checkpoints = done
    before = [(c / "model.safetensors").stat().st_mtime_ns for c in checkpoints]
    config = dataclasses.replace(load_config(RunConfig, out / "config.yaml"), seeds=(0, 1))
    config = dataclasses.replace(config, variants={})
    again = train_all(config, resume=True)
    assert [path.parent.name for path in again] == ["seed-0", "seed-1"]
    assert load_trainer_state(again[1])["finished"]
    assert [(c / "model.safetensors").stat().st_mtime_ns for c in checkpoints] == before


def test_a_bank_that_a_kill_left_out_is_written_on_resume(done, toy_stores):
    out, checkpoints = done
    bank = checkpoints[0] / "bank.h5"
    before = read_bank(bank)
    bank.unlink()
    train_all(quick(toy_stores, out), resume=True)
    np.testing.assert_array_equal(read_bank(bank).image, before.image)


def test_a_resume_with_other_settings_is_refused_by_section(done, toy_stores, tmp_path):
    config = quick(toy_stores, tmp_path)
    (job,) = expand(config)
    build(job).fit(until_step=1)
    wider = dataclasses.replace(config.model, omics=dataclasses.replace(OMICS, width=32))
    for change, words in (
        ({"model": wider}, r"model\.omics\.width \(16 there, 32 now\)"),
        ({"stages": (*QUICK, StageConfig("more", 1, MASKED))}, "stages.*"),
        (
            {"genes": dataclasses.replace(config.genes, rank=9), "model": wider},
            r"genes\.rank.*width.*",
        ),
    ):
        (other,) = expand(dataclasses.replace(config, **change))
        with pytest.raises(ConfigError, match=rf"other settings in: {words}; resume with"):
            build(other, resume=True)
    (same,) = expand(dataclasses.replace(config, checkpoint_every=9, bank=False))
    assert build(same, resume=True).step == 1


def test_there_must_be_something_to_resume(toy_stores, tmp_path):
    with pytest.raises(ConfigError, match="no such folder, so there is nothing to resume"):
        train_all(quick(toy_stores, tmp_path / "typo"), resume=True)
    assert not (tmp_path / "typo").exists()


def test_an_interrupted_run_says_how_to_go_on(toy_stores, tmp_path, monkeypatch):
    config = quick(toy_stores, tmp_path / "run")
    (job,) = expand(config)
    trainer = build(job)
    fit = trainer.fit
    monkeypatch.setattr("hibio.run.build", lambda *_, **__: trainer)
    monkeypatch.setattr(trainer, "fit", lambda: fit(until_step=1))
    with pytest.raises(InterruptedError, match=r"step 1 of 2 .*--config .*--resume "):
        train_all(config)
    monkeypatch.undo()
    assert find_checkpoint(job.folder) is not None
    train_all(config, resume=True)
    assert job.finished


# ------------------------------------------------------------------ kinds of data
@pytest.fixture(scope="module")
def blind_stores(toy_cohort, tmp_path_factory):
    """The cohort without its images."""
    rows = [dataclasses.replace(row, image=None) for row in read_manifest(toy_cohort)]
    folder = tmp_path_factory.mktemp("blind")
    assert not prepare(rows, folder, patch=PatchConfig(112.0, 32)).failed
    return folder


def test_counts_alone_train_without_a_vision_tower(blind_stores, tmp_path):
    stages = (StageConfig("omics", 1, MASKED),)
    config = run_config(blind_stores, tmp_path / "run", stages=stages)
    (checkpoint,) = train_all(config)
    model = HiBio.from_checkpoint(checkpoint)
    assert model.vision is None
    assert load_config(RunConfig, checkpoint / "config.yaml").model.vision.name == "none"
    assert not (checkpoint / "bank.h5").exists()
    again = train_all(config, resume=True)  # nothing is left to do, not even a bank
    assert again == [checkpoint]


def test_counts_alone_cannot_train_a_stage_with_images(blind_stores, toy_stores, tmp_path):
    with pytest.raises(ConfigError, match="stage 'spot' has terms that read images"):
        train_all(quick(blind_stores, tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"no vision tower: set data\.image"):
        train_all(quick(toy_stores, tmp_path / "b", data=DataConfig(toy_stores, image=None)))


def test_slides_without_an_image_join_the_omics_stage_only(blind_stores, toy_stores, tmp_path):
    for name, source in (("sim001", toy_stores), ("sim002", blind_stores), ("sim003", toy_stores)):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        (tmp_path / "mixed" / f"{name}.h5").write_bytes((source / f"{name}.h5").read_bytes())
    stages = (StageConfig("omics", 1, MASKED), *QUICK)
    config = run_config(tmp_path / "mixed", tmp_path / "run", stages=stages)
    (job,) = expand(config)
    trainer = build(job)
    assert trainer.plan.n_steps() == 2 + 1
    assert trainer.fit()
    finish(job, trainer)
    assert set(read_bank(job.folder / NAME / "bank.h5").slide) == {"sim001"}


def test_patches_through_timm_train_end_to_end(toy_stores, tmp_path):
    vision = dataclasses.replace(
        run_config(toy_stores, tmp_path).model.vision, name="timm", timm_name="test_resnet"
    )
    config = quick(toy_stores, tmp_path / "run", data=DataConfig(toy_stores, image="patches"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    (checkpoint,) = train_all(config)
    with SlideStore(toy_stores / "sim003.h5") as store:
        image = HiBio.from_checkpoint(checkpoint).encode_image(store.patches())
    assert image.shape == (70, 16)


def test_panels_that_share_nothing_are_an_error_before_anything_is_written(toy_stores, tmp_path):
    names = [f"ENSG{i:011d}" for i in range(400)]
    for name in ("sim001", "sim002", "sim003"):
        edit = rename_genes(names) if name == "sim001" else lambda file: None
        edit_store(toy_stores / f"{name}.h5", tmp_path / "mixed" / f"{name}.h5", edit)
    with pytest.raises(ConfigError, match=r"only 0 of 800 genes are on at least 100%"):
        train_all(quick(tmp_path / "mixed", tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("checkpoint*"))
