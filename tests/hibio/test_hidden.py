"""Names that others take: what hides a package of ours or lies in its place, and the doors."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hibio import __version__

HOUSE = Path(__file__).resolve().parents[2]


def imported(*before: Path, cwd: Path, argv: str = "-c") -> subprocess.CompletedProcess[str]:
    """`import hibio` with folders before everything else, without site-packages."""
    code = f"import sys; sys.argv = [{argv!r}]; sys.path[:0] = {[str(path) for path in before]}"
    told = [sys.executable, "-S", "-c", f"{code}; import hibio"]
    return subprocess.run(told, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["pathways", "preprocessing", "eval"])
@pytest.mark.parametrize("inside", ["{}.py", "{}/__init__.py"])
def test_what_hides_a_package_is_named(name: str, inside: str, tmp_path: Path) -> None:
    path = tmp_path / inside.format(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    done = imported(HOUSE, cwd=tmp_path)  # the folder itself comes last: nothing is hidden
    assert done.returncode == 0, done.stderr
    done = imported(tmp_path, HOUSE, cwd=HOUSE)
    last = done.stderr.splitlines()[-1]
    hiding, kind = (path, "file") if inside == "{}.py" else (path.parent, "folder")
    assert last.startswith(f"ImportError: {hiding} hides the package {name!r} that HiBio needs")
    assert last.endswith(f"rename or move that {kind}")
    command = imported(tmp_path, HOUSE, cwd=HOUSE, argv="/usr/bin/hibio")
    assert (command.returncode, command.stdout) == (1, "")
    assert command.stderr == last.replace("ImportError", "error") + "\n"
    module = subprocess.run(
        [sys.executable, "-S", "-m", "hibio.cli"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HOUSE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (module.returncode, module.stderr) == (1, command.stderr)


def test_other_files_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "pathways").mkdir()  # of files that Python does not import
    assert imported(tmp_path, HOUSE, cwd=HOUSE).returncode == 0


@pytest.mark.parametrize("name", ["pathways", "preprocessing", "eval"])
def test_another_project_in_the_place_of_a_package_is_named(name: str, tmp_path: Path) -> None:
    """Installed over ours, as pip does without a word, and in a folder that comes first."""
    ours, theirs = tmp_path / "one" / "site-packages", tmp_path / "two" / "site-packages"
    record = ours / f"hibio-{__version__}.dist-info" / "RECORD"
    for path, text in [
        (ours / "hibio" / "__init__.py", (HOUSE / "hibio" / "__init__.py").read_text()),
        *((ours / one / "__init__.py", "") for one in ("pathways", "preprocessing", "eval")),
        (theirs / name / "__init__.py", "theirs = 1"),
        (theirs / f"{name}_of_others-1.dist-info" / "top_level.txt", name),
        (theirs / f"{name}_of_others-1.dist-info" / "METADATA", f"Name: {name}-of-others"),
        (record, f"{name}/__init__.py,sha256=0,0\nRECORD,,\n"),
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert imported(ours, cwd=tmp_path).returncode == 0
    first = imported(theirs, ours, cwd=tmp_path)
    (ours / name / "__init__.py").write_text("# by hand")
    changed = imported(ours, cwd=tmp_path).stderr.splitlines()[-1]
    assert "is not what was installed" in changed
    assert changed.endswith(f"package {name!r}; pip install --force-reinstall --no-deps hibio")
    shutil.copytree(theirs, ours, dirs_exist_ok=True)
    over = imported(ours, cwd=tmp_path)
    for done, place in ((first, theirs), (over, ours)):
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"ImportError: {place / name / '__init__.py'} is of another project")
        assert f"({name}-of-others)" in last
        assert f"pip uninstall {name}-of-others, then pip install --force-reinstall" in last


@pytest.mark.parametrize("name", ["pathways", "preprocessing", "eval"])
def test_a_door_gives_the_public_names_and_nothing_else(name: str) -> None:
    package, door = import_module(name), import_module(f"hibio.{name}")
    assert door.__all__ == package.__all__
    assert all(getattr(door, public) is getattr(package, public) for public in door.__all__)
    assert getattr(import_module("hibio"), name) is door
    with pytest.raises(AttributeError, match="nothing"):
        _ = door.nothing
    assert (Path(package.__file__ or "").parent / "py.typed").is_file()


def test_a_door_is_light() -> None:
    code = "import sys, hibio; from hibio.preprocessing import SlideStore; import hibio.eval\n"
    code += "hibio.pathways.load_pathways; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HOUSE, check=False).returncode == 0


def test_the_version_is_said_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    setup = (HOUSE / "setup.cfg").read_text()
    assert "\nversion = attr: hibio.__version__\n" in setup
    with pytest.raises(SystemExit, match="0"):
        import_module("hibio.cli").main(["--version"])
    assert capsys.readouterr().out == f"hibio {import_module('hibio').__version__}\n"


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": "hibio pre", "COMP_POINT": "9", "IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "told"), "_ARGCOMPLETE_IFS": "\n"}
    command = [sys.executable, "-m", "hibio.cli"]
    subprocess.run(command, cwd=HOUSE, env={**os.environ, **asked}, check=True)
    assert (tmp_path / "told").read_text().split() == ["prepare", "predict"]
