"""Zero-shot gene-set scores on H&E alone, read out with the checkpoint's reference bank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse
from tqdm import tqdm

from eval.embed import (
    Checkpoint,
    checked,
    image_embedding,
    load_checkpoint,
    one_checkpoint,
)
from eval.measures.inner_folds import inner_groups
from eval.measures.metrics import unit_rows
from eval.measures.ridge import (
    TINY,
    Targets,
    centre,
    column_blocks,
    nearest_weights,
    ridge_fit,
    zscore,
)
from eval.report.figures.heatmaps import pathway_heatmaps
from eval.tables import (
    H5AD,
    hashes_of,
    lay_out,
    open_folder,
    require_finite,
    table_path,
    write_table,
)
from hibio.artifacts import Artifacts
from hibio.bank import Bank, read_bank
from hibio.checkpoint import BANK
from hibio.config.files import ConfigError
from hibio.data.counts import align_columns
from hibio.data.splits import SlideEntry, read_entries, with_images
from hibio.keys import UNS
from pathways import PathwayDatabase, load_pathways, score_sets, set_matrix
from pathways.anchors import cosine
from preprocessing.files import atomic_path, not_ours, spreadsheet_text
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in
from preprocessing.workers import each

NEAREST = 50  # training spots that a retrieved score is the mean of
FEWEST = 3  # genes of a set that is asked for, and that a slide measures of one
SHOWN = 4  # gene sets in a heatmap picture
CACHED = 64  # sets at once: their scores of some thousand spots stay in the processor's cache
ROUNDING = 1e-6  # spread of a mean of standardised values below which it is the same everywhere
FAINT = 0.05  # range of a set below which four decimals are too few
FORMAT = 2  # of the files: raised where the same question is answered otherwise than before
UNIT = 10_000  # of what has four decimals in a table
LONG = 9.9999  # from where on such a number, rounded, may have two digits before them


@dataclass(frozen=True)
class GeneSets:
    """Gene sets on the model's vocabulary, and their scores on the reference bank.

    Attributes:
        names: (M,).
        genes: members of each that are in the vocabulary.
        matrix: (G, M) unit idf columns.
        mean, sd: (M,) of their raw cosine over the bank.
        target: (n, M) scores of the bank's spots.
    """

    names: tuple[str, ...]
    genes: tuple[tuple[str, ...], ...]
    matrix: sparse.csr_matrix
    mean: np.ndarray
    sd: np.ndarray
    target: np.ndarray

    def measure(self, tfidf: sparse.csr_matrix, background: np.ndarray) -> np.ndarray:
        """Measured scores (S, M): standardised, minus the spot's mean over the database."""
        return score_sets(tfidf, self.matrix, self.mean, self.sd, background)

    def measure_columns(
        self, tfidf: sparse.csc_matrix, background: np.ndarray, empty: np.ndarray
    ) -> np.ndarray:
        """`measure` of rows stored by gene: the genes of the sets alone are read.

        ``empty`` (S,) says which spots have no counts.
        """
        raw = (tfidf @ self.matrix).toarray()
        return score_sets(tfidf, self.matrix, self.mean, self.sd, background, raw, empty)

    def measurable(self, genes: Collection[str]) -> np.ndarray:
        """Which (M,) have enough genes among those that a slide measures."""
        known = set(genes)
        return np.array([len(known.intersection(own)) >= FEWEST for own in self.genes], dtype=bool)

    def only(self, name: str) -> GeneSets:
        """One of them."""
        m = [self.names.index(name)]
        numbers = (self.matrix[:, m], self.mean[m], self.sd[m], self.target[:, m])
        return GeneSets((name,), (self.genes[m[0]],), *numbers)


def gene_sets(checkpoint: Checkpoint, source: str, bank: Bank) -> GeneSets:
    """The sets of ``source``, scored on the bank.

    Raises:
        PathwayError: unknown database, or no set shares enough genes with the vocabulary.
        ConfigError: a set has one score everywhere.
    """
    artifacts = checkpoint.model.artifacts
    database, report = load_pathways(source).restrict(artifacts.genes.tolist(), min_genes=FEWEST)
    print(report)
    return scored_on_bank(artifacts, database, bank, artifacts.anchors.background(bank.tfidf))


def scored_on_bank(
    artifacts: Artifacts, database: PathwayDatabase, bank: Bank, background: np.ndarray
) -> GeneSets:
    """Sets of genes of the vocabulary, scored on the bank.

    ``background`` is the mean (n,) of the checkpoint's own database on each spot of the bank.

    Raises:
        ConfigError: a set has one score everywhere.
    """
    members = tuple(database.members.values())
    matrix = set_matrix(database, artifacts.genes.tolist(), artifacts.tfidf.idf)
    raw = cosine(bank.tfidf, matrix)
    mean, sd = raw.mean(axis=0), raw.std(axis=0)
    flat = [name for name, value in zip(database.names, sd, strict=True) if value <= 0]
    if flat:
        raise ConfigError(
            f"gene set(s) {', '.join(flat[:4])} have one score on every training spot; their "
            "genes were never seen: leave them out"
        )
    target = score_sets(bank.tfidf, matrix, mean, sd, background, raw)
    return GeneSets(tuple(database.names), members, matrix, mean, sd, target)


def image_scores(
    checkpoint: Checkpoint,
    sets: GeneSets,
    bank: Bank,
    image: np.ndarray,
    readout: str,
    nearest: sparse.csr_matrix | None = None,
) -> np.ndarray:
    """Scores (S, M) of one slide from its image embeddings (S, D), docs/method.md 2.

    ``nearest`` is what `nearest_in_bank` gives of the slide, where it is at hand.
    """
    if readout == "anchor":
        members = dict(zip(sets.names, sets.genes, strict=True))
        return unit_rows(image) @ checkpoint.model.encode_gene_sets(members).T
    order = _by_slide(bank)
    rows = np.concatenate(order)
    slides, target = bank.slide[rows], sets.target[rows]
    if readout in ("default", "ridge"):
        train = np.concatenate([zscore(bank.image[spots]) for spots in order])
        place = np.stack([np.arange(len(rows)), np.zeros(len(rows))], axis=1)
        groups = inner_groups(bank.patient[rows], slides, place)
        ridge = ridge_fit(train, target, groups=groups, units=slides)
        test = ridge.reduced(zscore(image))
    if readout in ("default", "retrieval"):
        given = nearest_in_bank(bank, image) if nearest is None else nearest
        around = sparse.csr_matrix(given, dtype=target.dtype)
    if readout == "default":  # level and spread of both are taken off
        level = np.ravel(around.mean(axis=0)) @ ridge.y.z
        test, weights = (one.astype(target.dtype) for one in _unit(test, ridge.weights))
    score = np.empty((len(image), len(sets.names)), dtype=target.dtype)
    for columns in column_blocks(score.shape[1], CACHED):
        if readout == "retrieval":
            y = Targets.of(target[:, columns], slides)
            score[:, columns] = y.back(np.asarray(around @ y.z))
        elif readout == "ridge":
            score[:, columns] = ridge.y.back(test @ ridge.weights[:, columns], columns)
        else:
            near = around @ (ridge.y.z[:, columns] - level[columns]).astype(target.dtype)
            sd = np.sqrt(np.einsum("st,st->t", near, near) / len(near))
            near /= np.where(sd > ROUNDING, 2 * sd, np.inf)
            np.matmul(test, weights[:, columns], out=score[:, columns])
            score[:, columns] += near
    return score


def _unit(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows about their mean, and weights, whose products are half of the z-scored ``x @ weights``.

    So it costs nothing for each spot and set; a prediction that is the same everywhere becomes 0.
    """
    mean = x.mean(axis=0)
    centred = x - mean
    variance = np.einsum("ft,ft->t", weights, (centred.T @ centred / len(x)) @ weights)
    sd = np.sqrt(np.maximum(variance, 0.0))  # rounding may leave a little below 0
    varies = sd > TINY * np.maximum(np.abs(mean @ weights), TINY)
    return centred, weights / np.where(varies, 2 * sd, np.inf)


def nearest_in_bank(bank: Bank, image: np.ndarray) -> sparse.csr_matrix:
    """Weights (S, n) of the nearest training spots, the bank taken slide by slide; rows sum to 1.

    Embeddings are taken about the mean of their slide.
    """
    train = np.concatenate([centre(bank.image[spots]) for spots in _by_slide(bank)])
    return nearest_weights(train, centre(image), NEAREST)


def _by_slide(bank: Bank) -> list[np.ndarray]:
    return [np.flatnonzero(bank.slide == slide) for slide in np.unique(bank.slide)]


def query_folder(
    checkpoint_path: Path,
    data: Path,
    source: str,
    out: Path,
    readout: str = "default",
    *,
    form: str = H5AD,
    workers: int = 0,
    scheduler: str | None = None,
) -> list[Path]:
    """Score every slide with an image; writes ``<slide_id>.query.csv``, .h5ad and .png of each.

    ``source`` is anything that `pathways.load_pathways` takes, ``readout`` is default, ridge,
    retrieval or anchor, and ``form`` the format of the table, one of `keys.TABLES`. Whole files of
    the same inputs are kept. ``workers`` and ``scheduler`` are as in
    `preprocessing.workers.each`, a slide a task.

    Returns:
        The files written.

    Raises:
        DataError: slides that failed in other processes; the others are written.
        ConfigError: no slide has an image, or the checkpoint has no vision tower or bank.
    """
    checkpoint = load_checkpoint(one_checkpoint(checkpoint_path))
    entries = with_images(read_entries(stores_in(data)), "query")
    checked(checkpoint, entries)
    bank = read_bank(checkpoint.path / BANK, checkpoint.model)
    sets = gene_sets(checkpoint, source, bank)
    if not entries or checkpoint.model.vision is None:
        raise ConfigError(f"{data}: no slide with an image, or a model without a vision tower")
    open_folder(out, form)
    targets = {entry.slide_id: _targets(out, entry.slide_id, form) for entry in entries}
    for paths in targets.values():
        _refuse_others(paths)
    if workers or scheduler:
        asked = (source, out, readout)
        calls = {
            e.slide_id: partial(query_folder, checkpoint_path, e.path, *asked, form=form)
            for e in entries
        }
        each(calls, workers, scheduler, "query")
    written: list[Path] = []
    for entry in tqdm(entries, desc="query", disable=None):
        written += _query_slide(checkpoint, entry, sets, bank, targets[entry.slide_id], readout)
    return written


def _query_slide(
    checkpoint: Checkpoint,
    entry: SlideEntry,
    sets: GeneSets,
    bank: Bank,
    targets: list[Path],
    readout: str,
) -> list[Path]:
    artifacts = checkpoint.model.artifacts
    with SlideStore(entry.path) as store:
        made_of = {
            "checkpoint_sha256": checkpoint.sha256,
            "store_sha256": store.sha256,
            "asked_sha256": _asked(sets, readout),
        }
    known = hashes_of(targets[0], "asked_sha256")
    if known == made_of and all(path.exists() for path in targets):
        return targets
    image = image_embedding(checkpoint, entry.path)
    score = image_scores(checkpoint, sets, bank, image, readout)
    with SlideStore(entry.path) as store:
        index = pd.Index([spreadsheet_text(str(one)) for one in store.barcodes], name="barcode")
        names = [spreadsheet_text(name) for name in sets.names]
        frame = pd.DataFrame(score, index=index, columns=names)
        adata = anndata.AnnData(X=score.astype(np.float32, copy=False))
        adata.obs_names, adata.var_names = list(store.barcodes), list(sets.names)
        lay_out(adata, store)
        thumbnail, scale = store.thumbnail, store.thumbnail_downsample
        xy_thumb = store.xy_px0 / (scale or 1.0)
        measured, seen = _measured(store, sets, artifacts)
    adata.uns[UNS] = made_of
    require_finite(entry.slide_id, {"scores": score})
    if measured is not None:
        require_finite(entry.slide_id, {"measured": measured})
        measured[:, ~seen] = np.nan
        adata.layers["measured"] = measured.astype(np.float32, copy=False)
    write_table(targets[0], adata)  # first: it says who made the others
    with atomic_path(targets[1]) as temporary:
        write_scores(temporary, frame)
    maps = [
        (
            sets.names[m],
            score[:, m],
            measured[:, m] if seen[m] and measured is not None else None,
            None,
        )
        for m in shown_sets(score)
    ]
    figure = pathway_heatmaps(thumbnail, xy_thumb, maps, title=f"{entry.slide_id}: {readout}")
    with atomic_path(targets[2]) as temporary:
        temporary.write_bytes(figure.png)
    return targets


def _asked(sets: GeneSets, readout: str) -> str:
    text = json.dumps([FORMAT, sets.names, sets.genes, readout]).encode()
    return hashlib.sha256(text + sets.matrix.data.tobytes()).hexdigest()


def write_scores(path: Path, frame: pd.DataFrame) -> None:
    """Write a CSV of finite numbers with four decimals, many times as fast as pandas does.

    Those of a set that hardly varies, as a ridge of a strong penalty has it, have six digits.
    """
    values = frame.to_numpy()
    wide = values.max(axis=0, initial=-np.inf) - values.min(axis=0, initial=np.inf)
    faint = np.flatnonzero((wide > 0) & (wide < FAINT))
    texts = _texts()
    labels = frame.index.to_frame().to_csv(index=False, header=False, lineterminator="\0\n")
    with path.open("wb") as file:
        file.write(frame[:0].to_csv().encode())
        for label, row in zip(labels.encode().split(b"\0\n"), values, strict=False):
            if np.abs(row).max(initial=0.0) < LONG:
                units = np.rint(np.multiply(row, UNIT, dtype=np.float64)).astype(np.intp)
                units -= row < 0  # there is a -0.0000
                line = texts[units].tobytes().replace(b"\0", b"")
            else:
                line = "".join(f",{value:.4f}" for value in row.tolist()).encode()
            if len(faint):
                cells = line.split(b",")  # of which the first is empty
                for m in faint:
                    cells[m + 1] = b"%.6g" % row[m]
                line = b",".join(cells)
            file.write(label + line + b"\n")


def _texts() -> np.ndarray:
    """Numbers below ten behind a comma by their units, then the negative ones by theirs - 1.

    Eight bytes each, as one number; 0 fills up.
    """
    digits = np.arange(10 * UNIT)[:, None] // [UNIT, 1000, 100, 10, 1] % 10 + ord("0")
    text = np.zeros((2, len(digits), 8), dtype=np.uint8)
    text[:, :, 0], text[1, :, 1], text[:, :, 3] = map(ord, ",-.")
    text[:, :, 2], text[:, :, 4:] = digits[:, 0], digits[:, 1:]
    return np.concatenate([text[0], text[1, ::-1]]).view(np.uint64).ravel()


def _targets(out: Path, slide_id: str, form: str) -> list[Path]:
    name = f"{slide_id}.query"
    return [table_path(out, name, form), out / f"{name}.csv", out / f"{name}.png"]


def _refuse_others(targets: Sequence[Path]) -> None:
    """Refuse files in the place of a slide's results of which the first does not say our name."""
    if hashes_of(targets[0]) is None:
        for path in targets:
            if path.exists():
                raise not_ours(path)


def _measured(
    store: SlideStore, sets: GeneSets, artifacts: Artifacts
) -> tuple[np.ndarray | None, np.ndarray]:
    """Scores (S, M) of the gene sets on the counts of a slide, and of which sets (M,) they are.

    What is not measured of a slide with counts is told.
    """
    if not store.has_counts:
        return None, sets.measurable(())
    if store.modality != artifacts.modality:
        tqdm.write(
            f"{store.slide_id} measures {store.modality}, the model was trained on "
            f"{artifacts.modality}: no measured scores"
        )
        return None, sets.measurable(())
    seen = sets.measurable(store.gene_names)
    if not seen.all():
        tqdm.write(
            f"{store.slide_id} measures fewer than {FEWEST} genes of {(~seen).sum()} of "
            f"{len(seen)} sets, such as {sets.names[seen.argmin()]}: their measured scores are "
            "not known (NaN)"
        )
    counts = align_columns(store.counts(), store.gene_names, artifacts.genes)
    tfidf = artifacts.tfidf.transform(counts, artifacts.niche(store.xy_um))
    return sets.measure(tfidf, artifacts.anchors.background(tfidf)), seen


def shown_sets(score: np.ndarray, n: int = SHOWN) -> Sequence[int]:
    """The sets whose score varies most over the slide, at most ``n``."""
    squares = []
    for columns in column_blocks(score.shape[1]):
        centred = centre(score[:, columns])
        squares.append(np.einsum("sm,sm->m", centred, centred))
    return np.argsort(-np.concatenate(squares), kind="stable")[:n].tolist()
