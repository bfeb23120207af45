"""Fold-in of genes never seen: known genes return, unseen genes place spots, reports, errors."""

import numpy as np
import pytest
from scipy import sparse

from preprocessing.coexpression import GeneFactors, fit_gene_factors, spot_vectors, standardise
from preprocessing.coexpression.bridge import BridgeSlide
from preprocessing.coexpression.fold_in import FoldIn, FoldInRule, extend_factors, fold_in
from preprocessing.errors import DataError
from preprocessing.graphs import KNNGraph
from preprocessing.tfidf import VARIANTS, TfidfReweighter

N_KNOWN, N_NEW, RANK = 80, 60, 4
NEW = [f"new{i}" for i in range(N_NEW)]
ANY = FoldInRule(min_explained=-np.inf)


class Planted:
    """Slides of low-rank counts: known genes, new genes of the same programmes, random genes.

    Random genes have nothing but the depth of their spot, which TF-IDF divides out.
    """

    def __init__(self, sizes=(300, 240, 260, 280), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        programme = rng.gamma(0.4, 5, (RANK + 1, N_KNOWN + N_NEW))
        level = 3 * programme.mean(axis=0)[:N_NEW]
        self.known, self.new, self.random, self.graphs = [], [], [], []
        for size in sizes:
            usage = rng.gamma(0.5, 1, (size, RANK + 1)) * rng.gamma(4, 0.25, (size, 1))
            counts = rng.poisson(usage @ programme + 0.1)
            self.known.append(sparse.csr_matrix(counts[:, :N_KNOWN]))
            self.new.append(sparse.csr_matrix(counts[:, N_KNOWN:]))
            depth = counts[:, :N_KNOWN].sum(axis=1, keepdims=True)
            self.random.append(sparse.csr_matrix(rng.poisson(level * depth / depth.mean())))
            self.graphs.append(KNNGraph(k=4).build(rng.uniform(0, 1000, (size, 2))))

    def fit(self, variant: str = "log", rank: int = RANK) -> tuple[TfidfReweighter, GeneFactors]:
        """TF-IDF and factors of the known genes of the first two slides."""
        graphs = self.graphs[:2] if variant in ("spatial", "shrunken") else None
        tfidf = TfidfReweighter(variant).fit(self.known[:2], graphs)
        rows = [tfidf.transform(counts) for counts in self.known[:2]]
        return tfidf, fit_gene_factors(lambda: iter(rows), N_KNOWN, rank)

    def bridge(self, slides: list[int], new: list[sparse.csr_matrix] | None = None):
        """Bridge slides with known and new genes."""
        new = self.new if new is None else new
        chosen = [BridgeSlide(self.known[i], new[i], self.graphs[i]) for i in slides]
        return lambda: iter(chosen)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def correlations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(one.T, other.T, strict=True)])


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_known_genes_get_their_own_factors_and_weights_back(variant):
    """The oracle: training solved the same equations (but for the means of slides)."""
    cohort = Planted()
    tfidf, factors = cohort.fit(variant)
    bridge = cohort.bridge([0, 1], cohort.known)
    names = [f"known{i}" for i in range(N_KNOWN)]
    plain = FoldInRule(min_explained=-np.inf, calibrate=False)
    folded, _ = fold_in(bridge, names, tfidf, factors, plain)
    np.testing.assert_array_equal(folded.df, tfidf.sums.df)
    np.testing.assert_array_equal(folded.extra, tfidf.sums.extra)
    assert cosine(folded.components, factors.components) > 0.98
    assert 0.95 < np.linalg.norm(folded.components) / np.linalg.norm(factors.components) < 1.01
    for slides in ([0, 1], [2, 3]):  # calibrated for genes never seen, so a little longer
        found, report = fold_in(cohort.bridge(slides, cohort.known), names, tfidf, factors, ANY)
        assert cosine(found.components, factors.components) > 0.9
        assert 0.95 < np.linalg.norm(found.components) / np.linalg.norm(factors.components) < 1.5
        assert report.agreement > 0.85


def test_factors_equal_slow_least_squares_with_slide_offsets():
    cohort = Planted()
    tfidf, factors = cohort.fit()
    some = np.random.default_rng(0).random(N_KNOWN) < 0.5
    known = [sparse.csr_matrix(k.toarray() * some) for k in cohort.known]
    bridge = [BridgeSlide(known[i], cohort.new[i]) for i in (2, 3)]
    rule = FoldInRule(ridge=0, min_explained=-np.inf)
    folded, report = fold_in(lambda: iter(bridge), NEW, tfidf, factors, rule)

    idf = np.log((1 + tfidf.n_spots) / (1 + folded.df)) + 1
    rows, values = [], []
    for slide in bridge:
        for k, n in zip(slide.known.toarray(), slide.new.toarray(), strict=True):
            weights = np.log1p(1e4 * k / k.sum()) * tfidf.idf
            length = np.linalg.norm(weights)
            rows.append(weights / length)
            values.append(np.log1p(1e4 * n / k.sum()) * idf / length)
    rows, values = np.array(rows), np.array(values)
    z = rows @ factors.components.astype(float)
    offset = np.repeat(np.eye(2), [known[2].shape[0], known[3].shape[0]], axis=0)
    own = factors.components[some].astype(float)

    def slow(z: np.ndarray, values: np.ndarray, own: np.ndarray) -> np.ndarray:
        design = np.hstack([z, offset])
        return np.linalg.lstsq(design, values, rcond=None)[0][:RANK].T @ own.T @ own

    found = np.zeros_like(own)
    for place, gene in enumerate(np.flatnonzero(some)):
        others = np.arange(N_KNOWN) != gene
        z_without = rows[:, others] @ factors.components[others].astype(float)
        rest = np.delete(own, place, axis=0)
        found[place] = slow(z_without, rows[:, gene], rest)
    product, square = (found * own).sum(axis=0), (found**2).sum(axis=0)
    prior = square.mean() * RANK / some.sum()
    slope = (product + prior * product.sum() / square.sum()) / (square + prior)
    np.testing.assert_allclose(
        folded.components, slow(z, values, own) * slope, rtol=1e-3, atol=1e-5
    )
    assert report.agreement == pytest.approx(cosine(found, own), rel=1e-4)
    design = np.hstack([z, offset])
    within = values - offset @ np.linalg.lstsq(offset, values, rcond=None)[0]
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    share = 1 - (rest**2).sum(axis=0) / (within**2).sum(axis=0)
    free = len(rows) - 2
    np.testing.assert_allclose(
        folded.explained, 1 - (1 - share) * free / (free - RANK), rtol=1e-3, atol=1e-5
    )
    detected = np.sum([(cohort.new[i] > 0).sum(axis=0) for i in (2, 3)], axis=0).ravel()
    wanted = np.rint(detected * tfidf.n_spots / len(rows))
    np.testing.assert_array_equal(folded.df, wanted)


def unseen_only(tfidf, factors, folded, counts) -> np.ndarray:
    """Standardised spot vectors of a slide that measures nothing but the folded-in genes."""
    columns = [NEW.index(name) for name in folded.genes]
    known = sparse.csr_matrix((counts.shape[0], tfidf.n_genes), dtype=counts.dtype)
    table = sparse.hstack([known, counts[:, columns]]).tocsr()
    longer = extend_factors(factors, folded)
    rows = tfidf.with_genes(folded.df, folded.extra).transform(table)
    return standardise(spot_vectors(rows, longer), longer)[0]


@pytest.mark.parametrize("variant", ["log", "arcsinh", "rank"])
def test_spots_are_placed_by_unseen_genes_alone_and_not_by_random_ones(variant):
    cohort = Planted()
    tfidf, factors = cohort.fit(variant)
    known = standardise(spot_vectors(tfidf.transform(cohort.known[3]), factors), factors)[0]
    folded, report = fold_in(cohort.bridge([1, 2]), NEW, tfidf, factors)
    assert len(report.folded_in) > 0.9 * N_NEW
    placed = unseen_only(tfidf, factors, folded, cohort.new[3])
    assert correlations(placed, known).min() > 0.6
    assert cosine(placed, known) > 0.7
    random, _ = fold_in(cohort.bridge([1, 2], cohort.random), NEW, tfidf, factors, ANY)
    assert random.n_genes == N_NEW
    placed = unseen_only(tfidf, factors, random, cohort.random[3])
    assert np.abs(correlations(placed, known)).max() < 0.2
    np.testing.assert_allclose(random.explained.mean(), 0, atol=0.01)
    assert np.linalg.norm(random.components) < 0.5 * np.linalg.norm(folded.components)


def test_half_of_the_known_genes_give_factors_of_the_same_scale():
    """Spot vectors of half of the genes are shorter, which the factors must not feel."""
    cohort = Planted()
    tfidf, factors = cohort.fit()
    whole, _ = fold_in(cohort.bridge([2, 3]), NEW, tfidf, factors, ANY)
    some = np.arange(N_KNOWN) % 2 == 0
    half = [
        BridgeSlide(cohort.known[i] @ sparse.diags_array(some * 1.0), cohort.new[i]) for i in (2, 3)
    ]
    part, report = fold_in(lambda: iter(half), NEW, tfidf, factors, ANY)
    assert (report.matched, report.n_known) == (40, 80)
    assert cosine(part.components, whole.components) > 0.9
    assert 0.8 < np.linalg.norm(part.components) / np.linalg.norm(whole.components) < 1.2


def test_neither_order_of_slides_nor_of_genes_matters():
    cohort = Planted()
    tfidf, factors = cohort.fit()
    one, _ = fold_in(cohort.bridge([2, 3]), NEW, tfidf, factors)
    two, _ = fold_in(cohort.bridge([3, 2]), NEW, tfidf, factors)
    np.testing.assert_allclose(one.components, two.components, rtol=1e-5, atol=1e-7)
    turned = [part[:, ::-1] for part in cohort.new]
    back, _ = fold_in(cohort.bridge([2, 3], turned), NEW[::-1], tfidf, factors)
    assert back.genes.tolist() == one.genes.tolist()[::-1]
    np.testing.assert_allclose(back.components[::-1], one.components, rtol=1e-5, atol=1e-7)


def test_extension_leaves_known_genes_as_they_were():
    cohort = Planted()
    tfidf, factors = cohort.fit()
    before = tfidf.sums.df.copy()
    folded, _ = fold_in(cohort.bridge([2]), NEW, tfidf, factors)
    longer, more = tfidf.with_genes(folded.df, folded.extra), extend_factors(factors, folded)
    assert (longer.n_genes, more.n_genes) == (N_KNOWN + folded.n_genes,) * 2
    np.testing.assert_array_equal(tfidf.sums.df, before)
    np.testing.assert_array_equal(longer.idf[:N_KNOWN], tfidf.idf)
    empty = sparse.csr_matrix((cohort.known[3].shape[0], folded.n_genes))
    rows = longer.transform(sparse.hstack([cohort.known[3], empty]).tocsr())
    wanted = spot_vectors(tfidf.transform(cohort.known[3]), factors)
    np.testing.assert_allclose(spot_vectors(rows, more), wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(DataError, match="4 components, the gene factors 3"):
        extend_factors(cohort.fit(rank=3)[1], folded)


def test_the_report_tells_every_gene():
    cohort = Planted()
    tfidf, factors = cohort.fit()
    new = cohort.new[2].toarray()
    new[:, 0] = 0
    new[10:, 1] = 0
    new[:, 2] = cohort.known[2].toarray().sum(axis=1)  # the same share of every spot
    new[:, 3] = np.random.default_rng(5).permutation(new[:, 4])
    known = cohort.known[2].toarray()
    known[:7] = 0
    new[:7, 5] = 99  # not counted: no known gene says where these spots are
    bridge = [BridgeSlide(known, new)]
    raw = TfidfReweighter("raw").fit(cohort.known[:2])
    folded, report = fold_in(
        lambda: iter(bridge), NEW, tfidf, factors, FoldInRule(min_explained=0.05)
    )
    assert {*report.folded_in, *report.dropped} == set(NEW)
    assert report.folded_in == tuple(folded.genes.tolist())
    assert report.dropped["new0"] == report.dropped["new1"] == "found in fewer than 10 bridge spots"
    assert report.dropped["new3"] == "known genes explain no more than 5.0% of its variance"
    assert (report.n_spots, report.n_spots_without_known) == (253, 7)
    told = str(report)
    assert "80 of 80 known genes matched" in told
    assert f"{folded.n_genes} new genes folded in" in told
    assert "7 spots without a known gene left out" in told
    assert "dropped, found in fewer than 10 bridge spots: new0, new1" in told
    assert 0.05 < report.explained < 1
    # raw frequencies over a row length that is the same everywhere: nothing varies
    flat = [BridgeSlide(np.tile(known[9], (60, 1)), np.tile(new[9], (60, 1)))]
    rule = FoldInRule(min_spots=30)
    with np.errstate(all="raise"):
        none, report = fold_in(lambda: iter(flat), NEW, raw, factors, rule)
    assert none.components.shape == (0, RANK)
    assert "constant over the bridge spots" in report.dropped.values()
    assert "0 new genes folded in" in str(report)
    assert (
        extend_factors(factors, none).n_genes
        == raw.with_genes(none.df, none.extra).n_genes
        == N_KNOWN
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, t, f: fold_in(lambda: iter([]), NEW, t, f), "no bridge slide"),
        (lambda c, t, f: fold_in([], NEW, t, f), "found list.*lambda"),
        (lambda c, t, f: fold_in(c.bridge([2]), NEW[:-1], t, f), "60 genes, expected the 59"),
        (lambda c, t, f: fold_in(c.bridge([2]), [], t, f), "at least one"),
        (lambda c, t, f: fold_in(c.bridge([2]), ["a"] * N_NEW, t, f), "1 names.*all different"),
        (lambda c, t, f: fold_in(c.bridge([2]), NEW, t, GeneFactors(*short(f))), "one fit"),
        (lambda c, t, f: fold_in(blank(c), NEW, t, f), "0 of the 80 known genes.*organism"),
        (lambda c, t, f: fold_in(tiny(c), NEW, t, f), "20 of 20 bridge spots.*least 25.*more"),
        (lambda c, t, f: fold_in(tiny(c, 4), NEW, t, f, FoldInRule(min_spots=1)), "larger bridge"),
        (lambda c, t, f: fold_in(uneven(c), NEW, t, f), "rows of the same spots"),
        (lambda c, t, f: fold_in(c.bridge([2], [-n for n in c.new]), NEW, t, f), "negative"),
        (lambda c, t, f: fold_in(drying(c), NEW, t, f), "fresh iterator"),
        (
            lambda c, t, f: fold_in(
                lambda: iter([BridgeSlide(c.known[2], c.new[2])]),
                NEW,
                *c.fit("spatial"),
            ),
            "needs the spot graph",
        ),
        (
            lambda c, t, f: FoldIn(
                np.array(["a"]), np.ones((2, 3)), *(np.ones(1, int),) * 2, 9, np.ones(1)
            ),
            "three times",
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    cohort = Planted()
    with pytest.raises(DataError, match=message):
        call(cohort, *cohort.fit())


def short(factors: GeneFactors):
    statistics = (factors.spread, factors.mean, factors.sd, factors.singular_values)
    return (factors.components[:-1], *statistics)


def blank(cohort: Planted):
    return lambda: iter([BridgeSlide(cohort.known[2] * 0, cohort.new[2])])


def tiny(cohort: Planted, size: int = 20):
    return lambda: iter([BridgeSlide(cohort.known[2][:size], cohort.new[2][:size])])


def uneven(cohort: Planted):
    return lambda: iter([BridgeSlide(cohort.known[2], cohort.new[3])])


def drying(cohort: Planted):
    slides = [BridgeSlide(cohort.known[i], cohort.new[i]) for i in (2, 3)]
    passes = iter([slides, slides[:1]])
    return lambda: iter(next(passes))
