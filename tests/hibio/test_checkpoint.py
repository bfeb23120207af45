"""Checkpoints: whole at any kill, the newest is found, states of other versions."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hibio.checkpoint import (
    CHECKSUMS,
    NAME,
    PREVIOUS,
    STATE_VERSION,
    DamagedError,
    find_checkpoint,
    load_trainer_state,
    verify_files,
    write_checksums,
)
from hibio.config.files import ConfigError
from hibio.training import checkpoint as module
from hibio.training.checkpoint import TEMPORARY, save_checkpoint, whole_checkpoint

FILES = ["artifacts.h5", "checksums.json", "config.yaml", "model.safetensors", "trainer.pt"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what it interrupts."""


class Guillotine:
    """Counts everything that touches the disk and stops the process at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count = at, 0
        for name in ("save_file", "write_artifacts", "write_checksums", "fsync"):
            monkeypatch.setattr(module, name, self.guard(getattr(module, name)))
        monkeypatch.setattr(module.torch, "save", self.guard(torch.save))
        monkeypatch.setattr(module.shutil, "rmtree", self.guard(self.half_removed))
        for name in ("rename", "mkdir"):
            monkeypatch.setattr(Path, name, self.guard(getattr(Path, name)))
        self.remove = shutil.rmtree

    def guard(self, do):
        def guarded(*args, **kwargs):
            self.count += 1
            if self.count == self.at:
                if do == self.half_removed and (files := sorted(args[0].glob("*"))):
                    files[0].unlink()  # killed in the middle of a folder
                raise Killed
            return do(*args, **kwargs)

        return guarded

    def half_removed(self, folder: Path, ignore_errors: bool) -> None:
        for path in folder.glob("*"):
            path.unlink()
        if folder.exists():
            folder.rmdir()


@pytest.fixture(autouse=True)
def _quick_artifacts(monkeypatch):
    monkeypatch.setattr(module, "write_artifacts", lambda path, text: path.write_text(text))


def save(folder: Path, version: int) -> Path:
    model = SimpleNamespace(
        artifacts=f"genes {version}", state_dict=lambda: {"w": torch.full((3,), float(version))}
    )
    return save_checkpoint(
        folder, model, lambda path: path.write_text(f"v: {version}\n"), {"step": version}
    )


def version_of(folder: Path) -> int:
    """The version found, after checking that every file is whole and of it."""
    found, problem = whole_checkpoint(folder)
    assert found is not None, sorted(p.name for p in folder.iterdir())
    assert problem is None
    assert found == find_checkpoint(folder)
    version = load_trainer_state(found)["step"]
    assert load_file(found / "model.safetensors")["w"].tolist() == [version] * 3
    assert (found / "config.yaml").read_text() == f"v: {version}\n"
    assert (found / "artifacts.h5").read_text() == f"genes {version}"
    return version


def killed_save(folder: Path, version: int, at: int) -> bool:
    """Save and be killed at the ``at``-th touch of the disk; False when it finished before."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Guillotine(monkeypatch, at)
        try:
            save(folder, version)
        except Killed:
            return True
    return False


def test_a_save_leaves_a_whole_checkpoint_and_the_one_before(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert whole_checkpoint(tmp_path) == (None, None)
    for version in (1, 2, 3):
        target = save(tmp_path, version)
        assert target == tmp_path / NAME == find_checkpoint(tmp_path)
        assert version_of(tmp_path) == version
        folders = sorted(path.name for path in tmp_path.iterdir())
        assert folders == ([NAME] if version == 1 else [NAME, PREVIOUS])
        assert sorted(path.name for path in target.iterdir()) == FILES
        if version > 1:
            assert load_trainer_state(tmp_path / PREVIOUS)["step"] == version - 1
            verify_files(tmp_path / PREVIOUS)


def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path):
    """The old one or the new one, never a mixture; and the next save works."""
    seen = []
    for at in range(1, 100):
        folder = tmp_path / str(at)
        save(folder, 0)
        save(folder, 1)
        killed = killed_save(folder, 2, at)
        seen.append(version_of(folder))
        assert seen[-1] in (1, 2)
        save(folder, 3)
        assert version_of(folder) == 3
        assert sorted(path.name for path in folder.iterdir()) == [NAME, PREVIOUS]
        assert load_trainer_state(folder / PREVIOUS)["step"] == seen[-1]
        verify_files(folder / PREVIOUS)
        if not killed:
            break
    assert len(seen) > 15  # as many points at least
    assert seen == sorted(seen)  # old up to the rename, new from there on
    assert set(seen) == {1, 2}


def test_a_second_kill_at_any_point_does_no_harm_either(tmp_path):
    """After a kill between the two renames only .previous is left; it must outlive the next."""
    for at in range(1, 100):
        folder = tmp_path / str(at)
        save(folder, 1)
        (folder / NAME).rename(folder / PREVIOUS)
        (folder / TEMPORARY).mkdir()
        killed = killed_save(folder, 2, at)
        assert version_of(folder) in (1, 2)
        if not killed:
            assert version_of(folder) == 2
            break
    assert at > 10


def test_a_kill_in_the_very_first_save_leaves_none(tmp_path):
    for at in range(2, 10):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert killed_save(folder, 1, at)
        assert find_checkpoint(folder) is None
        save(folder, 1)
        assert version_of(folder) == 1


def test_a_checkpoint_without_a_trainer_state_cannot_be_resumed(tmp_path):
    model = SimpleNamespace(artifacts="", state_dict=lambda: {"w": torch.ones(2)[::2]})
    target = save_checkpoint(tmp_path, model, lambda path: path.write_text(""))
    with pytest.raises(ConfigError, match=r"no trainer\.pt, so this run cannot be resumed"):
        load_trainer_state(target)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
def test_a_truncated_trainer_state_is_refused(tmp_path, share):
    path = save(tmp_path, 1) / "trainer.pt"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DamagedError, match=r"trainer\.pt: not what was saved .*\.previous"):
        load_trainer_state(tmp_path / NAME)
    (tmp_path / NAME / CHECKSUMS).unlink()
    with pytest.raises(ConfigError, match=r"trainer\.pt: damaged .*\.previous"):
        load_trainer_state(tmp_path / NAME)


def test_a_trainer_state_of_the_first_version_is_read_and_a_newer_one_refused(tmp_path):
    target = save(tmp_path, 1)
    state = torch.load(target / "trainer.pt", weights_only=True)
    assert state["schema_version"] == STATE_VERSION
    torch.save({"step": 7}, target / "trainer.pt")  # as the first versions wrote it
    write_checksums(target)
    assert load_trainer_state(target) == {"step": 7, "schema_version": 0}
    torch.save({"step": 7, "schema_version": STATE_VERSION + 1}, target / "trainer.pt")
    write_checksums(target)
    with pytest.raises(ConfigError, match=r"trainer state 3, .* reads up to 2; update HiBio"):
        load_trainer_state(target)
