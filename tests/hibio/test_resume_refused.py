"""A run that is resumed with other data than it began with would end as neither of both."""

import dataclasses
import shutil

import pytest

from hibio.config.files import ConfigError
from hibio.config.run import DataConfig
from hibio.config.training import StageConfig
from hibio.data.splits import INDEX_NAME
from hibio.run import Job, build, expand
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
    with pytest.raises(ConfigError, match=r"other settings in: data;"):
        resumed(begun, data)


def test_slides_may_neither_come_nor_go(begun, tmp_path):
    gone = tmp_path / "stores" / "sim001.h5"
    shutil.move(gone, tmp_path / "sim001.h5")
    with pytest.raises(ConfigError, match=r"other slides: 1 gone \(sim001\) in data\.stores"):
        build(begun, resume=True)
    shutil.move(tmp_path / "sim001.h5", gone)
    assert build(begun, resume=True).step == 1
