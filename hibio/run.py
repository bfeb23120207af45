"""The jobs of a training run: listed, joined from their parts (`build`), trained and finished."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from hibio.artifacts import Artifacts, read_artifacts, write_artifacts
from hibio.bank import build_bank, has_bank, write_bank
from hibio.checkpoint import (
    ARTIFACTS,
    BANK,
    CONFIG,
    NAME,
    PROVENANCE,
    REHEARSAL,
    add_checksum,
    find_checkpoint,
    load_trainer_state,
    verdicts_on,
    write_provenance,
)
from hibio.config.data import GenesConfig, PathwaysConfig
from hibio.config.files import ConfigError, dump_config, explained, merge, to_dict
from hibio.config.model import ImageInput, ModelConfig
from hibio.config.run import DataConfig, RunConfig
from hibio.config.schema import SchemaError, build_section
from hibio.data.dataset import PreparedSlides
from hibio.data.fitting import fit_artifacts
from hibio.data.slide import sized_vision
from hibio.data.splits import (
    SlideEntry,
    Split,
    expand_folds,
    limited,
    read_entries,
    said_for_test,
    split_by_patient,
    tell_roles,
    with_counts,
)
from hibio.encoders.base import trust_code
from hibio.keys import MAIN
from hibio.model import HiBio
from hibio.training.checkpoint import (
    SavedRun,
    load_newest,
    refuse_other_settings,
    refuse_other_slides,
    refuse_seen,
    whole_checkpoint,
)
from hibio.training.curriculum import Inner, Judge, Verdict, followed, hold_out, judged_stages
from hibio.training.engine import Engine, build_engine
from hibio.training.engine.base import choose_device
from hibio.training.log import require_trackers
from hibio.training.objective import Objective
from hibio.training.plan import Plan, own_micro_batches
from hibio.training.process_group import ProcessGroup, start_processes, stops_at_once
from hibio.training.region_state import RegionState
from hibio.training.trainer import Trainer, parameter_use
from preprocessing.files import locked, refuse_others
from preprocessing.store.read import stores_in

FIT_THREADS = 8  # of the fit unless a number is given: each holds one slide and its products


@dataclass(frozen=True)
class Job:
    """One training: a variant on a fold with a seed; or the rehearsal of one."""

    config: RunConfig
    fold: str
    seed: int
    folder: Path
    is_rehearsal: bool = False

    @property
    def name(self) -> str:
        """variant/fold-X/seed-N."""
        return "/".join(self.folder.parts[-3:])

    @property
    def started(self) -> bool:
        """Whether it, or its rehearsal, has a checkpoint."""
        folders = (self.folder, self.folder / REHEARSAL)
        return any(find_checkpoint(folder) is not None for folder in folders)

    @property
    def finished(self) -> bool:
        """Whether its newest checkpoint is whole and the end of the curriculum.

        Raises:
            ConfigError: there are checkpoints, and none is whole.
        """
        checkpoint, problem = whole_checkpoint(self.folder)
        if checkpoint is None or problem is not None:
            return False
        return bool(load_trainer_state(checkpoint)["finished"])

    @property
    def rehearsal(self) -> Job | None:
        """What is trained first to judge the stages; None where there is nothing to judge."""
        judged = self.config.curriculum == "judged" and self.config.data.image is not None
        if self.is_rehearsal or not judged or not judged_stages(self.config.stages):
            return None
        return dataclasses.replace(self, folder=self.folder / REHEARSAL, is_rehearsal=True)


def expand(config: RunConfig) -> list[Job]:
    """Every job of a run, fold by fold, so that the fitted artifacts of a fold are shared."""
    configs = [config] + [_variant(config, name) for name in config.variants]
    entries = _entries(config.data, announce=True)
    folds = expand_folds(entries, config.folds)
    tell_roles(entries)
    return [
        Job(
            dataclasses.replace(one, folds=(fold,), seeds=(seed,), variants={}),
            fold,
            seed,
            config.out / one.variant / f"fold-{fold}" / f"seed-{seed}",
        )
        for fold in folds
        for seed in config.seeds
        for one in configs
    ]


def _variant(config: RunConfig, name: str) -> RunConfig:
    if name == MAIN or not name.replace("_", "").replace("-", "").isalnum():
        allowed = f"letters, digits, - and _, and not {MAIN!r}"
        raise ConfigError(f"variants.{name}: a variant's name is {allowed}")
    base = {**to_dict(config), "variants": {}, "variant": name}
    try:
        return build_section(RunConfig, merge(base, config.variants[name]), ("variants", name))
    except SchemaError as problem:
        raise ConfigError(f"variants.{name}: {explained(problem, ('variants', name))}") from problem


def split_of(config: RunConfig, fold: str) -> Split:
    """The split of one fold of a run."""
    split = split_by_patient(_entries(config.data), fold)
    wanted = config.data.train_patients
    return split if wanted is None else limited(split, wanted)


def _entries(data: DataConfig, *, announce: bool = False) -> tuple[SlideEntry, ...]:
    """The slides with counts; what is left out is told once, when the jobs are listed."""
    counted = with_counts(read_entries(stores_in(data.stores)), "training", announce=announce)
    return said_for_test(counted, data.test)


def start_of(job: Job) -> Path | None:
    """The checkpoint whose omics tower a job starts from: ``model.omics.init_from``.

    ``{fold}`` and ``{seed}`` in it stand for the job's own, so that each fold starts from a
    checkpoint that has not seen its test patients.
    """
    named = job.config.model.omics.init_from
    if named is None:
        return None
    text = str(named).replace("{fold}", job.fold).replace("{seed}", str(job.seed))
    return find_checkpoint(Path(text)) or Path(text)


@functools.lru_cache(maxsize=2)
def _fitted(
    paths: tuple[Path, ...],
    genes: GenesConfig,
    pathways: PathwaysConfig,
    start: Path | None,
    threads: int,
    asks_absent: bool,
) -> Artifacts:
    """Artifacts of one fold, shared by its variants and seeds."""
    source = None if start is None else HiBio.from_checkpoint(start).artifacts
    return fit_artifacts(
        paths, genes, pathways, start=source, threads=threads, asks_absent=asks_absent
    )


def fitted(job: Job, group: ProcessGroup | None = None) -> Artifacts:
    """What a job fits on its training slides before the first step; shared by alike jobs.

    Args:
        job: what is trained.
        group: the processes; the first one fits, and the others read what it wrote.
    """
    paths = tuple(entry.path for entry in split_of(job.config, job.fold).train)
    threads = job.config.threads or min(torch.get_num_threads(), FIT_THREADS)
    asks_absent = job.config.objective.query_genes > 0
    wanted = (paths, job.config.genes, job.config.pathways, start_of(job), threads, asks_absent)
    if group is None or group.size == 1:
        return _fitted(*wanted)
    told = job.folder / "artifacts-of-the-first-process.h5"
    fit = group.on_first(lambda: _fitted(*wanted))
    group.on_first(lambda: _tell(told, fit))
    artifacts = read_artifacts(told) if fit is None else fit
    group.wait()
    group.on_first(told.unlink)
    return artifacts


def _tell(path: Path, artifacts: Artifacts | None) -> None:
    """Write artifacts for the other processes."""
    assert artifacts is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_artifacts(path, artifacts)


def build(job: Job, *, resume: bool = False) -> Trainer:
    """Join the parts of one job, from its checkpoint with ``resume``; every process calls it."""
    config = job.config
    group = start_processes(config.device, single=config.optim.uses_deepspeed)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    split, start = split_of(config, job.fold), start_of(job)
    saved = load_newest(job.folder) if resume else None
    if saved is not None:
        _refuse_changed(job, saved.path, saved.artifacts)
    config = _sized(config, split)
    artifacts = _sealed(fitted(job, group), split) if saved is None else saved.artifacts
    refuse_seen(artifacts, split, start)
    inner = _inner(job, split, artifacts) if job.is_rehearsal else None
    entries = split.train if inner is None else inner.others(split.train)
    image = config.model.vision.image_input(config.data.image)
    dataset = PreparedSlides(
        entries, artifacts, image, config.data.cache_slides, config.data.shuffle_pairs
    )
    model = new_model(config.model, dataset, job.seed, start if saved is None else None)
    objective = Objective(
        model.to(choose_device(config.device, group)), config.objective, config.regions.levels
    )
    verdicts = _verdicts(job, saved)
    hidden = None if inner is None else inner.hidden_in(entries)
    plan = Plan(
        followed(config.stages, verdicts),
        config.sampler,
        dataset,
        RegionState(config.regions, dataset, hidden=hidden),
        objective,
        job.seed,
        group,
        prefetch=config.data.prefetch,
        pin=model.device.type == "cuda",
        augment=config.data.augment,
    )
    objective.check(config.stages)
    if saved is None:
        plan.check_radius()
    trainer = Trainer(
        model=model,
        engine=_engine(config, plan),
        plan=plan,
        folder=job.folder,
        write_config=lambda path: dump_config(config, path),
        checkpoint_every=config.checkpoint_every,
        verdicts=verdicts,
        judge=None if inner is None else _judge(inner, artifacts, image),
        log_to=config.log.to,
        settings=to_dict(config),
    )
    group.on_first(lambda: trust_code(config.model.vision.name, config.model.omics.name))
    if saved is not None:
        trainer.resume(saved)
    return trainer


def _judge(inner: Inner, artifacts: Artifacts, image: ImageInput | None) -> Judge:
    return Judge(inner, PreparedSlides(inner.entries, artifacts, image))


def _engine(config: RunConfig, plan: Plan) -> Engine:
    return build_engine(
        plan.objective,
        config.optim,
        config.device,
        plan.group,
        n_micro=own_micro_batches(config.sampler.batches_per_step, plan.group),
        mixed_stages=plan.mixed_stages(),
        used=lambda: parameter_use(plan.objective, plan),
    )


def _inner(job: Job, split: Split, artifacts: Artifacts) -> Inner:
    """What a rehearsal holds out of the slides that its job trains on."""
    image = job.config.model.vision.image_input(job.config.data.image)
    return hold_out(
        split.train,
        job.seed,
        job.config.sampler.halo,
        lambda entry: PreparedSlides((entry,), artifacts, image)[0],
    )


def _verdicts(job: Job, saved: SavedRun | None) -> list[Verdict]:
    """What a job's rehearsal said, as the job's checkpoint or the rehearsal's holds it."""
    rehearsal = job.rehearsal
    if rehearsal is None:
        return []
    if saved is not None:
        return [Verdict(**one) for one in saved.trainer["verdicts"]]
    if not rehearsal.finished:
        raise ConfigError(
            f"{job.name}: curriculum: judged, and its rehearsal is not finished; train it with "
            "`hibio train` (hibio.run.train_job), which rehearses first"
        )
    return [Verdict(**one) for one in verdicts_on(rehearsal.folder / NAME)]


def _sealed(artifacts: Artifacts, split: Split) -> Artifacts:
    """The artifacts with the seals of the test slides too."""
    tested = {entry.slide_id: entry.seal for entry in split.test}
    return dataclasses.replace(artifacts, seals={**tested, **artifacts.seals})


def new_model(
    config: ModelConfig, dataset: PreparedSlides, seed: int, start: Path | None = None
) -> HiBio:
    """Random weights of a seed, scaled on a few training spots (docs/method.md 3).

    On artifacts of an older HiBio they are not scaled, as theirs were not.

    Args:
        config: of the model, with the size of its vision input.
        dataset: the training slides.
        seed: of the weights.
        start: a checkpoint whose omics tower is taken over instead.
    """
    torch.manual_seed(seed)
    model = HiBio(config, dataset.artifacts)
    if start is not None:
        model.start_omics_from(HiBio.from_checkpoint(start))
    elif dataset.artifacts.scales is not None and hasattr(model.omics, "calibrate"):
        model.omics.calibrate(dataset.sample(model.halo))
    return model


def finish(job: Job, trainer: Trainer) -> Path:
    """After training: write the reference bank into the checkpoint; returns the checkpoint.

    Every process calls it; the first one writes.
    """
    if job.config.bank:
        model = trainer.whole_model()
        trainer.group.on_first(lambda: _write_bank(job, model, trainer.plan.dataset))
    return job.folder / NAME


def _write_bank(job: Job, model: HiBio, slides: PreparedSlides) -> None:
    image = job.config.model.vision.image_input(job.config.data.image)
    bank = build_bank(model, PreparedSlides(slides.entries, model.artifacts, image))
    if bank is not None:
        path = job.folder / NAME / BANK
        write_bank(path, bank)
        add_checksum(path)


def _lacks_bank(job: Job) -> bool:
    """Whether a finished job was stopped before its reference bank was written."""
    paired = any(entry.has_image for entry in split_of(job.config, job.fold).train)
    wanted = job.config.bank and job.config.data.image is not None and paired
    return wanted and not has_bank(job.folder / NAME)


def _sized(config: RunConfig, split: Split) -> RunConfig:
    """The configuration with the vision input size read from the training stores."""
    vision = sized_vision(config.model.vision, config.data.image, split.train)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))


def _refuse_changed(job: Job, checkpoint: Path, artifacts: Artifacts) -> None:
    """A job goes on as it began: with its settings, its slides and what they hold.

    Raises:
        ConfigError: names what differs.
    """
    split = split_of(job.config, job.fold)
    vision, key = job.config.model.vision, job.config.data.image
    refuse_other_slides(checkpoint, artifacts, split, vision.image_input(key))
    refuse_other_settings(checkpoint, _sized(job.config, split))


def train_job(job: Job, *, resume: bool = False) -> Path:
    """Train one job (see `build`) to its end, after its rehearsal, and write its bank.

    Returns:
        The checkpoint.

    Raises:
        InterruptedError: stopped by a signal; everything is saved.
    """
    rehearsal = job.rehearsal
    if rehearsal is not None and find_checkpoint(job.folder) is None and not rehearsal.finished:
        _fit(rehearsal, resume=resume)
    return finish(job, _fit(job, resume=resume))


def _fit(job: Job, *, resume: bool) -> Trainer:
    trainer = build(job, resume=resume)
    if not trainer.fit() or trainer.interrupted:
        raise InterruptedError(
            f"stopped at step {trainer.step} of {trainer.plan.n_steps()} of {job.name}; saved"
        )
    return trainer


def train_all(config: RunConfig, *, resume: bool = False) -> list[Path]:
    """Train every job of a run that is not finished yet; returns the checkpoints.

    With ``resume`` it goes on in a folder that already holds jobs.

    Raises:
        ConfigError: the folder holds checkpoints and ``resume`` is off, or there is no such folder
            and it is on, or a job of it, finished or not, began with other settings or slides.
        DataError: another process trains in the folder.
        InterruptedError: stopped by a signal; everything is saved.
    """
    with stops_at_once(lambda: f"stopped; {_go_on(config)}"):
        return _train_all(config, resume)


def _go_on(config: RunConfig) -> str:
    """How to continue a run that was stopped."""
    if not (config.out / CONFIG).is_file():
        return "nothing was trained yet, so run the same command again"
    return (
        f"whatever was saved stays. Continue with: hibio train --config "
        f"{config.out / 'config.yaml'} --resume {config.out}"
    )


def _train_all(config: RunConfig, resume: bool) -> list[Path]:
    if resume and not config.out.is_dir():
        raise ConfigError(
            f"{config.out}: no such folder, so there is nothing to resume; give the run's folder "
            "(its 'out'), or leave --resume out to begin"
        )
    require_trackers(config.log.to)
    jobs = expand(config)
    single = any(job.config.optim.uses_deepspeed for job in jobs)
    group = start_processes(config.device, single=single)
    with ExitStack() as held:
        group.on_first(lambda: held.enter_context(locked(config.out)))
        return _train_jobs(config, jobs, group, resume)


def _finished(job: Job) -> bool:
    """Whether a job is done; what has begun of it is compared with what is asked for now."""
    for folder in (job.folder / REHEARSAL, job.folder):
        checkpoint, problem = whole_checkpoint(folder)
        if checkpoint is not None:
            _refuse_changed(job, checkpoint, read_artifacts(checkpoint / ARTIFACTS))
    whole = checkpoint if problem is None else None
    return whole is not None and bool(load_trainer_state(whole)["finished"])


def _train_jobs(
    config: RunConfig, jobs: Sequence[Job], group: ProcessGroup, resume: bool
) -> list[Path]:
    started = [job for job in jobs if job.started]
    if started and not resume:
        raise ConfigError(
            f"{config.out} already holds {len(started)} checkpoint(s), e.g. {started[0].name}; "
            f"continue with --resume {config.out} (from Python: resume=True), or choose another "
            "folder with --set out=DIR (out=DIR)"
        )
    for fold in dict.fromkeys(job.fold for job in jobs):
        split_of(config, fold)  # one that cannot be is told before anything is written
    done = [_finished(job) for job in jobs]
    group.wait()  # all have looked before one writes
    group.on_first(lambda: _write_settings(config))
    checkpoints = []
    for number, (job, finished) in enumerate(zip(jobs, done, strict=True), start=1):
        if not finished:
            if group.is_first:
                print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
            try:
                train_job(job, resume=resume)
            except InterruptedError as stopped:
                raise InterruptedError(f"{stopped}; {_go_on(config)}") from stopped
        elif _lacks_bank(job):
            finish(job, build(job, resume=True))
        checkpoints.append(job.folder / NAME)
    return checkpoints


def _write_settings(config: RunConfig) -> None:
    """What was asked for, and on what machine, into the run's folder."""
    told, settings = config.out / PROVENANCE, config.out / CONFIG
    refuse_others({told: '"packages"'}, [settings])
    write_provenance(told)  # first: it says who made the other
    dump_config(config, settings)
