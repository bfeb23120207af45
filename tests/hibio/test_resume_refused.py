"""A run that is resumed with other data than it began with would end as neither of both."""

import dataclasses
import shutil
from contextlib import nullcontext
from pathlib import Path

import h5py
import pytest

from hibio.artifacts import read_artifacts
from hibio.checkpoint import ARTIFACTS, NAME, write_checksums
from hibio.config.files import ConfigError
from hibio.config.run import DataConfig
from hibio.config.training import StageConfig
from hibio.data.splits import INDEX_NAME
from hibio.run import Job, _write_settings, build, expand, split_of, train_all
from preprocessing.errors import DataError
from preprocessing.files import locked
from preprocessing.store import SlideStore
from tests.hibio.toy import SPOT, run_config


@pytest.fixture
def begun(toy_stores, tmp_path) -> Job:
    """A job that was stopped after its first step, on stores of its own."""
    shutil.copytree(toy_stores, tmp_path / "stores", ignore=shutil.ignore_patterns(INDEX_NAME))
    stages = (StageConfig("spot", 2, SPOT),)
    (job,) = expand(run_config(tmp_path / "stores", tmp_path / "run", stages=stages, bank=False))
    assert not build(job).fit(until_step=1)
    return job


def resumed(job: Job, data: DataConfig) -> int:
    config = dataclasses.replace(job.config, data=data)
    return build(dataclasses.replace(job, config=config), resume=True).step


def test_where_stores_lie_and_how_they_are_read_may_change(begun, tmp_path):
    (tmp_path / "stores").rename(tmp_path / "moved")
    assert resumed(begun, DataConfig(tmp_path / "moved", cache_slides=1, prefetch=0)) == 1


def test_what_is_read_may_not(begun):
    data = dataclasses.replace(begun.config.data, shuffle_pairs=True)
    with pytest.raises(
        ConfigError, match=r"other settings in: data.shuffle_pairs \(False there, True now\);"
    ):
        resumed(begun, data)


def test_a_value_of_an_older_version_that_is_fixed_now_is_another_setting(begun):
    config = begun.folder / NAME / "config.yaml"
    text = config.read_text()
    for value, refused in ((2000, False), (50, True)):
        config.write_text(text.replace("genes:\n", f"genes:\n  graph_spots: {value}\n"))
        write_checksums(begun.folder / NAME)
        told = rf"genes\.graph_spots: {value}: .*train again in another folder"
        with pytest.raises(ConfigError, match=told) if refused else nullcontext():
            assert resumed(begun, begun.config.data) == 1


def test_slides_may_neither_come_nor_go(begun, tmp_path):
    gone = tmp_path / "stores" / "sim001.h5"
    shutil.move(gone, tmp_path / "sim001.h5")
    with pytest.raises(ConfigError, match=r"other slides: 1 gone \(sim001\) in data\.stores"):
        build(begun, resume=True)
    shutil.move(tmp_path / "sim001.h5", gone)
    assert build(begun, resume=True).step == 1


def under(stores: Path, slide: str, other: str) -> None:
    """Put the content of another slide under a slide's id."""
    with SlideStore(stores / f"{slide}.h5") as store:
        own = {"slide_id": slide, "patient_id": store.patient_id}
    shutil.copy(stores / f"{other}.h5", stores / f"{slide}.h5")
    with h5py.File(stores / f"{slide}.h5", "r+") as file:
        file.attrs.update(own)


def test_a_slide_may_not_be_replaced_under_its_id(begun, tmp_path):
    seals = read_artifacts(begun.folder / NAME / ARTIFACTS).seals
    assert {slide: seal["patient"] for slide, seal in seals.items()} == {
        f"sim00{n}": f"patient0{n}" for n in (1, 2, 3)
    }  # the test slide too
    under(tmp_path / "stores", "sim001", "sim002")
    with pytest.raises(
        ConfigError, match=r"other content under the ids sim001 \(counts, .*features/handcr"
    ):
        train_all(begun.config, resume=True)


def test_a_finished_job_is_compared_before_anything_is_written(begun):
    build(begun, resume=True).fit()
    _write_settings(begun.config)
    folder = begun.config.out
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    stages = (dataclasses.replace(begun.config.stages[0], lr=0.5),)
    other = dataclasses.replace(begun.config, stages=stages)
    with pytest.raises(
        ConfigError, match=r"other settings in: stages\.0\.lr \(0.001 there, 0.5 now"
    ):
        train_all(other, resume=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    checkpoints = train_all(begun.config, resume=True)
    assert [path.parent for path in checkpoints] == [begun.folder]


def test_two_processes_do_not_train_in_one_folder(begun, tmp_path):
    with (
        locked(begun.config.out),
        pytest.raises(DataError, match=r"is in use: process \d+ on .*wait"),
    ):
        train_all(begun.config, resume=True)
    new = dataclasses.replace(begun.config, out=tmp_path / "new", folds=("nobody",))
    with pytest.raises(ConfigError, match="not in the data"):
        train_all(new)
    assert not (tmp_path / "new").exists()


def test_said_test_slides_are_not_trained_on(begun, capsys):
    data = dataclasses.replace(begun.config.data, test=("sim001",))
    config = dataclasses.replace(begun.config, data=data)
    split = split_of(config, "patient03")
    assert [entry.slide_id for entry in split.train] == ["sim002"]
    assert [entry.slide_id for entry in split.test] == ["sim001", "sim003"]
    expand(config)
    assert "never trained on (role test): sim001" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"other slides: 1 gone \(sim001\)"):
        build(dataclasses.replace(begun, config=config), resume=True)
