"""What an evaluation was measured on, so that only like is compared with like.

``{"slides": {id: sha256}, "folds": {name: {"train": [ids], "genes": sha256}}}`` stands in the data
of results.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.compare.paired import Results, listed
from eval.errors import FoldError
from eval.folds.assemble import JobGroup
from hibio.data.splits import SlideEntry
from preprocessing.store import SlideStore


def fingerprint(groups: Sequence[JobGroup], entries: Iterable[SlideEntry]) -> dict[str, Any]:
    """The fingerprint of an evaluation: every slide that was given, and every fold."""
    slides = {entry.slide_id: _content(entry) for entry in entries}
    folds = {
        group.fold: fold_print(
            group.main.model.artifacts.train_slides, group.main.model.artifacts.genes
        )
        for group in groups
    }
    return {"slides": slides, "folds": folds}


def fold_print(train: Iterable[str], genes: Iterable[str]) -> dict[str, Any]:
    """Training slides of a fold, and a hash of its genes, whatever their order."""
    text = "\n".join(sorted(str(gene) for gene in genes))
    return {"train": sorted(train), "genes": hashlib.sha256(text.encode()).hexdigest()}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty when nothing does."""
    told = [*_sets("slides", first["slides"], second["slides"])]
    shared = set(first["slides"]) & set(second["slides"])
    other = sorted(s for s in shared if first["slides"][s] != second["slides"][s])
    if other:
        told.append(f"the content of {len(other)} slides ({listed(other)})")
    told += _sets("folds", first["folds"], second["folds"])
    for what, name in (("train", "training slides"), ("genes", "genes")):
        odd = [
            fold
            for fold in sorted(set(first["folds"]) & set(second["folds"]))
            if first["folds"][fold][what] != second["folds"][fold][what]
        ]
        if odd:
            told.append(f"the {name} of {len(odd)} folds ({listed(odd)})")
    return told


def check_same_data(first: Results, second: Results) -> None:
    """Refuse to compare what was measured on different slides, folds or genes, or otherwise.

    Raises:
        FoldError: they differ, or a file does not say.
    """
    prints = []
    for results in (first, second):
        found = (results.body.get("data") or {}).get("fingerprint")
        if not isinstance(found, Mapping) or not {"slides", "folds"} <= set(found):
            raise FoldError(
                f"{results.label}: the results do not say which slides, folds and genes they were "
                "measured on (an older version wrote them); run `hibio eval` again"
            )
        prints.append(found)
    told = differences(*prints)
    settings = [(results.body.get("data") or {}).get("settings", {}) for results in (first, second)]
    if settings[0] != settings[1]:
        told.append(f"settings of tasks (--set): {settings[0]} and {settings[1]}")
    if told:
        raise FoldError(
            f"{first.label} (first) and {second.label} (second) were measured on different data: "
            f"{'; '.join(told)}; compare only runs of the same slides, folds and genes"
        )


def _sets(what: str, first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Names that only one side has."""
    mine, other = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    sides = [
        f"{len(names)} only in the {where} ({listed(names)})"
        for names, where in ((mine, "first"), (other, "second"))
        if names
    ]
    return [f"{what}: {'; '.join(sides)}"] if sides else []


def _content(entry: SlideEntry) -> str:
    """The seal of a store's content; of an older store without one, the hash of the file."""
    with SlideStore(entry.path) as store:
        return str(store.attrs.get("content_sha256") or store.sha256)
