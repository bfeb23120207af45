"""Search in a cohort: `python benchmarks/search.py --rows 1000000 --engine lists`.

Rows of width 64 around 200 planted groups, made anew from their seed, never all in memory. Printed:
seconds of processor time to build, peak memory, milliseconds of one core a question, R@10 against
the exact answer. Engines: lists (an inverted file of float16, as `hibio index`), graph (usearch,
HNSW of float16), exact (all rows, float16).
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

WIDTH, PART, ASKED = 64, 100_000, 200
Find = Callable[[np.ndarray], np.ndarray]


def block(seed: int, n: int) -> np.ndarray:
    """Unit rows (n, WIDTH)."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(0)
    centres, base = fixed.standard_normal((200, 8)), fixed.standard_normal((8, WIDTH))
    x = (centres[rng.integers(0, 200, n)] + 0.7 * rng.standard_normal((n, 8))) @ base
    x += 0.5 * rng.standard_normal((n, WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def blocks(n: int) -> Iterator[tuple[int, np.ndarray]]:
    """All rows, and the number of the first of each block."""
    for start in range(0, n, PART):
        yield start, block(start + 1, min(PART, n - start))


def lists(n: int, folder: Path, probed: int) -> Find:
    """An inverted file in parts, on disk."""
    import faiss
    from faiss.contrib.ondisk import merge_ondisk

    faiss.omp_set_num_threads(1)
    count = round(math.sqrt(n))
    half, inner = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    coarse = faiss.IndexFlatIP(WIDTH)
    empty = faiss.IndexIVFScalarQuantizer(coarse, WIDTH, count, half, inner)
    empty.train(block(1, min(n, 64 * count)))
    parts = []
    for start, rows in blocks(n):
        index = faiss.clone_index(empty)
        index.add_with_ids(rows, np.arange(start, start + len(rows)))
        parts.append(str(folder / f"{start}.part"))
        faiss.write_index(index, parts[-1])
    merge_ondisk(empty, parts, str(folder / "all.lists"))
    faiss.write_index(empty, str(folder / "all.faiss"))
    found = faiss.read_index(str(folder / "all.faiss"), faiss.IO_FLAG_READ_ONLY)
    found.nprobe = probed
    return lambda question: found.search(question, 10)[1]


def graph(n: int, folder: Path, probed: int) -> Find:
    """HNSW."""
    from usearch.index import Index

    made = Index(ndim=WIDTH, metric="ip", dtype="f16", expansion_search=probed)
    for start, rows in blocks(n):
        made.add(np.arange(start, start + len(rows)), rows, threads=1)
    made.save(str(folder / "all.usearch"))
    found = Index.restore(str(folder / "all.usearch"), view=True)
    return lambda question: np.atleast_2d(found.search(question, 10, threads=1).keys)


def exact(n: int, folder: Path, probed: int) -> Find:
    """Every row."""
    del folder, probed

    def find(question: np.ndarray) -> np.ndarray:
        score = np.full((len(question), 10), -np.inf)
        number = np.full((len(question), 10), -1)
        for start, rows in blocks(n):
            score = np.hstack([score, question @ rows.T])
            new = np.broadcast_to(np.arange(start, start + len(rows)), (len(question), len(rows)))
            number = np.hstack([number, new])
            order = np.argpartition(-score, 9, axis=1)[:, :10]
            score, number = (np.take_along_axis(one, order, 1) for one in (score, number))
        return number

    return find


def main() -> None:
    """Print a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=("lists", "graph", "exact"), default="lists")
    parser.add_argument("--probed", type=int, default=32, help="lists read, or width of the search")
    options = parser.parse_args()
    engine = {"lists": lists, "graph": graph, "exact": exact}[options.engine]
    question = block(10**9, ASKED)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        find = engine(options.rows, Path(folder), options.probed)
        built = time.process_time() - begin
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        find(question[:3])
        begin = time.process_time()
        got = np.concatenate([find(one[None]) for one in question])
        each = (time.process_time() - begin) / ASKED
        true = exact(options.rows, Path(), 0)(question)
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(got, true, strict=True)])
        size = sum(path.stat().st_size for path in Path(folder).glob("all.*")) / 2**30
    print(
        f"{options.engine} {options.rows:,} rows, {options.probed} probed: built in {built:.0f} s, "
        f"{memory:.2f} GiB of memory, {size:.2f} GiB of disk, {1e3 * each:.2f} ms a question, "
        f"R@10 {recall:.4f}"
    )


if __name__ == "__main__":
    main()
