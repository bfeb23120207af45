"""Spatial blocks: every cell once, compact, and nothing to fit on inside the buffer."""

from dataclasses import replace

import numpy as np
import pytest

from eval.errors import FoldError
from eval.folds.spatial_blocks import REACH_HOPS, BlocksConfig, block_splits, blocks_of, reach_um
from eval.results import Question, ResultTable


@pytest.fixture
def slide(toy_fold):
    return toy_fold.test[0]


def test_buffer_equals_a_loop_over_all_pairs(slide):
    splits = block_splits(slide, BlocksConfig(4, 160.0), ResultTable(Question("x")))
    assert len(splits) == 4
    for split in splits:
        held_out = slide.xy_um[split.test]
        for cell, xy in enumerate(slide.xy_um):
            near = min(np.hypot(*(xy - other)) for other in held_out) < 160.0
            assert split.train[cell] == (not near and not split.test[cell])
        assert split.n_left_out == slide.n_spots - split.train.sum() - split.test.sum() > 0
    assert sum(split.test.astype(int) for split in splits).tolist() == [1] * slide.n_spots


def test_four_heaps_are_four_blocks_from_left_to_right():
    rng = np.random.default_rng(0)
    centre = np.array([[900.0, 0.0], [0.0, 500.0], [0.0, 0.0], [300.0, 0.0]])
    xy = np.repeat(centre, 25, axis=0) + rng.uniform(-20, 20, (100, 2))
    found = blocks_of(xy, 4)
    assert all(len(set(part)) == 1 for part in np.split(found, 4))
    assert found[::25][0] == 3
    assert found[::25][3] == 2
    assert set(found[::25][1:3]) == {0, 1}


def test_blocks_do_not_depend_on_where_the_slide_lies(slide):
    found = blocks_of(slide.xy_um, 5)
    np.testing.assert_array_equal(found, blocks_of(slide.xy_um + np.array([4096.0, -512.0]), 5))
    assert len(set(found.tolist())) == 5


def test_the_default_buffer_is_the_reach_of_an_embedding(slide):
    xy = np.array([[0.0, 0.0], [10.0, 0.0], [30.0, 0.0], [70.0, 0.0]])
    near = np.array([[1, 2], [0, 2], [1, -1], [2, -1]])  # furthest: 30, 20, 20, 40
    line = replace(
        slide,
        xy_um=xy,
        neighbours=near,
        counts=slide.counts[:4],
        tfidf=slide.tfidf[:4],
        labels=slide.labels[:4],
    )
    assert reach_um(line) == REACH_HOPS * 25.0
    table = ResultTable(Question("x"))
    block_splits(slide, BlocksConfig(3), table)
    assert f"closer than {reach_um(slide):.0f} um" in table.result().notes[0]


def test_too_few_positions_are_refused_or_noted(slide):
    with pytest.raises(FoldError, match="1 different positions cannot be cut into 5 blocks"):
        blocks_of(np.zeros((9, 2)), 5)
    table = ResultTable(Question("x"))
    heap = replace(slide, xy_um=np.zeros_like(slide.xy_um))
    assert block_splits(heap, BlocksConfig(), table) == []
    assert "too few for 5 blocks" in table.result().notes[0]
