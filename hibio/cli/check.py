"""`hibio check`: a store, a folder of stores, a manifest, a checkpoint or gene sets."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from hibio.checkpoint import (
    ARTIFACTS,
    BANK,
    CHECKSUMS,
    CONFIG,
    NAME,
    PREVIOUS,
    READOUT,
    UNVERIFIED,
    WEIGHTS,
    damaged_files,
    load_trainer_state,
    read_checksums,
)
from hibio.config.files import ConfigError
from pathways.catalog import GMT_SUFFIXES, SET_READERS, list_databases, load_pathways
from pathways.coverage import KIND_LABELS
from pathways.database import ALIKE, COLUMNS, TABLE_SUFFIXES
from pathways.errors import GeneSetWarning, PathwayError
from preprocessing.errors import DataError
from preprocessing.findings import Finding, SlideWarning, failed
from preprocessing.manifest import missing_files, scan_manifest
from preprocessing.patches import PatchConfig
from preprocessing.readers.format import CONTROL
from preprocessing.readers.tables import text_head
from preprocessing.registration import Registration, register, store_registration
from preprocessing.run.sifting import Sifted, SlideTask, left_out, sifted, sources, with_picture
from preprocessing.slide_row import SlideRow
from preprocessing.store import SlideStore, verify_store
from preprocessing.store.read import stores_in
from preprocessing.store.verify import doubts, feature_word, few_features

if TYPE_CHECKING:
    from hibio.model import HiBio


def check_path(path: str | Path, root: str | Path | None = None) -> list[Finding]:
    """Check a store (.h5), a folder of stores or a manifest (.csv).

    Args:
        path: what to check.
        root: folder that relative paths of a manifest start from.

    Returns:
        At least one finding; never raises for bad data.
    """
    path = Path(path)
    if not path.exists():
        return [Finding("FAIL", str(path), "does not exist", "correct the path")]
    if path.is_dir():
        return _check_folder(path)
    if path.suffix.lower() == ".csv":
        return _check_manifest(path, root)
    findings = verify_store(path)
    return findings if failed(findings) else _with_fit(path, findings)


def _with_fit(path: Path, findings: list[Finding]) -> list[Finding]:
    """The findings on a valid store, and whether its image is the picture of its spots."""
    with SlideStore(path) as store:
        if not (store.has_image and store.has_counts):
            return findings
        return _joined(findings, store_registration(store).finding(str(path), store.correction))


def _joined(findings: list[Finding], fit: Finding) -> list[Finding]:
    """One more finding; two that are fine are one line."""
    if fit.level != "PASS" or [finding.level for finding in findings] != ["PASS"]:
        return [*findings, fit]
    return [replace(fit, message=f"{findings[0].message}; {fit.message}")]


def _check_folder(folder: Path) -> list[Finding]:
    try:
        stores = stores_in(folder)
    except DataError as error:
        return [Finding("FAIL", str(folder), str(error), "run `hibio prepare` first")]
    findings: list[Finding] = []
    usable: list[Path] = []
    for path in tqdm(stores, desc="check", unit="slide", disable=None):
        found = verify_store(path)
        if not failed(found):
            usable.append(path)
            found = _with_fit(path, found)
        findings += found
    return findings + _across(folder, usable)


def _across(folder: Path, stores: list[Path]) -> list[Finding]:
    """Compare the valid stores of a folder with each other."""
    ids: list[str] = []
    patches: set[tuple[float, int]] = set()
    shared: dict[str, set[str]] = {}
    for path in stores:
        with SlideStore(path) as store:
            ids.append(store.slide_id)
            if store.has_counts:
                genes = set(map(str, store.gene_names))
                shared[store.modality] = shared.get(store.modality, genes) & genes
            if store.has_image:
                patches.add((float(store.attrs["patch_um"]), int(store.attrs["patch_px"])))
    where, findings = str(folder), []
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    if twice:
        told = f"slide {twice[0]!r} is in two stores"
        findings.append(Finding("FAIL", where, told, "remove one of them"))
    if len(patches) > 1:
        sizes = ", ".join(f"{um:g} um / {px} px" for um, px in sorted(patches))
        fix = "prepare all slides with the same --patch-um and --patch-px"
        findings.append(Finding("FAIL", where, f"patches of different sizes: {sizes}", fix))
    for modality, genes in shared.items():
        if few_features(len(genes), modality) is not None:
            told = f"only {len(genes)} {feature_word(modality)} are on all slides"
            fix = "check that all slides use the same kind of gene names"
            findings.append(Finding("WARN", where, told, fix))
    return findings


def _check_manifest(path: Path, root: str | Path | None) -> list[Finding]:
    try:
        rows, problems = scan_manifest(path, root)
    except DataError as error:
        return [Finding("FAIL", str(path), str(error), "correct the manifest")]
    findings = [Finding("FAIL", str(path), problem, "correct this row") for problem in problems]
    for row in tqdm(rows, desc="check", unit="slide", disable=None):
        findings += _check_row(row)
    return findings


def _check_row(row: SlideRow) -> Iterable[Finding]:
    """Read the sources of one slide as `prepare` would, without writing."""
    missing = missing_files(row)
    if missing:
        return [Finding("FAIL", row.slide_id, text, "correct the path") for text in missing]
    try:
        found, fit = with_picture(row, _read)
    except MemoryError:
        text = "reading it needs more memory than there is"
        return [Finding("FAIL", row.slide_id, text, "are its files what the manifest says?")]
    except (DataError, OSError) as error:
        return [Finding("FAIL", row.slide_id, str(error), "correct the files or the manifest row")]
    table, doubted = found.table, list(found.table.warnings)
    if found.picture is None:
        told = "no image: only counts can be used"
        doubted.insert(0, SlideWarning(told, "fill the column image if there is one"))
    doubted += doubts(table.counts, table.modality, table.labels)
    findings = [Finding("WARN", row.slide_id, one.message, one.fix) for one in doubted]
    size = f"{table.n_spots} spots x {len(table.gene_names)} {feature_word(table.modality)}"
    if table.image_only:
        size = f"image only, no counts: {table.n_spots} windows on tissue"
    summary = "; ".join([f"{size}, {table.mpp:.4g} um per pixel", *left_out(found.dropped)])
    if found.dropped or not findings:
        findings.append(Finding("PASS", row.slide_id, summary))
    return findings if fit is None else _joined(findings, fit.finding(row.slide_id))


def _read(row: SlideRow, told: tuple[SlideWarning, ...]) -> tuple[Sifted, Registration | None]:
    """The spots, and whether the image is their picture where there are both."""
    sources(row)
    with sifted(SlideTask(row, Path(), PatchConfig()), told) as (_, found):
        table, picture = found.placed, found.picture
        if picture is None or table.image_only:
            return found, None
        return found, register(picture, table.xy_px0, table.counts, table.image_transform)


def check_sets(source: str) -> list[Finding]:
    """Check gene sets: a file, or anything else that `pathways.load_pathways` takes.

    Returns:
        At least one finding; never raises for bad sets.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            database = load_pathways(source)
        except PathwayError as error:
            text = str(error).removeprefix(f"{source}: ")
            return [Finding("FAIL", source, text, "correct the source of the gene sets")]
    told = [one.message.args for one in caught if isinstance(one.message, GeneSetWarning)]
    if controls := [gene for gene in database.genes if CONTROL.match(gene)]:
        found = f"{len(controls)} of the genes are control probes ({', '.join(controls[:5])})"
        told.append((found, "take them out: counts are read without them"))
    if database.id_type == "unknown" and not told:  # odd names are of no kind
        found = f"identifiers of no one kind ({', '.join(database.genes[:5])}, ...)"
        told.append((found, "write all as symbols, all as Ensembl or all as Entrez ids"))
    alike: dict[frozenset[str], list[str]] = {}
    for name, genes in database.members.items():
        alike.setdefault(frozenset(genes), []).append(name)
    if same := [" = ".join(names) for names in alike.values() if len(names) > 1]:
        told.append((f"sets of the same genes ({', '.join(same[:5])})", "keep one of each"))
    size = f"{len(database.names):,} sets of {len(database.genes):,} genes"
    weighted = ", weighted" if (database.table["weight"] != 1).any() else ""
    fine = Finding("PASS", source, f"{size}, {KIND_LABELS[database.id_type]}{weighted}")
    return [
        Finding("WARN", source, str(what).removeprefix(f"{source}: "), str(fix))
        for what, fix in told
    ] or [fine]


def _holds_sets(path: Path) -> bool:
    """Whether this is a file of gene sets, or the name of a source of them."""
    source = path.name.lower().removesuffix(".gz")
    table = source.endswith((".csv", *TABLE_SUFFIXES)) and path.is_file()
    if table and "slide_id" in text_head(path).replace("\0", ""):  # a manifest
        return False
    if source.endswith(".csv"):
        header = set(re.findall(r"\w+", text_head(path).replace("\0", "").split("\n")[0]))
        return any(header >= set(pair) for pair in (COLUMNS[:2], *ALIKE))
    if source.endswith((*GMT_SUFFIXES, *SET_READERS, *TABLE_SUFFIXES)):
        return True
    named = [entry.name for entry in list_databases()]
    return not path.exists() and (str(path) in named or any(mark in str(path) for mark in "+:"))


def check_any(path: Path) -> list[Finding]:
    """Findings on gene sets, a store, a folder of stores, a manifest, a checkpoint or a run."""
    if not path.is_dir() and _holds_sets(path):
        return check_sets(str(path))
    if not path.is_dir():
        return check_path(path)
    folders = sorted(config.parent for config in path.glob(f"**/{CONFIG}"))
    checkpoints = [f for f in folders if (f / WEIGHTS).exists() or (f / ARTIFACTS).exists()]
    if not checkpoints:
        return check_path(path)
    return [finding for one in checkpoints for finding in _check_one(one, path)]


def _check_one(checkpoint: Path, asked: Path) -> list[Finding]:
    """A checkpoint; in a run folder, of what is not the newest only whether it is whole."""
    from hibio.training.checkpoint import DAMAGED, LEAVING, TEMPORARY

    if checkpoint == asked or checkpoint.name not in (DAMAGED, LEAVING, PREVIOUS, TEMPORARY):
        return check_checkpoint(checkpoint)
    if checkpoint.name == DAMAGED:
        text = "a damaged checkpoint that a resumed run set aside"
        return [Finding("WARN", str(checkpoint), text, "remove it, and check the disk")]
    if checkpoint.name == PREVIOUS and not checkpoint.with_name(NAME).is_dir():
        return check_checkpoint(checkpoint)
    return _check_files(checkpoint) if checkpoint.name == PREVIOUS else []


def check_checkpoint(path: Path) -> list[Finding]:
    """Whether a checkpoint is what was saved and loads; what can be done with it."""
    from eval.embed import load_checkpoint

    try:
        findings = _check_files(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no checksums: told by the finding
            model = load_checkpoint(path).model
    except ConfigError as error:
        fix = "train again, or use the .previous sibling"
        return [Finding("FAIL", str(path), str(error), fix)]
    findings += [_check_model(path, model), _check_trainer(path), _check_bank(path, model)]
    return [*findings, *_check_readout(path)]


def _check_files(path: Path) -> list[Finding]:
    """One finding for every damaged file, or one for all."""
    damaged = damaged_files(path)
    if damaged is None:
        return [Finding("WARN", str(path), UNVERIFIED, "hibio train --config CONFIG --resume DIR")]
    if not damaged:
        n_files = len(read_checksums(path) or {})
        return [Finding("PASS", str(path), f"{n_files} files are what was saved ({CHECKSUMS})")]
    back = "resume the run, which goes on from the .previous sibling; or use that sibling"
    if path.name == PREVIOUS:
        back = "nothing is lost while the newer one is whole; the next save takes its place"
    anew = "resume the run, which writes it anew"
    return [
        Finding("FAIL", str(path / name), text, anew if name == BANK else back)
        for name, text in damaged.items()
    ]


def _check_model(path: Path, model: HiBio) -> Finding:
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    genes, sets = model.artifacts.n_genes, model.artifacts.n_pathways
    text = f"loads: {n_weights:,} weights, {genes:,} genes, {sets} pathways"
    return Finding("PASS", str(path), text)


def _check_trainer(path: Path) -> Finding:
    try:
        finished = load_trainer_state(path)["finished"]
    except ConfigError as error:
        return Finding("WARN", str(path), str(error), "it still embeds and evaluates")
    if finished:
        return Finding("PASS", str(path), "training is finished")
    fix = "hibio train --config CONFIG --resume RUN_FOLDER"
    return Finding("WARN", str(path), "training is not finished", fix)


def _check_bank(path: Path, model: HiBio) -> Finding:
    from hibio.bank import read_bank

    fix = "train to the end on slides with images, with bank: true"
    if not (path / BANK).is_file():
        return Finding("WARN", str(path), "no reference bank: it cannot be queried", fix)
    try:
        n_spots = len(read_bank(path / BANK, model).image)
    except ConfigError as error:
        return Finding("FAIL", str(path), str(error), f"remove bank.h5 and resume, or {fix}")
    return Finding("PASS", str(path), f"reference bank of {n_spots:,} spots")


def _check_readout(path: Path) -> list[Finding]:
    """Whether the read-out that is there can be read; where there is none, `predict` makes it."""
    from hibio.readout import read_readout

    try:
        if (path / READOUT).is_file():
            read_readout(path / READOUT)
    except ConfigError as error:
        fix = "remove it: `hibio predict` fits it again from the training stores"
        return [Finding("FAIL", str(path), str(error), fix)]
    return []
