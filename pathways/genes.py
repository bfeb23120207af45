"""Gene identifiers: which kind they are. Nothing is converted or guessed silently."""

import re
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

AGREEMENT = 0.8
ENSEMBL = re.compile(r"ENS[A-Z]{0,6}G\d{11}(\.\d+)?(_PAR_Y)?")
ENSEMBL_VERSION = re.compile(r"(ENS[A-Z]{0,6}[GTP]\d{11})\.\d+(_PAR_Y)?")
ENTREZ = re.compile(r"\d+")
HUMAN_SYMBOL = re.compile(r"(?=.*[A-Z])(?:[A-Z0-9]|C(?:\d+|X|Y)orf)[A-Z0-9._@-]*")
MOUSE_SYMBOL = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9][A-Za-z0-9._@()-]*")

KIND_LABELS = {
    "symbol": "human gene symbols",
    "mouse_symbol": "mouse gene symbols",
    "ensembl": "Ensembl gene ids",
    "entrez": "Entrez gene ids",
    "unknown": "identifiers of an unknown kind",
}


def detect_id_type(names: Iterable[str]) -> str:
    """Say which kind of gene identifier these are.

    A kind is named only if at least 80 % of the names have its form; mixtures are "unknown".

    Args:
        names: Identifiers, for example the gene names of a panel.

    Returns:
        "symbol" (human, upper case), "mouse_symbol" (Actb, 0610009B22Rik), "ensembl", "entrez" or
        "unknown".
    """
    names = [str(name) for name in names]
    if not names:
        return "unknown"
    kinds = [_kind_of(name) for name in names]
    for kind in ("ensembl", "entrez", "symbol", "mouse_symbol"):
        if kinds.count(kind) >= AGREEMENT * len(names):
            return kind
    return "unknown"


def _kind_of(name: str) -> str:
    """Kind of one identifier."""
    tests: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("ensembl", ENSEMBL.fullmatch),
        ("entrez", ENTREZ.fullmatch),
        ("symbol", HUMAN_SYMBOL.fullmatch),
        ("mouse_symbol", MOUSE_SYMBOL.fullmatch),
    )
    return next((kind for kind, matches in tests if matches(name)), "unknown")


def strip_versions(names: Iterable[str]) -> npt.NDArray[np.str_]:
    """Remove the version suffix of Ensembl identifiers; leave everything else as it is.

    ``ENSG00000141510.16`` becomes ``ENSG00000141510``; a symbol such as ``AC012345.1``, where the
    dot belongs to the name, stays. The ``_PAR_Y`` mark of GENCODE is kept, so that the two copies
    stay apart.

    Args:
        names: Identifiers (G,).

    Returns:
        Identifiers (G,) in the same order. Two versions of one gene become equal: check uniqueness
        where it matters.
    """
    stripped = []
    for name in names:
        match = ENSEMBL_VERSION.fullmatch(str(name))
        stripped.append(match[1] + (match[2] or "") if match else str(name))
    return np.array(stripped, dtype=np.str_)
