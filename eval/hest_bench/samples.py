"""What is read of one sample: barcodes, counts, gene sums, and keys of its content.

HDF5 is read with h5py and nothing is unpickled. Shapes: N patches of p x p pixels, G genes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from eval.hest_bench.layout import Sample
from preprocessing.errors import DataError, did_you_mean
from preprocessing.readers.hdf5 import index_values, open_hdf5, read_matrix

MIN_DETECTED = 10  # genes; spots with fewer are alike by chance and have no key
MIN_CONTRAST = 8  # grey levels; blank patches are alike and have no key
MAX_BITS = 3  # of 64 in which two hashes of the same patch may differ
BINS = 20  # of the mean, in which dispersion is standardised
MIN_SHARE = 0.1  # of the spots of every sample in which a chosen gene is above 0
CONTROLS = ("BLANK", "Control")
_IMAGES, _BARCODES = ("img", "imgs", "images"), ("barcode", "barcodes")
_BLOCK = 64


@dataclass(frozen=True)
class GeneSums:
    """Sums over the spots of a sample, from which variable genes are chosen.

    Args:
        genes: (G,) names.
        n: spots N.
        total: (G,) sum of the values.
        squares: (G,) sum of their squares.
        detected: (G,) spots above 0.
    """

    genes: np.ndarray
    n: int
    total: np.ndarray
    squares: np.ndarray
    detected: np.ndarray


@dataclass(frozen=True)
class SampleFacts:
    """A sample without its matrices.

    Args:
        barcodes: (N,) of the patches, in their order; rows of every other array follow it.
        sums: over these spots.
        spot_keys: (N,) uint64 of each spot's counts; 0 where it has none.
        patch_keys: (N,) uint64 of each patch's middle row of pixels; 0 where it is blank.
        patch_hashes: (N,) uint64 of what each patch looks like, see `difference_hash`; 0 where it
            is blank.
        xy: (N, 2) corners of the patches, pixels of the scan; None where the file has none.
        whole: whether all values are whole numbers (the benchmark takes them as they are).
    """

    barcodes: np.ndarray
    sums: GeneSums
    spot_keys: np.ndarray
    patch_keys: np.ndarray
    patch_hashes: np.ndarray
    xy: np.ndarray | None
    whole: bool


def read_facts(sample: Sample) -> SampleFacts:
    """Read a sample once.

    Raises:
        DataError: damaged, negative or missing values, or patches without their spot.
    """
    barcodes, keys, hashes, xy = _read_patch_file(sample.patches)
    genes, values = read_expression(sample.expression, barcodes)
    sums = GeneSums(
        genes,
        values.shape[0],
        np.asarray(values.sum(axis=0), dtype=np.float64).ravel(),
        np.asarray(values.multiply(values).sum(axis=0), dtype=np.float64).ravel(),
        np.bincount(values.indices[values.data > 0], minlength=len(genes)),
    )
    whole = bool((values.data == np.rint(values.data)).all())
    return SampleFacts(barcodes, sums, spot_keys(values, genes), keys, hashes, xy, whole)


def read_targets(sample: Sample, barcodes: np.ndarray, genes: Sequence[str]) -> np.ndarray:
    """ln(1 + x) of some genes, (N, G) float64: no depth scaling, as published.

    Raises:
        DataError: a gene is not measured; the nearest name is suggested.
    """
    names, values = read_expression(sample.expression, barcodes)
    column = {name: i for i, name in enumerate(names.tolist())}
    missing = [gene for gene in genes if gene not in column]
    if missing:
        hint = did_you_mean(missing[0], column)
        raise DataError(
            f"{sample.expression}: {len(missing)} of {len(genes)} genes are not measured "
            f"({', '.join(missing[:3])}){hint}"
        )
    chosen = values.tocsc()[:, [column[gene] for gene in genes]]
    return np.log1p(chosen.toarray())


def read_expression(path: Path, barcodes: np.ndarray) -> tuple[np.ndarray, sparse.csr_matrix]:
    """Gene names (G,) and X (N, G) float64 of these spots, in this order.

    Raises:
        DataError: damaged, a spot is missing, names repeat, or values are negative or not finite.
    """
    with open_hdf5(path, "an AnnData file (.h5ad)") as file:
        if any(part not in file for part in ("X", "obs", "var")):
            raise DataError(f"{path}: no X, obs and var ({', '.join(file)})")
        spots, genes = index_values(file["obs"]), index_values(file["var"])
        matrix = read_matrix(file["X"])
    if spots is None or genes is None or matrix.shape != (len(spots), len(genes)):
        raise DataError(f"{path}: X {matrix.shape} does not fit the names in obs and var")
    if len(set(genes.tolist())) < len(genes) or len(set(spots.tolist())) < len(spots):
        raise DataError(f"{path}: a gene or a spot is named twice; the benchmark goes by names")
    row = {name: i for i, name in enumerate(spots.tolist())}
    missing = [name for name in barcodes.tolist() if name not in row]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(barcodes)} patches have no spot (first: "
            f"{missing[0]!r}); the two files belong to different samples or versions"
        )
    values = matrix[[row[name] for name in barcodes.tolist()]].astype(np.float64)
    values.eliminate_zeros()
    if not np.isfinite(values.data).all() or (values.data < 0).any():
        raise DataError(f"{path}: X holds negative or missing values; expected counts")
    return genes.astype(str), sparse.csr_matrix(values)


def spot_keys(values: sparse.csr_matrix, genes: np.ndarray) -> np.ndarray:
    """A key (N,) uint64 of each spot's counts; neither the order of genes nor zeros change it.

    The sum of the counts times a number that the gene's name gives, modulo 2^64. Spots with fewer
    than `MIN_DETECTED` genes get 0.
    """
    weight = np.array([_number(str(name).encode()) for name in genes], dtype=np.uint64)
    term = np.rint(values.data * 1024.0).astype(np.uint64) * weight[values.indices]
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(term, dtype=np.uint64)])
    key = total[values.indptr[1:]] - total[values.indptr[:-1]]
    return np.where(np.diff(values.indptr) >= MIN_DETECTED, key, np.uint64(0))


def difference_hash(images: np.ndarray) -> np.ndarray:
    """Perceptual hash (N,) uint64 of patches (N, p, p, 3): brighter than the next, on 8 x 9 means.

    The difference hash of Krawetz (2013): a patch that was compressed again, brightened or shrunk
    keeps nearly all of its 64 bits. 0 where the means differ by less than `MIN_CONTRAST`.
    """
    grey = images.mean(axis=3, dtype=np.float32)
    for axis, parts in ((1, 8), (2, 9)):
        edges = np.linspace(0, grey.shape[axis], parts + 1).astype(np.int64)
        size = np.maximum(np.diff(edges), 1).astype(np.float32)
        shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
        grey = np.add.reduceat(grey, edges[:-1], axis=axis) / size.reshape(shape)
    bits = (grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(grey), 64)
    contrast = np.ptp(grey, axis=(1, 2)) >= MIN_CONTRAST
    hashes = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return np.where(contrast, hashes, np.uint64(0))


def alike_part(own: np.ndarray, others: np.ndarray) -> float:
    """Share of hashes (N,) within `MAX_BITS` of one of others (M,); 0 is no hash."""
    signs = [2.0 * np.unpackbits(h[h > 0, None].view(np.uint8), axis=1) - 1 for h in (own, others)]
    ours, theirs = (one.astype(np.float32) for one in signs)
    if not len(ours) or not len(theirs):
        return 0.0
    best = [(ours[i : i + 256] @ theirs.T).max(axis=1) for i in range(0, len(ours), 256)]
    return float((np.concatenate(best) >= 64 - 2 * MAX_BITS).mean())  # 64 - 2 x bits that differ


def _read_patch_file(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Barcodes (N,), keys (N,), hashes (N,) and corners (N, 2) of the patches."""
    with open_hdf5(path, "patches of HEST (.h5)") as file:
        images, names = patch_images(file, path), read_barcodes(file, path)
        keys, hashes = np.zeros((2, len(names)), dtype=np.uint64)
        for start in range(0, len(names), _BLOCK):
            block = images[start : start + _BLOCK]
            hashes[start : start + _BLOCK] = difference_hash(block)
            for i, row in enumerate(block[:, images.shape[1] // 2]):
                if int(row.max()) - int(row.min()) >= MIN_CONTRAST:
                    keys[start + i] = _number(row.tobytes())
        corners = file.get("coords")
        usable = isinstance(corners, h5py.Dataset) and corners.shape == (len(names), 2)
        xy = np.asarray(corners[:], dtype=np.float64) if usable else None
    return names, keys, hashes, xy


def patch_images(file: h5py.File, path: Path) -> h5py.Dataset:
    """The dataset of the patches, uint8 (N, p, p, 3).

    Raises:
        DataError: there is none.
    """
    images = next((file[name] for name in _IMAGES if name in file), None)
    if not isinstance(images, h5py.Dataset) or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: no patches; expected img (N, p, p, 3) ({', '.join(file)})")
    if images.dtype != np.uint8 or not len(images) or images.shape[1] != images.shape[2]:
        raise DataError(f"{path}: img is {images.dtype} {images.shape}; expected uint8, square")
    return images


def read_barcodes(file: h5py.File, path: Path) -> np.ndarray:
    """Names (N,) of the spots of the patches.

    Raises:
        DataError: none, not one a patch, or a name twice.
    """
    node = next((file[name] for name in _BARCODES if name in file), None)
    if not isinstance(node, h5py.Dataset) or node.dtype.kind not in "SO":
        raise DataError(f"{path}: no dataset barcode with the names of the spots")
    items = np.ravel(node[()]).tolist()
    if not all(isinstance(item, bytes | str) for item in items):
        raise DataError(f"{path}: barcode holds something other than texts; it is not unpickled")
    texts = [item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in items]
    others = [file[name] for name in (*_IMAGES, "embeddings") if name in file]
    if any(len(other) != len(texts) for other in others) or len(set(texts)) < len(texts):
        raise DataError(f"{path}: {len(texts)} barcodes; expected one of its own for each row")
    return np.array(texts, dtype=object)


def _number(content: bytes) -> int:
    """An odd 64-bit number that stands for some bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") | 1


def choose_genes(
    chosen_on: Sequence[GeneSums], measured_in: Sequence[GeneSums], k: int
) -> tuple[str, ...]:
    """The k most variable genes, in the order of their names.

    The published lists were chosen on all samples of a task, test samples included. The rule: genes
    above 0 in a tenth of the spots of every sample, controls left out, then the highest normalised
    dispersion (Satija et al. 2015; the flavour ``seurat`` of scanpy): ln(variance / mean) of the
    values, standardised within 20 bins of ln(1 + mean).

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
