"""Checking what a user has: a store, a folder of stores, or a manifest."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from preprocessing.errors import DataError
from preprocessing.findings import Finding
from preprocessing.manifest import SlideRow, missing_files, scan_manifest
from preprocessing.patches import PatchConfig, iter_patches
from preprocessing.readers import read_slide_spots, read_spots
from preprocessing.run import stores_in
from preprocessing.run.preparation import open_row_slide
from preprocessing.spot_table import SpotTable
from preprocessing.store import SlideStore, verify_store
from preprocessing.store.verify import feature_word, few_features


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
    return verify_store(path)


def _check_folder(folder: Path) -> list[Finding]:
    try:
        stores = stores_in(folder)
    except DataError as error:
        return [Finding("FAIL", str(folder), str(error), "run `hibio prepare` first")]
    findings: list[Finding] = []
    usable: list[Path] = []
    for path in tqdm(stores, desc="check", unit="slide", disable=None):
        found = verify_store(path)
        findings += found
        if all(finding.level != "FAIL" for finding in found):
            usable.append(path)
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
    findings = []
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    if twice:
        findings.append(
            Finding(
                "FAIL", str(folder), f"slide {twice[0]!r} is in two stores", "remove one of them"
            )
        )
    if len(patches) > 1:
        sizes = ", ".join(f"{um:g} um / {px} px" for um, px in sorted(patches))
        findings.append(
            Finding(
                "FAIL",
                str(folder),
                f"patches of different sizes: {sizes}",
                "prepare all slides with the same --patch-um and --patch-px",
            )
        )
    findings += [
        Finding(
            "WARN",
            str(folder),
            f"only {len(genes)} {feature_word(modality)} are on all slides",
            "check that all slides use the same kind of gene names",
        )
        for modality, genes in shared.items()
        if few_features(len(genes), modality) is not None
    ]
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
        table, findings = _read(row), []
    except MemoryError:
        text = "reading it needs more memory than there is"
        return [Finding("FAIL", row.slide_id, text, "are its files what the manifest says?")]
    except (DataError, OSError) as error:
        return [Finding("FAIL", row.slide_id, str(error), "correct the files or the manifest row")]
    genes = len(table.gene_names)
    word, few = feature_word(table.modality), few_features(genes, table.modality)
    if row.image is None:
        findings.append(
            Finding(
                "WARN",
                row.slide_id,
                "no image: only counts can be used",
                "fill the column image if there is one",
            )
        )
    if few is not None and not table.image_only:
        findings.append(Finding("WARN", row.slide_id, f"only {genes} {word}", few))
    findings += [
        Finding("WARN", row.slide_id, note, "look whether this is meant")
        for note in table.notes
        if note.startswith("mpp ")
    ]
    size = f"{table.n_spots} spots x {genes} {word}"
    if table.image_only:
        size = f"image only, no counts: {table.n_spots} windows on tissue"
    summary = f"{size}, {table.mpp:.4g} um per pixel"
    return findings or [Finding("PASS", row.slide_id, summary)]


def _read(row: SlideRow) -> SpotTable:
    if row.image is None:
        return read_spots(row)
    with open_row_slide(row) as (slide, _):
        patch = PatchConfig()
        table = read_slide_spots(row, slide, patch.patch_um)
        names = [str(name) for name in table.barcodes]
        iter_patches(slide, table.xy_px0, table.mpp, patch.patch_um, patch.patch_px, names)
    return table
