"""A toy cohort as real files: simulated, prepared into stores, and fitted artifacts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from pathways import load_pathways
from preprocessing.patches import PatchConfig
from preprocessing.run import prepare
from preprocessing.simulate import SimulateConfig, simulate_cohort
from preprocessing.store.read import stores_in

N_SLIDES, N_SPOTS, N_GENES = 3, 70, 400

settings.register_profile("hibio", deadline=None)  # a busy machine is no defect
settings.load_profile("hibio")


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marks mean."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device (benchmarks/gpu.sh)")


#: Modules whose set-up takes longest.
FIRST = ("test_distributed.py", "test_pipeline.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with them: of several workers one alone sets each up, and nobody waits at the end."""
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the home of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


#: Golden values of published code; the environment variable HIBIO_ORACLES names another folder.
ORACLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "oracles"


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], dict[str, np.ndarray]]:
    """Arrays of one file of golden values, by name; the test is skipped where it is not."""

    def read(name: str) -> dict[str, np.ndarray]:
        path = Path(os.environ.get("HIBIO_ORACLES") or ORACLES) / name
        if not path.is_file():
            pytest.skip(f"no golden values {path}; HIBIO_ORACLES names their folder")
        with np.load(path) as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def toy_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 3 patients with one slide each (sim001..3 of patient01..3)."""
    database = load_pathways("default")
    programmes = {name: list(database.genes_of(name)) for name in database.names}
    config = SimulateConfig(
        n_slides=N_SLIDES,
        n_patients=N_SLIDES,
        n_spots=N_SPOTS,
        n_genes=N_GENES,
        n_housekeeping=40,
        mpp=4.0,
    )
    return simulate_cohort(tmp_path_factory.mktemp("cohort"), programmes, config)


@pytest.fixture(scope="session")
def toy_stores(toy_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the three stores, patches of 112 um (as HEST-Bench's) and 32 px.

    Tests copy what they want to change.
    """
    folder = tmp_path_factory.mktemp("stores")
    report = prepare(toy_cohort, folder, patch=PatchConfig(112.0, 32))
    assert not report.failed, str(report)
    assert len(stores_in(folder)) == N_SLIDES
    return folder


@pytest.fixture(scope="session")
def toy_artifacts(toy_stores: Path):
    """Artifacts fitted on sim001 and sim002; sim003 is held out."""
    from hibio.data.fitting import fit_artifacts
    from tests.hibio.toy import GENES, PATHWAYS

    return fit_artifacts(stores_in(toy_stores)[:2], GENES, PATHWAYS)


@pytest.fixture(scope="session")
def niche_artifacts(toy_stores: Path):
    """The same with keyword genes of shrunken rates; the spot vector stays log TF-IDF."""
    from hibio.data.fitting import fit_artifacts
    from tests.hibio.toy import GENES, PATHWAYS

    genes = dataclasses.replace(GENES, tfidf="shrunken")
    return fit_artifacts(stores_in(toy_stores)[:2], genes, PATHWAYS)


@pytest.fixture
def toy_config(toy_stores: Path, tmp_path: Path):
    """A run of 8 steps in two stages that holds out patient03, into an empty folder."""
    from tests.hibio.toy import run_config

    return run_config(toy_stores, tmp_path / "run")
