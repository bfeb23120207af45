"""The matched-random control of docs/method.md 2: real sets must beat it."""

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from pathways.database import PathwayDatabase, gene_index
from pathways.errors import PathwayError

Integers = npt.NDArray[np.int64]


def matched_random(
    database: PathwayDatabase,
    genes: Sequence[str],
    mean_expression: npt.ArrayLike,
    seed: int,
    n_bins: int = 20,
) -> PathwayDatabase:
    """Random sets of the same size, with genes from the same bins of mean expression.

    Every gene of a set is replaced by a gene that is not in that set, drawn without repeats from
    its bin of the panel; when a bin runs out the nearest gene in mean expression that is still free
    is taken, and only when the whole panel runs out a gene of the set itself. Names and weights
    stay, so the result stands in the place of the original everywhere. A set's draw depends on the
    seed and its name, not on the other sets.

    Args:
        database: Restricted to the panel.
        genes: Panel (G,).
        mean_expression: Mean expression of the panel's genes on training spots (G,).
        seed: Random seed >= 0.
        n_bins: Bins of equal gene number along mean expression; 20 is typical.

    Returns:
        Database "matched_random:NAME" with the same names, sizes and weights.

    Raises:
        PathwayError: A set gene is not in the panel, or mean_expression has another length.
    """
    index = gene_index(genes)
    expression = np.asarray(mean_expression, dtype=np.float64)
    if expression.shape != (len(index),) or not np.isfinite(expression).all():
        raise PathwayError(
            f"mean_expression of shape {expression.shape}; expected {len(index)} finite numbers, "
            "one a gene of the panel."
        )
    rows = index.get_indexer(pd.Index(database.table["target"]))
    if (rows < 0).any():
        raise PathwayError(
            f"{int((rows < 0).sum())} rows of {database.name} name genes outside the panel. Call "
            "database.restrict(genes) first."
        )
    rank = np.empty(len(index), dtype=np.int64)
    rank[np.argsort(expression, kind="stable")] = np.arange(len(index))
    bin_of_gene = rank * min(n_bins, len(index)) // len(index)
    drawn = rows.astype(np.int64)
    bins = [np.flatnonzero(bin_of_gene == b) for b in range(bin_of_gene.max() + 1)]
    for name, members in database.table.groupby("source", sort=False).indices.items():
        rng = np.random.default_rng([seed, zlib.crc32(str(name).encode("utf-8"))])
        drawn[members] = _draw(drawn[members], rank, bin_of_gene, bins, rng)
    table = database.table.assign(target=index.to_numpy()[drawn])
    return PathwayDatabase(
        name=f"matched_random:{database.name}",
        table=table,
        organism=database.organism,
        id_type=database.id_type,
        licence=database.licence,
        version=f"{database.version} seed {seed}".strip(),
        descriptions=dict.fromkeys(database.names, "matched random genes"),
    )


def _draw(
    members: Integers,
    rank: Integers,
    bin_of_gene: Integers,
    bins: list[npt.NDArray[np.intp]],
    rng: np.random.Generator,
) -> Integers:
    """Replacement (n,) of a set's genes (n,), both as panel rows."""
    free = np.ones(len(rank), dtype=bool)
    free[members] = False
    drawn = np.full(len(members), -1, dtype=np.int64)
    for level in np.unique(bin_of_gene[members]):
        places = rng.permutation(np.flatnonzero(bin_of_gene[members] == level))
        pool = rng.permutation(bins[level][free[bins[level]]])[: len(places)]
        drawn[places[: len(pool)]] = pool
        free[pool] = False
    for place in np.flatnonzero(drawn < 0):
        if not free.any():
            free[np.setdiff1d(members, drawn)] = True
        candidates = np.flatnonzero(free)
        drawn[place] = candidates[np.argmin(np.abs(rank[candidates] - rank[members[place]]))]
        free[drawn[place]] = False
    return drawn
