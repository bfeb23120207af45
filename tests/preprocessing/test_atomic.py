"""atomic_path: the final name appears only when the block succeeds, and never half written."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.errors import DataError
from preprocessing.files import LOCK, atomic_path, locked, refuse_others, spreadsheet_text
from tests.preprocessing.full_disk import on_a_full_disk


def test_success_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    final = tmp_path / "new" / "store.h5"
    with atomic_path(final) as temporary:
        assert temporary.parent == final.parent
        assert temporary.suffix == ".h5"
        temporary.write_bytes(b"all")
        assert not final.exists()
    assert final.read_bytes() == b"all"
    assert [p.name for p in final.parent.iterdir()] == ["store.h5"]


def test_error_keeps_the_old_file_and_removes_the_half_one(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    final.write_text("old")

    def write_half() -> None:
        with atomic_path(final) as temporary:
            temporary.write_text("ne")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        write_half()
    assert final.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_takes_the_place_of_another_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "a.zarr"

    def write(*names: str) -> None:
        with atomic_path(final) as temporary:
            temporary.mkdir()
            for name in names:
                (temporary / name).write_text(name)
            assert names
            assert sorted(final.glob("*")) == before

    before: list[Path] = []
    write("one", "two")
    before = sorted(final.glob("*"))
    with pytest.raises(AssertionError):
        write()
    assert sorted(final.glob("*")) == before
    with monkeypatch.context() as patch:  # what has the name gets it back
        real = Path.replace

        def refused(path: Path, to: Path) -> Path:
            return real(path if path == final or path.suffix == ".old" else path / "gone", to)

        patch.setattr(Path, "replace", refused)
        with pytest.raises(FileNotFoundError):
            write("three")
    assert sorted(final.glob("*")) == before
    write("three")
    assert [path.name for path in final.iterdir()] == ["three"]
    assert list(tmp_path.iterdir()) == [final]


def test_block_without_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    final = tmp_path / "a.txt"
    with atomic_path(str(final)) as one, atomic_path(final) as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert final.read_text() == "one"  # the outer block ends last


def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_data_error_is_a_value_error() -> None:
    assert issubclass(DataError, ValueError)


def enter(folder: Path) -> None:
    with locked(folder):
        pytest.fail("two are inside")


def test_one_process_at_a_time_holds_a_folder(tmp_path: Path):
    folder = tmp_path / "a" / "run"
    with locked(folder):
        owner = json.loads((folder / LOCK).read_text())
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(DataError, match=rf"in use: process {os.getpid()} on .*, since 20"):
            enter(folder)
        assert (folder / LOCK).is_file()
    assert not (tmp_path / "a").exists()  # nothing was written, nothing stays
    with locked(folder):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_lock_of_a_dead_process_is_taken_over_and_told(tmp_path: Path, capsys):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with locked(tmp_path):
        owner = json.loads((tmp_path / LOCK).read_text())
    for stale in ({"pid": dead.pid}, {"started": "0"}):  # gone, or its number is another's now
        (tmp_path / LOCK).write_text(json.dumps({**owner, **stale}))
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        assert "which is gone; taken over" in capsys.readouterr().err
    for other in ({**owner, "machine": "0", "pid": dead.pid}, {}):  # nobody can tell
        (tmp_path / LOCK).write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"in use: .*if it is gone, remove .*lock\.json"):
            enter(tmp_path)
        assert json.loads((tmp_path / LOCK).read_text()) == other


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "\t=1", "\r=1"])
def test_a_spreadsheet_runs_no_cell(text):
    assert spreadsheet_text(text) == "'" + text


@pytest.mark.parametrize("text", ["", "a=1", "ERBB2", "1-2"])
def test_other_cells_stay_as_they_are(text):
    assert spreadsheet_text(text) == text


def test_a_lock_that_finds_no_room_leaves_nothing(tmp_path: Path) -> None:
    code = "from preprocessing.files import locked\nattempt(locked(sys.argv[1]).__enter__)"
    assert "File too large" in on_a_full_disk(code, tmp_path, limit=0)
    assert not list(tmp_path.iterdir())


def test_only_what_a_command_made_is_written_over(tmp_path: Path) -> None:
    first, page = tmp_path / "a.json", tmp_path / "a.html"

    def ask() -> None:
        refuse_others({first: '"made"'}, [page])

    ask()
    page.write_text("somebody's")
    with pytest.raises(DataError, match=r"a\.html is there and was not made .* another --out"):
        ask()
    first.write_bytes(b'\xff{"made": 1}')  # it speaks for the page
    ask()
    first.write_text("{}")
    with pytest.raises(DataError, match=r"a\.json is there"):
        ask()
    first.unlink()
    page.unlink()
    page.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"a\.html is there"):
        ask()


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EIO"])
def test_a_full_disk_is_told_with_its_place_and_remedy(tmp_path: Path, code: str) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "x.json") as path:
            path.write_text("half")
            raise OSError(getattr(errno, code), "refused")

    with pytest.raises(OSError, match="refused") as told:
        write()
    assert ("MiB are free: make room and run again" in str(told.value)) == (code != "EIO")
    assert (str(tmp_path) in str(told.value)) == (code != "EIO")
    assert told.value.__cause__ is not told.value
    assert list(tmp_path.iterdir()) == []
