"""What acts in a model: shares against a model built without the path, and the command."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from hibio.checkpoint import NAME
from hibio.data.dataset import PreparedSlides
from hibio.encoders.base import neighbour_mean
from hibio.model import HiBio
from hibio.paths import beside, change, path_shares
from hibio.run import build, expand, new_model
from tests.hibio.toy import (
    OMICS,
    assert_refused,
    make_model,
    make_slide,
    run_config,
    whole_batch,
)


@pytest.fixture(scope="module")
def batch(toy_stores, toy_artifacts):
    return whole_batch(make_slide(toy_stores, toy_artifacts))


def by_name(model, batch):
    return {one.path: one for one in path_shares(model, batch)}


@torch.no_grad()
def embedded(model, batch):
    return F.normalize(model.project_omics(batch), dim=1)


def test_a_path_is_what_the_output_loses_without_it(toy_artifacts, batch):
    model = make_model(toy_artifacts)
    before = copy.deepcopy(model.state_dict())
    found, whole = by_name(model, batch), embedded(model, batch)
    assert list(found) == [
        *("gene: value", "gene: rank", "gene: identity", "gene graph", "spot: own vector"),
        *("spot: neighbours' mean", "spots <- spots", "spots <- genes", "genes <- spot"),
        *("regions: attention", "anchors: mass moved", "anchors: gene graph"),
    ]
    for path, names in {
        "gene graph": ["bias_scale_H"],
        "spots <- spots": ["spot_attention.gate"],
        "spots <- genes": ["gate_up"],
        "genes <- spot": ["gate_down"],
    }.items():
        without = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in without.named_parameters():
                if any(name.endswith(one) for one in names):
                    parameter.zero_()
        cut = embedded(without, batch)
        lost = sum(float(((a - b) ** 2).sum()) for a, b in zip(whole, cut, strict=True))
        spread = sum(float(((a - whole.mean(dim=0)) ** 2).sum()) for a in whole)
        assert found[path].output == pytest.approx(lost / spread, rel=1e-3)
        assert found[path].acts == (lost / spread >= 0.01)
    tokens = [one.token for name, one in found.items() if name.startswith("gene: ")]
    assert sum(tokens) == pytest.approx(1.0)
    spots = [one.token for name, one in found.items() if name.startswith("spot: ")]
    assert sum(spots) + found["spots <- genes"].token == pytest.approx(1.0)
    after = model.state_dict()
    assert all(torch.equal(after[n], one) for n, one in before.items() if "cache" not in n)


def test_what_does_nothing_does_not_act(toy_artifacts, batch):
    model = make_model(toy_artifacts)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate_up" in name or "pool.score" in name:
                parameter.zero_()
    found = by_name(model, batch)
    assert found["spots <- genes"].output == 0.0
    assert not found["spots <- genes"].acts
    assert found["gene graph"].output == 0.0  # what the genes say goes nowhere
    assert found["gene graph"].facts["attention moved"] > 0.01
    assert found["regions: attention"].facts["entropy over uniform"] == pytest.approx(1.0)
    assert not found["regions: attention"].acts  # equal weights are the mean
    rows = {row["path"]: row["acts"] for row in beside(list(found.values()), list(found.values()))}
    assert not rows["spots <- genes"]
    assert rows["spot: own vector"]


@pytest.mark.parametrize(
    ("change_of", "gone"),
    [
        ({"skip": False}, {"spot: own vector", "spot: neighbours' mean"}),
        ({"cross": False}, {"spots <- genes", "genes <- spot"}),
        ({"gene_graph": False}, {"gene graph", "anchors: gene graph"}),
        ({"spatial_graph": False}, {"spots <- spots"}),
        ({"identity": "none"}, {"gene: identity"}),
    ],
)
def test_a_path_that_is_switched_off_has_no_row(toy_artifacts, batch, change_of, gone):
    plain = by_name(make_model(toy_artifacts), batch)
    omics = dataclasses.replace(OMICS, **change_of)
    found = by_name(make_model(toy_artifacts, omics=omics), batch)
    assert set(plain) - set(found) == gone


def test_the_perceptron_and_the_reference_mode(toy_artifacts, batch):
    model = make_model(toy_artifacts, omics=dataclasses.replace(OMICS, name="mlp"))
    found = by_name(model, batch)
    assert [one for one in found if one.startswith("spot")] == [
        "spot: own vector",
        "spot: neighbours' mean",
    ]
    around = neighbour_mean(batch.vector_SV, batch.neighbour_SN)
    with torch.no_grad():
        without = model.omics.layers(torch.cat([torch.zeros_like(around), around], dim=1))
        cut = F.normalize(model.omics_head(without), dim=1)
    expected = change(embedded(model, batch), cut)
    assert found["spot: own vector"].output == pytest.approx(expected, rel=1e-4)
    omics = dataclasses.replace(OMICS, variant="heist", identity="none", skip=False)
    found = by_name(make_model(toy_artifacts, omics=omics), batch)
    assert {"spot: place", "gene graph", "spots <- spots", "genes <- spot"} <= set(found)
    assert found["spots <- spots"].acts


def test_change_closed_form():
    whole = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # variance 1
    assert change(whole, whole) == 0.0
    assert change(whole, whole + 1.0) == pytest.approx(2.0)
    assert change(whole[:1], whole[:1] + 1.0) == 0.0


def test_the_doctor_looks_into_a_checkpoint(toy_stores, tmp_path, run):
    (job,) = expand(run_config(toy_stores, tmp_path / "run", bank=False))
    trainer = build(job)
    start = copy.deepcopy(trainer.model).eval()
    trainer.fit(until_step=3)
    code, out, told = run("doctor", "--checkpoint", job.folder, "--data", toy_stores)
    assert code == 0, told
    assert out.splitlines()[0].split() == ["path", "output", "token"]
    line = next(line for line in out.splitlines() if line.startswith("gene graph"))
    assert "attention moved" in line
    code, out, _ = run("doctor", "--checkpoint", job.folder / NAME, "--data", toy_stores, "--json")
    rows = {row["path"]: row for row in json.loads(out)}
    sample = trainer.plan.dataset.sample(start.halo)
    for path, one in by_name(start, sample).items():  # the start is that of the run
        assert rows[path]["start"]["output"] == pytest.approx(one.output, rel=1e-3, abs=1e-6)
    assert rows["gene: value"]["start"]["token"] == pytest.approx(1 / 3, rel=0.01)
    assert rows["gene: value"]["trained"] != rows["gene: value"]["start"]
    assert_refused(run("doctor", "--checkpoint", job.folder), "--checkpoint needs --data")
    assert_refused(run("doctor", "--data", toy_stores), "--data goes with --checkpoint DIR")
    empty = tmp_path / "other"
    empty.mkdir()
    (empty / "sim003.h5").write_bytes((toy_stores / "sim003.h5").read_bytes())
    wrong = run("doctor", "--checkpoint", job.folder, "--data", empty)
    assert_refused(wrong, "none of the slides that", "sim001")


def test_the_start_is_that_of_the_seed(toy_stores, tmp_path):
    (job,) = expand(run_config(toy_stores, tmp_path / "run", bank=False))
    trainer = build(job)
    again = new_model(trainer.model.config, trainer.plan.dataset, job.seed)
    other = new_model(trainer.model.config, trainer.plan.dataset, job.seed + 1)
    state = trainer.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in again.state_dict().items())
    assert not torch.equal(other.omics.rank.weight, again.omics.rank.weight)
    older = dataclasses.replace(trainer.plan.dataset.artifacts, scales=None)
    dataset = PreparedSlides(trainer.plan.dataset.entries, older, None)
    torch.manual_seed(job.seed)
    plain = HiBio(again.config, older).state_dict()
    found = new_model(again.config, dataset, job.seed).state_dict()
    assert all(torch.equal(one, plain[name]) for name, one in found.items())
