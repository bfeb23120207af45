"""Variable genes by the rule of HEST-Bench, chosen on whatever samples are given.

The published lists were chosen on all samples of a task, test samples included. The rule: genes
above 0 in a tenth of the spots of every sample, controls left out, then the highest normalised
dispersion (Satija et al. 2015; the flavour ``seurat`` of scanpy): ln(variance / mean) of the
values, standardised within 20 bins of ln(1 + mean). Shapes: G genes.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from eval.hest_bench.samples import GeneSums
from preprocessing.errors import DataError

BINS = 20
MIN_SHARE = 0.1
CONTROLS = ("BLANK", "Control")


def choose_genes(
    chosen_on: Sequence[GeneSums], measured_in: Sequence[GeneSums], k: int
) -> tuple[str, ...]:
    """The k most variable genes, in the order of their names.

    Args:
        chosen_on: samples whose values decide (training samples).
        measured_in: samples that must have the gene on their panel; their values are not looked at.
        k: genes; all that pass where there are fewer.

    Raises:
        DataError: no gene passes.
    """
    common = set(chosen_on[0].genes.tolist()) if chosen_on else set()
    for sums in chosen_on:
        enough = sums.detected >= np.ceil(MIN_SHARE * sums.n)
        common &= set(sums.genes[enough].tolist())
    for sums in measured_in:
        common &= set(sums.genes.tolist())
    names = sorted(g for g in common if not any(word in g for word in CONTROLS))
    if not names:
        raise DataError(
            f"no gene is above 0 in {100 * MIN_SHARE:g} % of the spots of each of "
            f"{len(chosen_on)} samples; they share no panel"
        )
    n, total, squares = 0, np.zeros(len(names)), np.zeros(len(names))
    for sums in chosen_on:
        place = {gene: i for i, gene in enumerate(sums.genes.tolist())}
        column = [place[name] for name in names]
        n += sums.n
        total, squares = total + sums.total[column], squares + sums.squares[column]
    score = normalised_dispersion(n, total, squares)
    best = np.sort(np.argsort(-score, kind="stable")[:k])
    return tuple(names[i] for i in best)


def normalised_dispersion(n: int, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Dispersion (G,) standardised within bins of the mean; -inf where a gene does not vary.

    Args:
        n: spots.
        total: (G,) sum of the values over the spots.
        squares: (G,) sum of their squares.
    """
    mean = np.maximum(total / n, 1e-12)
    variance = (squares - n * (total / n) ** 2) / max(n - 1, 1)
    ratio = variance / mean
    varies = variance > 1e-12 * np.maximum(squares / n, 1e-300)
    dispersion = np.log(ratio, out=np.full(len(ratio), np.nan), where=varies)
    table = pd.DataFrame({"bin": pd.cut(np.log1p(mean), BINS, labels=False), "d": dispersion})
    groups = table.groupby("bin")["d"]
    centre, spread = groups.transform("mean"), groups.transform("std")
    alone = spread.isna()  # one gene in its bin: it scores 1
    spread, centre = spread.where(~alone, centre), centre.where(~alone, 0.0)
    score = ((table["d"] - centre) / spread).to_numpy(dtype=np.float64)
    return np.where(np.isfinite(score), score, -np.inf)
