"""Checkpoints and stores to a `Fold` for each fold and seed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

from eval.embed import Checkpoint, load_checkpoint, unfinished_step
from eval.folds.baselines import (
    baselines,
    hide,
    random_sets,
    raw_features,
    tower_row,
    with_representations,
)
from eval.folds.fold import Fold, Representation, SlideData
from eval.results import NO_FOLD, RAW, SEED_MEAN, SEEN, Role, Seen
from hibio.artifacts import Artifacts
from hibio.checkpoint import ARTIFACTS, CONFIG, read_checksums
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES, ImageInput
from hibio.data.counts import align_columns
from hibio.data.slide import PreparedSlide, prepare_slide
from hibio.data.splits import (
    PATIENT,
    SlideEntry,
    Split,
    refuse_copies,
    refuse_replaced,
    said_for_test,
)
from hibio.keys import MAIN
from hibio.model import HiBio
from hibio.regions import RegionTree, fit_region_tree
from preprocessing.graphs import KNNGraph
from preprocessing.slide_row import TEST, TRAIN
from preprocessing.store import SlideStore

IMPUTATION = "imputation"  # the task that needs the slides embedded again without some genes
READ_BESIDE = {"expression", "retrieval"}  # tasks that put the stored features beside an embedding


@dataclass(frozen=True)
class JobGroup:
    """The checkpoints of one fold and seed: the model first, then its trained baselines.

    ``lacking``: variants that other folds or seeds of the run have, and this one has not.
    """

    fold: str
    seed: int
    checkpoints: tuple[Checkpoint, ...]
    lacking: tuple[str, ...] = ()

    @property
    def main(self) -> Checkpoint:
        """The checkpoint whose artifacts the fold is measured with."""
        return self.checkpoints[0]


def group_checkpoints(paths: Sequence[Path]) -> list[JobGroup]:
    """Load checkpoints and group them by fold and seed; ``hibio`` leads its group.

    A variant that one fold or seed lacks is left out there; a fold or seed without the model that
    leads the others is left out whole, with a warning.

    Raises:
        ConfigError: a training was stopped before its end, two checkpoints of one variant share a
            fold and a seed, or two variants of a fold were trained on different slides.
    """
    refuse_unfinished(paths)
    groups: dict[tuple[str, int], list[Checkpoint]] = {}
    for path in paths:
        checkpoint = load_checkpoint(path)
        groups.setdefault((checkpoint.fold, checkpoint.seed), []).append(checkpoint)
    result = []
    variants = sorted({c.variant for members in groups.values() for c in members}, key=_leads)
    for (fold, seed), members in sorted(groups.items()):
        members.sort(key=lambda c: _leads(c.variant))
        names = [member.variant for member in members]
        if names[0] != variants[0]:
            warnings.warn(
                f"fold {fold}, seed {seed} has no checkpoint of {variants[0]!r} (only "
                f"{', '.join(names)}), so it is left out; train it with --resume, then evaluate "
                "again",
                stacklevel=2,
            )
            continue
        if len(set(names)) < len(names):
            raise ConfigError(f"two checkpoints of fold {fold}, seed {seed} are called {names}")
        trained_on = {member.model.artifacts.train_slides for member in members}
        if len(trained_on) > 1:
            raise ConfigError(
                f"the variants {names} of fold {fold} were trained on different slides; evaluate "
                "them one by one"
            )
        lacking = tuple(name for name in variants if name not in names)
        result.append(JobGroup(fold, seed, tuple(members), lacking))
    return result


def _leads(variant: str) -> tuple[bool, str]:
    return variant != MAIN, variant


def refuse_unfinished(paths: Sequence[Path]) -> None:
    """A training that was stopped is not measured as if it were done.

    A checkpoint without a trainer state (made to be passed on) is taken for finished; of a damaged
    one it is warned that nobody can tell.

    Raises:
        ConfigError: names each with its step, and says how to go on.
    """
    found = [(path, step) for path in paths if (step := unfinished_step(path)) is not None]
    if not found:
        return
    told = "; ".join(f"{path} stopped at step {step}" for path, step in found[:4])
    run = found[0][0].absolute().parent.parents[2]
    whole = (run / CONFIG).is_file()
    again = f"--config {run / CONFIG} --resume {run}" if whole else "--config FILE --resume RUN"
    raise ConfigError(
        f"{len(found)} of {len(paths)} trainings are not finished: {told}. Go on with `hibio train "
        f"{again}`, or give --checkpoint finished ones one by one"
    )


@dataclass(frozen=True)
class Ruler:
    """What the models of a fold are measured with; nothing in it depends on a model.

    Attributes:
        fold: slides and targets, without models.
        entries: every slide of the fold.
        artifacts: give vocabulary, targets and gene sets.
        image: what the model reads, ``patches`` or stored features.
        beside: whether a task reads the stored features beside an embedding.
    """

    fold: Fold
    entries: tuple[SlideEntry, ...]
    artifacts: Artifacts
    image: str | None
    beside: bool

    @cached_property
    def features(self) -> dict[str, np.ndarray] | None:
        """slide_id -> (S, F) stored image features, or None; read when first asked for."""
        return stored_features(self.entries, self.image)

    def with_models(
        self, checkpoints: Sequence[Checkpoint], seed: int, *, with_baselines: bool
    ) -> Fold:
        """The fold with embeddings of its slides by the model and its trained baselines.

        ``with_baselines`` adds the baselines that need no training, and matched random sets.
        """
        fold, artifacts = self.fold, self.artifacts
        models = representations(checkpoints, self.entries, artifacts)
        random = raw = None
        if with_baselines:
            fitted_on, held_out = fold.train or fold.test, fold.test if fold.train else ()
            models += baselines(fitted_on, held_out, artifacts.factors, self.features)
            if artifacts.database is not None:
                idf, names = np.asarray(artifacts.tfidf.idf), list(artifacts.genes)
                random = random_sets(artifacts.database, names, idf, fitted_on, seed)
        elif self.beside and self.features is not None:
            raw = raw_features((*fold.train, *fold.test), self.features, artifacts.factors)
        hidden = fold.hidden
        if hidden is not None:
            hidden = with_representations(
                hidden, checkpoints, self.entries, artifacts, with_baselines=with_baselines
            )
        return dataclasses.replace(
            fold,
            seed=seed,
            models=tuple(models),
            random_sets=random,
            hidden=hidden,
            raw_features=raw,
        )


def make_ruler(
    split: Split, artifacts: Artifacts, image: str | None, tasks: Collection[str]
) -> Ruler:
    """Read the slides of a fold.

    ``artifacts`` were fitted on its training slides, ``image`` is what the model reads (``patches``
    or stored features); the task ``imputation`` hides genes.
    """
    train = tuple(slide_data(entry, artifacts) for entry in split.train)
    test = tuple(slide_data(entry, artifacts) for entry in split.test)
    hidden = None
    if IMPUTATION in tasks:
        hidden = hide(train, test, artifacts.genes, partial(_weighted, artifacts))
    fold = Fold(
        name=split.name,
        seed=0,
        genes=artifacts.genes,
        train=train,
        test=test,
        anchors=artifacts.anchors,
        factors=artifacts.factors,
        hidden=hidden,
    )
    entries = (*split.train, *split.test)
    return Ruler(fold, entries, artifacts, image, bool(READ_BESIDE & set(tasks)))


def assemble(
    group: JobGroup, split: Split, *, with_baselines: bool, tasks: Collection[str] = ()
) -> Fold:
    """The fold that one group of checkpoints is measured on.

    Args:
        group: the model and its trained baselines.
        split: of `split_entries`.
        with_baselines: add the baselines that need no training; they do not depend on the seed.
        tasks: that will be run.
    """
    artifacts = group.main.model.artifacts
    ruler = make_ruler(split, artifacts, group.main.run.data.image, tasks)
    fold = ruler.with_models(group.checkpoints, group.seed, with_baselines=with_baselines)
    return dataclasses.replace(fold, seen=_seen(split, artifacts))


def split_entries(
    group: JobGroup, entries: Sequence[SlideEntry], asked: Sequence[str] = ()
) -> Split:
    """Training and test slides of a group of checkpoints, whatever their fold is called.

    Slides that it was fitted on are training slides, all others test; ``asked`` names the test
    slides alone. A test slide of a trained patient must have been said to be one, and is marked.
    Where nothing is unseen, a model trained on every slide (``folds: [none]``) is measured on those
    slides, marked too, without training slides: clusterings are the transductive setting of
    per-slide clustering methods, and read-outs (annotation, imputation) are cross-validated over
    spatial blocks; both say so.

    Raises:
        ConfigError: no test slide, a test patient that was trained on and not said to be, a store
            that was replaced since the training, or a training slide again under another id.
    """
    artifacts = group.main.model.artifacts
    entries = said_for_test(entries, asked)
    train = tuple(e for e in entries if e.slide_id in artifacts.train_slides)
    for one in group.checkpoints:
        refuse_replaced(one.path, one.model.artifacts, train, one.image_input)
    bound = [e.slide_id for e in train if e.role == TEST]
    if bound:
        raise ConfigError(
            f"fold {group.fold}: {', '.join(bound[:4])} has the role test, but {group.main.path} "
            "was trained on it; train again, or take the role back"
        )
    test = tuple(e for e in entries if e.slide_id not in artifacts.train_slides)
    if asked:
        test = tuple(e for e in test if e.slide_id in asked)
    elif kept := [e.slide_id for e in test if e.role == TRAIN]:
        print(f"fold {group.fold}: role train, not trained on, not measured: {', '.join(kept)}")
        test = tuple(e for e in test if e.role != TRAIN)
    if not test and group.fold == NO_FOLD:
        return Split(group.fold, (), train)
    split = Split(group.fold, train, test)
    _check_split(split, artifacts)
    return split


def _trained_patients(split: Split, artifacts: Artifacts) -> set[str]:
    known = {seal[PATIENT] for seal in artifacts.trained_seals.values()}
    return known | {entry.patient_id for entry in split.train}


def _seen(split: Split, artifacts: Artifacts) -> dict[str, Seen]:
    """What was seen of each test slide in training, where it was anything."""
    patients = _trained_patients(split, artifacts)
    slides = set(artifacts.train_slides)
    return {
        entry.slide_id: "slide" if entry.slide_id in slides else "patient"
        for entry in split.test
        if entry.slide_id in slides or entry.patient_id in patients
    }


def _check_split(split: Split, artifacts: Artifacts) -> None:
    missing = set(artifacts.train_slides) - {entry.slide_id for entry in split.train}
    if missing and not split.train and split.test and artifacts.seals:
        warnings.warn(
            f"fold {split.name}: none of the {len(missing)} training slides is in the data, so "
            "nothing is fitted on them: read-outs are cross-validated over spatial blocks of the "
            "test slides, baselines are fitted on these, and tasks that need training slides are "
            "left out",
            stacklevel=2,
        )
    elif missing:
        raise ConfigError(
            f"fold {split.name}: {len(missing)} training slides are not in the data "
            f"({', '.join(sorted(missing)[:4])}); give the folder the model was trained on"
        )
    if not split.test:
        raise ConfigError(
            f"fold {split.name}: the model was trained on every slide of the data, so nothing is "
            "held out; train with folds: [each], or give a folder with more slides"
        )
    pretrained = {*artifacts.settings.pretrain_slides} & {entry.slide_id for entry in split.test}
    if pretrained:
        raise ConfigError(
            f"fold {split.name}: {len(pretrained)} test slides were seen by the checkpoint that "
            f"the omics tower started from ({', '.join(sorted(pretrained)[:4])}); remove them "
            "from the folder"
        )
    patients = _trained_patients(split, artifacts)
    seen = [e for e in split.test if e.role != TEST and e.patient_id in patients]
    if seen:
        both = ", ".join(sorted({entry.patient_id for entry in seen}))
        raise ConfigError(
            f"fold {split.name}: patients {both} are on both sides of the split: slides of them "
            f"were trained on. If {', '.join(e.slide_id for e in seen[:4])} are meant as test "
            "slides, say so: --test SLIDES, or role test in the manifest (their rows are marked "
            f"{SEEN['patient']!r}); else give --test the slides of new patients alone"
        )
    known = {**artifacts.trained_seals, **{entry.slide_id: entry.seal for entry in split.train}}
    refuse_copies(known, split.test, f"fold {split.name}")


def slide_data(entry: SlideEntry, artifacts: Artifacts) -> SlideData:
    """The measured side of one slide on the vocabulary of ``artifacts``."""
    with SlideStore(entry.path) as store:
        counts = align_columns(store.counts(), store.gene_names, artifacts.genes)
        xy_um, labels = store.xy_um, store.labels()
        modality, outcome = store.modality, store.outcome
    k = artifacts.settings.genes.neighbours
    return SlideData(
        slide_id=entry.slide_id,
        patient_id=entry.patient_id,
        counts=counts,
        **_weighted(artifacts, counts, xy_um),
        xy_um=xy_um,
        neighbours=KNNGraph(k=k).build(xy_um).neighbours(k)[0],
        labels=labels,
        has_image=entry.has_image,
        modality=modality,
        outcome=outcome,
    )


def _weighted(artifacts: Artifacts, counts: sparse.csr_matrix, xy_um: np.ndarray) -> dict[str, Any]:
    """``tfidf`` and ``profile`` of a slide."""
    tfidf, profile = artifacts.weigh(counts, artifacts.niche(xy_um))
    return {"tfidf": tfidf, "profile": profile}


def stored_features(
    entries: Sequence[SlideEntry], image: str | None
) -> dict[str, np.ndarray] | None:
    """Stored features of the slides with an image: those the model read, else the handcrafted."""
    key = "handcrafted" if image in (None, PATCHES) else image
    features = {}
    for entry in entries:
        with SlideStore(entry.path) as store:
            if entry.has_image and key in store.feature_names:
                features[entry.slide_id] = store.features(key)
    paired = sum(entry.has_image for entry in entries)
    return features if features and len(features) == paired else None


def representations(
    checkpoints: Sequence[Checkpoint], entries: Sequence[SlideEntry], sets: Artifacts
) -> list[Representation]:
    """The shared-space embedding of each checkpoint, and the omics tower before the projection.

    A slide is prepared once for all checkpoints whose artifacts are the same file. The gene sets of
    ``sets``, the artifacts of the main model, are embedded as anchors.
    """
    fitted = [_artifacts_digest(checkpoint.path) for checkpoint in checkpoints]
    found = [_Embedded() for _ in checkpoints]
    for entry in tqdm(entries, desc="embed", disable=None, leave=False):
        prepared: dict[tuple[str, ImageInput | None], PreparedSlide] = {}
        for checkpoint, digest, rows in zip(checkpoints, fitted, found, strict=True):
            key = digest, checkpoint.image_input
            if key not in prepared:
                artifacts = checkpoint.model.artifacts
                prepared[key] = prepare_slide(entry.path, artifacts, checkpoint.image_input)
            rows.add(entry.slide_id, prepared[key], checkpoint.model)
    return [row for one in zip(checkpoints, found, strict=True) for row in _rows_of(*one, sets)]


def _artifacts_digest(checkpoint: Path) -> str:
    """SHA-256 of a checkpoint's artifacts; its path where an older HiBio wrote none."""
    known = read_checksums(checkpoint) or {}
    return known[ARTIFACTS].sha256 if ARTIFACTS in known else str(checkpoint)


@dataclass(frozen=True)
class _Embedded:
    """What one checkpoint makes of the slides, by slide id."""

    image: dict[str, np.ndarray] = field(default_factory=dict)
    omics: dict[str, np.ndarray] = field(default_factory=dict)
    tower: dict[str, np.ndarray] = field(default_factory=dict)
    trees: dict[str, RegionTree] = field(default_factory=dict)

    def add(self, slide_id: str, slide: PreparedSlide, model: HiBio) -> None:
        embedding = model.encode_slide(slide)
        feature_SF = slide.fused(embedding.omics, embedding.image)
        self.trees[slide_id] = fit_region_tree(feature_SF, slide.graph)
        if embedding.image is not None:
            self.image[slide_id] = embedding.image
        if embedding.omics is not None and embedding.tower is not None:
            self.omics[slide_id], self.tower[slide_id] = embedding.omics, embedding.tower


def _rows_of(checkpoint: Checkpoint, found: _Embedded, sets: Artifacts) -> list[Representation]:
    asked = _sets(sets) if found.image else {}
    own = Representation(
        checkpoint.variant,
        image=found.image or None,
        omics=found.omics or None,
        role=checkpoint.role,
        words="" if checkpoint.role == "model" else "trained by the same code, other settings",
        aligned=bool(found.image),
        anchor=checkpoint.model.encode_gene_sets(asked) if asked else None,
        trees=found.trees,
    )
    with_tower = checkpoint.variant == MAIN and found.tower
    return [own, tower_row(found.tower)] if with_tower else [own]


def _sets(artifacts: Artifacts) -> dict[str, tuple[str, ...]]:
    """Genes of the gene sets, by name; none without a database."""
    if artifacts.database is None:
        return {}
    return {name: tuple(artifacts.database.genes_of(name)) for name in artifacts.anchors.names}


def seed_means(folds: Sequence[Fold]) -> Fold | None:
    """The same split under several seeds as one fold of mean models, or None with one seed.

    Unit embeddings of the seeds side by side: their cosine is the mean of the seeds' cosines.
    """
    if len(folds) < 2:
        return None
    names = [
        m.name
        for m in folds[0].models
        if m.aligned and m.image is not None and all(fold.has_model(m.name) for fold in folds)
    ]
    models = []
    for name in names:
        seeds = [fold.model(name) for fold in folds]
        image = {s: np.hstack([m.image[s] for m in seeds if m.image]) for s in seeds[0].image or {}}
        omics = {s: np.hstack([m.omics[s] for m in seeds if m.omics]) for s in seeds[0].omics or {}}
        note = f"{name}: mean similarity of {len(seeds)} seeds"
        role: Role = "variant" if seeds[0].role == "model" else seeds[0].role
        models.append(Representation(name + SEED_MEAN, image, omics, (note,), role))
    raw = folds[0].model(RAW) if folds[0].has_model(RAW) else None
    return dataclasses.replace(folds[0], models=tuple(models), random_sets=None, raw_features=raw)
