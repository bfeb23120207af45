"""Our databases are decoupler's networks as they are: its scores beside ours, where it is there."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from pathways import load_pathways, set_matrix
from pathways.anchors import cosine


def test_ulm_and_aucell_take_our_table_and_agree_with_our_match() -> None:
    dc = pytest.importorskip("decoupler", reason="pip install decoupler")
    database = load_pathways("default")
    names = list(database.names)[:6]
    genes = sorted({gene for name in names for gene in database.genes_of(name)})
    genes += [f"OTHER{i}" for i in range(200)]
    rng = np.random.default_rng(0)
    active = rng.integers(0, 6, size=90)
    value = rng.gamma(1.0, size=(90, len(genes))).astype(np.float32)
    for spot, own in enumerate(active):
        members = [genes.index(gene) for gene in database.genes_of(names[own])]
        value[spot, members] += 2.0
    value /= np.linalg.norm(value, axis=1, keepdims=True)
    few, _ = database.restrict(genes)
    kept = list(few.names)
    ours = cosine(csr_matrix(value), set_matrix(few, genes, np.ones(len(genes))))
    ours = pd.DataFrame(ours, columns=kept)[names]
    adata = anndata.AnnData(value, var=pd.DataFrame(index=genes))
    for method in ("ulm", "aucell"):
        getattr(dc.mt, method)(adata, net=database.table, tmin=3)
        theirs = adata.obsm[f"score_{method}"][names]
        assert (theirs.to_numpy().argmax(axis=1) == active).mean() > 0.9
        for name in names:
            assert np.corrcoef(theirs[name], ours[name])[0, 1] > 0.7
