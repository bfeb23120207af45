"""Damaged inputs of every kind: `python benchmarks/fuzz_readers.py [--cases 500 --seed 0 --runs]`.

Tries `hibio check` and `hibio prepare` on generated inputs (tests/preprocessing/fuzz_cases.py),
each in a process with 4 GiB of memory and 60 s; with --runs `check`, `embed` and `query` on
damaged stores, checkpoints and banks (tests/hibio/fuzz_runs.py). Prints what became of them. Exits
1 when a case gave an error that is not for users, hung, wrote numbers that are none, or left half a
file. A crash of a library in `prepare` is contained: the process of that slide dies, the slide is
reported, and it is counted apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Told = tuple[str, str, str]  # input, what became of it, a line on the case


def inputs(options: argparse.Namespace, folder: Path) -> Iterator[Told]:
    """Sources of slides."""
    from tests.preprocessing.fuzz_cases import draw_cases, outcome, run_cases

    cases = draw_cases(options.cases, options.seed)
    for case, result in run_cases(cases, folder, options.workers):
        word = outcome(result)
        what = f"{case.number} {case.base} | {case.damage} | {case.seed}"
        yield case.base, word, f"{what} | {word} | {result.seconds:.1f} s | {result.reason}"


def runs(options: argparse.Namespace, folder: Path) -> Iterator[Told]:
    """Stores, checkpoints and banks."""
    from pathways import load_pathways
    from preprocessing.patches import PatchConfig
    from preprocessing.run import prepare
    from preprocessing.simulate import SimulateConfig, simulate_cohort
    from tests.hibio.fuzz_runs import make_lab, run_case

    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    size = SimulateConfig(n_slides=3, n_patients=3, n_spots=70, n_genes=400, mpp=4.0)
    manifest = simulate_cohort(folder / "cohort", programmes, size)
    prepare(manifest, folder / "stores", patch=PatchConfig(112.0, 32))
    lab = make_lab(folder / "stores", folder / "run")
    for number in range(options.first, options.first + options.cases):
        base, one = run_case(number, options.seed, lab, folder / "case")
        yield base, one.word, f"{number} {base} | {one.damage} | {one.word} | {one.said}"


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="of --runs: number of the first case")
    parser.add_argument("--workers", type=int, default=1, help="of inputs")
    parser.add_argument("--runs", action="store_true", help="stores, checkpoints and banks")
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    if options.runs:
        from tests.hibio.fuzz_runs import BAD

        good = ("worked", "refused")
    else:
        from tests.preprocessing.fuzz_cases import BAD

        good = ("prepared", "refused")
    words = (*good, *(() if options.runs else ("crash, contained",)), *BAD)
    begin, table, odd = time.monotonic(), defaultdict[str, Counter[str]](Counter), []
    with tempfile.TemporaryDirectory(prefix="hibio_fuzz_") as folder:
        for base, word, line in (runs if options.runs else inputs)(options, Path(folder)):
            table[base][word] += 1
            if word not in good:
                odd.append(line)
            if options.show:
                print(line, flush=True)
    print("| input | cases | " + " | ".join(words) + " |\n|" + "---|" * (len(words) + 2))
    table["all"] = sum(table.values(), Counter())
    for base, count in table.items():
        cells = " | ".join(str(count[word]) for word in words)
        print(f"| {base} | {count.total()} | {cells} |")
    print("\n".join(["", *odd]))
    seconds = time.monotonic() - begin
    print(f"\n{table['all'].total()} cases, seed {options.seed}, {seconds:.0f} s")
    return int(any(table["all"][word] for word in BAD))


if __name__ == "__main__":
    sys.exit(main())
