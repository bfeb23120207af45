"""Kinds of features in a 10x or AnnData table: which belong to a modality."""

from collections import Counter

import numpy as np

from preprocessing.errors import DataError
from preprocessing.modality import PROTEIN

_GENES = ("Gene Expression",)
_PROTEINS = ("Antibody Capture", "Protein Expression")


def feature_kinds(modality: str) -> tuple[str, ...]:
    """Names that 10x gives to the features of a modality."""
    return _PROTEINS if modality == PROTEIN else _GENES


def wanted_features(kinds: np.ndarray, modality: str, where: str) -> tuple[np.ndarray, list[str]]:
    """Choose the features of a modality; controls and others are left out and counted.

    Args:
        kinds: (F,) kind of each feature.
        modality: "rna" or "protein".
        where: the file, for the message.

    Returns:
        (G,) int64 positions of those that stay, and notes.

    Raises:
        DataError: none is of the kind; lists the kinds found.
    """
    wanted = feature_kinds(modality)
    kept = np.flatnonzero([kind in wanted for kind in kinds])
    found = Counter(map(str, kinds))
    if len(kept) == 0:
        raise DataError(
            f"{where}: no feature of type {' or '.join(map(repr, wanted))}; found "
            f"{', '.join(f'{n} {k}' for k, n in found.most_common(4)) or 'none'}"
        )
    others = [f"{n} {k}" for k, n in found.items() if k not in wanted]
    if not others:
        return kept, []
    note = f"{len(kinds) - len(kept)} features that are not {' or '.join(wanted)} left out"
    return kept, [f"{note} ({', '.join(others)})"]
