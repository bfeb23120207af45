"""One encoder on one fold: the published number, and what HiBio puts beside it.

Shapes: N spots of a sample, S training and Q test spots, F features, G genes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eval.hest_bench.layout import BenchSplit
from eval.hest_bench.protocol import (
    HestProtocol,
    constant_genes,
    nested_predictions,
    published_pearson,
    published_predictions,
    reduce_features,
)
from eval.metrics import pearson_per_gene, summarise
from eval.readouts import inner_groups
from preprocessing.errors import DataError


@dataclass(frozen=True)
class FoldData:
    """What the encoders of a fold are measured on; all by sample.

    Args:
        split: the fold.
        published: targets (N, G) of the published genes.
        own: targets (N, G') of the genes chosen on training samples alone.
        patients: patient of a sample, or the sample where none is known.
        xy: corners of the patches (N, 2), or None.
    """

    split: BenchSplit
    published: Mapping[str, np.ndarray]
    own: Mapping[str, np.ndarray]
    patients: Mapping[str, str]
    xy: Mapping[str, np.ndarray | None]


@dataclass(frozen=True)
class FoldScores:
    """Numbers of one encoder on one fold.

    Args:
        genes: (G,) published r of each published gene; NaN where it is constant.
        per_slide: test sample -> mean r within it over the genes that vary there.
        nested: mean pooled r with the penalty of inner folds.
        own_genes: mean pooled r of the published head on the genes of the training samples.
        constant: published genes that are constant over the test spots.
        constant_in: the same within each test sample.
        n_components: of the PCA.
        alpha: the published penalty.
    """

    genes: np.ndarray
    per_slide: Mapping[str, float]
    nested: float
    own_genes: float
    constant: int
    constant_in: Mapping[str, int]
    n_components: int
    alpha: float

    @property
    def published(self) -> float:
        """The published number: a constant gene makes it NaN, as there."""
        return float(np.mean(self.genes))

    @property
    def varying(self) -> float:
        """The same over the genes that vary."""
        return summarise(self.genes).mean


def score_fold(
    embeddings: Mapping[str, np.ndarray], data: FoldData, protocol: HestProtocol
) -> FoldScores:
    """Fit on the training samples of a fold and score its test samples.

    Args:
        embeddings: (N, F) of every sample.
        data: targets of the same spots.
        protocol: the published settings.
    """
    train = [sample.sample_id for sample in data.split.train]
    test = [sample.sample_id for sample in data.split.test]
    features = reduce_features(
        np.concatenate([embeddings[name] for name in train]),
        np.concatenate([embeddings[name] for name in test]),
        protocol,
    )
    train_y = np.concatenate([data.published[name] for name in train])
    test_y = np.concatenate([data.published[name] for name in test])
    prediction = published_predictions(features, train_y, protocol)
    nested = nested_predictions(features, train_y, *_inner(data, train))
    own_y = np.concatenate([data.own[name] for name in train])
    own = published_predictions(features, own_y, protocol)
    own_truth = np.concatenate([data.own[name] for name in test])
    ends = np.cumsum([len(data.published[name]) for name in test])[:-1]
    parts = np.split(prediction, ends)
    slides = [
        summarise(pearson_per_gene(part, data.published[name])).mean
        for name, part in zip(test, parts, strict=True)
    ]
    return FoldScores(
        genes=published_pearson(prediction, test_y),
        per_slide=dict(zip(test, slides, strict=True)),
        nested=summarise(pearson_per_gene(nested, test_y)).mean,
        own_genes=summarise(pearson_per_gene(own, own_truth)).mean,
        constant=constant_genes(test_y),
        constant_in={name: constant_genes(data.published[name]) for name in test},
        n_components=features.train.shape[1],
        alpha=protocol.alpha(features.train.shape[1], train_y.shape[1]),
    )


def _inner(data: FoldData, train: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Groups and samples (S,) of the inner folds: patients, or blocks of the only patient."""
    size = [len(data.published[name]) for name in train]
    slides = np.repeat(np.array(train, dtype=object), size)
    patients = np.repeat(np.array([data.patients[n] for n in train], dtype=object), size)
    places = [data.xy[name] for name in train]
    if len(set(patients.tolist())) > 1:
        return patients, slides
    known = [place for place in places if place is not None]
    if len(known) < len(places):
        raise DataError(
            f"fold {data.split.name}: one training patient, so the inner folds are spatial blocks, "
            "but a patch file has no dataset coords (N, 2); write it again with coordinates"
        )
    return inner_groups(patients, slides, np.concatenate(known)), slides
