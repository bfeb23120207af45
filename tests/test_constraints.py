"""The committed versions: every requirement of setup.cfg has one, and it fits."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def requirements(text: str) -> list[Requirement]:
    """The base and all that is locked with it: extras of users, of the tests, of the site."""
    setup = configparser.ConfigParser()
    setup.read_string(text)
    extras = setup["options.extras_require"]
    found, todo = [], f"{setup['options']['install_requires']}\nhibio[all,test,docs]".split("\n")
    while todo:
        if line := todo.pop(0).strip():
            found.append(Requirement(line))
        if line.startswith("hibio["):
            todo += [one for extra in found.pop().extras for one in extras[extra].split("\n")]
    return found


def pins(text: str) -> dict[str, Version]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def unmet(setup: str, constraints: str) -> list[str]:
    locked = pins(constraints)
    told = []
    for wanted in requirements(setup):
        version = locked.get(canonicalize_name(wanted.name))
        if version is None:
            told.append(f"{wanted.name} has no version; make lock")
        elif version not in wanted.specifier:
            told.append(f"{wanted} is locked at {version}; make lock")
    local = [f"{name}=={v}: a local build" for name, v in locked.items() if v.local]
    return told + local


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_requirement_is_locked_at_a_version_that_fits():
    assert len(requirements(read("setup.cfg"))) > 50
    assert unmet(read("setup.cfg"), read("constraints.txt")) == []


@pytest.mark.parametrize(
    ("constraints", "words"),
    [
        ("numpy==1.0\nruff==0.9.1\nwandb==1.0\n", "numpy>=1.26 is locked at 1.0"),
        ("numpy==2.0\nwandb==1.0\n", "ruff has no version"),
        ("numpy==2.0\nruff==0.9.1\n", "wandb has no version"),
        ("numpy==2.0+cpu\nruff==0.9.1\nwandb==1.0\n", "a local build"),
    ],
)
def test_what_does_not_fit_is_found(constraints, words):
    setup = "[options]\ninstall_requires =\n  numpy>=1.26\n"
    setup += "[options.extras_require]\ntest =\n  ruff>=0.9\ndocs =\n"
    setup += "all =\n  hibio[tracking]\ntracking =\n  wandb>=0.18\n"
    found = unmet(setup, constraints)
    assert len(found) == 1
    assert words in found[0]
