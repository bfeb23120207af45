"""The models of an evaluation: where each comes from, its parameters and the time of its fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.glossary import HIBIO
from eval.report.facts import duration
from eval.report.markup import MISSING, Html, heading_row, join, number, paragraph, table, tag, text

NOTE = (
    "Wall time: mean over fits, of training alone, on the machine that ran it; checkpoints were "
    "trained in their own run, the others in this evaluation. Read-outs are not counted."
)


def models_section(results: Mapping[str, Any]) -> Html:
    """A row for every model that was fitted; a sentence when none was recorded."""
    rows = (results.get("data") or {}).get("models") or []
    if not rows:
        return paragraph("No cost of a model was recorded with these results.", "soft")
    head = [heading_row(("model", "source", "parameters", "fits", "wall time of a fit"))]
    shown = table(head, [_cells(row) for row in rows])
    return join([shown, paragraph(NOTE, "soft")])


def _cells(row: Mapping[str, Any]) -> Html:
    seconds = row.get("seconds")
    cells = (
        tag("td", text(str(row.get("source", MISSING))), class_="words"),
        tag("td", text(number(row.get("n_parameters")))),
        tag("td", text(number(row.get("fits")))),
        tag("td", text(MISSING if seconds is None else duration(float(seconds)))),
    )
    own = "self" if row["model"] == HIBIO else None
    return tag("tr", tag("th", text(str(row["model"])), scope="row"), *cells, class_=own)
