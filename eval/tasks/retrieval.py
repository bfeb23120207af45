"""Cross-modal retrieval within slides (docs/method.md 6.2).

Metrics ``image_to_omics/recall@10%`` and so on, per test slide; ``.../pooled_recall@10%`` over all
test slides; ``_csls`` and ``_sinkhorn`` use the whole test slide (transductive). A model whose two
sides share no space is bridged by ridge from its image features to the omics spot vector;
``_combined`` is the weighted mean of the cosine of that bridge, from the raw features, and a
model's own; the weight is chosen on training slides (`choose_share`). ``readout: full`` adds
``_full``, Sinkhorn on the combined cosine, and ``_full_niche``, the same of spots averaged with
their neighbours on both sides, beside ``_full_random_graph``, averaged over random spots instead.

``.../soft_recall@10``: spots beside each other have nearly the same profile, and plain recall
counts all but one of them as wrong. Here an item is relevant to a query when its measured
expression is among the most similar to the query's own: Pearson over variable genes, the first
``share`` of the slide's spots, the query's own included. Soft recall at k is the share of the first
k items that are relevant: precision at k (Manning, Raghavan and Schütze 2008, section 8.4) under
that relevance, so a random order reaches about ``share``. Ties count at their expectation.
Shapes: N spots of one slide (queries in rows, items in columns), S spots of all slides,
D dimensions, V variable genes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import logsumexp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from eval.errors import FoldError
from eval.folds.fold import Fold, Representation, SlideData, dense_expression, stack, variable_genes
from eval.measures.inner_folds import SHARES, spatial_blocks, within_one_error
from eval.measures.metrics import (
    TIE,
    WORDS,
    Ranks,
    balanced_accuracy,
    chance_mrr,
    chance_recall_at_k,
    list_length,
    median_rank,
    mrr,
    ranks,
    ranks_of_embeddings,
    recall_at_k,
    unit_rows,
)
from eval.measures.ridge import RidgeConfig, zscore
from eval.results import RAW, Measure, Question, ResultTable, TaskResult
from eval.tasks.probes import (
    BRIDGED,
    FULL,
    PLAIN,
    Pairs,
    averaged,
    check_readout,
    item_graphs,
    pairs_of,
    raw_bridge,
    side_by_side,
)
from hibio.config.schema import Count, Fraction, Temperature, Whole

QUESTION = Question(
    "retrieval",
    "Given a spot's image, find its own expression profile among those of a fixed pool, and the "
    "reverse; within one slide unless a metric says pooled.",
    (
        "image_to_omics/recall@10%",
        "omics_to_image/recall@10%",
        "image_to_omics/recall@5",
        "image_to_omics/recall@10%_combined",
        "image_to_omics/recall@10%_sinkhorn",
        "image_to_omics/median_rank",
        "image_to_omics/soft_recall@10",
        "identity/patient_balanced_accuracy",
    ),
)
WHOLE_SLIDE = "csls, sinkhorn: similarities re-scaled with the whole test slide (transductive)"
SOFT = (
    "soft_recall@k: share of the first k items whose measured expression is among the 5 % of the "
    "slide most like the query's own"
)
IDENTITY = (
    "identity: accuracy of a probe that tells slide or patient from the embedding, so that stain "
    "or depth shortcuts are kept; lower is better"
)
#: Part of a metric's name -> what it changes.
CHANGES = {
    "pooled_": WORDS["pooled"],
    "_random_graph": "random_graph: items averaged over random spots instead of neighbours; a "
    "niche gains only what it has beyond this",
    "_combined": "combined: cosine of the embeddings and cosine of the spot vector and its ridge "
    "prediction from the raw image features, weighted on training slides",
    "_full": "full: Sinkhorn on the combined cosine of the whole test slide (transductive)",
    "_full_niche": "full_niche: full, both sides averaged over the spot's neighbours first",
    "_csls": WHOLE_SLIDE,
    "_sinkhorn": WHOLE_SLIDE,
}
DIRECTIONS = ("image_to_omics", "omics_to_image")
BLOCK = 512


def soft_recall(
    query: np.ndarray,
    item: np.ndarray,
    expression: np.ndarray,
    k: Sequence[int],
    share: float,
    block: int = BLOCK,
) -> tuple[list[float], float]:
    """Mean over the queries for several list lengths, and what a random order reaches.

    Args:
        query: (N, D) embeddings of one side.
        item: (N, D) embeddings of the other side, pairs in the same row.
        expression: (N, V) measured expression of the spots.
        k: list lengths.
        share: of the items that are relevant to a query; more where similarities tie.
        block: queries at a time; memory is block x N float64.

    Raises:
        FoldError: rows do not match, or a length beyond the pool.
    """
    n = len(query)
    if not (len(item) == len(expression) == n) or not n:
        raise FoldError(
            f"{n} queries, {len(item)} items, {len(expression)} profiles; must be equal"
        )
    if min(k) < 1 or max(k) > n:
        raise FoldError(f"list lengths {list(k)} of a pool of {n}; they must be 1 to {n}")
    a, b = unit_rows(query), unit_rows(item)
    profile = unit_rows(expression - expression.mean(axis=1, keepdims=True))
    first = list_length(share, n)
    total, relevant_share = np.zeros(len(k)), 0.0
    for start in range(0, n, block):
        rows = slice(start, start + block)
        alike = profile[rows] @ profile.T
        own = np.arange(len(alike))
        alike[own, start + own] = np.inf  # the query's own spot is always relevant
        bound = -np.partition(-alike, first - 1, axis=1)[:, first - 1 : first]
        relevant = alike >= bound - TIE
        relevant_share += float(relevant.mean(axis=1).sum())
        similarity = a[rows] @ b.T
        total += [_precision(similarity, relevant, length).sum() for length in k]
    return (total / n).tolist(), relevant_share / n


def _precision(similarity: np.ndarray, relevant: np.ndarray, k: int) -> np.ndarray:
    """Share (Q,) of the k most similar items that are relevant; ties in random order."""
    cut = -np.partition(-similarity, k - 1, axis=1)[:, k - 1 : k]
    above, tied = similarity > cut + TIE, np.abs(similarity - cut) <= TIE
    free = k - above.sum(axis=1)
    part = (relevant & tied).sum(axis=1) / tied.sum(axis=1)
    return np.asarray(((relevant & above).sum(axis=1) + free * part) / k)


def csls(similarity: np.ndarray, k: int = 10) -> np.ndarray:
    """Cross-domain similarity local scaling: 2 s - mean of the k best per row and per column.

    Args:
        similarity: (N, M) cosines.
        k: size of the neighbourhood.

    Returns:
        (N, M); the same matrix serves both directions.
    """
    rows = _mean_of_best(similarity, k)
    columns = _mean_of_best(similarity.T, k)
    return np.asarray(2.0 * similarity - rows[:, None] - columns[None, :])


def _mean_of_best(similarity: np.ndarray, k: int) -> np.ndarray:
    k = min(k, similarity.shape[1])
    best = np.partition(similarity, similarity.shape[1] - k, axis=1)[:, -k:]
    return np.asarray(best.mean(axis=1))


def sinkhorn(similarity: np.ndarray, temperature: float = 0.1, steps: int = 30) -> np.ndarray:
    """Log of the doubly stochastic scaling of exp(similarity / temperature).

    It says that every item belongs to one query, which holds for a pool of pairs.

    Args:
        similarity: (N, N) cosines.
        temperature: of the kernel; 0.1 was measured in the prototype.
        steps: rounds of row and column scaling.

    Returns:
        (N, N) log assignment; rows and columns of its exponential sum to about 1.
    """
    kernel = similarity / temperature
    row = np.zeros(len(kernel))
    column = np.zeros(kernel.shape[1])
    for _ in range(steps):
        row = -logsumexp(kernel + column, axis=1)
        column = -logsumexp(kernel + row[:, None], axis=0)
    return np.asarray(kernel + row[:, None] + column)


def identity_accuracy(
    embeddings: list[np.ndarray],
    slides: tuple[SlideData, ...],
    kind: str,
    max_spots: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """Balanced accuracy of a logistic probe, on blocks of tissue it was not fitted on.

    The folds are spatial blocks within slides, so that a spot's neighbours do not give it away.

    Args:
        embeddings: (S, D) per slide, as the model gives them (not centred per slide).
        slides: the slides.
        kind: ``slide`` or ``patient``.
        max_spots: spots drawn per slide.
        seed: of the draw.

    Returns:
        Balanced accuracy, and chance (1 / number of names); NaN with fewer than two names.
    """
    names = [getattr(slide, f"{kind}_id") for slide in slides]
    n_names = len(set(names))
    if n_names < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    rows, truth, fold = [], [], []
    for name, slide, values in zip(names, slides, embeddings, strict=True):
        pick = rng.permutation(slide.n_spots)[:max_spots]
        rows.append(values[pick])
        truth.append(np.full(len(pick), name, dtype=object))
        fold.append((spatial_blocks(slide.xy_um) % 3)[pick])
    predicted = _cross_predict(stack(rows), np.concatenate(truth), np.concatenate(fold), seed)
    return balanced_accuracy(np.concatenate(truth).astype(str), predicted), 1.0 / n_names


def _cross_predict(rows: np.ndarray, truth: np.ndarray, fold: np.ndarray, seed: int) -> np.ndarray:
    rows = zscore(rows)
    if rows.shape[1] > 50:
        rows = zscore(PCA(50, random_state=seed).fit_transform(rows))
    predicted = np.empty(len(rows), dtype=object)
    for held in np.unique(fold):
        own = fold == held
        probe = LogisticRegression(C=1.0, max_iter=500, class_weight="balanced")
        probe.fit(rows[~own], truth[~own].astype(str))
        predicted[own] = probe.predict(rows[own])
    return predicted.astype(str)


@dataclass(frozen=True)
class RetrievalConfig:
    """Settings of retrieval.

    Args:
        item: ``spot``, or ``niche`` = a spot averaged with its neighbours on both sides; a niche
            is an easier item, so it is reported beside the same average over random spots.
        k: list lengths.
        fractions: list lengths as shares of the pool.
        soft_share: share of a slide's spots whose expression is nearly the query's own.
        soft_genes: variable genes in which that is measured.
        csls_k: neighbourhood of CSLS.
        temperature: of Sinkhorn.
        steps: of Sinkhorn.
        max_transductive: largest slide for CSLS and Sinkhorn, which hold N x N numbers.
        target: model whose omics vector is the target of the ridge rows.
        ridge: of those rows.
        identity_spots: spots per slide in the slide and patient probe; 0 leaves it out.
        readout: ``plain``, or ``full`` = also the ``_full`` metrics.
    """

    item: str = "spot"
    k: tuple[Count, ...] = (1, 5, 10)
    fractions: tuple[Fraction, ...] = (0.01, 0.05, 0.1)
    soft_share: Fraction = 0.05
    soft_genes: Count = 500
    csls_k: Count = 10
    temperature: Temperature = 0.1
    steps: Count = 30
    max_transductive: Whole = 6000
    target: str = RAW
    ridge: RidgeConfig = field(default_factory=RidgeConfig)
    identity_spots: Whole = 100
    readout: str = PLAIN

    def __post_init__(self) -> None:
        check_readout("retrieval", self.readout)
        if self.item not in ("spot", "niche"):
            raise FoldError(f"retrieval item {self.item!r}; it must be 'spot' or 'niche'")


def run(fold: Fold, config: RetrievalConfig) -> TaskResult:
    """Retrieve the omics of a spot by its image and the image by its omics."""
    table = ResultTable(QUESTION)
    slides = fold.paired_test
    if not slides:
        table.note(f"fold {fold.name}: no test slide with an image; not run")
        return table.result()
    table.note(f"item: {config.item}; pool: one test slide; embeddings centred per slide")
    table.row(BRIDGED, "baseline", "ridge from image features to the omics vector")
    table.note("ties count at their expectation; csls and sinkhorn rows are transductive")
    if config.item != "spot":
        table.note("soft recall is of single spots; it is left out for niches")
    profiles = _profiles(fold, config)
    bridge = raw_bridge(fold, config.target, config.ridge)
    for model in fold.models:
        _add_identity(table, fold, model, config)
        pairs = pairs_of(fold, model, config.target, config.ridge)
        if pairs is not None:
            _add_pairs(table, fold, pairs, profiles, config)
            if bridge is not None and model.aligned:
                _add_combined(table, fold, pairs, bridge, config)
    return table.result(fold.models)


def _add_pairs(
    table: ResultTable,
    fold: Fold,
    pairs: Pairs,
    profiles: list[np.ndarray],
    config: RetrievalConfig,
) -> None:
    """Every metric of one model by itself."""
    for suffix, graph in item_graphs(fold.paired_test, config.item, fold.seed):
        shown = averaged(pairs, graph)
        for index, slide in enumerate(fold.paired_test):
            _add_slide(table, fold, slide, (shown, index, suffix), config)
            if config.item == "spot":
                _add_soft(table, fold.key(slide.slide_id), (shown, index), profiles, config)
        pooled = (stack(shown.image), stack(shown.omics))
        _add_cosine(table, shown.name, pooled, ("pooled_", suffix, fold.key("pooled")), config)


def _add_combined(
    table: ResultTable, fold: Fold, pairs: Pairs, bridge: Pairs, config: RetrievalConfig
) -> None:
    """The model beside the bridge; in `full` also Sinkhorn on that, of spots and of niches."""
    share, slides = choose_share(pairs, bridge), fold.paired_test
    table.note(f"combined, fold {fold.key(pairs.name)}: weight of its own cosine {share:g}")
    for suffix, graph in item_graphs(slides, config.item, fold.seed):
        both = side_by_side(averaged(pairs, graph), averaged(bridge, graph), share)
        for slide, *sides in zip(slides, both.image, both.omics, strict=True):
            where = ("", f"{suffix}_combined", fold.key(slide.slide_id))
            _add_cosine(table, both.name, (sides[0], sides[1]), where, config)
    if config.readout != FULL:
        return
    niches = [
        (suffix or "_niche", graph) for suffix, graph in item_graphs(slides, "niche", fold.seed)
    ]
    for suffix, graph in [("", None), *niches]:
        both = side_by_side(averaged(pairs, graph), averaged(bridge, graph), share)
        for index, slide in enumerate(slides):
            if slide.n_spots <= config.max_transductive:
                _add_sinkhorn(
                    table, fold.key(slide.slide_id), (both, index, f"_full{suffix}"), config
                )


def choose_share(own: Pairs, bridge: Pairs) -> float:
    """Weight of a model's own cosine beside the bridge's, the best recall on training slides.

    Model and bridge are both asked about spots that they were fitted on: a model is not trained
    again for inner folds, and next to a bridge that is, it would look better than it is (its recall
    at 10 % is .9 on training slides of HER2ST, .36 on others). Of the weights within one standard
    error over slides the one nearest to a half is taken (`within_one_error`); a half without
    training slides.
    """
    if own.train is None or bridge.train is None:
        return 0.5
    mixed = [side_by_side(own.train, bridge.train, share) for share in SHARES]
    scores = np.array([[_recall(*s) for s in zip(m.image, m.omics, strict=True)] for m in mixed]).T
    return SHARES[within_one_error(scores, [-abs(share - 0.5) for share in SHARES])]


def _recall(image: np.ndarray, omics: np.ndarray) -> float:
    """Mean recall at 10 % of both directions."""
    both = [ranks_of_embeddings(*sides) for sides in _both_ways(image, omics)]
    return float(np.mean([recall_at_k(found, list_length(0.1, len(image))) for found in both]))


def _add_sinkhorn(
    table: ResultTable, key: str, shown: tuple[Pairs, int, str], config: RetrievalConfig
) -> None:
    pairs, index, suffix = shown
    cosine = unit_rows(pairs.image[index]) @ unit_rows(pairs.omics[index]).T
    scaled = sinkhorn(cosine, config.temperature, config.steps)
    for direction, matrix in zip(DIRECTIONS, (scaled, scaled.T), strict=True):
        _add_ranks(table, (pairs.name, f"{direction}/", suffix, key), ranks(matrix), config)


def _both_ways(image: np.ndarray, omics: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(image, omics), (omics, image)]


def _add_cosine(
    table: ResultTable,
    model: str,
    sides: tuple[np.ndarray, np.ndarray],
    where: tuple[str, str, str],
    config: RetrievalConfig,
) -> None:
    """Ranks by plain cosine, both ways; `where` is prefix and suffix of the metric, and its key."""
    prefix, suffix, key = where
    for direction, (query, item) in zip(DIRECTIONS, _both_ways(*sides), strict=True):
        place = (model, f"{direction}/{prefix}", suffix, key)
        _add_ranks(table, place, ranks_of_embeddings(query, item), config)


def _add_slide(
    table: ResultTable,
    fold: Fold,
    slide: SlideData,
    shown: tuple[Pairs, int, str],
    config: RetrievalConfig,
) -> None:
    pairs, index, suffix = shown
    image, omics = pairs.image[index], pairs.omics[index]
    key = fold.key(slide.slide_id)
    _add_cosine(table, pairs.name, (image, omics), ("", suffix, key), config)
    if slide.n_spots > config.max_transductive:
        table.note(f"slide {slide.slide_id}: {slide.n_spots} spots, no csls and sinkhorn rows")
        return
    cosine = unit_rows(image) @ unit_rows(omics).T
    whole = {
        "csls": csls(cosine, config.csls_k),
        "sinkhorn": sinkhorn(cosine, config.temperature, config.steps),
    }
    for kind, similarity in whole.items():
        for direction, matrix in zip(DIRECTIONS, (similarity, similarity.T), strict=True):
            where = (pairs.name, f"{direction}/", f"{suffix}_{kind}", key)
            _add_ranks(table, where, ranks(matrix), config)


def _profiles(fold: Fold, config: RetrievalConfig) -> list[np.ndarray]:
    """Expression (N, V) of each test slide on genes that vary on the training slides."""
    genes = variable_genes(fold.train or fold.test, config.soft_genes)
    return [dense_expression(slide, genes) for slide in fold.paired_test]


def _add_soft(
    table: ResultTable,
    key: str,
    shown: tuple[Pairs, int],
    profiles: list[np.ndarray],
    config: RetrievalConfig,
) -> None:
    """Soft recall of one slide; lists longer than the slide are left out."""
    pairs, index = shown
    k = [length for length in config.k if length <= len(profiles[index])]
    if not k:
        return
    sides = _both_ways(pairs.image[index], pairs.omics[index])
    for direction, (query, item) in zip(DIRECTIONS, sides, strict=True):
        found, chance = soft_recall(query, item, profiles[index], k, config.soft_share)
        unit = f"share of retrieved items within the {100 * config.soft_share:g} % most alike"
        for length, value in zip(k, found, strict=True):
            measure = Measure(f"{direction}/soft_recall@{length}", unit, words=(SOFT,))
            table.add(pairs.name, measure, key, value, chance)


def _add_ranks(
    table: ResultTable, where: tuple[str, str, str, str], found: Ranks, config: RetrievalConfig
) -> None:
    model, key = where[0], where[-1]
    n = found.n_items
    lengths = {f"recall@{k}": k for k in config.k}
    lengths |= {f"recall@{100 * f:g}%": list_length(f, n) for f in config.fractions}
    for name, k in lengths.items():
        measure = _measure(where, name, "share of queries")
        table.add(model, measure, key, recall_at_k(found, k), chance_recall_at_k(k, n))
    measure = _measure(where, "median_rank", "rank / pool, lower is better")
    table.add(model, measure, key, median_rank(found), 0.5)
    table.add(model, _measure(where, "mrr", "reciprocal rank"), key, mrr(found), chance_mrr(n))


def _measure(where: tuple[str, str, str, str], score: str, unit: str) -> Measure:
    _, prefix, suffix, _ = where
    words = [WORDS[score.split("@")[0]]]
    words += [text for part, text in CHANGES.items() if part in prefix + suffix]
    return Measure(
        f"{prefix}{score}{suffix}",
        unit,
        "low" if score == "median_rank" else "high",
        tuple(words),
        transductive=WHOLE_SLIDE in words or suffix.startswith("_full"),
    )


def _add_identity(
    table: ResultTable, fold: Fold, model: Representation, config: RetrievalConfig
) -> None:
    """Slide and patient probe on all slides of the fold that have an image."""
    slides = (*fold.paired_train, *fold.paired_test)
    if model.image is None or not config.identity_spots:
        return
    rows = model.rows("image", slides)
    for kind in ("slide", "patient"):
        value, chance = identity_accuracy(rows, slides, kind, config.identity_spots, fold.seed)
        name, unit = f"identity/{kind}_balanced_accuracy", "balanced accuracy, lower is better"
        if np.isfinite(chance):
            measure = Measure(name, unit, "low", (IDENTITY,))
            table.add(model.name, measure, fold.key("pooled"), value, chance)
