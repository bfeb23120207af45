"""Every key acts: a shipped configuration sets it, or a second value changes what it should.

A new key needs an entry here, or a line in a file of ``configs/``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from hibio import keys
from hibio.checkpoint import read_log
from hibio.config.files import changed, to_dict
from hibio.config.model import ImageInput
from hibio.config.run import RunConfig
from hibio.config.schema import build_section
from hibio.config.training import SamplerConfig, StageConfig
from hibio.data.dataset import PreparedSlides
from hibio.data.splits import read_entries
from hibio.run import build, expand
from preprocessing.store.read import stores_in
from tests.hibio.toy import MASKED, REGION, run_config

TESTS = Path(__file__).resolve().parents[1]
CONFIGS = TESTS.parent / "configs"

EVERY_TERM = {**REGION, **MASKED, keys.TERM_SPATIAL: 1.0, keys.TERM_DECORRELATION: 1.0}

#: Key -> a second value, with which the losses of the first steps are other numbers.
SECOND: dict[str, Any] = {
    "genes.neighbours": 3,
    "genes.target_genes": 12,
    "genes.graph_edges": 4,
    "pathways.temperature": 2.0,
    "pathways.top": 1,
    "pathways.threshold": 1.0,
    "sampler.halo": 0,
    "sampler.batches_per_step": 2,
    "model.vision.dropout": 0.6,
    "model.vision.context": "neighbours",
    "model.dropout": 0.5,
    "model.temperature": 0.3,
    "model.anchor_temperature": 0.3,
    "objective.duplicate_correlation": -1.0,
    "objective.mask_genes": 0.7,
    "objective.mask_spots": 0.7,
    "objective.contrast_um": 400.0,
    "objective.contrast_correlation": -1.0,
    "objective.drop_genes": 0.7,
    "objective.keep_counts": 0.3,
    "objective.anchors_per_step": 4,
    "optim.weight_decay": 10.0,
    "optim.clip": 1e-6,
    "optim.precision": "bf16",
}

#: Key -> the test that gives it a second value.
TESTED = {
    "data.cache_slides": "hibio/test_every_key.py::test_no_more_slides_are_kept_than_asked",
    "data.test": "hibio/test_resume_refused.py::test_said_test_slides_are_not_trained_on",
    "log.to": "hibio/test_log.py::test_a_run_tells_its_trackers_and_names_what_is_missing",
    "data.prefetch": "hibio/test_plan.py::test_reading_ahead_changes_nothing",
    "genes.min_slide_fraction": "hibio/test_fitting.py::test_vocabulary_against_plain_loops",
    "genes.exclude": (
        "hibio/test_fitting.py::test_excluded_genes_are_left_out_by_name_and_by_pattern"
    ),
    "pathways.min_genes": "hibio/test_fitting.py::test_set_sizes_are_limited_and_the_settings_kept",
    "pathways.max_genes": "hibio/test_fitting.py::test_set_sizes_are_limited_and_the_settings_kept",
    "sampler.balance": "hibio/test_sampler.py::test_every_spot_exactly_once_by_spot_balance",
    "sampler.window": (
        "hibio/test_sampler.py::test_slides_come_window_by_window_and_are_read_once"
    ),
    "sampler.weights": "hibio/test_mixture.py::test_training_draws_by_them",
    "model.vision.name": "hibio/test_vision.py::test_a_tower_of_the_user",
    "model.vision.timm_name": (
        "hibio/test_vision.py::test_models_of_a_fixed_size_or_with_a_wide_head"
    ),
    "model.vision.pretrained": "hibio/test_model.py::test_a_checkpoint_needs_no_other_weights_file",
    "model.vision.weights": "hibio/test_vision.py::test_weights_file_round_trip",
    "model.vision.tune": (
        "hibio/test_vision.py::test_a_frozen_backbone_gets_no_gradient_and_does_not_move"
    ),
    "model.vision.tune_blocks": (
        "hibio/test_tuning.py::test_the_last_blocks_are_trained_and_the_others_stay"
    ),
    "model.vision.standardise": (
        "hibio/test_vision.py::test_brighter_scanners_cancel_out_by_slide_and_not_by_constants"
    ),
    "model.vision.stain": (
        "hibio/test_stain_input.py::test_a_run_trains_on_it_and_its_checkpoint_remembers"
    ),
    "model.vision.feature_dim": "hibio/test_features.py::test_a_model_trains_on_them",
    "model.vision.settings": (
        "hibio/test_own_encoder.py::test_an_encoder_of_ones_own_trains_and_loads_elsewhere"
    ),
    "model.omics.settings": (
        "hibio/test_own_encoder.py::test_an_encoder_of_ones_own_trains_and_loads_elsewhere"
    ),
    "model.omics.rank_code": (
        "hibio/test_heist_published.py::test_the_published_encoder_gives_the_same"
    ),
    "model.omics.checkpoint": (
        "hibio/test_grad_cache.py::test_layers_computed_again_give_the_same_gradient"
    ),
    "optim.graph_rate": (
        "hibio/test_calibrate.py::test_the_rate_of_the_graph_is_a_factor_of_the_stages"
    ),
    "optim.shares_every": (
        "hibio/test_calibrate.py::test_shares_of_the_gradient_are_looked_at_as_often_as_asked"
    ),
    "optim.engine": "hibio/test_engine_settings.py::test_which_engine_auto_means",
    "optim.zero": (
        "hibio/test_engine_settings.py::test_the_generated_settings_and_what_is_merged_over_them"
    ),
    "optim.offload": (
        "hibio/test_engine_settings.py::test_the_generated_settings_and_what_is_merged_over_them"
    ),
    "optim.deepspeed": (
        "hibio/test_engine_settings.py::test_the_generated_settings_and_what_is_merged_over_them"
    ),
    "device": "hibio/test_engine_settings.py::test_ports_are_free_and_each_process_has_its_own_gpu",
    "stages.epochs": "hibio/test_trainer.py::test_a_length_in_steps_is_that_length_in_epochs",
    "curriculum": "hibio/test_curriculum.py::test_verdicts_change_the_weights_as_they_say",
    "checkpoint_every": ("hibio/test_trainer.py::test_a_crash_goes_back_to_the_last_checkpoint"),
}


def keys_of(cls: type, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of a configuration; those of the stages without a number."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = StageConfig if field.name == "stages" else hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from keys_of(inner, (*above, field.name))
        else:
            yield ".".join((*above, field.name))


def keys_in(data: Any, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys that plain values set, those inside of dotted ones too."""
    if isinstance(data, list):
        for item in data:
            yield from keys_in(item, above)
    elif isinstance(data, Mapping):
        for name, value in data.items():
            parts = [part for part in str(name).split(".") if part != "*" and not part.isdigit()]
            yield ".".join((*above, *parts))
            yield from keys_in(value, (*above, *parts))


def shipped_keys() -> set[str]:
    """Keys that a shipped run or grid sets."""
    found: set[str] = set()
    for path in CONFIGS.rglob("*.yaml"):
        data = yaml.safe_load(path.read_text())
        sections = [data, data.get("settings"), data.get("sweep")]
        sections += [*(data.get("variants") or {}).values(), *(data.get("rows") or {}).values()]
        for section in sections:
            found |= set(keys_in(section))
    return found


def test_every_key_is_covered_and_nothing_else_is_listed():
    every, listed = set(keys_of(RunConfig)), {*SECOND, *TESTED}
    assert every - listed - shipped_keys() == set()
    assert listed - every == set()


@pytest.mark.parametrize("key", TESTED)
def test_the_tests_that_are_named_are_there(key):
    file, _, name = TESTED[key].partition("::")
    assert f"def {name}(" in (TESTS / file).read_text()


@pytest.fixture(scope="module")
def losses(toy_stores, tmp_path_factory):
    """Losses of the first steps of a toy run with all terms, with other settings."""

    def run(n_steps: int = 1, **changes: Any) -> list[dict[str, float]]:
        folder = tmp_path_factory.mktemp("key")
        stages = (StageConfig("every", 2, EVERY_TERM),)
        half = SamplerConfig(batch_spots=35)  # of a slide, so that its halo is not empty
        plain = to_dict(run_config(toy_stores, folder, stages=stages, sampler=half, bank=False))
        config = build_section(RunConfig, changed(plain, changes, "test"))
        (job,) = expand(config)
        build(job).fit(until_step=n_steps)
        return [step["terms"] for step in read_log(job.folder / "log.jsonl")]

    return run


@pytest.fixture(scope="module")
def plain(losses):
    return losses(n_steps=2)


def test_the_same_settings_give_the_same_losses(losses, plain):
    assert losses(n_steps=2) == plain
    assert set(plain[1]) == set(EVERY_TERM)


@pytest.mark.parametrize("key", SECOND)
def test_a_second_value_changes_the_losses(losses, plain, key):
    n_steps = 2 if key.startswith("optim") else 1  # the first losses are of the first weights
    assert losses(n_steps, **{key: SECOND[key]}) != plain[:n_steps]


@pytest.mark.parametrize(("kept", "same"), [(1, False), (2, True)])
def test_no_more_slides_are_kept_than_asked(toy_stores, toy_artifacts, kept, same):
    entries = read_entries(stores_in(toy_stores))
    dataset = PreparedSlides(entries, toy_artifacts, ImageInput("handcrafted"), kept)
    first = dataset[0]
    assert dataset[0] is first
    dataset[1]
    assert (dataset[0] is first) == same
