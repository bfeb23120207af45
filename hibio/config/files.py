"""A YAML file becomes nested frozen dataclasses, and goes back to YAML unchanged.

A dataclass is the only description of a section: its fields are the keys, its annotations the types
(`hibio.config.schema` lists them), its ``__post_init__`` the rules.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hibio.config.schema import Key, SchemaError, build_section, dotted, to_plain
from preprocessing.errors import did_you_mean
from preprocessing.files import atomic_path

C = TypeVar("C")
Layer = tuple[str, Mapping[str, Any]]

#: Values in one file, aliases written out; a bomb has billions.
LARGEST = 100_000
#: Keys of an older HiBio -> what to do; the settings of its runs have them.
RENAMED: dict[Key, str] = {
    ("optim", "amp"): (
        "a key of an older HiBio; write optim.precision: auto | fp32 | bf16 instead. A run that it "
        "began embeds and evaluates as it is, and cannot be trained on: train again in another "
        "folder (--set out=DIR)"
    ),
    ("genes", "graph_smoothing"): (
        "a key of an older HiBio; leave it out: information between smoothed genes measures the "
        "smoothing, so it is 0 now. A run that had another value embeds and evaluates as it is, "
        "with its gene graphs, and cannot be trained on: train again in another folder"
    ),
    ("genes", "graph_spots"): (
        "a key of an older HiBio; leave it out: 2000 training spots are sampled for a gene graph. "
        "A run that had another number embeds and evaluates as it is, with its gene graphs, and "
        "cannot be trained on: train again in another folder"
    ),
}
#: Those whose value is now fixed: a file that gives it means what it always did.
FIXED: Mapping[Key, Any] = {("genes", "graph_smoothing"): 0, ("genes", "graph_spots"): 2000}
#: What says nothing of the numbers of a run; None: whatever its value.
SAME: Mapping[Key, Any] = {**dict.fromkeys(RENAMED), **FIXED}
EVERY = "*"  # in a dotted key: every entry of a list
#: Runs, grids (``ablation/``), manifests and job files that come with HiBio.
SHIPPED = Path(str(files("hibio"))) / "configs"
_ABSENT = object()


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the file, the key and the remedy."""


def _with_exponents(resolvers: Mapping[Any, Any]) -> dict[Any, Any]:
    """Implicit resolvers for which 1e-4 is a number (for plain YAML 1.1 it is text)."""
    pattern = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    entry = ("tag:yaml.org,2002:float", pattern)
    added = {start: [*resolvers.get(start, []), entry] for start in "-+.0123456789"}
    return {**resolvers, **added}


class _Loader(yaml.SafeLoader):
    """Safe loader that reads 1e-4 as a number and refuses a key that is given twice."""

    yaml_implicit_resolvers = _with_exponents(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                message = f"key '{key.value}' is given twice; keep one"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > LARGEST:
            message = f"merges (<<) of more than {LARGEST:,} keys"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)


class _Dumper(yaml.SafeDumper):
    """Counterpart of the loader: text that looks like 1e-4 is quoted, aliases are written out."""

    yaml_implicit_resolvers = _with_exponents(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refuse_bomb(data: Any) -> None:
    """Refuse aliases (``*name``) that write out to a huge or an endless value.

    Raises:
        yaml.YAMLError: more than 100,000 values, or one that contains itself.
    """
    sizes: dict[int, float] = {}

    def size(value: Any) -> float:
        if not isinstance(value, dict | list | tuple):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = math.inf  # what it is while it is open: its own part
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(part) for part in parts)
        return sizes[id(value)]

    if size(data) > LARGEST:
        raise yaml.YAMLError(f"its aliases (*name) write out to more than {LARGEST:,} values")


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file that a name means: one of the user's, or else the shipped one of that name.

    Args:
        name: a path, or a shipped file's name: ``her2st``, ``ablation/regions``; its end alone
            where only one ends so, ``regions``; also as it stands in the checkout,
            ``configs/her2st.yaml``.
        beside: the folder that a path is relative to; None for the working folder.

    Returns:
        A path; whether it can be read is seen when it is.

    Raises:
        ConfigError: it is neither; names the nearest.
    """
    path = Path(name) if beside is None else beside / name
    if path.is_file():
        return path
    asked = Path(name)
    within = asked.relative_to("configs") if asked.parts[:1] == ("configs",) else asked
    shipped, wanted = _shipped(), str(within).removesuffix(".yaml")
    tails = [one for one in shipped if f"/{one}".endswith(f"/{wanted}")]
    if wanted in shipped or len(tails) == 1:
        return shipped[wanted if wanted in shipped else tails[0]]
    if path.exists():  # a folder: told when it is read
        return path
    known = [*shipped, *(one.rpartition("/")[2] for one in shipped)]
    hint = did_you_mean(wanted, tails, cutoff=0.0, n=3) or did_you_mean(wanted, known)
    raise ConfigError(
        f"{path}: no such file, and no shipped one has this name{hint}; hibio config list shows "
        "them"
    )


def _shipped() -> dict[str, Path]:
    """Every shipped file by the name that `find_config` takes; YAML without its suffix."""
    found = (path for path in SHIPPED.rglob("*") if path.is_file())
    return {str(p.relative_to(SHIPPED)).removesuffix(".yaml"): p for p in found}


def shipped_names() -> list[str]:
    """Names of all shipped files."""
    return sorted(_shipped())


def load_config(cls: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read a YAML file into a dataclass.

    A top-level ``base: other.yaml`` (relative to the file, or a shipped one's name) gives defaults,
    section by section.

    Args:
        cls: dataclass of the whole file; no field of it may be called ``base``.
        path: YAML file, or the name of a shipped one (`find_config`).
        overrides: ``"model.dim=64"``, applied last; see `apply_overrides`.

    Returns:
        An instance of ``cls``.

    Raises:
        ConfigError: unreadable file, unknown or missing key, wrong type, or a section's own rule.
    """
    layers = _read_layers(find_config(path), ())
    name = str(path)
    data: dict[str, Any] = {}
    for _, layer in layers:
        data = merge(data, layer)
    for override in overrides:
        data = apply_overrides(data, [override])
        layers.append((f"{path} with --set {override}", apply_overrides({}, [override])))
    try:
        return build_section(cls, without_renamed(data, FIXED))
    except SchemaError as problem:
        source = _source_of(layers, problem.key) or name
        raise ConfigError(f"{source}: {explained(problem)}") from problem


def load_saved(cls: type[C], path: str | Path, section: str = "") -> C:
    """Read what HiBio wrote (a checkpoint's ``config.yaml``), or one section of it.

    Args:
        cls: dataclass of the file or of the section.
        path: YAML file; keys that only an older HiBio had are left out.
        section: name of the section; "" for the whole file.

    Raises:
        ConfigError: unreadable file, no such section, or one that does not fit ``cls``.
    """
    data = _read_file(Path(path), "")
    if "base" in data:
        raise ConfigError(f"{path}: has a 'base' file, which the settings of a run never have")
    if section and section not in data:
        raise ConfigError(
            f"{path}: no section '{section}'; the file is cut off, or of something else"
        )
    data = without_renamed(data, dict.fromkeys(RENAMED))
    key = (section,) if section else ()
    try:
        return build_section(cls, data[section] if section else data, key)
    except SchemaError as problem:
        raise ConfigError(f"{path}: {problem}") from problem


def without_renamed(data: Mapping[str, Any], only: Mapping[Key, Any] = SAME) -> dict[str, Any]:
    """Saved settings, their variants included, without keys of :data:`RENAMED`.

    Args:
        data: plain values of a configuration.
        only: key -> the value with which it is left out; None: with any.
    """
    result = copy.deepcopy(dict(data))
    variants = result.get("variants")
    for one in (result, *(variants.values() if isinstance(variants, dict) else ())):
        for key, value in only.items():
            node: Any = one
            for part in key[:-1]:
                node = node.get(part) if isinstance(node, Mapping) else None
            if isinstance(node, dict) and (value is None or node.get(key[-1], _ABSENT) == value):
                node.pop(key[-1], None)
    return result


def outdated(path: Path) -> dict[Key, Any]:
    """Keys of saved settings that have another value than is fixed now, which changed numbers."""
    data = without_renamed(_read_file(path, ""))
    sections = {name: one for name, one in data.items() if isinstance(one, Mapping)}
    return {k: sections[k[0]][k[1]] for k in FIXED if k[1] in sections.get(k[0], ())}


def explained(problem: SchemaError, above: Key = ()) -> str:
    """What is wrong with a key below ``above``, and of one of :data:`RENAMED` what became of it."""
    renamed = RENAMED.get(problem.key[len(above) :])
    return f"{problem}" if renamed is None else f"{dotted(problem.key)}: {renamed}"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config, in what YAML can hold (tuples become lists, paths text)."""
    return dict(to_plain(config))


def dump_config(config: Any, path: str | Path) -> None:
    """Write a config as YAML, atomically; `load_config` gives an equal one back."""
    try:
        text = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: a value cannot be written as YAML: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def merge(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge: mappings key by key, the rest (lists too) replaced; the inputs do not change."""
    merged = copy.deepcopy(dict(base))
    for key, value in patch.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``"a.b.0.c=value"`` settings to a copy; see `_places` for what a key reaches.

    Unknown keys pass here: they are refused, with the nearest valid key, when sections are built.

    Args:
        data: mapping as read from YAML.
        overrides: ``KEY=VALUE`` texts, the value read as YAML; a section is replaced.

    Raises:
        ConfigError: not KEY=VALUE, a value that is not YAML, or a key that leads nowhere.
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        name, equals, text = override.partition("=")
        key = tuple(name.strip().split("."))
        if not equals or "" in key:
            raise ConfigError(f"--set {override}: expected KEY=VALUE, for example model.dim=64")
        try:
            value = yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
            _refuse_bomb(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
        for node, place in _places(result, key, f"--set {override}"):
            node[place] = copy.deepcopy(value)
    return result


def changed(data: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of ``data`` with other values under dotted keys; see `_places` for what they reach.

    A section is merged into the section that is there; everything else replaces what was there.

    Args:
        data: plain values of a configuration.
        changes: dotted key -> new value.
        where: the row or section that asks, for messages.

    Raises:
        ConfigError: a key that is empty or leads nowhere.
    """
    result = copy.deepcopy(dict(data))
    for name, value in changes.items():
        key = tuple(str(name).split("."))
        if "" in key:
            raise ConfigError(f"{where}: {name!r} is no key; write it like model.omics.width")
        for node, place in _places(result, key, f"{where}: {name}"):
            old: Any = node.get(place) if isinstance(node, dict) else node[place]
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            node[place] = merge(old, value) if both else copy.deepcopy(value)
    return without_renamed(result, FIXED)


def _places(data: dict[str, Any], key: Key, asked: str) -> list[tuple[Any, Any]]:
    """Every place that a dotted key names: (mapping, its key) or (list, its index).

    A number is a place in a list, ``*`` every entry of a list that has the rest of the key
    (``stages.*.weights.pathway/kl`` reaches the stages that have this term). Sections that are not
    there are made, in ``data`` itself. ``asked`` says who asks for what, for messages.

    Raises:
        ConfigError: the key goes through a plain value, or names no list entry.
    """
    reached: list[tuple[Any, Any]] = [({"": data}, "")]
    every = False
    for depth, part in enumerate(key):
        where = f"{asked}: '{dotted(key[:depth])}'"
        found: list[tuple[Any, Any]] = []
        for above, name in reached:
            node = above[name]
            if node is None:
                node = above[name] = {}
            if isinstance(node, list) and part == EVERY and depth < len(key) - 1:
                every = True
                found += [(node, index) for index in range(len(node))]
            elif isinstance(node, list):
                found.append((node, _index(node, part, where)))
            elif not isinstance(node, dict):
                raise ConfigError(f"{where} is the value {node!r}, not a section with keys")
            elif not every or part in node:
                if depth < len(key) - 1:
                    node.setdefault(part, {})
                found.append((node, part))
        reached = found
    if not reached:
        raise ConfigError(f"{asked}: no entry of the list has this key")
    return reached


def _index(node: list[Any], part: str, where: str) -> int:
    if not (part.isdecimal() and int(part) < len(node)):
        raise ConfigError(
            f"{where} is a list of {len(node)}, counted from 0 (* with a key behind it is every "
            f"entry); it has no '{part}'"
        )
    return int(part)


def _read_layers(path: Path, above: tuple[Path, ...]) -> list[Layer]:
    """(name, mapping) of every file that the file is based on, then its own."""
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(p.name for p in (*above, resolved))
        raise ConfigError(f"{path}: 'base' goes in a circle ({chain}); remove one of them")
    data = _read_file(path, f" (base of {above[-1]})" if above else "")
    base = data.pop("base", None)
    if base is None:
        return [(str(path), data)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: 'base' must name one YAML file, found {base!r}")
    try:
        below = find_config(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from error
    return [*_read_layers(below, (*above, resolved)), (str(path), data)]


def _read_file(path: Path, user: str) -> dict[str, Any]:
    """The mapping of one YAML file; ``user`` says in messages what wants it."""
    try:
        data = yaml.load(path.read_bytes(), Loader=_Loader)  # a SafeLoader: plain values only
        _refuse_bomb(data)
    except OSError as error:
        raise ConfigError(
            f"{path}{user}: cannot be read: {error.strerror}; check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        found = type(data).__name__
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level, found {found}")
    return data


def _source_of(layers: list[Layer], key: tuple[str, ...]) -> str | None:
    """Name of the last layer that sets ``key``, if one does."""
    for name, layer in reversed(layers):
        node: Any = layer if key else _ABSENT
        for part in key:
            node = (
                node.get(part, node.get(EVERY, _ABSENT)) if isinstance(node, Mapping) else _ABSENT
            )
        if node is not _ABSENT:
            return name
    return None
