"""`hibio view`: the deep zoom of a real slide."""

from pathlib import Path

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator

from eval.view.tiles import OVERLAP, TILE, SlideLevels
from preprocessing.slides import open_slide


def test_a_real_slide_has_the_tiles_that_openslide_makes():
    path = Path(__file__).resolve().parents[3] / "shared/data/slides/CMU-1-Small-Region.svs"
    if not path.is_file():
        pytest.skip("needs the shared slides")
    with openslide.OpenSlide(path) as theirs, open_slide(path) as ours:
        true, made = (DeepZoomGenerator(s, TILE, OVERLAP) for s in (theirs, SlideLevels(ours)))
        assert true.level_tiles == made.level_tiles
        for level, place in (
            (0, (0, 0)),
            (9, (0, 0)),
            (11, (2, 1)),
            (true.level_count - 1, (1, 4)),
        ):
            one, other = true.get_tile(level, place), made.get_tile(level, place)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
