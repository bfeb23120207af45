"""The Python names that other people's scripts rely on (README, "In Python")."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_the_public_names_are_there() -> None:
    from eval import evaluate
    from hibio import HiBio
    from pathways import load_pathways
    from preprocessing import SlideStore, TfidfReweighter, prepare

    public = (evaluate, prepare, load_pathways, SlideStore, TfidfReweighter, HiBio.from_checkpoint)
    assert all(callable(thing) for thing in public)


@pytest.mark.parametrize("package", ["hibio", "eval", "preprocessing", "pathways"])
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    import importlib

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module(package).no_such_name


@pytest.mark.parametrize("package", ["hibio", "eval", "preprocessing", "pathways"])
def test_importing_a_package_does_not_load_torch(package: str) -> None:
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
