"""What evaluation takes from the run folders that training leaves, also from damaged ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from eval.embed import find_checkpoints
from eval.report import gallery
from hibio.checkpoint import NAME, PREVIOUS, TRAINER, WEIGHTS, write_checksums
from hibio.config.files import ConfigError
from hibio.data.splits import SlideEntry


def make_checkpoint(folder: Path, rebuilds: int = 2) -> Path:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"")
    trees = torch.zeros(rebuilds, 3, 4, dtype=torch.int16)
    torch.save({"schema_version": 1, "regions": {"s1": trees}}, folder / TRAINER)
    write_checksums(folder)
    return folder


def test_the_newest_checkpoint_of_every_run_folder_is_found(tmp_path: Path) -> None:
    both = make_checkpoint(tmp_path / "a" / NAME)
    make_checkpoint(tmp_path / "a" / PREVIOUS)
    before = make_checkpoint(tmp_path / "b" / PREVIOUS)  # killed between two renames
    make_checkpoint(tmp_path / "b" / "checkpoint.damaged")
    make_checkpoint(tmp_path / "c" / "checkpoint.tmp")  # killed in its first save
    assert find_checkpoints(tmp_path) == [both, before]
    assert find_checkpoints(tmp_path / "b") == [before]
    assert find_checkpoints(both) == [both]
    with pytest.raises(ConfigError, match="no checkpoint there or below"):
        find_checkpoints(tmp_path / "c")


class Store:
    """Positions of four spots."""

    def __init__(self, path: Path) -> None:
        self.xy_px0 = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None: ...


def test_the_history_of_regions_needs_a_whole_trainer_state_and_its_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery, "SlideStore", Store)
    checkpoint = make_checkpoint(tmp_path / NAME)
    entry = SlideEntry(tmp_path / "s1.h5", "s1", "P1", True, 4)
    assert len(gallery._history(checkpoint, [entry])) == 1
    assert gallery._history(checkpoint, []) == []  # evaluated on other stores
    assert gallery._history(make_checkpoint(tmp_path / "once", 1), [entry]) == []
    path = checkpoint / TRAINER
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match=r"left out: .*trainer\.pt: not what was saved"):
        assert gallery._history(checkpoint, [entry]) == []
    path.unlink()
    assert gallery._history(checkpoint, [entry]) == []
