"""Damaged inputs of every kind: `python benchmarks/fuzz_readers.py [--cases 500 --seed 0]`.

Tries `hibio check` and `hibio prepare` on generated inputs (tests/preprocessing/fuzz_cases.py),
each in a process with 4 GiB of memory and 60 s, and prints what became of them. Exits 1 when a case
gave an error that is not for users, hung, or left half a store. A crash of a library is contained:
the process of that slide dies, `hibio prepare` reports the slide and goes on; it is counted apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.preprocessing.fuzz_cases import BAD, draw_cases, outcome, run_cases

WORDS = ("prepared", "refused", "crash, contained", *BAD)


def main() -> int:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print every case")
    options = parser.parse_args()
    begin, table, odd = time.monotonic(), defaultdict[str, Counter[str]](Counter), []
    cases = draw_cases(options.cases, options.seed)
    with tempfile.TemporaryDirectory(prefix="hibio_fuzz_") as folder:
        for case, result in run_cases(cases, Path(folder), options.workers):
            word = outcome(result)
            table[case.base][word] += 1
            what = f"{case.number} {case.base} | {case.damage} | {case.seed}"
            line = f"{what} | {word} | {result.seconds:.1f} s | {result.reason}"
            if word not in WORDS[:2]:
                odd.append(line)
            if options.show:
                print(line, flush=True)
    print("| input | cases | " + " | ".join(WORDS) + " |\n|" + "---|" * (len(WORDS) + 2))
    table["all"] = sum(table.values(), Counter())
    for base, count in table.items():
        cells = " | ".join(str(count[word]) for word in WORDS)
        print(f"| {base} | {count.total()} | {cells} |")
    print("\n".join(["", *odd]))
    print(f"\n{len(cases)} cases, seed {options.seed}, {time.monotonic() - begin:.0f} s")
    return int(any(table["all"][word] for word in BAD))


if __name__ == "__main__":
    sys.exit(main())
