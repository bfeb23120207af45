"""Self-contained HTML pages: their parts as plain data, one template that marks them up.

Words come from stores and results of others, so nothing here is markup: the template escapes
everything. Pictures are inside the page, and no script runs.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from preprocessing.files import atomic_path


@dataclass(frozen=True)
class Cell:
    """A cell of a table; a plain string is one too.

    Attributes:
        text: its words.
        kind: ``words`` for text that may wrap, else "".
        strong: how it is marked: ``best``, ``far`` or "".
        beside: small print behind the words.
        below: small print under them, line by line.
        link: where the words lead.
        picture: a PNG or JPEG before them.
        colour: red, green, blue (0..255) of a swatch before them.
    """

    text: str = ""
    kind: str = ""
    strong: str = ""
    beside: str = ""
    below: tuple[str, ...] = ()
    link: str = ""
    picture: bytes = b""
    colour: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Line:
    """A row of a table; the first cell names it. ``kind`` is ``self``, ``chance`` or ""."""

    cells: Sequence[Cell | str]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table in a box that scrolls sideways.

    Attributes:
        head: headings of the columns.
        rows: below them.
        caption: above them.
        groups: heading and number of columns of each group, over the columns after ``lead``.
        lead: columns in no group.
        kind: class of the table.
    """

    shape: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Line]
    caption: str = ""
    groups: Sequence[tuple[str, int]] = ()
    lead: int = 0
    kind: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph after an optional bold beginning; ``kind`` is ``soft`` for small print."""

    shape: ClassVar[str] = "text"
    words: str
    kind: str = ""
    bold: str = ""


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    shape: ClassVar[str] = "heading"
    words: str
    level: int = 2


@dataclass(frozen=True)
class Bullets:
    """A list; a pair is a bold beginning and the rest."""

    shape: ClassVar[str] = "bullets"
    items: Sequence[str | tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with its caption."""

    shape: ClassVar[str] = "picture"
    data: bytes
    alt: str
    caption: str
    title: str = ""


@dataclass(frozen=True)
class Verbatim:
    """Text whose lines and spaces stay."""

    shape: ClassVar[str] = "verbatim"
    words: str


@dataclass(frozen=True)
class Box:
    """Parts that a click on the summary shows."""

    shape: ClassVar[str] = "box"
    summary: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Beside:
    """Parts side by side, where there is room."""

    shape: ClassVar[str] = "beside"
    parts: Sequence[Part]


Part = Table | Text | Heading | Bullets | Picture | Verbatim | Box | Beside


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading; with an anchor it stands in the contents."""

    parts: Sequence[Part]
    heading: str = ""
    anchor: str = ""


def render(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    return _template().render(title=title, sections=sections).lstrip()


def write_page(path: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write a page in one step: an old one is replaced only when the new one is complete."""
    with atomic_path(path) as temporary:
        temporary.write_text(render(title, sections), encoding="utf-8")
    return path


def data_uri(data: bytes) -> str:
    """A PNG or JPEG as text that a page can hold."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("preprocessing", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = data_uri
    return environment.get_template("page.html.j2")
