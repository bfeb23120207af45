"""The head of HEST-Bench, to the letter, and what HiBio puts beside it.

Published (Jaume et al. 2024, section 5, and the repository's ``README`` of 2026-04-03): features
standardised and reduced by PCA in the type that they are stored in, both fitted on the training
spots, rounded to float32, and from there in float64; ridge by LSQR, no intercept, alpha = 100 /
(dimensions x genes), at most 1,000 iterations; Pearson of each gene over all test spots of the
fold, mean over genes; mean and population standard deviation over folds. The paper's table A13 is
the second published protocol: the same ridge on the stored features as they are.
Shapes: N spots of a sample, S training and Q test spots, F features, C components, G genes.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from eval.errors import FoldError
from eval.hest_bench.layout import BenchSplit
from eval.measures.inner_folds import inner_groups
from eval.measures.metrics import pearson_per_gene, summarise
from eval.measures.ridge import RidgeConfig, ridge_fit_predict
from hibio.config.files import ConfigError, apply_overrides
from hibio.config.schema import Count, Positive, SchemaError, Seed, build_section
from preprocessing.errors import DataError


@dataclass(frozen=True)
class HestProtocol:
    """The published settings.

    Args:
        n_components: of the PCA; fewer where there are fewer features or training spots.
        penalty: alpha is this over (components x genes).
        max_iter: of LSQR, whose tolerance is scikit-learn's default.
        seed: of PCA and ridge.
    """

    n_components: Count = 256
    penalty: Positive = 100.0
    max_iter: Count = 1000
    seed: Seed = 1

    def alpha(self, n_components: int, n_genes: int) -> float:
        """The published penalty."""
        return self.penalty / (n_components * n_genes)


def protocol_of(overrides: Iterable[str]) -> HestProtocol:
    """The protocol with other settings, ``"n_components=64"`` each.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    try:
        return build_section(HestProtocol, apply_overrides({}, overrides))
    except SchemaError as problem:
        raise ConfigError(f"--set: {problem}") from problem


@dataclass(frozen=True)
class Features:
    """Training (S, C) and test (Q, C) features: as they are stored, or scaled and reduced."""

    train: np.ndarray
    test: np.ndarray


def stored_features(train_x: np.ndarray, test_x: np.ndarray) -> Features:
    """Features (S, F) and (Q, F) as they are, of the protocol without PCA.

    Raises:
        FoldError: features of another width, not finite, or fewer than two training spots.
    """
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise FoldError(f"features {train_x.shape} and {test_x.shape}; the widths must be equal")
    if len(train_x) < 2 or not len(test_x):
        raise FoldError(f"{len(train_x)} training and {len(test_x)} test spots; too few")
    if not (np.isfinite(train_x).all() and np.isfinite(test_x).all()):
        raise FoldError("features are not finite; compute the embeddings again")
    return Features(train_x, test_x)


def reduce_features(stored: Features, protocol: HestProtocol) -> Features:
    """Scale and rotate features (S, F) and (Q, F), float64; nothing is fitted on test spots.

    The stored type is kept up to the PCA, whose result is rounded to float32, as published.
    """
    size = min(protocol.n_components, *stored.train.shape)
    pca = PCA(n_components=size, random_state=protocol.seed)
    pipeline = Pipeline([("scale", StandardScaler()), ("pca", pca)])
    train, test = pipeline.fit_transform(stored.train), pipeline.transform(stored.test)
    return Features(*(side.astype(np.float32).astype(np.float64) for side in (train, test)))


def published_predictions(
    features: Features, train_y: np.ndarray, protocol: HestProtocol
) -> np.ndarray:
    """Predictions (Q, G) of the published head from targets (S, G)."""
    ridge = Ridge(
        alpha=protocol.alpha(features.train.shape[1], train_y.shape[1]),
        solver="lsqr",
        fit_intercept=False,
        max_iter=protocol.max_iter,
        random_state=protocol.seed,
    )
    found = np.asarray(ridge.fit(features.train, train_y).predict(features.test))
    return found.reshape(len(features.test), train_y.shape[1])  # one gene comes back as a row


def nested_predictions(
    features: Features, train_y: np.ndarray, groups: np.ndarray, units: np.ndarray
) -> np.ndarray:
    """Predictions (Q, G) of the same features with the penalty chosen by inner folds.

    Args:
        features: after PCA, which saw all training spots but no target.
        train_y: (S, G).
        groups: (S,) never split over inner folds: patients, else samples, else spatial blocks.
        units: (S,) samples, within which the inner correlation is taken.
    """
    config = RidgeConfig(n_components=features.train.shape[1])
    return ridge_fit_predict(features.train, train_y, features.test, "cv", groups, units, config)


def published_pearson(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson r (G,) of each gene of (Q, G) as published: NaN where either side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)  # the NaN is what is asked for
        pairs = zip(truth.T, prediction.T, strict=True)
        return np.array([pearsonr(own, found)[0] for own, found in pairs])


def constant_genes(truth: np.ndarray) -> int:
    """Genes of (Q, G) that do not vary over these spots, so that they have no correlation."""
    return int((np.ptp(truth, axis=0) == 0).sum())


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
        genes: (G,) published r of each published gene, with PCA; NaN where it is constant.
        genes_no_pca: (G,) the same by the published protocol without PCA.
        per_slide: test sample -> mean r within it over the genes that vary there.
        nested: mean pooled r with the penalty of inner folds.
        own_genes: mean pooled r of the published head on the genes of the training samples.
        constant: published genes that are constant over the test spots.
        constant_in: the same within each test sample.
        n_components: of the PCA.
        alpha: the published penalty.
    """

    genes: np.ndarray
    genes_no_pca: np.ndarray
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
    def no_pca(self) -> float:
        """The published number of the protocol without PCA; NaN in the same way."""
        return float(np.mean(self.genes_no_pca))

    @property
    def varying(self) -> float:
        """The same over the genes that vary."""
        return summarise(self.genes).mean


def score_fold(
    embeddings: Mapping[str, np.ndarray], data: FoldData, protocol: HestProtocol
) -> FoldScores:
    """Fit on embeddings (N, F) of the training samples of a fold and score its test samples."""
    train = [sample.sample_id for sample in data.split.train]
    test = [sample.sample_id for sample in data.split.test]

    def sides(by_sample: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        parts = [[by_sample[name] for name in names] for names in (train, test)]
        return np.concatenate(parts[0]), np.concatenate(parts[1])

    stored = stored_features(*sides(embeddings))
    features = reduce_features(stored, protocol)
    (train_y, test_y), (own_y, own_truth) = sides(data.published), sides(data.own)
    prediction = published_predictions(features, train_y, protocol)
    nested = nested_predictions(features, train_y, *_inner(data, train))
    no_pca = published_predictions(stored, train_y, protocol)
    own = published_predictions(features, own_y, protocol)
    ends = np.cumsum([len(data.published[name]) for name in test])[:-1]
    parts = np.split(prediction, ends)
    slides = [
        summarise(pearson_per_gene(part, data.published[name])).mean
        for name, part in zip(test, parts, strict=True)
    ]
    return FoldScores(
        genes=published_pearson(prediction, test_y),
        genes_no_pca=published_pearson(no_pca, test_y),
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
