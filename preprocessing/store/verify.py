"""Checking a slide store: everything a training run will rely on. Shapes: S spots, G genes."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from preprocessing.errors import DataError
from preprocessing.findings import Finding, Level, SlideWarning
from preprocessing.hdf5 import oversized
from preprocessing.slide_row import ROLES
from preprocessing.spot_table import PROTEIN, repeated_names
from preprocessing.store.layout import broken, unsealed_features
from preprocessing.store.read import SlideStore

MIN_GENES = 300
MIN_PROTEINS = 10
MIN_DEPTH = 200
_AGAIN = "delete the store and run `hibio prepare` again"
_SAMPLE = 4
_HARMLESS_BYTES = 1 << 24  # what a dataset may claim beyond its bytes
_XY_TOLERANCE_UM = 0.5
Problem = tuple[Level, str, str]  # level, message, fix


def verify_store(path: str | Path) -> list[Finding]:
    """Check one store: schema, shapes, counts, coordinates, patches, features, labels.

    Returns:
        FAIL and WARN findings, or a single PASS; never raises for a bad file.
    """
    path = Path(path)
    findings: list[Finding] = []
    try:
        with SlideStore(path) as store:
            for check in _CHECKS:
                findings += [Finding(p[0], str(path), *p[1:]) for p in _run(check, store)]
                if check is _check_sizes and findings:  # to read it would fill the memory
                    return findings
            if not findings:
                text = f"{_size(store)}, checksums, schema and values are valid"
                findings.append(Finding("PASS", str(path), text))
    except DataError as error:
        findings.append(Finding("FAIL", str(path), str(error), _AGAIN))
    return findings


def _size(store: SlideStore) -> str:
    if not store.has_counts:
        return f"{store.n_spots} spots, image only, no counts"
    return f"{store.n_spots} spots x {len(store.gene_ids)} {feature_word(store.modality)}"


def feature_word(modality: str) -> str:
    """What the columns of the counts are called: genes or proteins."""
    return "proteins" if modality == PROTEIN else "genes"


def few_features(count: int, modality: str) -> str | None:
    """Say what to expect of a small panel; None where it is large enough."""
    if modality == PROTEIN:
        return "expect coarse cell types" if count < MIN_PROTEINS else None
    return "expect weak pathway coverage" if count < MIN_GENES else None


def _run(check: Callable[[SlideStore], list[Problem]], store: SlideStore) -> list[Problem]:
    try:
        return check(store)
    except DataError as error:
        return [("FAIL", str(error), _AGAIN)]
    except Exception as error:  # noqa: BLE001 - whatever a damaged file makes the library raise
        return [("FAIL", f"damaged ({type(error).__name__}: {error})", _AGAIN)]


def _check_sizes(store: SlideStore) -> list[Problem]:
    with h5py.File(store.path, "r") as file:
        absurd = oversized(file, _HARMLESS_BYTES)
    if absurd:
        return [("FAIL", f"{', '.join(absurd)}: claims more values than the file can hold", _AGAIN)]
    return []


def _check_ids(store: SlideStore) -> list[Problem]:
    problems: list[Problem] = []
    if store.path.stem != store.slide_id:
        problems.append(("WARN", f"holds the slide {store.slide_id!r}", "name the file like it"))
    if not store.patient_id:
        problems.append(("FAIL", "patient_id is empty", "fill it in the manifest; prepare again"))
    if store.role not in ("", *ROLES):
        problems.append(("FAIL", f"role is {store.role!r}", "correct the manifest; prepare again"))
    return problems


def _check_warnings(store: SlideStore) -> list[Problem]:
    return [("WARN", warning.message, warning.fix) for warning in store.warnings]


def _check_content(store: SlideStore) -> list[Problem]:
    with h5py.File(store.path, "r") as file:
        differing, unsealed = broken(file), unsealed_features(file)
    if differing is None:
        text = "no checksum of the content (written by an older version)"
        return [("WARN", text, "run `hibio prepare` again to have one")]
    if differing:
        text = f"{', '.join(differing)}: not what was written (damaged disk or copy, or edited)"
        return [("FAIL", text, _AGAIN)]
    if unsealed:
        text = f"{', '.join(unsealed)}: no checksum (added by an older version)"
        return [("WARN", text, "compute these features again to have one")]
    return []


def _check_names(store: SlideStore) -> list[Problem]:
    problems: list[Problem] = []
    for what, names in (("barcodes", store.barcodes), ("gene names", store.gene_names)):
        repeated = repeated_names(names)
        if repeated:
            problems.append(("FAIL", f"{what} occur twice (first: {repeated[0]!r})", _AGAIN))
    return problems


def _check_counts(store: SlideStore) -> list[Problem]:
    counts: csr_matrix = store.counts()
    if not store.has_counts and store.has_image:
        return []
    if counts.nnz == 0:
        return [("FAIL", "the counts are all zero", "check the counts file of the manifest")]
    values = counts.data
    if store.modality == PROTEIN:
        if values.dtype.kind == "f" and np.isfinite(values).all() and values.min() >= 0:
            return []  # the sum of intensities is no depth
        return [("FAIL", "intensities are not finite numbers from 0 on", _AGAIN)]
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0:
        return [("FAIL", "counts are not non-negative integers", _AGAIN)]
    return []


def _check_places(store: SlideStore) -> list[Problem]:
    xy_px0, xy_um = store.xy_px0, store.xy_um
    problems: list[Problem] = []
    if store.n_spots > 1 and (xy_um == xy_um[:1]).all():
        problems.append(("FAIL", "all spots have the same coordinates", "correct the positions"))
    if np.abs(xy_px0 * store.mpp - xy_um).max() > _XY_TOLERANCE_UM:
        problems.append(("FAIL", "xy_um is not xy_px0 * mpp", _AGAIN))
    size = store.attrs.get("slide_size_px0")
    if size is not None:
        outside = ((xy_px0 < 0) | (xy_px0 > np.asarray(size))).any(axis=1)
        if outside.any():
            text = f"{int(outside.sum())} spots lie outside the image"
            problems.append(("FAIL", text, "correct image_scale or the positions; prepare again"))
    return problems


def _check_patches(store: SlideStore) -> list[Problem]:
    if not store.has_image:
        return [("WARN", "no image: only counts can be used", "give an image in the manifest")]
    count = store.n_patches
    if count != store.n_spots:
        return [("FAIL", f"{count} patches for {store.n_spots} spots", _AGAIN)]
    sample = np.unique(np.linspace(0, store.n_spots - 1, _SAMPLE).astype(np.int64))
    if store.context_um is not None:
        if store.n_context != store.n_spots:
            text = f"{store.n_context} context patches for {store.n_spots} spots"
            return [("FAIL", text, _AGAIN)]
        store.context(sample)  # raises where they cannot be decoded
    patches = store.patches(sample)
    if (patches.reshape(len(sample), -1).std(axis=1) == 0).all():
        return [("WARN", "the sampled patches are of one colour", "look at the slide and the mask")]
    return []


def _check_features(store: SlideStore) -> list[Problem]:
    problems: list[Problem] = []
    for name in store.feature_names:
        try:
            store.features(name)
        except DataError as error:
            problems.append(("FAIL", str(error), f"compute {name!r} again"))
    return problems


def _check_doubts(store: SlideStore) -> list[Problem]:
    found = doubts(store.counts(), store.modality, store.labels())
    return [("WARN", one.message, one.fix) for one in found]


def doubts(counts: csr_matrix, modality: str, labels: pd.DataFrame) -> list[SlideWarning]:
    """What may disappoint in the content of a slide: few genes, few counts, empty labels.

    Args:
        counts: (S, G); without columns nothing was counted.
        modality: "rna" or "protein".
        labels: (S, columns), as `SlideStore.labels` gives them.
    """
    found: list[SlideWarning] = []
    few = few_features(counts.shape[1], modality)
    if few is not None and counts.shape[1]:
        found.append(SlideWarning(f"only {counts.shape[1]} {feature_word(modality)}", few))
    depth = float(np.median(np.asarray(counts.sum(axis=1)).ravel()))
    if 0 < depth < MIN_DEPTH and modality != PROTEIN:  # the sum of intensities is no depth
        text = f"median depth is {depth:g} counts a spot"
        found.append(SlideWarning(text, "expect noisy expression"))
    return found + [
        SlideWarning(f"label column {name!r} is empty for every spot", "correct the labels file")
        for name in labels.columns
        if labels[name].isin(["", np.nan]).all()
    ]


_CHECKS: tuple[Callable[[SlideStore], list[Problem]], ...] = (
    _check_sizes,
    _check_ids,
    _check_content,
    _check_warnings,
    _check_names,
    _check_counts,
    _check_places,
    _check_patches,
    _check_features,
    _check_doubts,
)
