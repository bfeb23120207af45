"""Patients as bags of spots: what a patient-level read-out sees of the slides of a fold.

Shapes: P patients, S spots of one patient, D embedding dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eval.attention_pool import thinned
from eval.fold import FoldError, Representation, SlideData
from eval.variable_genes import expression


@dataclass(frozen=True)
class Patients:
    """Patients of one side of a split, sorted by name.

    Args:
        names: P patient names.
        vectors: (P, D) mean over a patient's slides of the mean over the spots.
        spread: (D,) standard deviation of a spot within its slide, pooled; None where the
            vectors are not means of spots.
        bags: P arrays (S, D) of spots, empty where the vectors are not means of spots.
    """

    names: tuple[str, ...]
    vectors: np.ndarray
    spread: np.ndarray | None = None
    bags: tuple[np.ndarray, ...] = ()


def patient_outcomes(slides: Sequence[SlideData]) -> dict[str, str]:
    """Outcome of each patient for whom one is known, by name.

    Raises:
        FoldError: two slides of a patient disagree.
    """
    found: dict[str, str] = {}
    for slide in slides:
        old = found.setdefault(slide.patient_id, slide.outcome.strip())
        if old != slide.outcome.strip():
            raise FoldError(
                f"patient {slide.patient_id} has the outcomes {old!r} and {slide.outcome!r}; give "
                "all slides of a patient the same one in the manifest and prepare again"
            )
    return {name: found[name] for name in sorted(found) if found[name]}


def embedded_patients(
    model: Representation,
    modality: str,
    slides: Sequence[SlideData],
    outcomes: dict[str, str],
    most: int | None,
    seed: int,
) -> Patients | None:
    """Patients with a known outcome as bags of a model's spot embeddings.

    Args:
        model: whose embeddings.
        modality: ``image`` or ``omics``.
        slides: one side of the split.
        outcomes: of the patients; others are left out.
        most: spots of one slide in a bag, drawn at random; None: all.
        seed: of the draw.

    Returns:
        None when no patient is left.
    """
    usable = [slide for slide in slides if slide.has_image or modality == "omics"]
    names, vectors, spreads, bags = [], [], [], []
    for name, own in _by_patient(usable, outcomes):
        means, variances, parts = [], [], []
        for slide in own:
            rows = model.rows(modality, [slide])[0]
            means.append(rows.mean(axis=0))
            variances.append(rows.var(axis=0))
            rng = np.random.default_rng([seed, *slide.slide_id.encode()])
            parts.append(rows if most is None else thinned(rows, most, rng))
        names.append(name)
        vectors.append(np.mean(means, axis=0))
        spreads.append(np.mean(variances, axis=0))
        bags.append(np.concatenate(parts))
    if not names:
        return None
    spread = np.sqrt(np.mean(spreads, axis=0))
    return Patients(tuple(names), np.stack(vectors), spread, tuple(bags))


def pseudobulk(slides: Sequence[SlideData], outcomes: dict[str, str]) -> Patients:
    """Mean normalised expression (P, G) of each patient: composition without any model."""
    return _tabulated(slides, outcomes, _mean_expression)


def cohort_facts(slides: Sequence[SlideData], outcomes: dict[str, str]) -> Patients:
    """What a cohort gives away without biology: spots, slides, depth and genes found.

    Columns: ln spots of a slide, slides, mean and standard deviation of ln(1 + depth), mean
    ln(1 + genes found).
    """
    table = _tabulated(slides, outcomes, _facts)
    counts = [len(own) for _, own in _by_patient(slides, outcomes)]
    return Patients(table.names, np.column_stack([table.vectors, counts]))


def _by_patient(
    slides: Sequence[SlideData], outcomes: dict[str, str]
) -> Iterator[tuple[str, list[SlideData]]]:
    for name in sorted({s.patient_id for s in slides} & set(outcomes)):
        yield name, [slide for slide in slides if slide.patient_id == name]


def _tabulated(
    slides: Sequence[SlideData], outcomes: dict[str, str], of: Callable[[SlideData], np.ndarray]
) -> Patients:
    pairs = [
        (name, np.mean([of(slide) for slide in own], axis=0))
        for name, own in _by_patient(slides, outcomes)
    ]
    vectors = np.stack([vector for _, vector in pairs]) if pairs else np.zeros((0, 0))
    return Patients(tuple(name for name, _ in pairs), vectors)


def _mean_expression(slide: SlideData) -> np.ndarray:
    return np.asarray(expression(slide).mean(axis=0)).ravel()


def _facts(slide: SlideData) -> np.ndarray:
    depth = np.log1p(np.asarray(slide.counts.sum(axis=1), dtype=np.float64).ravel())
    genes = np.log1p(np.diff(slide.counts.tocsr().indptr))
    return np.array([np.log(slide.n_spots), depth.mean(), depth.std(), genes.mean()])
