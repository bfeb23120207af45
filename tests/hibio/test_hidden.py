"""A file of the user's with the name of a package of ours."""

import subprocess
import sys
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
