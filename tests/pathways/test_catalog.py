"""load_pathways: every form of the user's string, and what it says when the string is wrong."""

import sys
from pathlib import Path

import pytest

from pathways import (
    GeneSet,
    PathwayDatabase,
    PathwayError,
    list_databases,
    load_pathways,
    write_gmt,
)

MODULE = """
import pandas as pd
from pathways import GeneSet, PathwayDatabase
def as_sets(): return [GeneSet("A", "d", ("G1", "G2"))]
def as_mapping(): return {"A": ["G1", "G2"]}
def as_table(): return pd.DataFrame({"source": "A", "target": ["G1", "G2"], "weight": 1.0})
def as_database(): return PathwayDatabase.from_sets(as_sets(), "given")
def as_nothing(): return None
CONSTANT = 3
"""


@pytest.fixture
def lab_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "lab_sets_for_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lab_sets_for_test", raising=False)
    return "lab_sets_for_test"


def test_default_has_its_facts() -> None:
    database = load_pathways("default")
    assert (database.name, database.organism, database.id_type) == ("default", "human", "symbol")
    assert database.licence == "Apache-2.0"
    assert load_pathways(" default ").sha256 == database.sha256


def test_files_start_from_root(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_gmt(tmp_path / "sub" / "mine.gmt.gz", [GeneSet("A", "d", ("G1", "G2"))])
    for spec in ("sub/mine.gmt.gz", "./sub/mine.gmt.gz", str(tmp_path / "sub" / "mine.gmt.gz")):
        database = load_pathways(spec, root=tmp_path)
        assert database.genes_of("A") == ("G1", "G2")
        assert database.name == "mine.gmt.gz"
    with pytest.raises(PathwayError, match="does not exist"):
        load_pathways("mine.gmt", root=tmp_path)
    with pytest.raises(PathwayError, match="unknown ending"):
        load_pathways("sub/mine.xyz", root=tmp_path)


@pytest.mark.parametrize("function", ["as_sets", "as_mapping", "as_table", "as_database"])
def test_functions_of_a_user_module(lab_module: str, function: str) -> None:
    database = load_pathways(f"{lab_module}:{function}")
    assert isinstance(database, PathwayDatabase)
    assert database.genes_of("A") == ("G1", "G2")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("as_set", "no function 'as_set'.*'as_sets'"),
        ("CONSTANT", "no function"),
        ("as_nothing", "returned NoneType"),
        ("", "no function"),
    ],
)
def test_wrong_functions(lab_module: str, function: str, words: str) -> None:
    with pytest.raises(PathwayError, match=words):
        load_pathways(f"{lab_module}:{function}")


def test_plus_joins_parts(tmp_path: Path) -> None:
    write_gmt(tmp_path / "mine.gmt", [GeneSet("A", "d", ("TP53", "EGFR"))])
    both = load_pathways("default + ./mine.gmt", root=tmp_path)
    default = load_pathways("default")
    assert both.names == (*default.names, "A")
    assert both.name == "default+./mine.gmt"
    assert (both.organism, both.licence) == ("human", "Apache-2.0")
    assert both.descriptions["A"] == "d"
    assert len(both.table) == len(default.table) + 2


def test_a_plus_sign_in_a_file_name(tmp_path: Path) -> None:
    write_gmt(tmp_path / "a+b.gmt", [GeneSet("A", "d", ("G1",))])
    assert load_pathways("a+b.gmt", root=tmp_path).names == ("A",)


def test_joins_that_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(PathwayError, match="are in default and in default"):
        load_pathways("default+default")
    with pytest.raises(PathwayError, match="empty part"):
        load_pathways("default+")
    write_gmt(tmp_path / "mouse.gmt", [GeneSet("M", "", ("Trp53", "Actb"))])
    with pytest.raises(PathwayError, match=r"default has symbol, mouse.gmt has mouse_symbol"):
        load_pathways("default+mouse.gmt", root=tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("defualt", "Did you mean 'default'"),
        ("Hallmark", "Did you mean 'hallmark'"),
        ("zzz", "Expected one of default, hallmark, reactome"),
        ("", "unknown pathway database ''"),
        ("no_such_module_at_all:load", "cannot import 'no_such_module_at_all'"),
        (":load", "cannot import ''"),
        (".:load", "cannot import"),
        ("matched_random:default", "pathways.matched_random"),
    ],
)
def test_unknown_names_say_what_to_do(spec: str, words: str) -> None:
    with pytest.raises(PathwayError, match=words):
        load_pathways(spec)


def test_listed_names_are_the_known_ones() -> None:
    entries = {entry.name: entry for entry in list_databases()}
    assert list(entries) == ["default", "hallmark", "reactome"]
    assert [entry.shipped for entry in entries.values()] == [True, False, False]
    assert all(entry.licence and entry.version and entry.summary for entry in entries.values())
