"""The reference mode against outputs of the published code, run apart (golden values)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hibio.batch import SlideBatch
from hibio.encoders.base import OmicsContext
from hibio.encoders.heist import HeistEncoder
from tests.hibio.test_heist import CONFIG

PARTS = ("query", "key", "value", "skip")
#: What has another name here; ``hl`` is a message from the spots (high) to the genes (low).
PUBLISHED_NAMES = {
    "mlp_high.": "spot_input.",
    "mlp_low.": "gene_input.",
    "convs.": "layers.",
    "conv_high.nn.": "neighbour_sum.linear.",
    "conv_high.eps": "neighbour_sum.eps",
    "multi_head.in_proj_": "slide_attention.query_key_value.",
    "multi_head.out_proj.": "slide_attention.out.",
    "MLP_high.layers.0.": "spot_forward.layers.0.",
    "MLP_high.layers.1.": "spot_forward.layers.2.",
    "MLP_high.layers.2.": "spot_forward.layers.4.",
    "MLP_low.layers.0.": "gene_forward.layers.0.",
    "MLP_low.layers.1.": "gene_forward.layers.2.",
    "MLP_low.layers.2.": "gene_forward.layers.4.",
    "norm_high_": "spot_forward.norm_",
    "norm_low_": "gene_forward.norm_",
    "cross_hl.": "spot_gate.",
    "cross_lh.": "gene_gate.",
    ".Q.": ".query.",
    ".K.": ".key.",
    ".V.": ".value.",
    "final_norm.": "norm.",
}


def published_weights(golden: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The published parameters under the names of this encoder."""
    weights: dict[str, torch.Tensor] = {}
    for key, value in golden.items():
        kind, _, name = key.partition("/")
        if kind == "weight":
            for theirs, ours in PUBLISHED_NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = torch.from_numpy(value)
    for key in [key for key in weights if "lin_query" in key]:
        parts = [weights.pop(key.replace("query", part)) for part in PARTS]
        weights[key.replace("conv_low.lin_query", "gene_convolution.query_key_value_skip")] = (
            torch.cat(parts)
        )
    return weights


def published_batch(golden: dict[str, np.ndarray]) -> SlideBatch:
    """The published inputs; the loop of each spot is not in the lists of its neighbours."""
    source, target = golden["input/spot_edges_2E"]
    n_spots = len(golden["input/gene_SK"])
    assert (np.bincount(target[source == target], minlength=n_spots) == 1).all()
    lists = [source[(target == i) & (source != i)] for i in range(n_spots)]
    neighbour = np.full((n_spots, max(map(len, lists))), -1)
    for row, one in zip(neighbour, lists, strict=True):
        row[: len(one)] = one
    told = {
        name: torch.from_numpy(golden[f"input/{name}"])
        for name in ("gene_SK", "value_SK", "xy_um_S2", "spot_group_S")
    }
    return SlideBatch(
        **told,
        vector_SV=torch.zeros(n_spots, 3),
        vector_scale_SV=torch.ones(n_spots, 3),
        neighbour_SN=torch.from_numpy(neighbour),
        distance_um_SN=torch.ones(neighbour.shape),
        slide_of_spot_S=torch.zeros(n_spots, dtype=torch.long),
        core_S=torch.ones(n_spots, dtype=torch.bool),
        region_of_spot_LS=torch.zeros(1, n_spots, dtype=torch.long),
        slide_ids=("published",),
    )


@pytest.mark.parametrize("code", ["fixed", "released"])
@torch.no_grad()
def test_the_published_encoder_gives_the_same(oracle, code):
    """Outputs of the published code, run apart, float64 (README beside the file)."""
    golden = oracle("heist_v2.npz")
    n_genes, n_keywords, _, width, heads, layers = golden["size/G_K_S_D_heads_layers"].tolist()
    edge, weight = (golden[f"input/gene_graph_{name}_CGE"] for name in ("edge", "weight"))
    told = OmicsContext(n_genes, n_keywords, np.zeros((n_genes, 3), np.float32), edge, weight)
    config = dataclasses.replace(CONFIG, width=width, layers=layers, heads=heads, rank_code=code)
    encoder = HeistEncoder(config, told).double().eval()
    missing, unknown = encoder.load_state_dict(published_weights(golden), strict=False)
    assert (set(missing), unknown) == ({"masked_gene_D", "masked_spot_D"}, [])
    spot, gene = encoder.encode(published_batch(golden))
    expected = f"output/rank_fixed_{code == 'fixed'}"
    np.testing.assert_allclose(spot[:, :width], golden[f"{expected}/spot_SD"], atol=1e-5)
    np.testing.assert_allclose(gene[..., :width], golden[f"{expected}/gene_SKD"], atol=1e-5)
