"""``hibio ablate``: the options, and what is told at the end."""

from __future__ import annotations

import argparse

from hibio.ablation.config import load_grid
from hibio.ablation.plan import plan
from hibio.ablation.run import listing, run_grid


def run(options: argparse.Namespace) -> int:
    """Run, list or report a grid as the options of `hibio.arguments` say."""
    grid = load_grid(options.config, options.set, options.out)
    if options.list:
        print(listing(grid, plan(grid, options.data)))
        return 0
    report = run_grid(
        grid,
        options.data,
        index=options.index,
        parts=options.parts,
        report_only=options.report_only,
    )
    again = f"hibio ablate --config {options.config}"
    again += f" --data {options.data}" if options.data else ""
    again += f" --out {options.out}" if options.out else ""
    again += "".join(f" --set '{setting}'" for setting in options.set)
    if report is None:
        print(f"done; when every job is: {again} --report-only")
    else:
        print(f"wrote {grid.out / 'table.csv'}\nreport: {report}")
    return 0
