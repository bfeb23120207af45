"""Names that others take: a file that hides a package of ours, and the doors below `hibio`."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["pathways", "preprocessing", "eval"])
def test_a_file_that_hides_a_package_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HOUSE)!r}]; import hibio"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{name}.py hides the package" in done.stderr
    assert "rename or move" in done.stderr


def test_other_files_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(HOUSE)!r}]; import hibio"
    assert subprocess.run([sys.executable, "-S", "-c", code], check=False).returncode == 0


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
