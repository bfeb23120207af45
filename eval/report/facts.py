"""What this run is: command, digest, seeds, folds, hardware, versions, wall time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from eval.report.numbers import MISSING, exact, is_number, number
from hibio.keys import MAIN
from preprocessing.pages import Box, Cell, Line, Part, Table, Text, Verbatim

# Label and the names under which a run may have kept it; the shallowest match is shown.
FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Command", ("command", "argv")),
    ("Checkpoint", ("checkpoint", "checkpoint_dir", "checkpoints")),
    ("Config digest", ("config_digest", "config_sha256", "config_hash", "digest")),
    ("Seeds", ("seeds", "seed")),
    ("Folds", ("folds", "n_folds", "splits", "split")),
    ("Patients", ("n_patients", "patients")),
    ("Slides", ("n_slides", "slides")),
    ("Spots", ("n_spots", "spots")),
    ("Genes", ("n_genes",)),
    ("Parameters", ("n_parameters", "parameters")),
    ("Hardware", ("hardware", "machine")),
    ("Versions", ("versions", "packages")),
    ("Wall time", ("wall_time_s", "wall_s", "wall_seconds", "wall_time")),
    ("Finished", ("finished", "date", "created", "timestamp")),
)
MAX_LISTED = 24
MAX_DEPTH = 2


def run_section(results: Mapping[str, Any]) -> list[Part]:
    """Facts table, and everything that was recorded about the data."""
    rows = []
    for label, names in FACTS:
        value = _find(results, names)
        shown = _describe(label, value)
        if label == "Config digest" and value is None:
            shown = f"{config_digest(results.get('config'))} (sha256 of the config below)"
        rows.append(Line((label, shown)))
    everything = Box("Everything recorded about the data", [_dump(results.get("data"))])
    return [Table((), rows, kind="facts"), everything]


def config_section(results: Mapping[str, Any]) -> list[Part]:
    """The resolved config in a closed box."""
    config = results.get("config")
    if not config:
        return [Text("No config was recorded with these results.", "soft")]
    return [Box("Resolved config", [_dump(config)])]


def config_digest(config: object) -> str:
    """First 12 hex digits of the sha256 of the config as canonical JSON."""
    canonical = json.dumps(config, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:12]


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, for reading."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _dump(value: object) -> Verbatim:
    return Verbatim(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def _find(results: Mapping[str, Any], names: tuple[str, ...]) -> object:
    """First hit in data, then config, then beside them; each from the outside inwards."""
    beside = {
        key: value for key, value in results.items() if key not in ("tasks", "config", "data")
    }
    for root in (results.get("data"), beside, results.get("config")):
        level = [root]
        for _ in range(MAX_DEPTH):
            tables = [item for item in level if isinstance(item, Mapping)]
            for name in names:
                for item in tables:
                    if item.get(name) is not None:
                        return item[name]
            level = [value for item in tables for value in item.values()]
    return None


def _describe(label: str, value: object) -> str:
    if value is None:
        return "not recorded"
    if label == "Wall time" and is_number(value):
        return duration(float(value))  # type: ignore[arg-type]
    if label == "Command" and isinstance(value, list | tuple):
        return " ".join(str(part) for part in value)
    return _short(value)


def _short(value: object) -> str:
    """A value in one line; long lists are cut and say how many they had."""
    if isinstance(value, Mapping):
        pairs = [f"{key} {_short(item)}" for key, item in value.items()]
        return _listed(pairs) or MISSING
    if isinstance(value, list | tuple):
        return _listed([_short(item) for item in value]) or MISSING
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else exact(value)
    return MISSING if value is None else str(value)


def _listed(parts: list[str]) -> str:
    if len(parts) <= MAX_LISTED:
        return ", ".join(parts)
    return ", ".join(parts[:MAX_LISTED]) + f", ... ({len(parts)} in all)"


NOTE = (
    "Wall time: mean over fits, of training alone, on the machine that ran it; checkpoints were "
    "trained in their own run, the others in this evaluation. Read-outs are not counted."
)


def models_section(results: Mapping[str, Any]) -> list[Part]:
    """A row for every model that was fitted; a sentence when none was recorded."""
    rows = (results.get("data") or {}).get("models") or []
    if not rows:
        return [Text("No cost of a model was recorded with these results.", "soft")]
    head = ("model", "source", "parameters", "fits", "wall time of a fit")
    return [Table(head, [_row(row) for row in rows]), Text(NOTE, "soft")]


def _row(row: Mapping[str, Any]) -> Line:
    seconds = row.get("seconds")
    cells = (
        str(row["model"]),
        Cell(str(row.get("source", MISSING)), "words"),
        number(row.get("n_parameters")),
        number(row.get("fits")),
        MISSING if seconds is None else duration(float(seconds)),
    )
    return Line(cells, "self" if row["model"] == MAIN else "")
