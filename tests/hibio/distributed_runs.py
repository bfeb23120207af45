"""Training runs in the processes of one launch, started by the tests with torchrun.

``distributed_runs.py CASES.json``: a list of runs, one after the other, each
``{"config": FILE, "resume": bool, "until": steps or null, "event": null or
{"kind": "signal" | "nan", "rank": R, "step": N}}``. Every process writes what became of each
run to ``outcome-<number>-<rank>.json`` beside the list, and of the gathered rows to
``gather-<rank>.json``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hibio.config.files import load_config
from hibio.config.run import RunConfig
from hibio.run import build, expand
from hibio.training.engine import NotFiniteError
from hibio.training.process_group import ProcessGroup, end_processes, start_processes
from hibio.training.step_outputs import gather_rows
from hibio.training.trainer import Trainer


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One run; what it came to."""
    (job,) = expand(load_config(RunConfig, case["config"]))
    trainer = build(job, resume=case["resume"])
    began = trainer.step
    if case.get("event"):
        plant(trainer, **case["event"])
    told: dict[str, Any] = {"error": None, "finished": None}
    try:
        told["finished"] = trainer.fit(until_step=case["until"])
    except NotFiniteError as error:
        told["error"] = str(error)
    weight = trainer.whole_model().state_dict()["omics_head.0.weight"]
    return {**told, "began": began, "step": trainer.step, "weight": float(weight.double().sum())}


def plant(trainer: Trainer, kind: str, rank: int, step: int) -> None:
    """Let something happen on one process, after that many steps."""
    original = trainer.engine.run

    def disturbed(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        if trainer.step == step and trainer.group.rank == rank:
            if kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif "total" in result:  # not the rows of a micro-batch
                result["total"] = result["total"] * float("nan")
        return result

    trainer.engine.run = disturbed


def gathered(group: ProcessGroup) -> dict[str, Any]:
    """Rows of processes with different counts, and the gradient of a function of all of them."""
    n = 3 - 2 * group.rank  # 3 rows and 1
    rows = (torch.arange(n * 2.0).reshape(n, 2) + 10 * group.rank).requires_grad_()
    whole = gather_rows(rows)
    (whole[:, 0] * torch.arange(1.0, 5.0)).square().sum().backward()
    assert rows.grad is not None
    return {
        "rows": whole.tolist(),
        "gradient": rows.grad.tolist(),
        "bools": gather_rows(torch.tensor([True, False, True])[:n]).tolist(),
        "numbers": gather_rows(torch.arange(n) + 2**40).tolist(),
        "empty": list(gather_rows(torch.zeros(0 if group.rank else 2, 3)).shape),
        "any": [group.any(group.rank == 1), group.any(False)],
        "told": _refusal(group),
    }


def _refusal(group: ProcessGroup) -> str:
    """What the other processes hear when the first one fails."""

    def fail() -> None:
        raise ValueError("no room")

    try:
        group.on_first(fail)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    """Run every case."""
    cases = Path(sys.argv[1])
    group = start_processes("cpu")
    told = json.dumps(gathered(group))
    (cases.parent / f"gather-{group.rank}.json").write_text(told)
    for number, case in enumerate(json.loads(cases.read_text())):
        told = json.dumps(run(case))
        (cases.parent / f"outcome-{number}-{group.rank}.json").write_text(told)
    end_processes()


if __name__ == "__main__":
    main()
