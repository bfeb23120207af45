"""HTML primitives: the only place where text becomes markup, so that all of it is escaped.

`Html` is a string that is safe to put into a page. It is made by `text` (escapes) and `tag`
(joins safe children); a plain `str` does not pass the type checker where `Html` is asked for.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import NewType

Html = NewType("Html", str)
MISSING = "–"
VOID = frozenset({"img", "meta", "br"})


def text(value: object) -> Html:
    """Escape anything for use as text or attribute value."""
    return Html(html.escape(str(value), quote=True))


def tag(name: str, /, *children: Html, **attributes: object) -> Html:
    """Build an element.

    Args:
        name: Element name, a literal of this package.
        *children: Safe markup.
        **attributes: Escaped here; a trailing underscore is dropped (`class_`), inner ones become
            hyphens (`aria_label`), False and None leave the attribute out, True writes its name.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{text(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(children)}</{name}>")


def join(parts: Iterable[Html]) -> Html:
    """Put safe parts below each other."""
    return Html("\n".join(parts))


def paragraph(content: object, class_: str | None = None) -> Html:
    """A paragraph of plain text."""
    return tag("p", text(content), class_=class_)


def table(head: Sequence[Html], body: Iterable[Html], caption: str = "") -> Html:
    """A table in a box of its own that scrolls sideways.

    Args:
        head: Rows (`tr`) of the head.
        body: Rows (`tr`) of the body.
        caption: Plain text above the table.
    """
    title = tag("caption", text(caption)) if caption else Html("")
    inner = tag("table", title, tag("thead", *head), tag("tbody", join(body)))
    return tag("div", inner, class_="scroll", tabindex="0")


def heading_row(names: Iterable[object]) -> Html:
    """One row of column headings."""
    return tag("tr", *(tag("th", text(name), scope="col") for name in names))


def details(summary: str, *children: Html) -> Html:
    """A closed box that opens on a click, without a script."""
    return tag("details", tag("summary", text(summary)), *children)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number (no bool, None, NaN or infinity)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


def decimals_for(value: float) -> int:
    """Digits after the point that give about three significant ones for usual metrics."""
    size = abs(value)
    return 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0


def number(value: object, decimals: int | None = None) -> str:
    """A number for a table; a dash when it is missing or not finite.

    Args:
        value: Anything; numpy scalars included.
        decimals: Digits after the point; by size when None. A tiny value that would read as
            zero is written with an exponent.
    """
    if not is_number(value):
        return MISSING
    if isinstance(value, Integral):
        return f"{int(value):,}"
    plain = float(value)  # type: ignore[arg-type]
    digits = decimals_for(plain) if decimals is None else decimals
    if decimals is None and plain != 0 and abs(plain) < 0.5 * 10**-digits:
        return f"{plain:.1e}"
    shown = f"{plain:,.{digits}f}"
    return shown.lstrip("-") if float(shown.replace(",", "")) == 0 else shown


def exact(value: object) -> str:
    """A number with six significant digits, for the lists of single values."""
    return f"{float(value):.6g}" if is_number(value) else MISSING  # type: ignore[arg-type]
