"""Speed of the whole training step: `python benchmarks/train_step.py [--image handcrafted]`.

A cohort is simulated and prepared into stores, and the trainer runs on them as `hibio train` does.

patches       end-to-end spots/s with a timm backbone on patches from disk, against the backbone
              alone: forward and backward on tensors in memory, same batch size, same precision, in
              the same run. The two are measured in turn, round by round.
handcrafted   spots/s with stored features, and the share of the time spent waiting for data.

Both print where the time of a step goes. On a GPU the FLOP/s of the backbone are set against one
large product in bf16 (--device cuda), and --largest looks for the largest batch that fits.
Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from timing import seconds
from torch.utils.flop_counter import FlopCounterMode

from hibio import keys
from hibio.config.data import GenesConfig, PathwaysConfig
from hibio.config.model import ModelConfig, OmicsConfig, VisionConfig
from hibio.config.run import DataConfig, RunConfig
from hibio.config.training import SamplerConfig, StageConfig
from hibio.run import build, expand
from hibio.training.engine import OptimConfig
from hibio.training.plan import StepInput
from hibio.training.trainer import Trainer
from pathways import load_pathways
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort

WEIGHTS = {
    keys.TERM_SPOT: 1.0,
    keys.TERM_EXPRESSION: 1.0,
    keys.TERM_PATHWAY: 0.25,
    keys.TERM_REGION: 0.25,
    keys.TERM_MEMBER: 0.25,
}


def write_stores(folder: Path, options: argparse.Namespace) -> Path:
    """Simulated slides as stores with patches and handcrafted features."""
    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    config = SimulateConfig(
        n_slides=options.slides, n_patients=options.slides, n_spots=options.spots
    )
    manifest = simulate_cohort(folder / "cohort", programmes, config)
    report = prepare(manifest, folder / "stores", patch=PatchConfig(patch_px=options.px))
    if report.failed:
        raise SystemExit(str(report))
    return folder / "stores"


def make_trainer(stores: Path, options: argparse.Namespace) -> Trainer:
    """The trainer of a run on these stores, one long stage."""
    is_patches = options.image == "patches"
    vision = VisionConfig(name="timm", timm_name=options.backbone) if is_patches else VisionConfig()
    config = RunConfig(
        out=stores.parent / "run",
        data=DataConfig(stores, image=options.image, prefetch=options.prefetch),
        stages=(StageConfig("step", 10_000, WEIGHTS, lr=1e-4),),
        folds=("none",),
        genes=GenesConfig(keyword_genes=options.genes),
        pathways=PathwaysConfig(min_genes=5),
        sampler=SamplerConfig(batch_spots=options.batch),
        model=ModelConfig(
            vision=vision, omics=OmicsConfig(width=options.width, layers=options.layers)
        ),
        optim=OptimConfig(precision=options.precision),
        device=options.device,
        threads=options.threads,
        bank=False,
    )
    (job,) = expand(config)
    trainer = build(job)
    trainer.model.train()
    if options.compile and is_patches:
        trainer.model.vision.backbone = torch.compile(trainer.model.vision.backbone)
    return trainer


class Clock:
    """Seconds spent in parts of the program, by name; parts inside others count in both."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, owner: Any, name: str, label: str) -> None:
        """Measure a method of an object from now on."""
        original = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = original(*arguments, **named)
            self._wait()
            self.seconds[label] += time.perf_counter() - started
            return result

        setattr(owner, name, timed)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def steps_for_ever(trainer: Trainer) -> Iterator[StepInput]:
    """What the trainer would train on, epoch after epoch."""
    stage = trainer.stages[0]
    for epoch in itertools.count():
        with closing(trainer.plan.epoch(stage, epoch, 0, trainer.step)) as steps:
            yield from steps


def run_steps(trainer: Trainer, steps: Iterator[StepInput], n: int) -> tuple[float, float, int]:
    """Seconds, those of them waiting for data, and core spots of n steps."""
    waited, spots, started = 0.0, 0, time.perf_counter()
    for _ in range(n):
        asked = time.perf_counter()
        step = next(steps)
        waited += time.perf_counter() - asked
        spots += trainer._train_step(step, 0.0)["n"]
    return time.perf_counter() - started, waited, spots


def bare_backbone(trainer: Trainer, n_spots: int, px: int) -> Callable[[], None]:
    """One forward and backward pass of the backbone on tensors in memory."""
    backbone, device = trainer.model.vision.backbone, trainer.engine.device
    image = torch.randn(n_spots, 3, px, px, device=device)

    def once() -> None:
        with trainer.engine.precision():
            total = backbone(image).float().square().mean()
        total.backward()
        backbone.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return once


def compare(trainer: Trainer, options: argparse.Namespace) -> None:
    """End to end against the backbone alone, round by round."""
    steps = steps_for_ever(trainer)
    _, _, spots = run_steps(trainer, steps, options.warm)
    size = round(spots / options.warm)
    once = bare_backbone(trainer, size, options.px)
    seconds(once, options.warm)
    whole, bare = [], []
    for number in range(options.rounds):
        taken, waited, spots = run_steps(trainer, steps, options.steps)
        whole.append(spots / taken)
        bare.append(size * options.steps / seconds(once, options.steps))
        print(
            f"round {number}: end to end {whole[-1]:.1f} spots/s, waiting for data "
            f"{waited / taken:.1%}; backbone alone {bare[-1]:.1f} spots/s; ratio "
            f"{whole[-1] / bare[-1]:.3f}",
            flush=True,
        )
    ratio = statistics.median(a / b for a, b in zip(whole, bare, strict=True))
    print(f"median ratio {ratio:.3f} (batch of about {size} core spots)")
    tell_flops(once, size, statistics.median(bare), trainer.engine.device)


def tell_flops(once: Callable[[], None], size: int, rate: float, device: torch.device) -> None:
    """FLOP/s of the backbone, and their share of a large product's."""
    with FlopCounterMode(display=False) as counter:
        once()
    per_spot = counter.get_total_flops() / size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    side = 8192 if device.type == "cuda" else 2048
    left = torch.randn(side, side, device=device, dtype=dtype)

    def product() -> None:
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds(product, 3)
    best = 2 * side**3 / min(seconds(product, 1) for _ in range(5))
    print(
        f"backbone: {per_spot / 1e9:.2f} GFLOP a spot, {per_spot * rate / 1e12:.3f} TFLOP/s, "
        f"{per_spot * rate / best:.1%} of a {side} x {side} product ({best / 1e12:.2f} TFLOP/s)"
    )


def features(trainer: Trainer, options: argparse.Namespace) -> None:
    """Spots/s and waiting with stored features."""
    steps = steps_for_ever(trainer)
    run_steps(trainer, steps, options.warm)
    for number in range(options.rounds):
        seconds, waited, spots = run_steps(trainer, steps, options.steps)
        print(
            f"round {number}: {spots / seconds:.1f} spots/s, waiting for data "
            f"{waited / seconds:.1%}",
            flush=True,
        )


def profile(trainer: Trainer, options: argparse.Namespace) -> None:
    """Where the time of a step goes; reading is in another thread, beside the rest."""
    clock = Clock(trainer.engine.device)
    model, objective = trainer.model, trainer.plan.objective
    for owner, name, label in (
        (trainer.plan, "_read", "reading and collating (other thread)"),
        (model, "project_image", "image tower, forward"),
        (model, "project_omics", "omics tower, forward (anchors too)"),
        (objective, "outputs", "all of a micro-batch, forward"),
        (objective, "terms", "terms, forward"),
        (trainer.engine, "step", "backward, clipping and update"),
    ):
        clock.around(owner, name, label)
    steps = steps_for_ever(trainer)
    seconds, waited, spots = run_steps(trainer, steps, options.steps)
    clock.seconds["waiting for data"] = waited
    print(f"\n{'part':<40} {'ms a step':>10} {'share':>7}")
    for label, spent in [*clock.seconds.items(), ("whole step", seconds)]:
        print(f"{label:<40} {1e3 * spent / options.steps:>10.1f} {spent / seconds:>7.1%}")
    print(f"{spots / options.steps:.0f} core spots a step")


def largest_batch(trainer: Trainer, px: int) -> None:
    """Spots of the largest backbone pass that fits, by doubling."""
    size, fits = 32, 0
    while True:
        try:
            bare_backbone(trainer, size, px)()
        except torch.cuda.OutOfMemoryError:
            break
        fits, size = size, size * 2
        torch.cuda.empty_cache()
    print(f"largest power-of-two batch of the backbone in memory: {fits} spots")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--image", choices=("patches", "handcrafted"), default="patches")
    add("--backbone", default="resnet18", help="timm name")
    add("--px", type=int, default=224, help="pixels of a patch")
    add("--slides", type=int, default=4)
    add("--spots", type=int, default=500, help="of a slide")
    add("--batch", type=int, default=128, help="core spots of a step")
    add("--genes", type=int, default=64, help="keyword genes of a spot")
    add("--width", type=int, default=96, help="of the omics tower")
    add("--layers", type=int, default=2, help="of the omics tower")
    add("--prefetch", type=int, default=2)
    add("--steps", type=int, default=10, help="of a round")
    add("--rounds", type=int, default=5)
    add("--warm", type=int, default=3, help="steps before the first round")
    add("--threads", type=int, help="CPU threads of torch")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--compile", action="store_true", help="torch.compile the backbone")
    add("--largest", action="store_true", help="look for the largest batch (cuda)")
    return parser.parse_args()


def main() -> None:
    """Write the stores, measure, tell."""
    options = arguments()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(options)}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(write_stores(Path(folder), options), options)
        if options.image == "patches":
            compare(trainer, options)
        else:
            features(trainer, options)
        profile(trainer, options)
        if options.largest and options.device == "cuda":
            largest_batch(trainer, options.px)


if __name__ == "__main__":
    main()
