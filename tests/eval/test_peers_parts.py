"""The parts of the peers against slow formulas, closed forms and bad input."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from eval.errors import FoldError
from eval.folds.fold import Cost, Prediction, Representation
from eval.measures.inner_folds import spatial_blocks
from eval.peers.bleep import Bleep, smoothed_contrast
from eval.peers.gene_lists import GeneBag, over_usual, ranked_genes, usual_level, without, words
from eval.peers.pca_ridge import PcaRidge
from eval.peers.peer import (
    Budget,
    TrainingConfig,
    TrainingData,
    fit,
    standardised,
    target_genes,
)
from eval.peers.regression import Output, SlideStack
from eval.peers.st_align import niche
from eval.peers.stagate import GraphAutoencoder
from eval.peers.triplex import Triplex, TriplexNetwork, distilled_error
from eval.tasks.expression import ExpressionConfig, run

RNG = np.random.default_rng(0)


def rows(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape))


def training_data(fold) -> TrainingData:
    scaled = standardised(fold.model("raw_features").image)
    own = {slide.slide_id: scaled[slide.slide_id] for slide in fold.train}
    return TrainingData(fold.genes, fold.train, own)


# --- BLEEP -----------------------------------------------------------------------------------


def slow_smoothed(image, omics, of_image, of_omics, temperature):
    """Spot by spot, with plain loops."""
    n, total = len(image), 0.0
    target = np.zeros((n, n))
    for i in range(n):
        alike = [
            np.exp((of_image[i] @ of_image[j] + of_omics[i] @ of_omics[j]) / 2 * temperature)
            for j in range(n)
        ]
        target[i] = np.array(alike) / sum(alike)
    logits = np.array([[omics[i] @ image[j] / temperature for j in range(n)] for i in range(n)])
    for i in range(n):
        for j in range(n):
            total -= target[i, j] * (logits[i, j] - np.log(np.exp(logits[i]).sum()))
            total -= target[i, j] * (logits[i, j] - np.log(np.exp(logits[:, j]).sum()))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_smoothed_contrast_equals_the_slow_formula(temperature):
    parts = [rows(7, 4), rows(7, 4), rows(7, 5), rows(7, 3)]
    slow = slow_smoothed(*(part.numpy() for part in parts), temperature)
    assert float(smoothed_contrast(*parts, temperature)) == pytest.approx(slow)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    turned = smoothed_contrast(*(part[order] for part in parts), temperature)
    assert float(turned) == pytest.approx(slow)


def test_smoothed_contrast_with_far_apart_spots_has_identity_targets():
    image, omics = rows(5, 3), rows(5, 3)
    apart = 100.0 * torch.eye(5, dtype=torch.float64)
    logits = omics @ image.T
    own = torch.arange(5)
    closed = sum(nn.functional.cross_entropy(both, own) for both in (logits, logits.T)) / 2
    assert float(smoothed_contrast(image, omics, apart, apart, 1.0)) == pytest.approx(float(closed))
    with pytest.raises(FoldError, match="expected pairs row by row"):
        smoothed_contrast(image, omics[:4], apart, apart, 1.0)


def test_bleep_predicts_the_mean_of_the_nearest_training_spots(toy_fold):
    data = training_data(toy_fold)
    fitted = Bleep(k=7, training=TrainingConfig(steps=1)).fit(data, 0)
    features = standardised(toy_fold.model("raw_features").image)
    found = fitted.represent(toy_fold.test, features)
    genes = target_genes(toy_fold.train)
    bank = fitted.towers.embed_omics(toy_fold.train)
    every, known = [], []
    for slide in toy_fold.train:
        depth = np.asarray(slide.counts.sum(axis=1))
        known.append(np.log1p(1e4 * slide.counts.toarray() / depth)[:, genes])
        every.append(bank[slide.slide_id] / np.linalg.norm(bank[slide.slide_id], axis=1)[:, None])
    every, known = np.concatenate(every), np.concatenate(known)
    for spot in (0, 50, 119):
        nearest = np.argsort(-(every @ found.image["c1"][spot]))[:7]
        slow = known[nearest].mean(axis=0)
        np.testing.assert_allclose(found.prediction.values["c1"][spot], slow, rtol=1e-5)


# --- sentences and rank tokens ---------------------------------------------------------------


def test_ranked_genes_are_those_of_a_plain_sort():
    table = RNG.poisson(0.7, size=(30, 12)).astype(float)
    table[3] = 0
    found = ranked_genes(sparse.csr_matrix(table), 5)
    for spot in range(30):
        listed = sorted((-value, gene) for gene, value in enumerate(table[spot]) if value > 0)
        slow = [gene for _, gene in listed][:5]
        assert found[spot].tolist() == slow + [-1] * (5 - len(slow))
    doubled = ranked_genes(sparse.csr_matrix(3.0 * table), 5)
    np.testing.assert_array_equal(found, doubled)
    with pytest.raises(FoldError, match="0 places"):
        ranked_genes(sparse.csr_matrix(table), 0)


def test_sentences_leave_out_odd_names_and_housekeeping():
    names = ["ERBB2", "MT-CO1", "AC012.1", "RPL13", "RPS6KA1", "rps12", "HLA-A", "KRT19"]
    assert words(names).tolist() == [True, False, False, False, False, False, False, True]
    kept = without(sparse.csr_matrix(np.arange(1.0, 9.0)[None]), words(names)).toarray()
    assert kept.tolist() == [[1.0, 0, 0, 0, 0, 0, 0, 8.0]]
    with pytest.raises(FoldError, match="give gene symbols"):
        words(["ENSG1.2", "ENSG2.1"])


def test_rank_tokens_divide_by_the_mean_where_expressed(toy_fold):
    usual = usual_level(toy_fold.train)
    slide = toy_fold.test[0]
    scaled = [
        1e4 * s.counts.toarray() / s.counts.toarray().sum(axis=1, keepdims=True)
        for s in toy_fold.train
    ]
    train = np.concatenate(scaled)
    for gene in (0, 17, 59):
        values = [value for value in train[:, gene] if value > 0]
        assert usual[gene] == pytest.approx(sum(values) / len(values))
    own = slide.counts.toarray()
    slow = 1e4 * own / own.sum(axis=1, keepdims=True) / usual
    np.testing.assert_allclose(over_usual(slide, usual).toarray(), slow)
    unseen = np.where(np.arange(60) == 4, 0.0, usual)
    assert not over_usual(slide, unseen).toarray()[:, 4].any()


@pytest.mark.parametrize("by_place", [True, False])
def test_gene_bag_is_a_weighted_mean_of_gene_vectors(by_place):
    torch.manual_seed(0)
    bag = GeneBag(9, 4, 6, by_place)
    with torch.no_grad():
        bag.place_P.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0]) * by_place)
    lists = torch.tensor([[3, 1, 8, 0], [5, 2, -1, -1], [-1, -1, -1, -1]])
    found = bag(lists)
    table = bag.gene_vector.weight
    for row, listed in enumerate(([3, 1, 8, 0], [5, 2])):
        weight = bag.place_P[: len(listed)].exp()
        mean = sum(w * table[gene] for w, gene in zip(weight, listed, strict=True)) / weight.sum()
        torch.testing.assert_close(found[row], bag.norm(mean))
    torch.testing.assert_close(found[2], bag.norm.bias)
    assert bag.place_P.requires_grad == by_place
    swapped = bag(lists[:1].flip(1))
    assert torch.allclose(swapped, found[:1], atol=1e-5) != by_place


# --- images ----------------------------------------------------------------------------------


def test_slide_stack_points_at_the_right_spots(toy_fold):
    slides = toy_fold.train[:2]
    features = standardised(toy_fold.model("raw_features").image)
    found = SlideStack.of(slides, features, side=3)
    assert found.n_spots == 240
    near = found.near_Nk.cpu().numpy()
    for spot, slide, start in ((5, slides[0], 0), (125, slides[1], 120)):
        np.testing.assert_array_equal(near[spot], slide.neighbours[spot - start] + start)
    block = spatial_blocks(slides[1].xy_um, 3)
    mean = features[slides[1].slide_id][block == 4].mean(axis=0)
    np.testing.assert_allclose(found.block_LBF[1, 4].cpu().numpy(), mean, rtol=1e-4, atol=1e-6)
    few = SlideStack.of([_cut(slides[0], 4)], {slides[0].slide_id: np.ones((4, 2))}, side=3)
    assert int(few.filled_LB.sum()) == 4
    assert torch.isfinite(few.block_LBF).all()


def _cut(slide, n: int):
    """The first n spots, without neighbours."""
    return dataclasses.replace(
        slide,
        counts=slide.counts[:n],
        tfidf=slide.tfidf[:n],
        xy_um=slide.xy_um[:n],
        neighbours=np.full((n, 6), -1),
        labels=slide.labels.iloc[:n],
    )


def test_niche_is_the_mean_with_the_neighbours(toy_fold):
    values = RNG.standard_normal((120, 3))
    near = toy_fold.train[0].neighbours.copy()
    near[7, 4:] = -1
    near[9] = -1
    slide = dataclasses.replace(toy_fold.train[0], neighbours=near)
    found = niche(values, slide)
    for spot in (0, 7, 9):
        members = [spot, *[j for j in near[spot] if j >= 0]]
        np.testing.assert_allclose(found[spot], values[members].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_triplex_sees_neighbours_and_the_whole_slide_but_no_other_slide(toy_fold):
    slides = toy_fold.train[:2]
    features = standardised(toy_fold.model("raw_features").image)
    torch.manual_seed(0)
    network = TriplexNetwork(12, 5, Triplex()).eval()
    base = network(SlideStack.of(slides, features), torch.tensor([3])).prediction

    def changed(name: str, spot: int) -> bool:
        other = {key: value.copy() for key, value in features.items()}
        other[name][spot] += 1.0
        found = network(SlideStack.of(slides, other), torch.tensor([3])).prediction
        return not torch.equal(base, found)

    near = slides[0].neighbours[3]
    far = next(j for j in range(119, 0, -1) if j not in near)
    assert changed(slides[0].slide_id, int(near[0]))
    assert changed(slides[0].slide_id, far)
    assert not changed(slides[1].slide_id, 3)


def test_distilled_error_by_hand_and_without_gradient_into_the_teacher():
    fused, branch, truth = rows(4, 3).requires_grad_(), rows(4, 3), rows(4, 3)
    found = distilled_error(Output(None, fused, (branch,)), truth, 0.3)
    pairs = ((1.0, fused, truth), (0.7, branch, truth), (0.3, branch, fused))
    slow = sum(weight * float(((a - b) ** 2).mean().detach()) for weight, a, b in pairs)
    assert float(found.detach()) == pytest.approx(slow)
    found.backward()
    alone = fused.detach().clone().requires_grad_()
    nn.functional.mse_loss(alone, truth).backward()
    torch.testing.assert_close(fused.grad, alone.grad)


def test_graph_attention_by_hand():
    torch.manual_seed(0)
    model = GraphAutoencoder(5, 4, 2)
    value, near = torch.randn(3, 5), torch.tensor([[0, 1, -1], [1, 0, 2], [2, -1, -1]])
    projected = value @ model.first
    weight = model.attention(projected, near)
    for spot in range(3):
        there = [j for j in near[spot].tolist() if j >= 0]
        own = projected[spot] @ model.score_self
        score = [torch.sigmoid(own + projected[j] @ model.score_near).exp() for j in there]
        for place, one in enumerate(score):
            assert float(weight[spot, place].detach()) == pytest.approx(
                float((one / sum(score)).detach()), rel=1e-5
            )
    assert float(weight[2, 1:].detach().sum()) == 0.0
    latent, back = model(value, near)
    assert latent.shape == (3, 2)
    assert back.shape == (3, 5)


# --- the loop, predictions and ridge ---------------------------------------------------------


def test_the_loop_steps_as_told_and_leaves_the_random_state():
    seen: list[int] = []

    def loss(module, items):
        seen.append(len(items))
        return module(torch.ones(len(items), 2, device=items.device)).square().mean()

    torch.manual_seed(3)
    before = torch.get_rng_state()
    module, cost = fit(lambda: nn.Linear(2, 1), loss, 9, TrainingConfig(), Budget(7, 4), 0)
    assert seen == [3] * 7  # an epoch of nine is three equal parts of at most four
    assert (cost.n_parameters, cost.steps) == (3, 7)
    assert cost.seconds > 0
    assert not module.training
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    seen.clear()
    own = TrainingConfig(steps=3, batch=2)  # its own settings go before the budget
    _, cost = fit(lambda: nn.Linear(2, 1), loss, 3, own, Budget(50, 8), 0)
    assert seen == [2] * 3  # the spot left over in an epoch is dropped
    assert cost.steps == 3


def test_the_loop_refuses_what_cannot_train():
    with pytest.raises(FoldError, match="batch 2 or more"):
        TrainingConfig(batch=1)
    with pytest.raises(FoldError, match="steps, lr and clip must be positive"):
        TrainingConfig(steps=0)
    with pytest.raises(FoldError, match="1 training spots"):
        fit(nn.Identity, lambda module, items: torch.zeros(()), 1, TrainingConfig(), Budget(), 0)
    with pytest.raises(FoldError, match="training loss is nan"):
        fit(
            lambda: nn.Linear(1, 1),
            lambda module, items: module.weight.sum() * torch.nan,
            5,
            TrainingConfig(),
            Budget(),
            0,
        )


def test_ridge_rows_equal_the_readouts_of_the_raw_features(toy_fold):
    data = training_data(toy_fold)
    scaled = standardised(toy_fold.model("raw_features").image)
    found = {}
    for alpha in ("cv", "hest"):
        peer = PcaRidge(alpha=alpha, n_genes=50, name=f"ridge_{alpha}")
        found[alpha] = peer.fit(data, 0).represent(toy_fold.test, scaled)
    models = (toy_fold.model("raw_features"), *found.values())
    fold = dataclasses.replace(toy_fold, models=models)
    result = run(fold, ExpressionConfig(n_genes=(50,))).models
    for row, metric in (("ridge_cv", "pearson"), ("ridge_hest", "pearson_hest")):
        expected = result["raw_features"][f"{metric}/top50_hvg"].values
        assert result[row]["pearson/top50_hvg"].values == pytest.approx(expected, abs=1e-4)
    with pytest.raises(FoldError, match="expected 'cv' or 'hest'"):
        PcaRidge(alpha="none")


def test_predictions_are_taken_by_gene_and_checked(toy_fold):
    slide = toy_fold.test[0]
    values = RNG.standard_normal((120, 3))
    one = Representation("p", prediction=Prediction(np.array([7, 2, 5]), {"c1": values}))
    np.testing.assert_array_equal(one.predicted([slide], np.array([5, 7]))[0], values[:, [2, 0]])
    with pytest.raises(FoldError, match="not 1 of the 2 targets"):
        one.predicted([slide], np.array([5, 8]))
    with pytest.raises(FoldError, match="prediction of slide c2 is missing"):
        one.predicted([toy_fold.test[1]], np.array([5]))
    with pytest.raises(FoldError, match="predicts no expression"):
        Representation("q", cost=Cost("x", 1)).predicted([slide], np.array([5]))


def test_a_model_that_predicts_is_scored_on_its_own_prediction(toy_fold):
    genes = target_genes(toy_fold.train, 10)
    logs = {
        s.slide_id: np.log1p(s.counts.toarray() / np.asarray(s.counts.sum(axis=1)) * 1e4)[:, genes]
        for s in toy_fold.test
    }
    image = dict(toy_fold.model("raw_features").image)
    perfect = Representation("perfect", image, prediction=Prediction(genes, logs), aligned=False)
    fold = dataclasses.replace(toy_fold, models=(perfect,))
    found = run(fold, ExpressionConfig(n_genes=(10,))).models["perfect"]
    assert found["pearson/top10_hvg"].mean == pytest.approx(1.0)
    assert 0.2 < found["pearson_ridge/top10_hvg"].mean < 0.9
    with pytest.raises(FoldError, match="fit it on as many variable genes"):
        run(fold, ExpressionConfig(n_genes=(20,)))
