"""What carries HiBio elsewhere: wheel, recipes, workflows, forms; each agrees with setup.cfg."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hibio import __version__
from hibio.config.files import SHIPPED, shipped_names

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser()
SETUP.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
EXTRAS = SETUP["options.extras_require"]
#: Packages that conda calls otherwise.
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "openslide-bin": "openslide"}
NAMED = re.compile(r"hibio\\?\[([a-z,]+)\\?\]")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def limits(one: Requirement) -> str:
    """The range of a requirement, in one order."""
    return ",".join(sorted(str(one.specifier).split(",")))


def call(*arguments: str | Path, **options: object) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def build(folder: Path, kind: str, out: Path) -> Path:
    """The sdist or wheel of a source folder, by what pip calls, without another environment."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    return out / call(sys.executable, "-c", code, cwd=folder).splitlines()[-1]


def test_the_wheel_of_the_sdist_runs_where_nothing_else_of_hibio_is(tmp_path):
    """Installed by ``--target``, which puts nothing outside that folder."""
    source, out, target = tmp_path / "source", tmp_path / "dist", tmp_path / "installed"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "vendor")
    for name in ("hibio", "pathways", "preprocessing", "eval", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out.mkdir()
    with tarfile.open(build(source, "sdist", out)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    wheel = build(tmp_path / "unpacked" / f"hibio-{__version__}", "wheel", out)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    call(*pip, "--disable-pip-version-check", "--no-index", cwd=tmp_path)
    shutil.rmtree(source)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def hibio(*arguments: str) -> str:
        here = {"cwd": tmp_path, "env": environment}
        return call(sys.executable, "-m", "hibio.cli", *arguments, **here)

    assert hibio("--version") == f"hibio {__version__}\n"
    assert [line.split()[0] for line in hibio("config", "list").splitlines()] == shipped_names()
    for name in shipped_names():
        path = SHIPPED / (name if "." in name else f"{name}.yaml")
        assert (target / "hibio" / "configs" / path.relative_to(SHIPPED)).is_file()
    hibio("simulate", "--out", "cohort", "--slides", "1", "--patients", "1", "--spots", "60")
    hibio("prepare", "cohort/manifest.csv", "--out", "stores", "--patch-px", "16")
    assert [path.stem for path in (tmp_path / "stores").glob("*.h5")] == ["sim001"]
    (about,) = target.glob("hibio-*.dist-info/METADATA")
    assert "must not be in the same environment" in about.read_text()  # pathways of PyPI


def test_every_extra_that_is_named_is_there():
    named = {
        extra
        for folder in ("hibio", "preprocessing", "pathways", "eval", "docs", ".")
        for path in (ROOT / folder).glob("**/*" if folder != "." else "*")
        if path.suffix in (".py", ".md", ".cfg") or path.name == "Dockerfile"
        for found in NAMED.findall(path.read_text(encoding="utf-8"))
        for extra in found.split(",")
    }
    named |= set(re.search(r"\.\[([a-z0-9,]+)\]", read("Dockerfile"))[1].split(","))  # type: ignore[index]
    assert len(named) > 10
    assert named <= set(EXTRAS)


def test_all_is_every_extra_of_a_user():
    (every,) = requirements(EXTRAS["all"])
    assert every.extras == set(EXTRAS) - {"all", "weights", "docs", "test"}


def test_the_conda_recipe_needs_what_the_base_needs():
    recipe = yaml.safe_load(read("conda/recipe.yaml"))
    wanted = {
        f"{CONDA.get(one.name, one.name)} {limits(one)}"
        for one in requirements(SETUP["options"]["install_requires"])
    }
    needs = {Requirement(line) for line in recipe["requirements"]["run"]}
    found = {f"{one.name} {limits(one)}" for one in needs}
    assert found == wanted | {f"python {SETUP['options']['python_requires']}"}
    assert recipe["package"] == {"name": "hibio", "version": __version__}
    assert recipe["requirements"]["host"][-1] == "setuptools >=77"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
    assert {"cff-version", "message", "title", "authors", "date-released"} <= set(citation)


@pytest.mark.parametrize("name", ["ci.yml", "newest.yml"])
def test_a_workflow_calls_make_and_the_targets_are_there(name):
    workflow = yaml.safe_load(read(f".github/workflows/{name}"))
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    (job,) = workflow["jobs"].values()
    (line,) = [step["run"] for step in job["steps"] if "run" in step]
    assert line == "make ${{ matrix.target }} PYTHON=python"
    called = [one["target"] for one in job["strategy"]["matrix"]["include"]]
    assert called.count("test") == (3 if name == "ci.yml" else 0)
    assert set(called) <= targets
    assert workflow["permissions"] == {"contents": "read"}


def test_the_form_of_an_error_asks_for_the_machine():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), path
    assert "`hibio doctor --json`" in read(".github/ISSUE_TEMPLATE/bug.yml")


def test_the_lowest_versions_are_those_of_setup_cfg():
    pinned = [line for line in read("constraints-lowest.txt").splitlines() if line[0] != "#"]
    lowest = {Requirement(line).name: str(Requirement(line).specifier) for line in pinned}
    every = "\n".join([SETUP["options"]["install_requires"], *EXTRAS.values()])
    floors = {
        one.name: f"=={spec.version}.*"
        for one in requirements(every)
        for spec in one.specifier
        if spec.operator == ">="
    }
    assert lowest == floors, "make constraints-lowest.txt"
