"""Fetched collections: only the recipe's bytes are accepted; nothing here uses the network."""

import hashlib
import re
from pathlib import Path

import pytest

from pathways import PathwayError, fetch, load_pathways
from pathways import catalog as recipes

CONTENT = b"A\tx\tTP53\tEGFR\nB\ty\tTP53\tERBB2\n"


@pytest.fixture
def toy_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder, and a catalog whose `hallmark` is a tiny file."""
    recipe = recipes.Recipe(
        "hallmark", "https://x.org/h.gmt", "v0", "CC0", hashlib.sha256(CONTENT).hexdigest(), "toy"
    )
    monkeypatch.setattr(recipes, "read_recipes", lambda: {"hallmark": recipe})
    monkeypatch.setenv(recipes.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_recipe_is_complete_and_pinned() -> None:
    for name, recipe in recipes.read_recipes().items():
        assert recipe.name == name
        assert re.fullmatch(r"[0-9a-f]{64}", recipe.sha256)
        assert re.match(r"https://.*/[0-9a-f]{40}/.*\.gmt$", recipe.url)  # a commit, not a branch
        assert recipe.version
        assert recipe.licence


def test_not_fetched_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(recipes.CACHE_VARIABLE, str(tmp_path))
    for name in ("hallmark", "reactome"):
        with pytest.raises(PathwayError, match=f"not shipped.*fetch {name}.*MSigDB"):
            load_pathways(name)


def test_fetch_then_load(toy_recipe: Path) -> None:
    asked: list[str] = []

    def download(url: str) -> bytes:
        asked.append(url)
        return CONTENT

    path = fetch("hallmark", download=download)
    assert asked == ["https://x.org/h.gmt"]
    assert path == toy_recipe / "h.gmt"
    assert path.read_bytes() == CONTENT
    database = load_pathways("hallmark")
    assert database.names == ("A", "B")
    assert (database.licence, database.version) == ("CC0", "v0")


def test_other_bytes_are_refused(toy_recipe: Path) -> None:
    with pytest.raises(PathwayError, match=r"sha256 .*, expected"):
        fetch("hallmark", download=lambda url: CONTENT + b"\n")
    assert not toy_recipe.exists()
    fetch("hallmark", download=lambda url: CONTENT)
    (toy_recipe / "h.gmt").write_bytes(b"A\tx\tEVIL\n")
    with pytest.raises(PathwayError, match=r"expected .* for hallmark"):
        load_pathways("hallmark")


def test_unknown_and_unsafe_addresses(toy_recipe: Path) -> None:
    with pytest.raises(PathwayError, match="Did you mean 'hallmark'"):
        fetch("halmark")
    with pytest.raises(PathwayError, match="expected an https address"):
        recipes._fetch_bytes("file:///etc/hostname")


def test_cache_folder_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(recipes.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert recipes.cache_folder() == tmp_path / "hibio" / "pathways"
    monkeypatch.setenv(recipes.CACHE_VARIABLE, str(tmp_path / "own"))
    assert recipes.cache_folder() == tmp_path / "own"
