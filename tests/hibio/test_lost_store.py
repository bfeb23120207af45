"""Stores that vanish or break in the middle of a run: the slide is named, with a remedy."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hibio.data.counts import reading
from hibio.data.dataset import PreparedSlides
from hibio.data.splits import read_entries
from preprocessing.errors import DataError
from preprocessing.store.read import stores_in


@pytest.fixture
def folder(toy_stores, tmp_path) -> Path:
    return Path(shutil.copytree(toy_stores, tmp_path / "stores"))


def vanish(path: Path) -> None:
    path.unlink()


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


WORDS = r"slide 'sim002' cannot be read from .*sim002\.h5: .*--resume"


@pytest.mark.parametrize("harm", [vanish, tear])
def test_a_slide_that_is_no_longer_there(folder, toy_artifacts, harm):
    dataset = PreparedSlides(read_entries(stores_in(folder)), toy_artifacts, "handcrafted", cache=1)
    assert dataset[1].n_spots == 70
    harm(folder / "sim002.h5")
    assert dataset[1].n_spots == 70  # it is still in memory
    assert dataset[0].n_spots == 70
    with pytest.raises(DataError, match=WORDS) as caught:
        dataset[1]
    assert isinstance(caught.value.__cause__, DataError)


@pytest.mark.parametrize("harm", [vanish, tear])
def test_patches_and_counts_that_are_read_later(folder, toy_artifacts, harm):
    slide = PreparedSlides(read_entries(stores_in(folder)), toy_artifacts, "patches")[1]
    harm(folder / "sim002.h5")
    with pytest.raises(DataError, match=WORDS):
        slide.patches(np.arange(3))
    with pytest.raises(DataError, match=WORDS):
        slide.expression.source.rows(np.arange(3))


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError, match="own"), reading(Path("a.h5")):
        raise KeyError("own")
    words = r"slide 'b' cannot be read from a\.h5: disk gone"
    with pytest.raises(DataError, match=words), reading(Path("a.h5"), "b"):
        raise OSError("disk gone")
