"""Plain values (mappings, lists, scalars) checked against the annotations of nested dataclasses.

Supported annotations: dataclasses, unions and ``X | None``, ``Literal``, ``Path``,
``tuple[X, ...]``, ``tuple[X, Y]``, ``list[X]``, ``dict[str, X]``, ``Any``, bool, int, float and
str, and numbers with a range, ``Annotated[int, Range(1)]``. Types are checked, never coerced; the
exceptions are int -> float and a number in quotes ("1e-4") -> float. Numbers are finite. A tuple
may be empty only where it is so by default.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from preprocessing.errors import did_you_mean

C = TypeVar("C")
Key = tuple[str, ...]

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Range:
    """What a number of a configuration may be; part of its annotation.

    Attributes:
        low, high: the least and the largest value; None: no limit.
        open: the limits themselves are excluded: none | low | high.
    """

    low: float | None = None
    high: float | None = None
    open: Literal["none", "low", "high"] = "none"

    def holds(self, value: float) -> bool:
        """Whether a value lies inside."""
        above = self.low is None or value > self.low or (value == self.low and self.open != "low")
        below = self.high is None or value < self.high
        return above and (below or (value == self.high and self.open != "high"))

    def __str__(self) -> str:
        """For messages: ``a number from 1 to 64``."""
        low = None if self.low is None else f"{self.low:.12g}"
        high = None if self.high is None else f"{self.high:.12g}"
        if low and high and self.open == "none":
            return f"a number from {low} to {high}"
        parts = [low and (f"above {low}" if self.open == "low" else f"from {low} on")]
        parts.append(high and (f"below {high}" if self.open == "high" else f"at most {high}"))
        return "a number " + " and ".join(part for part in parts if part)


#: Ranges that several sections, tasks or peers have.
Size = Annotated[int, Range(1, 16_384)]
Dropout = Annotated[float, Range(0, 1, "high")]
Temperature = Annotated[float, Range(0, 100, "low")]
Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0, 1, "low")]
Level = Annotated[float, Range(0.5, 1, "high")]
Count = Annotated[int, Range(1, 1e9)]
Whole = Annotated[int, Range(0, 1e9)]
Rounds = Annotated[int, Range(0, 1000)]
Folds = Annotated[int, Range(2, 1000)]
Positive = Annotated[float, Range(0, 1e12, "low")]
Weight = Annotated[float, Range(0, 1e6)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Correlation = Annotated[float, Range(-1, 1)]
Micrometres = Annotated[float, Range(0, 1e6)]


class SchemaError(ValueError):
    """A value does not fit its annotation.

    Attributes:
        key: path of the value from the top, for example ``("model", "dim")``.
    """

    def __init__(self, key: Key, message: str) -> None:
        super().__init__(message)
        self.key = key


def build_section(cls: type[C], data: Any, key: Key = (), default: C | None = None) -> C:
    """Build a dataclass from a mapping.

    Args:
        cls: dataclass whose fields are the valid keys.
        data: mapping of plain values.
        key: where the section stands, for messages.
        default: instance whose values are kept for keys that are not given (else the class's).

    Raises:
        SchemaError: unknown or missing key, wrong type, or a ``ValueError`` of ``__post_init__``.
    """
    if not isinstance(data, Mapping):
        raise _mismatch(key, "a section (key: value lines)", data)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    for name in data:
        if name not in fields:
            raise _unknown((*key, str(name)), list(fields))
    values: dict[str, Any] = {}
    for name, field in fields.items():
        path = (*key, name)
        known, given = _default_of(field, default)
        if name in data:
            values[name] = _build(hints[name], data[name], path, given)
            if values[name] == () and field.default != ():  # nothing would be done
                raise SchemaError(path, f"{dotted(path)} is empty; give at least one")
        elif known:
            values[name] = given
        else:
            raise SchemaError(path, f"required key '{dotted(path)}' is missing; add it")
    try:
        return cls(**values)
    except ValueError as error:
        where = f"section '{dotted(key)}'" if key else "the settings do not go together"
        raise SchemaError(key, f"{where}: {error}") from error


def to_plain(value: Any) -> Any:
    """The same value in what YAML can hold: sections become dicts, tuples lists, paths text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return {name: to_plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dotted(key: Key) -> str:
    """The key as a user writes it: ``model.dim``."""
    return ".".join(key)


def _default_of(field: dataclasses.Field[Any], instance: Any) -> tuple[bool, Any]:
    """(is there a default, the default) of a field; ``instance`` goes before the class."""
    if instance is not None:
        return True, getattr(instance, field.name)
    if field.default is not dataclasses.MISSING:
        return True, field.default
    if field.default_factory is not dataclasses.MISSING:
        return True, field.default_factory()
    return False, None


def _build(hint: Any, value: Any, key: Key, default: Any = None) -> Any:
    """Check ``value`` against one annotation; containers, paths and sections are converted."""
    if hint is Any:
        return copy.deepcopy(value)
    if dataclasses.is_dataclass(hint):
        same = default if type(default) is hint else None
        return build_section(typing.cast(Any, hint), value, key, same)
    origin = typing.get_origin(hint) or hint
    if origin is Annotated:
        return _build_ranged(hint, value, key)
    if origin in (Union, types.UnionType):
        return _build_union(hint, value, key, default)
    if origin is Literal:
        return _build_literal(typing.get_args(hint), value, key)
    if origin in (list, tuple):
        return _build_sequence(hint, value, key)
    if origin is dict:
        return _build_dict(hint, value, key)
    return _build_scalar(hint, value, key)


def _build_ranged(hint: Any, value: Any, key: Key) -> Any:
    arm, *limits = typing.get_args(hint)
    found = _build(arm, value, key)
    for limit in limits:
        if not limit.holds(found):
            raise SchemaError(key, f"'{dotted(key)}' is {found!r}, expected {limit}")
    return found


def _build_union(hint: Any, value: Any, key: Key, default: Any) -> Any:
    """An arm that leaves the value as it is goes first, then the first that fits."""
    arms = [arm for arm in typing.get_args(hint) if arm is not types.NoneType]
    if value is None and len(arms) < len(typing.get_args(hint)):
        return None
    fits: list[Any] = []
    problems: list[SchemaError] = []
    for arm in arms:
        try:
            fits.append(_build(arm, value, key, default))
        except SchemaError as problem:
            problems.append(problem)
    if not fits:
        if len(problems) == 1:
            raise problems[0]
        raise SchemaError(key, "; or ".join(str(problem) for problem in problems))
    sections = [type(fit).__name__ for fit in fits if dataclasses.is_dataclass(fit)]
    if len(sections) > 1:
        alike = " and ".join(sections)
        raise SchemaError(key, f"'{dotted(key)}' fits {alike} alike; give a key that only one has")
    unchanged = [fit for fit in fits if type(fit) is type(value) and fit == value]
    return (unchanged or fits)[0]


def _build_literal(choices: tuple[Any, ...], value: Any, key: Key) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    listed = [str(choice) for choice in choices]
    remedy = did_you_mean(str(value), listed, cutoff=0.5)
    message = f"'{dotted(key)}' is {value!r}, expected one of: {', '.join(listed)}{remedy}"
    raise SchemaError(key, message)


def _build_sequence(hint: Any, value: Any, key: Key) -> Any:
    """A YAML list into ``list[X]``, ``tuple[X, ...]`` or ``tuple[X, Y]``."""
    kind = typing.get_origin(hint) or hint
    arms = typing.get_args(hint) or (Any,)
    if not isinstance(value, list | tuple):
        raise _mismatch(key, "a list (write the whole list)", value)
    if kind is list or arms[-1] is Ellipsis or not typing.get_args(hint):
        arms = arms[:1] * len(value)
    if len(arms) != len(value):
        raise _mismatch(key, f"a list of {len(arms)} values", value)
    items = zip(arms, value, strict=True)
    return kind(_build(arm, item, (*key, str(i))) for i, (arm, item) in enumerate(items))


def _build_dict(hint: Any, value: Any, key: Key) -> Any:
    of_key, arm = typing.get_args(hint) or (str, Any)
    if of_key is not str:
        raise TypeError(f"field '{dotted(key)}': dict keys must be str, found {of_key!r}")
    if not isinstance(value, Mapping):
        raise _mismatch(key, "a section (key: value lines)", value)
    for name in value:
        if not isinstance(name, str):
            raise _mismatch((*key, str(name)), "a name as key; put it in quotes", name)
    return {name: _build(arm, item, (*key, name)) for name, item in value.items()}


def _build_scalar(hint: Any, value: Any, key: Key) -> Any:
    if hint not in (bool, int, float, str, Path):
        raise TypeError(f"field '{dotted(key)}' has the unsupported annotation {hint!r}")
    if hint is float and (number := _finite(value)) is not None:
        return number
    if type(value) is hint and hint is not float:
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    wanted = {
        bool: "true or false",
        int: "a whole number",
        float: "a number (finite)",
        str: "text; put it in quotes",
        Path: "a path (text)",
    }
    raise _mismatch(key, wanted[hint], value)


def _finite(value: Any) -> float | None:
    """A number, also one in quotes, as float; None for anything else, NaN and infinity."""
    number = isinstance(value, str) and _NUMBER.fullmatch(value)
    if not number and type(value) not in (int, float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _mismatch(key: Key, wanted: str, value: Any) -> SchemaError:
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    where = f"'{dotted(key)}'" if key else "the file"
    found = "nothing (null)" if value is None else f"{type(value).__name__} {shown}"
    return SchemaError(key, f"{where}: expected {wanted}, found {found}")


def _unknown(key: Key, valid: list[str]) -> SchemaError:
    near = difflib.get_close_matches(key[-1], valid, n=1, cutoff=0.5)
    remedy = f"did you mean '{dotted((*key[:-1], *near))}'? " if near else ""
    where = f"'{dotted(key[:-1])}'" if len(key) > 1 else "the top level"
    listed = ", ".join(sorted(valid)) or "none"
    return SchemaError(key, f"unknown key '{dotted(key)}'; {remedy}Valid keys of {where}: {listed}")


def json_schema(cls: Any) -> dict[str, Any]:
    """What a YAML file of a dataclass may hold, as JSON Schema (2020-12), for editors.

    Types, choices, ranges, defaults and the docstring of every key. Rules between keys are not in
    it: `build_section` has the last word.

    Args:
        cls: dataclass of the whole file, which may also have a ``base`` that gives what it lacks.
    """
    schema = _schema_of(cls, False)
    text = {"type": "string", "description": "file that gives what is not said here"}
    schema["properties"] = {"base": text, **schema["properties"]}
    needed = [f.name for f in dataclasses.fields(cls) if not _default_of(f, None)[0]]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__}
    return {**head, **schema, "anyOf": [{"required": ["base"]}, {"required": needed}]}


def _schema_of(hint: Any, whole: bool) -> dict[str, Any]:
    """Of one annotation; ``whole``: in a list, whose entries no ``base`` adds to."""
    if dataclasses.is_dataclass(hint):
        return _section_schema(hint, whole)
    origin, arms = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated:
        return _schema_of(arms[0], whole) | {k: v for one in arms[1:] for k, v in _limits(one)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(arm, whole) for arm in arms]}
    if origin is Literal:
        return {"enum": list(arms)}
    if origin in (list, tuple):
        return _list_schema(origin, arms)
    if origin is dict:
        of_value = _schema_of(arms[1] if arms else Any, whole)
        return {"type": "object", "additionalProperties": of_value}
    names = {bool: "boolean", int: "integer", float: "number", types.NoneType: "null"}
    return {} if hint is Any else {"type": names.get(hint, "string")}


def _section_schema(cls: Any, whole: bool) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    words = _attributes(inspect.cleandoc(cls.__doc__ or ""))
    properties, needed = {}, []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        one = _schema_of(hints[field.name], whole)
        known, default = _default_of(field, None)
        if known and not dataclasses.is_dataclass(default):
            one["default"] = to_plain(default)
        elif not known:
            needed.append(field.name)
        if field.name in words:
            one["description"] = words[field.name]
        properties[field.name] = one
    told = {"required": needed} if whole and needed else {}
    return {"type": "object", "properties": properties, "additionalProperties": False, **told}


def _list_schema(kind: Any, arms: tuple[Any, ...]) -> dict[str, Any]:
    if kind is list or not arms or arms[-1] is Ellipsis:
        return {"type": "array", "items": _schema_of(arms[0] if arms else Any, True)}
    entries = [_schema_of(arm, True) for arm in arms]
    size = {"minItems": len(arms), "maxItems": len(arms)}
    return {"type": "array", "prefixItems": entries, **size}


def _limits(limit: Range) -> list[tuple[str, float]]:
    low = "exclusiveMinimum" if limit.open == "low" else "minimum"
    high = "exclusiveMaximum" if limit.open == "high" else "maximum"
    found = [(low, limit.low), (high, limit.high)]
    return [(name, value) for name, value in found if value is not None]


def _attributes(docstring: str) -> dict[str, str]:
    """Name -> words of the section ``Attributes`` of a clean docstring; ``a, b: words`` is two."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if not line.strip():
            break
        start = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
        for name in names:
            found[name] = start[2] if start else f"{found[name]} {line.strip()}"
    return found
