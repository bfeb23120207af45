"""Judged stages: scores against plain loops, verdicts, what is held out, and whole runs."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from eval.embed import find_checkpoints
from hibio import keys
from hibio.checkpoint import NAME, REHEARSAL, load_trainer_state, steps_taken, verdicts_on
from hibio.config.files import ConfigError
from hibio.config.training import SamplerConfig, StageConfig
from hibio.data.sampler import pack_regions
from hibio.data.splits import SlideEntry
from hibio.run import build, expand, train_job
from hibio.training import curriculum, trainer
from hibio.training.curriculum import (
    Verdict,
    followed,
    found_pairs,
    hold_out,
    inner_block,
    judged_stages,
    mean_weights,
)
from tests.hibio.test_trainer import assert_same, everything
from tests.hibio.toy import MASKED, REGION, SPOT, make_slide, run_config

STAGES = (
    StageConfig("omics", None, MASKED, steps=1),
    StageConfig("spot", None, SPOT, steps=2),
    StageConfig("region", None, REGION, rebuild_every=1, steps=2),
    StageConfig("last", None, SPOT, steps=2),
)


def job_of(stores, out, **changes):
    settings = {"stages": STAGES, "curriculum": "judged", "bank": False, **changes}
    (job,) = expand(run_config(stores, out, **settings))
    return job


# ------------------------------------------------------------------ the parts
def test_found_pairs_against_sorting():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(57, 4))
    omics = image + rng.normal(size=image.shape)
    image, omics = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (image, omics))
    found = 0
    for spot in range(57):
        nearest = sorted(range(57), key=lambda other: -float(image[spot] @ omics[other]))[:6]
        found += spot in nearest
    assert found_pairs(image, omics) == pytest.approx(found / 57)
    assert found_pairs(image, omics, tile=10) == found_pairs(image, omics)
    order = rng.permutation(57)
    assert found_pairs(image[order], omics[order]) == found_pairs(image, omics)
    assert found_pairs(image, image) == 1.0
    assert found_pairs(image, np.ones_like(omics)) == 0.0  # all alike: nothing is found


@pytest.mark.parametrize(
    ("before", "mixed", "after", "outcome"),
    [
        (0.30, 0.30, 0.32, "kept"),
        (0.30, 0.33, 0.32, "mixed"),
        (0.30, 0.32, 0.32, "kept"),
        (0.30, 0.305, 0.309, "undone"),  # noise
        (0.30, 0.20, 0.10, "undone"),
        (0.30, 0.32, 0.10, "mixed"),
    ],
)
def test_verdicts(before, mixed, after, outcome):
    verdict = Verdict.of("s", (before, mixed, after), "patient B")
    assert verdict.outcome == outcome
    assert Verdict(**verdict.plain()) == verdict
    assert f"'s' {outcome}" in str(verdict)
    assert [
        stage.name for stage in followed([STAGES[1], StageConfig("s", 1, SPOT)], [verdict])
    ] == (["spot"] if outcome == "undone" else ["spot", "s"])


def test_which_stages_are_judged():
    assert list(judged_stages(STAGES)) == [2, 3]
    assert not judged_stages(STAGES[:2])
    assert not judged_stages(STAGES[:1])


def test_mean_weights():
    one = {"w": torch.tensor([1.0, 3.0]), "n": torch.tensor(3)}
    other = {"w": torch.tensor([3.0, 3.0]), "n": torch.tensor(5)}
    found = mean_weights(one, other)
    assert found["w"].tolist() == [2.0, 3.0]
    assert int(found["n"]) == 5


def entry(tmp_path, name, patient, image=True, spots=10):
    return SlideEntry(tmp_path / name, name, patient, image, spots)


def test_an_inner_patient_leaves_with_all_its_slides(tmp_path):
    entries = [
        entry(tmp_path, "a1", "A"),
        entry(tmp_path, "b1", "B"),
        entry(tmp_path, "b2", "B", image=False),
        entry(tmp_path, "c1", "C", image=False),
    ]
    for seed, patient in ((0, "A"), (1, "B"), (2, "A")):  # C has nothing to be judged by
        inner = hold_out(entries, seed, 1, pytest.fail)
        assert inner.name == f"patient {patient}"
        assert [e.slide_id for e in inner.entries] == [f"{patient.lower()}1"]
        assert {e.patient_id for e in inner.others(entries)} == {"A", "B", "C"} - {patient}
        assert inner.hidden_in(inner.others(entries)) == {}
    with pytest.raises(ConfigError, match="needs training slides with images"):
        hold_out(entries[2:], 0, 1, pytest.fail)


@pytest.mark.parametrize("seed", range(5))
def test_a_block_and_its_margin(toy_stores, toy_artifacts, tmp_path, seed):
    slide = make_slide(toy_stores, toy_artifacts)
    one = entry(tmp_path, "sim001", "A", spots=slide.n_spots)
    inner = inner_block(one, slide, 1, seed)
    assert inner.block.sum() == round(0.2 * slide.n_spots)
    near = inner.block
    for _ in range(2):  # halo + 1 hops, by plain loops
        near = np.array(
            [near[i] or any(near[j] for j in slide.neighbour_SN[i] if j >= 0) for i in range(70)]
        )
    assert inner.hidden.tolist() == near.tolist()
    assert inner.others([one]) == (one,)
    (hidden,) = inner.hidden_in([one]).values()
    assert hidden is inner.hidden
    regions = np.where(inner.hidden, -1, np.arange(70) // 5)
    packed = np.sort(np.concatenate(pack_regions(regions, 2, np.random.default_rng(0))))
    assert packed.tolist() == np.flatnonzero(~inner.hidden).tolist()


# ------------------------------------------------------------------ whole runs
@pytest.fixture
def scores(monkeypatch):
    """Verdicts as told instead of measured: scores of (before, mixed, after) stage by stage."""

    def tell(*told):
        given = iter([score for three in told for score in three])
        monkeypatch.setattr(trainer.Judge, "score", lambda self, model: next(given))

    return tell


KEPT, MIXED, UNDONE = (0.1, 0.2, 0.5), (0.1, 0.5, 0.2), (0.5, 0.1, 0.1)


def test_a_measured_rehearsal_and_its_run(toy_stores, tmp_path, capsys):
    """Nothing is told here: the rehearsal trains without its patient and its word is followed."""
    job = job_of(toy_stores, tmp_path)
    checkpoint = train_job(job)
    verdicts = [Verdict(**one) for one in verdicts_on(checkpoint)]
    assert [verdict.stage for verdict in verdicts] == ["region", "last"]
    assert {verdict.judged_on for verdict in verdicts} == {"patient patient01"}
    assert verdicts_on(job.rehearsal.folder / NAME) == [one.plain() for one in verdicts]
    assert steps_taken(job.rehearsal.folder / NAME) == 7
    undone = sum(2 for verdict in verdicts if verdict.outcome == "undone")
    assert steps_taken(checkpoint) == 7 - undone
    assert find_checkpoints(tmp_path) == [checkpoint]  # the rehearsal is none of the run's
    assert job.finished
    assert job.started
    again = Verdict.of("region", [verdicts[0].before, verdicts[0].mixed, verdicts[0].after], "x")
    assert again.outcome == verdicts[0].outcome


def test_verdicts_change_the_weights_as_they_say(toy_stores, tmp_path, scores):
    """Undone is never trained; kept is the blind run; mixed is the mean of before and after."""

    def weights(name, *told, stages=STAGES[:3], kind="judged"):
        scores(*told)
        job = job_of(toy_stores, tmp_path / name, stages=stages, curriculum=kind)
        train_job(job)
        return dict(build(job, resume=True).model.state_dict())

    before = weights("before", stages=STAGES[:2], kind="blind")
    after = weights("after", kind="blind")
    assert_same(weights("undone", UNDONE), before)
    assert_same(weights("kept", KEPT), after)
    assert_same(weights("mixed", MIXED), mean_weights(before, after))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_rehearsal_goes_on_from_what_was_chosen(toy_stores, tmp_path, scores):
    """After an undone stage weights, moments and trees are those before it."""
    scores(UNDONE)
    job = job_of(toy_stores, tmp_path / "judged", stages=STAGES[:3]).rehearsal
    one = build(job)
    assert one.fit()
    two = build(dataclasses.replace(job, folder=tmp_path / "before"))
    assert not two.fit(until_step=3)
    assert_same(dict(one.model.state_dict()), dict(two.model.state_dict()))
    assert_same(one.engine.state(), two.engine.state())
    assert_same(one.regions.state(), two.regions.state())


@pytest.mark.parametrize("cut", [4, 6])
def test_a_judged_run_resumes_to_the_bit(toy_stores, tmp_path, scores, cut):
    """In the rehearsal and in the run itself, inside of judged and mixed stages and between."""
    scores(MIXED, KEPT, MIXED, KEPT)
    left = job_of(toy_stores, tmp_path / "left")
    train_job(left)
    right = job_of(toy_stores, tmp_path / "right")
    for part in (right.rehearsal, right):
        first = build(part)
        assert first.fit(until_step=cut) is False
        second = build(part, resume=True)
        assert second.fit()
    whole = build(left, resume=True)
    assert_same(everything(second), everything(whole))
    assert [one.outcome for one in second.verdicts] == ["mixed", "kept"]


def test_a_single_patient_is_judged_on_a_block(toy_stores, tmp_path):
    for name in ("sim001", "sim002"):
        (tmp_path / "stores").mkdir(exist_ok=True)
        shutil.copy(toy_stores / f"{name}.h5", tmp_path / "stores")
    job = job_of(tmp_path / "stores", tmp_path / "run", folds=("patient02",))
    rehearsal = build(job.rehearsal)
    assert rehearsal.judge.inner.name == "14 spots of sim001"
    hidden = np.flatnonzero(rehearsal.judge.inner.hidden)
    seen = [core for step in rehearsal.plan.epoch(STAGES[1], 0, 0, 0) for _, core in step.shares]
    assert len(np.intersect1d(np.concatenate(seen), hidden)) == 0
    assert np.concatenate(seen).size == 70 - len(hidden)
    assert 0.0 <= rehearsal.judge.score(rehearsal.model) <= 1.0


def test_what_needs_no_rehearsal_has_none(toy_stores, tmp_path):
    assert job_of(toy_stores, tmp_path, stages=STAGES[:2]).rehearsal is None
    assert job_of(toy_stores, tmp_path, curriculum="blind").rehearsal is None
    judged = job_of(toy_stores, tmp_path)
    assert judged.rehearsal.folder == judged.folder / REHEARSAL
    with pytest.raises(ConfigError, match="its rehearsal is not finished; train it with"):
        build(judged)
    twice = (STAGES[1], dataclasses.replace(STAGES[2], name="spot"))
    with pytest.raises(ValueError, match="needs stages of different names"):
        job_of(toy_stores, tmp_path, stages=twice)


def test_blind_checkpoints_say_nothing(toy_stores, tmp_path):
    job = job_of(toy_stores, tmp_path, curriculum="blind", sampler=SamplerConfig(batch_spots=70))
    build(job).fit(until_step=1)
    assert load_trainer_state(job.folder / NAME)["before"] is None
    assert verdicts_on(job.folder / NAME) == []
    assert keys.TERM_SPOT in STAGES[1].active
    assert curriculum.NOISE == 0.01
