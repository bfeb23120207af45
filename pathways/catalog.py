"""Published collections, and the only place that turns a user's string into a database."""

import csv
import hashlib
import importlib
import io
import os
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import pandas as pd

from pathways.database import TABLE_SUFFIXES, PathwayDatabase, read_table
from pathways.errors import PathwayError, did_you_mean
from pathways.files import (
    GeneSet,
    read_gmt,
    read_gmt_leniently,
    read_gmx,
    read_grp,
    read_set_json,
    write_bytes,
)

CACHE_VARIABLE = "HIBIO_PATHWAYS"
MAX_DOWNLOAD = 64 * 1024**2
TIMEOUT_S = 60
DEFAULT_NAME, DEFAULT_VERSION, DEFAULT_LICENCE = "default", "1", "Apache-2.0"
GMT_SUFFIXES = (".gmt", ".gmt.gz")
SET_READERS = {".gmx": read_gmx, ".grp": read_grp, ".txt": read_grp, ".json": read_set_json}
CONTROL_PREFIX = "matched_random:"


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
        hint = did_you_mean(name, recipes)
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


def fetched_file(name: str) -> Path:
    """The file of a collection that was fetched before, in ``cache_folder()``.

    Raises:
        PathwayError: Not there (says how to get it), or its bytes are not those of the recipe.
    """
    recipe = recipe_named(name)
    path = cache_folder() / recipe.filename
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
    found = hashlib.sha256(data).hexdigest()
    if found != recipe.sha256:
        raise PathwayError(
            f"{where}: sha256 {found}, expected {recipe.sha256} for {recipe.name} "
            f"{recipe.version}. Remove the file and fetch it again, or pass another file by path."
        )


@dataclass(frozen=True)
class DatabaseEntry:
    """One line of ``list_databases``.

    Attributes:
        name: What ``load_pathways`` takes.
        shipped: True: part of this package. False: fetched first (``fetch``).
        version: Version of the content.
        licence: Licence of the content.
        summary: One line of meaning.
    """

    name: str
    shipped: bool
    version: str
    licence: str
    summary: str


def list_databases() -> tuple[DatabaseEntry, ...]:
    """Every name that ``load_pathways`` knows."""
    summary = "working vocabulary: tumour and brain"
    default = DatabaseEntry(DEFAULT_NAME, True, DEFAULT_VERSION, DEFAULT_LICENCE, summary)
    fetched = [
        DatabaseEntry(r.name, False, r.version, r.licence, r.summary)
        for r in read_recipes().values()
    ]
    return (default, *fetched)


def load_pathways(spec: str, root: str | Path | None = None) -> PathwayDatabase:
    """Turn a string into a database.

    Args:
        spec: One of

            - a name of ``list_databases``: "default", "hallmark", "reactome";
            - a file: .gmt, .gmx, .grp or .txt (a list of genes), .json (MSigDB), or a long table
              .tsv/.csv with source, target[, weight]; each also with .gz;
            - "package.module:function": **imports the module and calls the function without
              arguments, so this runs code**; it returns a PathwayDatabase, a list of GeneSet, a
              mapping name -> genes, or a table source, target, weight;
            - several of these joined by "+"; a pathway name may appear in one part only.
        root: Folder that relative paths start from; default the working folder.

    Raises:
        PathwayError: Unknown name (with the nearest), missing or wrong file, wrong return value.
    """
    spec = spec.strip()
    if spec.startswith(CONTROL_PREFIX):
        raise PathwayError(
            f"{spec!r} is a control that needs the training data: load "
            f"{spec.removeprefix(CONTROL_PREFIX)!r} and pass it to pathways.matched_random."
        )
    if "+" not in spec or (_looks_like_path(spec) and _path(spec, root).is_file()):
        return _load_part(spec, root)
    parts = [part.strip() for part in spec.split("+")]
    if not all(parts):
        raise PathwayError(f"{spec!r}: an empty part beside '+'; expected names or files.")
    return concatenate([_load_part(part, root) for part in parts], name="+".join(parts))


def concatenate(databases: list[PathwayDatabase], name: str) -> PathwayDatabase:
    """Join databases with different pathway names and one kind of gene identifier.

    Raises:
        PathwayError: A pathway name in two parts, or parts with different kinds of identifiers.
    """
    owner: dict[str, str] = {}
    for part in databases:
        shared = [n for n in part.names if n in owner]
        if shared:
            raise PathwayError(
                f"{name}: {len(shared)} pathway name(s) are in {owner[shared[0]]} and in "
                f"{part.name}: {', '.join(shared[:5])}. Rename them in one of the files."
            )
        owner.update(dict.fromkeys(part.names, part.name))
    kinds = {p.name: p.id_type for p in databases if p.id_type != "unknown"}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{n} has {k}" for n, k in kinds.items())
        raise PathwayError(
            f"{name}: parts with different kinds of gene identifiers ({listed}) cannot match one "
            "panel. Convert one of them first."
        )
    return PathwayDatabase(
        name=name,
        table=pd.concat([p.table for p in databases], ignore_index=True),
        organism=_joined([p.organism for p in databases]),
        id_type=next(iter(kinds.values()), "unknown"),
        licence=_joined([p.licence for p in databases]),
        version=_joined([p.version for p in databases]),
        descriptions={k: v for p in databases for k, v in p.descriptions.items()},
    )


def _joined(values: list[str]) -> str:
    return " + ".join(dict.fromkeys(v for v in values if v))


def _load_part(spec: str, root: str | Path | None) -> PathwayDatabase:
    if _looks_like_path(spec):
        return _load_file(_path(spec, root))
    if ":" in spec:
        return _load_function(spec)
    if spec == DEFAULT_NAME:
        return load_default()
    if (recipe := read_recipes().get(spec)) is not None:
        sets = read_gmt(fetched_file(spec))
        return PathwayDatabase.from_sets(
            sets, spec, "human", "symbol", recipe.licence, recipe.version
        )
    known = [entry.name for entry in list_databases()]
    hint = did_you_mean(spec.lower(), known, cutoff=0.5)
    raise PathwayError(
        f"unknown pathway database {spec!r}.{hint} Expected one of {', '.join(known)}, a .gmt, "
        ".tsv or .csv file, or package.module:function."
    )


def _looks_like_path(spec: str) -> bool:
    return (
        "/" in spec
        or "\\" in spec
        or spec.lower().removesuffix(".gz").endswith((*GMT_SUFFIXES, *SET_READERS, *TABLE_SUFFIXES))
    )


def _path(spec: str, root: str | Path | None) -> Path:
    return Path(root or ".") / Path(spec).expanduser()


def _load_file(path: Path) -> PathwayDatabase:
    """A file of gene sets or a long table, told by the name's ending."""
    lower = path.name.lower()
    if lower.endswith(GMT_SUFFIXES):
        sets, weights = read_gmt_leniently(path)
        return PathwayDatabase.from_sets(sets, name=path.name, weights=weights)
    for ending, read in SET_READERS.items():
        if lower.removesuffix(".gz").endswith(ending):
            return PathwayDatabase.from_sets(read(path), name=path.name)
    if lower.endswith(TABLE_SUFFIXES):
        return read_table(path)
    endings = ", ".join((*GMT_SUFFIXES, *SET_READERS, *TABLE_SUFFIXES))
    raise PathwayError(f"{path}: unknown ending; expected one of {endings}. Rename the file.")


def load_default() -> PathwayDatabase:
    """The embedded database, written by this project (see data/README.md)."""
    source = resources.files("pathways") / "data" / "default.gmt"
    with resources.as_file(source) as path:
        sets = read_gmt(path)
    return PathwayDatabase.from_sets(
        sets, DEFAULT_NAME, "human", "symbol", DEFAULT_LICENCE, DEFAULT_VERSION
    )


def _load_function(spec: str) -> PathwayDatabase:
    """Import a module of the user and call its function."""
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        raise PathwayError(
            f"{spec!r}: cannot import {module_name!r} ({error}). Install the package or put its "
            "folder on PYTHONPATH; the form is package.module:function."
        ) from error
    function: Callable[[], object] | None = getattr(module, function_name, None)
    if not callable(function):
        hint = did_you_mean(function_name, dir(module))
        raise PathwayError(f"{spec!r}: {module_name} has no function {function_name!r}.{hint}")
    return _from_object(function(), spec)


def _from_object(value: object, spec: str) -> PathwayDatabase:
    """What a user's function may return -> database."""
    if isinstance(value, PathwayDatabase):
        return value
    if isinstance(value, pd.DataFrame):
        return PathwayDatabase(name=spec, table=value)
    if isinstance(value, Mapping):
        value = [GeneSet(str(k), "", tuple(v)) for k, v in value.items()]
    if isinstance(value, list | tuple) and value and all(isinstance(v, GeneSet) for v in value):
        return PathwayDatabase.from_sets(value, name=spec)
    raise PathwayError(
        f"{spec!r} returned {type(value).__name__}; expected a PathwayDatabase, a non-empty list "
        "of GeneSet, a mapping name -> genes, or a table source, target, weight."
    )
