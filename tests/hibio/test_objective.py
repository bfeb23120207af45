"""The objective: only what a stage asks for, gradients where they belong, signal in the pairs."""

import dataclasses
import importlib
from functools import partial

import numpy as np
import pytest
import torch

from hibio import keys
from hibio.checkpoint import read_log
from hibio.config import training
from hibio.config.files import ConfigError
from hibio.config.model import VisionConfig
from hibio.config.training import ObjectiveConfig, StageConfig
from hibio.data.collate import Views
from hibio.encoders.genes import relative_values
from hibio.losses.contrastive import info_nce, soft_info_nce
from hibio.run import expand, train_job
from hibio.training import objective as module
from hibio.training.engine import OptimConfig, TorchEngine
from hibio.training.objective import Objective, draw_mask
from tests.hibio.toy import (
    MASKED,
    OMICS,
    REGION,
    SPOT,
    loss_of,
    make_model,
    make_slide,
    run_config,
    whole_batch,
)

LEVELS = ("250um", "500um")
PLAIN = ObjectiveConfig(duplicate_um=0.0)


@pytest.fixture(scope="module")
def slides(toy_stores, toy_artifacts):
    return [make_slide(toy_stores, toy_artifacts, name) for name in ("sim001", "sim002")]


@pytest.fixture(scope="module")
def batch(slides):
    return whole_batch(*slides, views=Views(np.random.default_rng(0), keep_counts=0.7))


@pytest.fixture
def model(toy_artifacts):
    return make_model(toy_artifacts)


def stage(weights: dict[str, float]) -> StageConfig:
    return StageConfig("s", 1, weights)


def losses(model, batch, weights, config=PLAIN, seed: int = 0):
    torch.manual_seed(seed)
    return loss_of(Objective(model, config, LEVELS), batch, stage(weights))


@pytest.mark.parametrize("term", keys.TERMS)
def test_a_stage_of_one_term_has_that_term_alone(model, batch, term):
    off = {other: 0.0 for other in keys.TERMS if other != term}
    out = losses(model, batch, {term: 2.0, **off})
    assert set(out.terms) == {term}
    assert float(out.total.detach()) == pytest.approx(2.0 * float(out.terms[term]), rel=1e-6)
    assert torch.isfinite(out.total)
    assert out.n == 140


def total(*args, **kwargs) -> float:
    return float(losses(*args, **kwargs).total.detach())


PARTS = {
    keys.TERM_SPOT: "info_nce",
    keys.TERM_REGION: "info_nce",
    keys.TERM_PATHWAY: "pathway_kl",
    keys.TERM_MEMBER: "spot_to_region",
    keys.TERM_MASKED: "draw_mask",
    keys.TERM_SPATIAL: "spatial_contrast",
    keys.TERM_DECORRELATION: "decorrelation",
    keys.TERM_EXPRESSION: "rows_mse",
}


@pytest.mark.parametrize("term", PARTS)
def test_terms_that_are_off_are_not_computed(model, batch, monkeypatch, term):
    def forbidden(*args, **kwargs):
        raise AssertionError("computed")

    together = (  # of one function
        keys.MASKED_TERMS | {keys.TERM_EXPRESSION},
        {keys.TERM_SPOT, keys.TERM_REGION},
    )
    off = {term}.union(*(terms for terms in together if term in terms))
    weights = {other: 1.0 for other in keys.TERMS if other not in off}
    monkeypatch.setattr(module, PARTS[term], forbidden)
    assert term not in losses(model, batch, weights).terms
    with pytest.raises(AssertionError, match="computed"):
        losses(model, batch, {term: 1.0})


def test_an_omics_stage_never_runs_the_image_tower(model, batch, monkeypatch):
    monkeypatch.setattr(model, "project_image", None)
    assert set(losses(model, batch, MASKED).terms) == set(MASKED)


def test_the_total_is_the_weighted_sum_of_separate_runs(model, batch):
    weights = {**REGION, keys.TERM_DECORRELATION: 0.1}
    together = losses(model, batch, weights)
    alone = {term: float(losses(model, batch, {term: 1.0}).terms[term]) for term in weights}
    for term, value in alone.items():
        assert float(together.terms[term]) == pytest.approx(value, rel=1e-4, abs=1e-6)
    expected = sum(weights[term] * value for term, value in alone.items())
    assert float(together.total.detach()) == pytest.approx(expected, rel=1e-4)


def moved(model) -> set[str]:
    """First names of the parts of the model that got a gradient."""
    return {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (SPOT, {"vision", "image_head", "expression_head", "omics", "omics_head", "log_scale"}),
        (
            {keys.TERM_REGION: 1.0},
            {"vision", "image_head", "omics", "omics_head", "pool", "log_scale"},
        ),
        (
            {keys.TERM_PATHWAY: 1.0},
            {"vision", "image_head", "omics", "omics_head", "log_scale_anchor"},
        ),
        ({keys.TERM_SPATIAL: 1.0}, {"omics", "omics_head", "log_scale"}),
        (MASKED, {"omics", "omics_head", "decoder", "own_head", "niche_head"}),
        ({keys.TERM_EXPRESSION: 1.0}, {"vision", "image_head", "expression_head"}),
    ],
)
def test_gradients_reach_what_a_stage_trains_and_nothing_else(model, batch, weights, expected):
    losses(model, batch, weights).total.backward()
    assert moved(model) == expected


def test_no_gradient_reaches_a_frozen_backbone(toy_artifacts, toy_stores):
    vision = VisionConfig(name="timm", timm_name="test_resnet", tune="none")
    model = make_model(toy_artifacts, vision=vision)
    patches = whole_batch(make_slide(toy_stores, toy_artifacts, image="patches"))
    losses(model, patches, SPOT).total.backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert moved(model) >= {"image_head", "omics"}


# ------------------------------------------------------------------ values of single terms
def test_the_spot_term_is_info_nce_with_the_negatives_asked_for(model, batch):
    with torch.no_grad():
        pair = model(batch)
    values = {}
    for negatives in ("same_slide", "all", "mixed"):
        config = dataclasses.replace(PLAIN, negatives=negatives)
        values[negatives] = total(model, batch, {keys.TERM_SPOT: 1.0}, config)
        with torch.no_grad():
            expected = info_nce(
                pair.image, pair.omics, model.temperature, None, pair.group, negatives
            )
        assert values[negatives] == pytest.approx(float(expected), rel=1e-5)
    assert values["same_slide"] < values["all"]  # fewer candidates
    assert values["mixed"] == pytest.approx((values["same_slide"] + values["all"]) / 2, rel=1e-5)


@pytest.mark.parametrize("negatives", ["same_slide", "all", "mixed"])
def test_soft_targets_take_the_place_of_identity_ones(model, batch, negatives):
    with torch.no_grad():
        pair = model(batch)
        soft = partial(soft_info_nce, pair.image, pair.omics, model.temperature, 0.3)
        both = {
            "all": [soft()],
            "same_slide": [soft(pair.group)],
            "mixed": [soft(), soft(pair.group)],
        }
        expected = float(torch.stack(both[negatives]).mean())
    changes = {"targets": "soft", "target_temperature": 0.3, "negatives": negatives}
    config = dataclasses.replace(PLAIN, **changes)
    assert total(model, batch, {keys.TERM_SPOT: 1.0}, config) == pytest.approx(expected, rel=1e-5)


def test_near_duplicates_are_no_negatives(model, batch):
    """Every spot on top of its neighbours with one profile: nothing is left to contrast with."""
    term = {keys.TERM_SPOT: 1.0}
    same = dataclasses.replace(
        batch,
        vector_SV=batch.vector_SV[:1].expand_as(batch.vector_SV) + 1e-3 * batch.vector_SV,
        xy_um_S2=torch.zeros_like(batch.xy_um_S2),
    )
    with_rule = ObjectiveConfig(duplicate_um=150.0, duplicate_correlation=0.9)
    assert total(model, same, term, with_rule) == pytest.approx(0.0, abs=1e-6)
    assert total(model, same, term, PLAIN) > 1.0


@torch.no_grad()
def test_region_terms_against_their_definitions(model, batch):
    spot, between, member = model(batch), [], []
    for own in batch.region_of_spot_LS:
        region, _ = model.regions(spot, own)
        between.append(
            info_nce(
                region.image,
                region.omics,
                model.temperature,
                group_N=region.group,
                negatives="same_slide",
            )
        )
        for one, other in ((spot.image, region.omics), (spot.omics, region.image)):
            logit = one @ other.T / model.temperature
            member.append(torch.nn.functional.cross_entropy(logit, own))
    terms = losses(model, batch, REGION).terms
    for name, values in ((keys.TERM_REGION, between), (keys.TERM_MEMBER, member)):
        assert float(terms[name]) == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


def test_masked_terms_against_their_definitions(model, batch):
    torch.manual_seed(0)
    mask = draw_mask(batch.gene_SK < 400, 0.2, 0.15)
    with torch.no_grad():
        view = model.masked_view(batch, mask)
    target = relative_values(batch.value_SK, batch.gene_SK < 400)
    target = model.standardised(target, batch.gene_SK)
    around = [
        torch.cat([batch.frequency_SH[[spot]], batch.frequency_SH[near[near >= 0]]]).mean(dim=0)
        for spot, near in enumerate(batch.neighbour_SN)
    ]
    expected = {
        keys.TERM_MASKED: (view.value_SK - target)[mask.gene_SK].square().mean(),
        keys.TERM_PROFILE: (view.own_SV - batch.vector_SV).square().mean(),
        keys.TERM_NEIGHBOUR: (view.niche_SH - torch.stack(around)).square().mean(),
    }
    terms = losses(model, batch, MASKED, seed=0).terms
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(float(value), rel=1e-4)


def test_terms_are_over_core_spots_only(model, slides):
    """The halo is context: with enough of it a part of a slide has the terms of that part."""
    from hibio.data.collate import collate
    from tests.hibio.toy import regions_of

    slide, core = slides[0], list(range(20, 50))
    part = collate([(slide, regions_of(slide), torch.tensor(core).numpy())], hops=model.halo)
    assert part.n_spots > 30
    out = losses(model, part, {keys.TERM_SPOT: 1.0, keys.TERM_EXPRESSION: 1.0})
    assert out.n == 30
    with torch.no_grad():
        whole = model(whole_batch(slide))
        expected = info_nce(whole.image[core], whole.omics[core], model.temperature)
    assert float(out.terms[keys.TERM_SPOT]) == pytest.approx(float(expected), rel=1e-4)


def test_a_few_anchors_a_step_name_the_most_wanted(model, batch):
    n_sets = model.artifacts.n_pathways
    config = dataclasses.replace(PLAIN, anchors_per_step=6)
    one = Objective(model, config, ())
    target = torch.zeros(5, n_sets)
    target[:, [7, 2, 11]] = torch.tensor([0.5, 0.3, 0.2])
    drawn = [one._fresh_anchors(target) for _ in range(20)]
    assert all(set(rows[:3].tolist()) == {7, 2, 11} for rows in drawn)
    assert all(len(set(rows.tolist())) == 6 for rows in drawn)
    assert len({tuple(sorted(rows.tolist())) for rows in drawn}) > 3  # the others are drawn
    assert Objective(model, PLAIN, ())._fresh_anchors(target[:, :20]) is None


def test_half_precision_changes_little_and_breaks_nothing(model, batch):
    """As on a GPU: the forward pass in bf16, parameters and gradients in fp32."""
    weights = {**REGION, **MASKED, keys.TERM_DECORRELATION: 0.1}
    full = losses(model, batch, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = losses(model, batch, weights)
    half.total.backward()
    for name, value in full.terms.items():
        assert float(half.terms[name]) == pytest.approx(float(value), rel=0.05, abs=0.02), name
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 40
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


def test_random_draws_follow_from_the_seed(model, batch):
    first, second, other = (losses(model, batch, MASKED, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.total, second.total)
    assert not torch.equal(first.total, other.total)


# ------------------------------------------------------------------ learning
def train(model, batch, n_steps: int) -> None:
    engine = TorchEngine(model, OptimConfig(), "cpu")
    for step in range(n_steps):
        engine.step(losses(model, batch, {keys.TERM_SPOT: 1.0}, seed=step).total, 3e-3)


def test_true_pairs_are_learned_and_carry_over_to_another_slide(toy_artifacts, slides):
    """After 40 steps true pairs beat shuffled ones, on the slide trained on and on the other."""
    model = make_model(toy_artifacts)
    own, other = (whole_batch(slide) for slide in slides)
    start = total(model, own, {keys.TERM_SPOT: 1.0})
    train(model, own, 40)
    for batch, margin in ((own, 0.5), (other, 0.1)):
        torch.manual_seed(0)
        order = torch.randperm(batch.n_spots)
        shuffled = dataclasses.replace(batch, features_SF=batch.features_SF[order])
        true = total(model, batch, {keys.TERM_SPOT: 1.0})
        assert true < total(model, shuffled, {keys.TERM_SPOT: 1.0}) - margin
    assert total(model, own, {keys.TERM_SPOT: 1.0}) < start - 0.5


# ------------------------------------------------------------------ refusals
def test_stages_that_the_model_cannot_compute_are_refused_at_once(toy_artifacts):
    blind = make_model(toy_artifacts, vision=VisionConfig(name="none"))
    with pytest.raises(ConfigError, match=r"stage 's' .*spot/contrastive\), and this model has no"):
        Objective(blind, PLAIN, ()).check([stage(MASKED), stage({keys.TERM_SPOT: 1.0})])
    flat = make_model(toy_artifacts, omics=dataclasses.replace(OMICS, name="mlp"))
    with pytest.raises(ConfigError, match=r"masked view \(omics/masked.*'mlp' does not have"):
        Objective(flat, PLAIN, ()).check([stage(SPOT), stage(MASKED)])
    Objective(flat, PLAIN, ()).check([stage(REGION)])
    Objective(blind, PLAIN, ()).check([stage(MASKED)])


# ------------------------------------------------------------------ CONTRIBUTING: "A loss"
def test_a_loss_is_added_as_the_guide_says(toy_stores, tmp_path, monkeypatch):
    """One function in a file, a name with what it reads, one entry of the table, a weight."""
    (tmp_path / "lab_losses.py").write_text(
        "def spread(embedding_SD):\n    return (embedding_SD @ embedding_SD.T).square().mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spread = importlib.import_module("lab_losses").spread
    term = "omics/spread"
    monkeypatch.setitem(keys.TERMS, term, "mean squared cosine of all pairs of profiles")
    monkeypatch.setattr(training, "EMBEDDING_TERMS", keys.EMBEDDING_TERMS | {term})
    monkeypatch.setitem(
        module.STEP_TERMS, (term,), lambda objective, rows, active: {term: spread(rows["omics"])}
    )
    stages = (StageConfig("lab", 4, {term: 1.0, keys.TERM_DECORRELATION: 0.0}, lr=3e-3),)
    (job,) = expand(run_config(toy_stores, tmp_path / "run", stages=stages, bank=False))
    train_job(job)
    values = [record["terms"][term] for record in read_log(job.folder / "log.jsonl")]
    assert len(values) == 8
    assert 0 < values[-1] < values[0]
