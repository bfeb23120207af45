"""Recipes: published collections that are fetched, never shipped, and checked by their hash."""

import csv
import hashlib
import io
import os
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from .errors import PathwayError
from .textfile import write_bytes

CACHE_VARIABLE = "HIBIO_PATHWAYS"
MAX_DOWNLOAD = 64 * 1024**2
TIMEOUT_S = 60


@dataclass(frozen=True)
class Recipe:
    """Where one published collection comes from.

    Attributes:
        name: Catalog name, for example "hallmark".
        url: https address of a GMT file that never changes (a commit or a release).
        version: Release of the collection.
        licence: Licence stated by the publisher, and whom to cite.
        sha256: Hash of the file's bytes.
        summary: One line of meaning.
    """

    name: str
    url: str
    version: str
    licence: str
    sha256: str
    summary: str

    @property
    def filename(self) -> str:
        """Name under which the file is kept."""
        return self.url.rsplit("/", 1)[-1]


def read_recipes() -> dict[str, Recipe]:
    """The recipes that come with this package, by name."""
    text = (resources.files("pathways") / "data" / "recipes.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text), delimiter="\t")
    return {row["name"]: Recipe(**row) for row in rows}


def recipe_named(name: str) -> Recipe:
    """One recipe; an unknown name is an error with the choices."""
    recipes = read_recipes()
    if name not in recipes:
        near = get_close_matches(name, recipes, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PathwayError(
            f"no recipe to fetch {name!r}; the choices are {', '.join(recipes)}.{hint}"
        )
    return recipes[name]


def cache_folder() -> Path:
    """Folder of fetched collections.

    ``$HIBIO_PATHWAYS``, else ``$XDG_CACHE_HOME/hibio/pathways``, else ``~/.cache/hibio/pathways``.
    """
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hibio" / "pathways"


def fetched_file(name: str, folder: Path | None = None) -> Path:
    """The file of a collection that was fetched before.

    Args:
        name: Recipe name.
        folder: Where to look; default ``cache_folder()``.

    Raises:
        PathwayError: Not there (says how to get it), or its bytes are not those of the recipe.
    """
    recipe = recipe_named(name)
    path = (folder or cache_folder()) / recipe.filename
    if not path.is_file():
        raise PathwayError(
            f"the collection {name!r} is not shipped and not at {path}. Run `hibio pathways fetch "
            f"{name}`, or download the GMT from MSigDB (gsea-msigdb.org) and pass its path instead "
            f"of {name!r}."
        )
    _check_hash(recipe, path.read_bytes(), str(path))
    return path


def fetch(
    name: str,
    folder: Path | None = None,
    download: Callable[[str], bytes] | None = None,
) -> Path:
    """Download a collection, check its hash and keep it. The only network access of this package.

    Args:
        name: Recipe name: "hallmark" or "reactome".
        folder: Where to keep it; default ``cache_folder()``.
        download: Address -> bytes, for another transport; default https by the standard library.

    Returns:
        Path of the GMT file.

    Raises:
        PathwayError: Unknown name, no connection, or other bytes than the recipe says.
    """
    recipe = recipe_named(name)
    path = (folder or cache_folder()) / recipe.filename
    data = (download or _fetch_bytes)(recipe.url)
    _check_hash(recipe, data, recipe.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path


def _fetch_bytes(url: str) -> bytes:
    """Bytes behind an https address, at most 64 MiB."""
    if not url.startswith("https://"):
        raise PathwayError(f"{url}: expected an https address.")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            data: bytes = answer.read(MAX_DOWNLOAD + 1)
    except OSError as error:
        raise PathwayError(
            f"{url}: download failed ({error}). Check the connection, or download the GMT from "
            "MSigDB (gsea-msigdb.org) by hand and pass its path."
        ) from error
    return data


def _check_hash(recipe: Recipe, data: bytes, where: str) -> None:
    """Refuse bytes that are not the recipe's."""
    found = hashlib.sha256(data).hexdigest()
    if found != recipe.sha256:
        raise PathwayError(
            f"{where}: sha256 {found}, expected {recipe.sha256} for {recipe.name} "
            f"{recipe.version}. Remove the file and fetch it again, or pass another file by path."
        )
