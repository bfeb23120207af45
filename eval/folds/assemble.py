"""Checkpoints and stores to a `Fold` for each fold and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from tqdm import tqdm

from eval.embed import Checkpoint, load_checkpoint
from eval.folds.baselines import (
    baselines,
    hide,
    random_sets,
    raw_features,
    tower_row,
    with_representations,
)
from eval.folds.fold import Fold, Representation, SlideData
from eval.results import NO_FOLD, RAW, SEED_MEAN, Role
from hibio.artifacts import Artifacts
from hibio.config.files import ConfigError
from hibio.config.model import PATCHES
from hibio.data.counts import align_columns
from hibio.data.slide import prepare_slide
from hibio.data.splits import SlideEntry, Split
from hibio.keys import MAIN
from hibio.regions import fit_region_tree
from preprocessing.graphs import KNNGraph
from preprocessing.store import SlideStore

IMPUTATION = "imputation"  # the task that needs the slides embedded again without some genes
READ_BESIDE = {"expression", "retrieval"}  # tasks that put the stored features beside an embedding


@dataclass(frozen=True)
class JobGroup:
    """The checkpoints of one fold and seed: the model first, then its trained baselines."""

    fold: str
    seed: int
    checkpoints: tuple[Checkpoint, ...]

    @property
    def main(self) -> Checkpoint:
        """The checkpoint whose artifacts the fold is measured with."""
        return self.checkpoints[0]


def group_checkpoints(paths: Sequence[Path]) -> list[JobGroup]:
    """Load checkpoints and group them by fold and seed; ``hibio`` leads its group.

    Raises:
        ConfigError: two checkpoints of one variant share a fold and a seed, or two variants of a
            fold were trained on different slides.
    """
    groups: dict[tuple[str, int], list[Checkpoint]] = {}
    for path in paths:
        checkpoint = load_checkpoint(path)
        groups.setdefault((checkpoint.fold, checkpoint.seed), []).append(checkpoint)
    result = []
    for (fold, seed), members in sorted(groups.items()):
        members.sort(key=lambda c: (c.variant != MAIN, c.variant))
        names = [member.variant for member in members]
        if len(set(names)) < len(names):
            raise ConfigError(f"two checkpoints of fold {fold}, seed {seed} are called {names}")
        trained_on = {member.model.artifacts.train_slides for member in members}
        if len(trained_on) > 1:
            raise ConfigError(
                f"the variants {names} of fold {fold} were trained on different slides; evaluate "
                "them one by one"
            )
        result.append(JobGroup(fold, seed, tuple(members)))
    return result


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
        models: list[Representation] = []
        for checkpoint in checkpoints:
            models += representations(checkpoint, self.entries, artifacts)
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
    group: JobGroup,
    entries: Sequence[SlideEntry],
    *,
    with_baselines: bool,
    tasks: Collection[str] = (),
) -> Fold:
    """The fold that one group of checkpoints is measured on.

    A model trained on every slide (``folds: [none]``) is measured on those slides, without
    training slides: clusterings are the transductive setting of per-slide clustering methods, and
    read-outs (annotation, imputation) are cross-validated over spatial blocks; both say so. Else
    the slides that it was fitted on are training slides, the others test. ``with_baselines`` adds
    the baselines that need no training; they do not depend on the seed.

    Raises:
        ConfigError: no test slide, or a test patient that was trained on.
    """
    artifacts = group.main.model.artifacts
    split = _split_entries(group, entries)
    ruler = make_ruler(split, artifacts, group.main.run.data.image, tasks)
    return ruler.with_models(group.checkpoints, group.seed, with_baselines=with_baselines)


def _split_entries(group: JobGroup, entries: Sequence[SlideEntry]) -> Split:
    """Training and test slides; without a fold all that were trained on are test slides."""
    artifacts = group.main.model.artifacts
    train = tuple(e for e in entries if e.slide_id in artifacts.train_slides)
    if group.fold == NO_FOLD:
        return Split(group.fold, (), train)
    test = tuple(e for e in entries if e.slide_id not in artifacts.train_slides)
    split = Split(group.fold, train, test)
    _check_split(split, artifacts)
    return split


def _check_split(split: Split, artifacts: Artifacts) -> None:
    missing = set(artifacts.train_slides) - {entry.slide_id for entry in split.train}
    if missing:
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
    seen = {entry.patient_id for entry in split.train} & {entry.patient_id for entry in split.test}
    if seen:
        raise ConfigError(
            f"fold {split.name}: patients {', '.join(sorted(seen))} are on both sides of the "
            "split; remove their untrained slides from the folder"
        )


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
    checkpoint: Checkpoint, entries: Sequence[SlideEntry], sets: Artifacts
) -> list[Representation]:
    """The shared-space embedding of a checkpoint, and the omics tower before the projection.

    The gene sets of ``sets``, the artifacts of the main model, are embedded as anchors.
    """
    image, omics, tower, trees = {}, {}, {}, {}
    bar = tqdm(entries, desc=f"embed {checkpoint.variant}", disable=None, leave=False)
    for entry in bar:
        slide = prepare_slide(entry.path, checkpoint.model.artifacts, checkpoint.image_input)
        embedding = checkpoint.model.encode_slide(slide)
        feature_SF = slide.fused(embedding.omics, embedding.image)
        trees[entry.slide_id] = fit_region_tree(feature_SF, slide.graph)
        if embedding.image is not None:
            image[entry.slide_id] = embedding.image
        if embedding.omics is not None:
            omics[entry.slide_id] = embedding.omics
            assert embedding.tower is not None
            tower[entry.slide_id] = embedding.tower
    asked = _sets(sets) if image else {}
    anchor = checkpoint.model.encode_gene_sets(asked) if asked else None
    own = [
        Representation(
            checkpoint.variant,
            image=image or None,
            omics=omics or None,
            role=checkpoint.role,
            words="" if checkpoint.role == "model" else "trained by the same code, other settings",
            aligned=bool(image),
            anchor=anchor,
            trees=trees,
        )
    ]
    return [*own, tower_row(tower)] if checkpoint.variant == MAIN and tower else own


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
    names = [m.name for m in folds[0].models if m.aligned and m.image is not None]
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
