"""Mixture weights of slides: products over columns, names without case, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from hibio.config.files import ConfigError
from hibio.config.schema import build_section
from hibio.config.training import SamplerConfig
from hibio.data.sampler import slide_weights
from hibio.data.splits import SlideEntry
from hibio.run import build
from tests.hibio.test_trainer import one_job


def entry(number: int, technology: str, tissue: str) -> SlideEntry:
    return SlideEntry(
        Path(f"s{number}.h5"), f"s{number}", "P", True, 10, technology=technology, tissue=tissue
    )


SLIDES = [
    entry(0, "Visium", "kidney"),
    entry(1, "Xenium", "kidney"),
    entry(2, "Visium", "brain"),
    entry(3, "", "brain"),
]


def test_no_weights_are_all_one():
    assert slide_weights({}, SLIDES) == [1.0] * 4


def test_columns_multiply_and_what_is_not_named_has_one():
    weights = {"technology": {"xenium": 0.2, "VISIUM": 2}, "tissue": {"kidney": 3.0}}
    assert slide_weights(weights, SLIDES) == pytest.approx([6.0, 0.6, 2.0, 1.0])
    assert slide_weights({"technology": {"": 0.0}}, SLIDES) == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"tecnology": {"Visium": 1}}, r"no such column; did you mean 'technology'\?"),
        (
            {"technology": {"Xenum": 1}},
            r"sampler.weights.technology.Xenum: no training slide has this technology; did you "
            r"mean 'xenium'\? \(found: '', 'Visium', 'Xenium'\)",
        ),
        ({"tissue": {"lung": 1}}, r"no training slide has this tissue \(found: 'brain', 'kidney'"),
        ({"tissue": {"brain": -1}}, "is -1, expected a number of 0 or more"),
        ({"tissue": {"brain": float("nan")}}, "is nan, expected"),
        ({"tissue": {"brain": 1, "Brain": 2}}, "named twice"),
        ({"tissue": {"brain": 0, "kidney": 0}}, "each of the 4 training slides weight 0"),
    ],
)
def test_what_cannot_be(weights, words):
    with pytest.raises(ConfigError, match=words):
        slide_weights(weights, SLIDES)


def test_weights_are_read_from_a_configuration():
    config = build_section(SamplerConfig, {"weights": {"technology": {"Xenium": 1}}})
    assert config.weights == {"technology": {"Xenium": 1.0}}


def test_training_draws_by_them(toy_stores, tmp_path):
    """Two training slides of 70 spots, one share each: a weight of 3 gives one of them three."""
    job = one_job(toy_stores, tmp_path)
    weights = {"technology": {"Visium": 3.0}}
    sampler = dataclasses.replace(job.config.sampler, weights=weights)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, sampler=sampler))
    trainer = build(job)
    technologies = zip(trainer.plan.dataset.entries, ("Visium", "Xenium"), strict=True)
    trainer.plan.dataset.entries = tuple(
        dataclasses.replace(entry, technology=one) for entry, one in technologies
    )
    drawn = trainer.plan.sampler(trainer.stages[0])
    assert drawn.shares_per_slide(0).tolist() == [3, 1]
