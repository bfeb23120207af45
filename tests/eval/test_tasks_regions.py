"""Region trees against labels: contiguous pieces by hand, planted and shuffled domains."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from eval.folds.fold import Fold, Representation, SlideData
from eval.tasks.regions import RegionsTaskConfig, contiguous_pieces, run
from preprocessing.graphs import KNNGraph


def grid_slide(side: int = 12) -> tuple[SlideData, np.ndarray]:
    """A square grid whose left, middle and right thirds are labelled A, B, A."""
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    xy = np.stack([x.ravel(), y.ravel()], axis=1) * 100.0
    third = (x.ravel() * 3) // side
    labels = np.array(["A", "B", "A"])[third]
    graph = KNNGraph(k=6).build(xy)
    slide = SlideData(
        slide_id="grid",
        patient_id="p",
        counts=sparse.csr_matrix((side**2, 3)),
        tfidf=sparse.csr_matrix((side**2, 3)),
        xy_um=xy,
        neighbours=graph.neighbours(6)[0],
        labels=pd.DataFrame({"domain": labels}),
        has_image=False,
    )
    return slide, third


def fold_of(slide: SlideData, rows: np.ndarray) -> Fold:
    model = Representation("m", omics={slide.slide_id: rows}, aligned=False)
    return Fold("f", 0, np.array(["a", "b", "c"]), (), (slide,), (model,))


def test_pieces_split_a_label_that_does_not_touch_itself() -> None:
    slide, third = grid_slide()
    graph = KNNGraph(k=6).build(slide.xy_um)
    piece = contiguous_pieces(slide.categories("domain"), graph)
    assert len(set(piece)) == 3
    assert all(len(set(piece[third == t])) == 1 for t in range(3))


def test_a_spot_without_label_is_in_no_piece() -> None:
    slide, _ = grid_slide()
    labels = slide.categories("domain")
    labels[:5] = ""
    piece = contiguous_pieces(labels, KNNGraph(k=6).build(slide.xy_um))
    assert (piece[:5] == -1).all()
    assert (piece[5:] >= 0).all()


def test_an_embedding_of_the_pieces_scores_one_and_noise_does_not() -> None:
    slide, third = grid_slide()
    perfect = run(fold_of(slide, np.eye(3)[third] * 10), RegionsTaskConfig()).models["m"]
    assert perfect["ari/matched"].mean > 0.85
    assert perfect["ari/best_column"].mean == pytest.approx(perfect["ari/matched"].mean)
    noise = np.random.default_rng(0).normal(size=(slide.n_spots, 3))
    assert run(fold_of(slide, noise), RegionsTaskConfig()).models["m"]["ari/matched"].mean < 0.5


def test_a_models_own_tree_is_used() -> None:
    from hibio.regions import fit_region_tree

    slide, third = grid_slide()
    graph = KNNGraph(k=6).build(slide.xy_um)
    tree = fit_region_tree(np.eye(3)[third], graph)
    fold = fold_of(slide, np.random.default_rng(0).normal(size=(slide.n_spots, 3)))
    model = dataclasses.replace(fold.models[0], trees={"grid": tree})
    found = run(dataclasses.replace(fold, models=(model,)), RegionsTaskConfig()).models["m"]
    assert found["ari/matched"].mean == pytest.approx(1.0)


def test_without_labels_it_says_so() -> None:
    slide, _ = grid_slide()
    blank = dataclasses.replace(slide, labels=pd.DataFrame(index=range(slide.n_spots)))
    result = run(fold_of(blank, np.zeros((slide.n_spots, 2))), RegionsTaskConfig())
    assert "not run" in result.notes[0]
