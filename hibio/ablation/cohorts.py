"""Simulated cohorts of an ablation: made once, kept under the hash of their settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hibio.ablation.config import CohortsConfig
from hibio.config import ConfigError
from hibio.schema import SchemaError, build_section
from pathways import load_pathways
from preprocessing.errors import DataError
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort


@dataclass(frozen=True)
class Cohort:
    """What is simulated and where its stores lie.

    Attributes:
        point: swept simulator setting -> value.
        config: all simulator settings.
        patch: of the stores.
        stores: folder of the stores; whole as soon as it exists.
    """

    point: Mapping[str, Any]
    config: SimulateConfig
    patch: PatchConfig
    stores: Path

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient names, as the simulator gives them."""
        return tuple(f"patient{number + 1:02d}" for number in range(self.config.n_patients))


def cohorts_of(config: CohortsConfig, out: Path) -> Iterator[Cohort]:
    """The cohorts of a grid, none of them simulated yet.

    Args:
        config: the grid's section.
        out: folder of the grid.

    Raises:
        ConfigError: a setting that the simulator does not have, or out of its range.
    """
    patch = PatchConfig(config.patch_um, config.patch_px)
    for values in itertools.product(*config.sweep.values()):
        point = dict(zip(config.sweep, values, strict=True))
        try:
            settings = build_section(SimulateConfig, {**config.simulate, **point})
        except SchemaError as problem:
            raise ConfigError(f"cohorts.simulate: {problem}") from problem
        text = json.dumps([asdict(settings), asdict(patch)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        yield Cohort(point, settings, patch, out / "cohorts" / digest)


def make_cohort(cohort: Cohort) -> None:
    """Simulate and prepare a cohort where that is not done; safe beside other processes.

    It is made in a folder of this process and renamed when it is whole, so that a killed run
    leaves no half cohort, and two processes at worst make it twice.

    Raises:
        DataError: the simulator or the preparation refuses.
    """
    if cohort.stores.is_dir():
        return
    settings = ", ".join(f"{name} {value}" for name, value in cohort.point.items())
    print(f"simulate a cohort of {cohort.config.n_slides} slides ({settings or 'one'})", flush=True)
    own = cohort.stores.with_name(f".{cohort.stores.name}.{os.getpid()}.part")
    shutil.rmtree(own, ignore_errors=True)
    try:
        database = load_pathways("default")
        programmes = {name: list(database.genes_of(name)) for name in database.names}
        manifest = simulate_cohort(own / "slides", programmes, cohort.config)
        report = prepare(manifest, own / "stores", patch=cohort.patch)
        if report.failed:
            raise DataError(f"a simulated cohort could not be prepared:\n{report}")
        shutil.copy2(own / "slides" / "truth.json", own / "stores" / "truth.json")
        _take_name(own / "stores", cohort.stores)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _take_name(made: Path, final: Path) -> None:
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was faster; both hold the same
            raise
