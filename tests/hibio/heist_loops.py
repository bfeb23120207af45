"""The published HEIST arithmetic in loops, written from the report, as the oracle of the encoder.

Nothing here knows of batches, masks of attention or padding: it follows edges and sums, one spot
and one gene at a time, in float64.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from hibio.batch import SlideBatch
from hibio.encoders.base import OmicsContext
from hibio.encoders.genes import OmicsMask
from hibio.encoders.heist import HeistEncoder


def array(tensor: Tensor) -> np.ndarray:
    """A tensor in float64."""
    return tensor.detach().double().numpy()


def affine(layer, x):
    bias = 0.0 if layer.bias is None else array(layer.bias)
    return array(layer.weight) @ x + bias


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def gelu(x):
    return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])


def layer_norm(norm, x):
    scaled = (x - x.mean()) / math.sqrt(x.var() + norm.eps)
    return scaled * array(norm.weight) + array(norm.bias)


def attend(query, keys, values, heads):
    """Heads side by side, each a softmax over the scaled products with its keys."""
    size = len(query) // heads
    out = []
    for h in range(heads):
        cut = slice(h * size, (h + 1) * size)
        weights = softmax([query[cut] @ key[cut] / math.sqrt(size) for key in keys])
        out.append(sum(w * value[cut] for w, value in zip(weights, values, strict=True)))
    return np.concatenate(out)


def slow_neighbour_sum(part, spots, neighbours):
    out = []
    for i, own in enumerate(spots):
        total = (1 + part.eps.item()) * own + own  # the published edges hold a loop
        for j in neighbours[i]:
            total = total + spots[j]
        out.append(affine(part.linear, total))
    return out


def slow_slide_attention(part, spots, slide):
    packed = [np.split(affine(part.query_key_value, x), 3) for x in spots]
    out = []
    for i in range(len(spots)):
        seen = [j for j in range(len(spots)) if slide[j] == slide[i]]
        mixed = attend(
            packed[i][0], [packed[j][1] for j in seen], [packed[j][2] for j in seen], part.heads
        )
        out.append(affine(part.out, mixed))
    return out


def slow_gene_convolution(part, genes, edges):
    """``edges[i]``: the partners of gene i."""
    packed = [np.split(affine(part.query_key_value_skip, x), 4) for x in genes]
    out = []
    for i in range(len(genes)):
        query, _, _, skip = packed[i]
        keys, values = ([packed[j][n] for j in edges[i]] for n in (1, 2))
        out.append(skip + (attend(query, keys, values, part.heads) if edges[i] else 0.0))
    return out


def slow_perceptron(part, x):
    normed = layer_norm(part.norm_pre, x)
    first, second, third = part.layers[0], part.layers[2], part.layers[4]
    hidden = np.maximum(affine(first, normed), 0)
    hidden = np.maximum(affine(second, hidden), 0)
    return layer_norm(part.norm_post, x + affine(third, hidden))


def slow_gate(part, target, source):
    scalar = affine(part.query, target) @ affine(part.key, source) / math.sqrt(len(target))
    return scalar * affine(part.value, target)


def slow_layer(layer, spots, genes, batch_lists):
    neighbours, slide, edges = batch_lists
    summed = slow_neighbour_sum(layer.neighbour_sum, spots, neighbours)
    attended = slow_slide_attention(layer.slide_attention, spots, slide)
    new_spots, new_genes = [], []
    for i in range(len(spots)):
        spot = slow_perceptron(layer.spot_forward, summed[i] + attended[i])
        own = slow_gene_convolution(layer.gene_convolution, genes[i], edges[i])
        own = [slow_perceptron(layer.gene_forward, x) for x in own]
        mean = sum(own) / len(own) if own else np.zeros_like(spot)
        new_spots.append(gelu(slow_gate(layer.spot_gate, spot, mean)))
        new_genes.append([gelu(slow_gate(layer.gene_gate, x, spot)) for x in own])
    return new_spots, new_genes


def slow_edges(told: OmicsContext, genes, group):
    """Partners of every gene of a spot, listed by either end."""
    edges = [set() for _ in genes]
    for i, one in enumerate(genes):
        for other, weight in zip(
            told.edge_TGE[group][one], told.weight_TGE[group][one], strict=True
        ):
            if weight > 0 and other in genes:
                edges[i].add(genes.index(other))
                edges[genes.index(other)].add(i)
    return [sorted(e) for e in edges]


def slow_inputs(encoder: HeistEncoder, batch: SlideBatch, mask: OmicsMask | None):
    """Input tokens of spots and genes."""
    width, padding = encoder.config.width, encoder.n_genes
    axis = width // 2
    xy, slide = array(batch.xy_um_S2), batch.slide_of_spot_S.numpy()
    spots, genes = [], []
    for i in range(batch.n_spots):
        own = xy[slide == slide[i]]
        place = (xy[i] - own.mean(axis=0)) / own.std(axis=0)
        x = []
        for value in place:
            for n in range(axis // 2):
                angle = value / 10000 ** (4 * n / axis)
                x += [value + math.sin(angle), value + math.cos(angle)]
        token = gelu(affine(encoder.spot_input[0], np.array(x)))
        spots.append(array(encoder.masked_spot_D) if mask and mask.spot_S[i] else token)
        here = [k for k in range(batch.gene_SK.shape[1]) if batch.gene_SK[i, k] < padding]
        shown = [k for k in here if not (mask and mask.gene_SK[i, k])]
        mean = np.mean([batch.value_SK[i, k].item() for k in shown]) if shown else 1.0
        genes.append([])
        for k in here:
            if k not in shown:
                genes[-1].append(array(encoder.masked_gene_D))
                continue
            rank, x = shown.index(k), []
            for n in range(0, width, 2):
                angle = rank * 10000 ** (-n / width)
                if encoder.config.rank_code == "released":
                    angle = rank / max(len(shown) - 1, 1) * 10000 * 2 * n / (width // 2)
                x += [math.sin(angle), math.cos(angle)]
            x = np.array(x) + batch.value_SK[i, k].item() / mean
            genes[-1].append(gelu(affine(encoder.gene_input[0], x)))
    return spots, genes


def slow_encode(
    encoder: HeistEncoder, batch: SlideBatch, told: OmicsContext, mask: OmicsMask | None = None
):
    """Spot embeddings, and the last tokens of spots and genes, of a small batch."""
    neighbours = [[j for j in row if j >= 0] for row in batch.neighbour_SN.tolist()]
    padding = encoder.n_genes
    names = [[g for g in row if g < padding] for row in batch.gene_SK.tolist()]
    edges = [
        slow_edges(told, *pair) for pair in zip(names, batch.spot_group_S.tolist(), strict=True)
    ]
    spots, genes = slow_inputs(encoder, batch, mask)
    for depth, layer in enumerate(encoder.layers):
        lists = (neighbours, batch.slide_of_spot_S.tolist(), edges)
        new_spots, new_genes = slow_layer(layer, spots, genes, lists)
        if depth > 0:
            new_spots = [a + b for a, b in zip(spots, new_spots, strict=True)]
            new_genes = [
                [a + b for a, b in zip(x, y, strict=True)]
                for x, y in zip(genes, new_genes, strict=True)
            ]
        spots, genes = new_spots, new_genes
    spots = [layer_norm(encoder.norm, x) for x in spots]
    genes = [[layer_norm(encoder.norm, x) for x in row] for row in genes]
    mean = [sum(row) / len(row) if row else np.zeros(encoder.config.width) for row in genes]
    return np.array([np.concatenate(pair) for pair in zip(spots, mean, strict=True)]), spots, genes
