"""The page around the sections: style sheet, contents, figures as data URIs, the file itself.

`Html` is a string that is safe to put into a page. It is made by `text` (escapes) and `tag`
(joins safe children); a plain `str` does not pass the type checker where `Html` is asked for.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import NewType

from eval.report.figures.canvas import Figure

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


STYLE = """
:root{color-scheme:light dark;--ink:#1b2430;--soft:#55616f;--line:#d5dbe3;--back:#fff;
--band:#f4f6f9;--mark:#b34700}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#a3afbd;--line:#3a4451;
--back:#14181d;--band:#1d232b;--mark:#ff9d5c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.5rem 1.25rem 4rem;background:var(--back);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 .6rem}
h2{font-size:1.25rem;margin:2.4rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p,ul,dl{max-width:48rem}p{margin:.4rem 0}.soft{color:var(--soft);font-size:.9rem}
a{color:inherit}nav a{margin-right:1rem;white-space:nowrap}
.scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{text-align:left;color:var(--soft);padding:.4rem .6rem;font-size:.85rem}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{background:var(--band);vertical-align:bottom;font-weight:600}
thead th.group{text-align:center;border-left:1px solid var(--line)}
th[scope=row],thead tr:first-child th:first-child{text-align:left;position:sticky;left:0}
th[scope=row]{background:var(--back)}
td.words,th.words{text-align:left;white-space:normal;min-width:10rem}
tr.self th,tr.self td{background:var(--band)}tr.chance td,tr.chance th{color:var(--soft)}
tbody th{font-weight:400}tr.self th{font-weight:700}
b.best{color:var(--mark)}small{color:var(--soft)}
figure{margin:1.2rem 0}figure img{display:block;max-width:100%;height:auto;background:#fff;
border:1px solid var(--line);border-radius:6px;padding:.4rem}
figcaption{font-size:.9rem;color:var(--soft);max-width:48rem;margin-top:.3rem}
figcaption b{color:var(--ink)}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--soft)}
pre{overflow:auto;max-height:36rem;background:var(--band);border:1px solid var(--line);
border-radius:6px;padding:.7rem;font-size:.8rem;line-height:1.4}
dt{font-weight:600;margin-top:.4rem}dd{margin:0 0 0 1rem;color:var(--soft);font-size:.9rem}
table.facts{min-width:0}table.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--back:#fff;--band:#f2f2f2;--mark:#000}
body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll{overflow:visible;border:0}
th[scope=row],thead tr:first-child th:first-child{position:static}
table{font-size:7.5pt}th,td{padding:.15rem .3rem}
figure,tr{break-inside:avoid}h2,h3{break-after:avoid}pre{max-height:none;white-space:pre-wrap}}
"""


def page(title: str, sections: Sequence[tuple[str, str, Html]]) -> str:
    """The whole document.

    Args:
        title: Plain text.
        sections: (anchor, heading, content) in reading order.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", text(title)),
        tag("style", Html(STYLE)),
    )
    links = [tag("a", text(heading), href=f"#{anchor}") for anchor, heading, _ in sections]
    parts = [
        tag("section", tag("h2", text(heading)), content, id=anchor)
        for anchor, heading, content in sections
    ]
    nav = tag("nav", join(links), aria_label="Contents") if len(links) > 1 else Html("")
    body = tag("body", tag("h1", text(title)), nav, join(parts))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def figures_section(figures: Sequence[Figure]) -> Html:
    """Figures with captions, or a sentence when there is none."""
    if not figures:
        return paragraph("This run has no figures.", "soft")
    return join(_figure(figure, index) for index, figure in enumerate(figures, start=1))


def _figure(figure: Figure, index: int) -> Html:
    data = base64.b64encode(figure.png).decode("ascii")
    picture = tag("img", src=f"data:image/png;base64,{data}", alt=figure.title)
    caption = tag(
        "figcaption",
        tag("b", text(f"Figure {index}. {figure.title}.")),
        Html(" "),
        text(figure.caption),
    )
    return tag("figure", picture, caption)
