"""The frame of the quality pages, and the pieces that text becomes markup with: all is escaped."""

import html
import math
from collections.abc import Iterable, Sequence
from string import Template

from preprocessing.qc.slide import Measure

DASH = "–"

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root{color-scheme:light dark;--ink:#1b2430;--soft:#55616f;--line:#d5dbe3;--back:#fff;
--band:#f4f6f9;--mark:#b34700}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#a3afbd;--line:#3a4451;
--back:#14181d;--band:#1d232b;--mark:#ff9d5c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.5rem 1.25rem 4rem;background:var(--back);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.2rem 0 .4rem}
h2{font-size:1.25rem;margin:2.2rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line)}
p,ul{max-width:48rem}p{margin:.4rem 0}.soft{color:var(--soft);font-size:.9rem}a{color:inherit}
.scroll{overflow-x:auto;margin:.6rem 0;border:1px solid var(--line);border-radius:6px}
.two{display:flex;flex-wrap:wrap;gap:0 1.5rem;align-items:flex-start}
.two>*{flex:1 1 20rem;min-width:0}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{background:var(--band);vertical-align:bottom;white-space:normal}
th:first-child{text-align:left}
tbody th{font-weight:400}b.far{color:var(--mark)}
td img{display:block;max-height:64px}
figure{margin:1rem 0}figure img{display:block;max-width:100%;height:auto;background:#fff;
border:1px solid var(--line);border-radius:6px;padding:.3rem}
figcaption{font-size:.9rem;color:var(--soft);max-width:48rem;margin-top:.3rem}
.swatch{display:inline-block;width:2.4rem;height:1rem;border:1px solid var(--line);
vertical-align:middle;margin-right:.4rem}
@media print{body{max-width:none;padding:0;font-size:10pt}.scroll{overflow:visible;border:0}
table{font-size:7.5pt}figure,tr{break-inside:avoid}h2{break-after:avoid}}
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def page(title: str, parts: Iterable[str]) -> str:
    """Return the whole document.

    Args:
        title: plain text.
        parts: markup, in reading order.
    """
    return PAGE.substitute(title=text(title), body="\n".join(parts))


def text(value: object) -> str:
    """Escape anything for use as text or as the value of an attribute."""
    return html.escape(str(value), quote=True)


def paragraph(words: object, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{text(kind)}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def bullets(lines: Sequence[object]) -> str:
    """Return a list of plain sentences."""
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in lines) + "</ul>"


def heading(words: str) -> str:
    """Return the heading of a section."""
    return f"<h2>{text(words)}</h2>"


def figure(uri: str, alt: str, caption: str) -> str:
    """Return a picture with its caption.

    Args:
        uri: of the picture, with its data inside.
        alt: what it shows, plain text.
        caption: how to read it, plain text.
    """
    picture = f'<img src="{text(uri)}" alt="{text(alt)}">'
    return f"<figure>{picture}<figcaption>{text(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls sideways; its first column names the rows.

    Args:
        head: plain headings.
        rows: cells as markup made by this module.
    """
    titles = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = []
    for first, *others in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    inner = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inner}</table></div>'


def swatch(colour: tuple[int, int, int]) -> str:
    """Return a small box of one colour (red, green, blue; 0..255)."""
    red, green, blue = (int(part) for part in colour)
    return f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>'


def shown(value: float, measure: Measure) -> str:
    """Return a value of a measure with its unit as plain text; a dash where there is none."""
    if not math.isfinite(value):
        return DASH
    if measure.unit == "%":
        return f"{100 * value:.{measure.decimals}f}%"
    digits = measure.decimals if measure.decimals or abs(value) >= 10 else 1
    digits = 0 if float(value).is_integer() and not measure.decimals else digits
    return f"{value:,.{digits}f}"
