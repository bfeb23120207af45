"""Figures are PNGs of a bounded size, survive degenerate slides, and compute what they state."""

import struct
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from eval.report.figures.canvas import MAX_PNG_BYTES, png_bytes, score_colours, window_of
from eval.report.figures.heatmaps import (
    Layout,
    pathway_heatmaps,
    spearman,
)
from eval.report.figures.lines import (
    _binned,
    _segments,
    _smoothed,
    _stage_spans,
    loss_curves,
    metric_bars,
    retrieval_curves,
)
from eval.report.figures.regions import (
    matched_names,
    niche_maps,
    region_colours,
    region_history,
    slide_regions,
)
from preprocessing.canvas import new_page
from preprocessing.errors import DataError


def lattice(side: int = 6, pitch: float = 10.0) -> np.ndarray:
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    return np.column_stack([x.ravel(), y.ravel()]) * pitch + 20.0


def thumbnail(side: int = 100) -> np.ndarray:
    return np.random.default_rng(1).integers(100, 255, (side, side, 3)).astype(np.uint8)


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height after checking signature, size limit and that it is no blank page."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(png) <= MAX_PNG_BYTES
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def logs(n: int = 12) -> list[dict[str, Any]]:
    stages = ["spot"] * (n // 2) + ["region"] * (n - n // 2)
    return [
        {"step": i * 5, "stage": s, "terms": {"spot/contrastive": 2.0 / (i + 1)}, "total": 3.0 - i}
        for i, s in enumerate(stages)
    ]


@pytest.mark.parametrize("picture", [None, thumbnail()])
@pytest.mark.parametrize("side", [1, 2, 6])
def test_slide_figures_of_any_size(side: int, picture: np.ndarray | None) -> None:
    xy = lattice(side)
    n = len(xy)
    score = np.arange(n, dtype=float)
    ids = np.arange(n) % 3
    labels = np.where(ids == 0, "tumour <b>", "")
    pictures = [
        slide_regions(picture, xy, np.stack([ids, ids * 0]), ["fine", "coarse"], labels),
        region_history(np.stack([ids, ids[::-1]]), xy),
        pathway_heatmaps(picture, xy, [("A_SET", score, score, score), ("B", score, score, None)]),
    ]
    for figure in pictures:
        width, height = size_of(figure.png)
        assert width > 200
        assert height > 100
        assert figure.title
        assert figure.caption


def test_constant_and_missing_scores_are_drawn_and_have_no_correlation() -> None:
    xy = lattice()
    flat, broken = np.ones(len(xy)), np.full(len(xy), np.nan)
    size_of(pathway_heatmaps(None, xy, [("X", flat, broken, None)]).png)
    assert np.isnan(spearman(flat, np.arange(len(xy))))
    assert np.isnan(spearman(flat, broken))
    assert len(np.unique(score_colours(flat), axis=0)) == 1
    assert not np.array_equal(score_colours(flat)[0], score_colours(broken)[0])


def test_the_correlation_is_that_of_ranks_over_what_is_finite_in_both() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 60).astype(float), rng.normal(size=60)
    ranks = [rankdata(values) for values in (x, y)]
    assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    gaps = np.append(x, [np.nan, 3.0])
    assert spearman(gaps, np.append(y, [1.0, np.inf])) == pytest.approx(spearman(x, y))


def test_score_colours_do_not_depend_on_scale_or_order() -> None:
    values = np.random.default_rng(2).normal(size=50)
    order = np.random.default_rng(3).permutation(50)
    colours = score_colours(values)
    np.testing.assert_allclose(score_colours(values * 7 - 3), colours)
    np.testing.assert_array_equal(score_colours(values[order]), colours[order])


def test_neighbouring_regions_differ_and_keep_their_colour() -> None:
    xy = lattice(8)
    ids = (xy[:, 0] // 20).astype(int) * 10 + (xy[:, 1] // 20).astype(int)
    later = np.where(ids == ids[0], -1, ids)
    colours = region_colours(xy, np.stack([ids, later]))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    for i, j in zip(*np.nonzero((distance > 0) & (distance <= 10)), strict=True):
        if ids[i] != ids[j]:
            assert not np.array_equal(colours[0, i], colours[0, j])
    kept = later == ids
    np.testing.assert_array_equal(colours[0, kept], colours[1, kept])
    assert len(np.unique(colours[1, ~kept], axis=0)) == 1


def test_window_holds_all_spots_and_discs_do_not_overlap() -> None:
    window = window_of(lattice(30))
    assert window.x[0] < 20
    assert window.x[1] > 20 + 29 * 10
    assert window.diameter == pytest.approx(9.4)
    assert window_of(lattice(30) * 3).diameter == pytest.approx(3 * 9.4)


def test_panels_never_overlap() -> None:
    for count, columns in [(1, 2), (4, 2), (5, 3)]:
        layout = Layout(count, columns, True, 0.8)
        corners = [layout.corner(i, c) for i in range(count) for c in range(columns)]
        width, height = layout.panel
        assert layout.size[0] <= 11.2
        for i, (left, top) in enumerate(corners):
            assert left >= layout.slide[0]
            assert left + width <= layout.size[0]
            assert top + height <= layout.size[1]
            for other_left, other_top in corners[:i]:
                apart = abs(left - other_left) >= width or abs(top - other_top) >= height
                assert apart


def test_heavy_picture_is_made_lighter() -> None:
    page = new_page(8, 8, arranged=False)
    noise = np.random.default_rng(0).integers(0, 255, (880, 880, 3)).astype(np.uint8)
    page.figimage(noise)
    width, height = size_of(png_bytes(page))
    assert 200 <= width < 880
    assert width == height


def test_loss_curves_with_one_and_several_runs() -> None:
    size_of(loss_curves({"one": logs(1)}).png)
    broken = logs()
    broken[3]["total"] = float("nan")
    broken[4]["total"] = None
    figure = loss_curves({"a": broken, "b": logs(700), "empty": []})
    size_of(figure.png)
    assert "2 values were not finite" in figure.caption
    assert "a (12 records), b (700 records)" in figure.caption


def test_losses_are_cut_at_stages_and_binned_by_their_mean() -> None:
    records = logs(10)
    assert _stage_spans(records) == [("spot", 0.0, 25.0), ("region", 25.0, 45.0)]
    parts = _segments(records, "total")
    assert [len(steps) for steps, _ in parts] == [5, 5]
    assert _segments(records, "pathway/image") == []
    values = np.random.default_rng(0).normal(size=1000)
    values[7] = np.nan
    steps, means = _binned(np.arange(1000.0), values)
    np.testing.assert_allclose(means, [np.nanmean(values[i : i + 5]) for i in range(0, 1000, 5)])
    assert np.all(np.diff(steps) > 0)
    slow = [np.nanmean(values[max(0, i - 2) : i + 3]) for i in range(1000)]
    np.testing.assert_allclose(np.delete(_smoothed(values, 5), 7), np.delete(slow, 7))


def test_retrieval_curves() -> None:
    x = np.linspace(0, 1, 50)
    figure = retrieval_curves({f"model {p}": (x, x**p) for p in np.linspace(0.2, 1, 9)})
    size_of(figure.png)
    with pytest.raises(DataError, match="rising"):
        retrieval_curves({"hibio": (x[::-1], x)})
    with pytest.raises(DataError, match="no retrieval curve"):
        retrieval_curves({})


def test_metric_bars_show_every_model_and_survive_missing_values() -> None:
    entry = {"mean": 0.4, "std": None, "n": 1, "values": [0.4, None], "chance": 0.1}
    empty: dict[str, Any] = {"mean": None, "std": None, "n": 0, "values": []}
    models = {"hibio": {"ari": entry}, "neighbour_oracle": {"ari": entry}, "pca": {"ari": empty}}
    results = {"tasks": {"domains": {"models": models}}}
    figure = metric_bars(results, "domains", "ari")
    size_of(figure.png)
    assert "No finite mean: pca" in figure.caption
    with pytest.raises(DataError, match="metrics there: ari"):
        metric_bars(results, "domains", "arri")


def test_wrong_shapes_are_named() -> None:
    xy = lattice()
    with pytest.raises(DataError, match="36 entries"):
        pathway_heatmaps(None, xy, [("A", np.ones(5), np.ones(36), None)])
    with pytest.raises(DataError, match="1 level names for 2 levels"):
        slide_regions(None, xy, np.zeros((2, 36), int), ["fine"])
    with pytest.raises(DataError, match="expected uint8"):
        slide_regions(np.zeros((5, 5)), xy, np.zeros((1, 36), int), ["fine"])
    with pytest.raises(DataError, match="divide level-0 pixels"):
        slide_regions(thumbnail(), xy * 50, np.zeros((1, 36), int), ["fine"])
    with pytest.raises(DataError, match="no finite position"):
        region_history(np.zeros((1, 1), int), np.full((1, 2), np.nan))
    with pytest.raises(DataError, match="S >= 1"):
        region_history(np.zeros((1, 0), int), np.empty((0, 2)))
    with pytest.raises(DataError, match="no map was given"):
        pathway_heatmaps(None, xy, [])
    with pytest.raises(DataError, match="no training log"):
        loss_curves({"a": []})


def test_clusters_take_the_name_they_overlap_most_one_to_one():
    labels = np.array(["a", "a", "a", "b", "b", "", "a"])
    clusters = np.array([5, 5, 2, 2, 2, 7, 5])
    assert matched_names(labels, clusters).tolist() == ["a", "a", "b", "b", "b", "", "a"]
    renamed = np.array([1, 1, 9, 9, 9, 3, 1])
    assert matched_names(labels, renamed).tolist() == matched_names(labels, clusters).tolist()
    two_of_one = matched_names(np.array(["a"] * 4), np.array([0, 0, 0, 1]))
    assert two_of_one.tolist() == ["a", "a", "a", ""]  # the smaller one has no partner left


def test_niche_maps_state_the_score_of_each_model():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 500, (80, 2))
    labels = np.where(xy[:, 0] > 250, "left", "right")
    labels[:5] = ""
    perfect, random = (xy[:, 0] > 250).astype(int), rng.integers(0, 2, 80)
    figure = niche_maps(xy, labels, {"good": perfect, "bad": random}, "Niches")
    assert figure.title == "Niches"
    assert figure.png.startswith(b"\x89PNG")
    with pytest.raises(DataError):
        niche_maps(xy, labels, {"good": perfect[:-1]}, "Niches")
