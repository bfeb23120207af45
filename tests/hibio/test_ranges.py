"""Every number of a configuration has a range: what lies outside is refused by its key."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest

from hibio.config.files import ConfigError, changed, load_config, to_dict
from hibio.config.run import RunConfig
from hibio.config.schema import Range, SchemaError, build_section
from tests.hibio.toy import run_config

TRIED = (-1, 0, math.nan, 1e9)
#: Values among these that a key takes, because they mean something; NaN never does.
TAKEN = {
    "data.cache_slides": {1e9},  # all
    "data.train_patients": {1e9},
    "data.prefetch": {0},
    "data.augment.stain": {0},
    "stages.epochs": {1e9},
    "stages.steps": {1e9},
    "stages.rebuild_every": {0, 1e9},
    "stages.weights": {0},  # off
    "seeds": {0, 1e9},
    "genes.min_spots": {0, 1e9},  # too many: the fit says how many there are
    "genes.target_genes": {1e9},  # all genes
    "genes.graph_edges": {1e9},
    "pathways.max_genes": {1e9},
    "pathways.top": {1e9},
    "pathways.threshold": {-1, 0, 1e9},
    "sampler.batch_spots": {1e9},  # whole slides
    "sampler.slides_per_batch": set(),  # more than the window
    "sampler.window": {1e9},
    "sampler.halo": {0},
    "sampler.weights": {0},
    "model.vision.dropout": {0},
    "model.omics.dropout": {0},
    "model.dropout": {0},
    "objective.duplicate_um": {0},
    "objective.duplicate_correlation": {-1, 0},
    "objective.mask_genes": {0},
    "objective.mask_spots": {0},
    "objective.query_genes": {0},
    "objective.contrast_um": {0},
    "objective.contrast_correlation": {-1, 0},
    "objective.drop_genes": {0},
    "objective.anchors_per_step": {1e9},
    "optim.weight_decay": {0},
    "optim.clip": {1e9},  # off
    "optim.shares_every": {0, 1e9},
    "optim.zero": {0},
    "checkpoint_every": {1e9},
}
LISTED = {"seeds": "seeds", "regions.diameters_um": "regions.diameters_um"}
INSIDE = {
    "stages.weights": "stages.0.weights.spot/contrastive",
    "sampler.weights": "sampler.weights.technology.Visium",
}


def number_in(hint: Any) -> type | None:
    """Int or float, where an annotation is one or holds them; None otherwise."""
    if hint in (int, float):
        return hint
    if typing.get_origin(hint) is typing.Literal:
        return int if all(type(arm) is int for arm in typing.get_args(hint)) else None
    found = [number_in(arm) for arm in typing.get_args(hint) if not isinstance(arm, Range)]
    return next((kind for kind in found if kind is not None), None)


def numeric_keys(cls: type, above: str = "") -> Iterator[tuple[str, type]]:
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls, include_extras=True)[field.name]
        inner = typing.get_args(hint)[0] if field.name == "stages" else hint
        if dataclasses.is_dataclass(inner):
            yield from numeric_keys(inner, f"{above}{field.name}.")
        elif (kind := number_in(hint)) is not None:
            yield above + field.name, kind


def attempt(key: str, value: Any) -> str | None:
    """What is said of a value of a key; None where it is taken."""
    plain = to_dict(run_config(Path("stores"), Path("out")))
    place = INSIDE.get(key, key.replace("stages.", "stages.0."))
    own = {place: [value] if key in LISTED else value}
    own |= {"stages.0.epochs": None} if key == "stages.steps" else {}
    own |= {"stages.0.steps": None} if key == "stages.epochs" else {}
    data = changed(plain, {"sampler.weights": {"technology": {"Visium": 1.0}}}, "test")
    try:
        build_section(RunConfig, changed(data, own, "test"))
    except SchemaError as problem:
        return str(problem)
    return None


KEYS = dict(numeric_keys(RunConfig))


def test_all_numbers_are_found():
    assert len(KEYS) > 45
    assert TAKEN.keys() | LISTED.keys() | INSIDE.keys() <= KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_what_means_nothing_is_refused_by_its_key(key):
    for value in TRIED:
        whole = int(value) if KEYS[key] is int and not math.isnan(value) else value
        told = attempt(key, whole)
        assert (told is None) == (value in TAKEN.get(key, set())), f"{value}: {told}"
        if told is not None:
            assert key.rpartition(".")[2] in told


def test_a_seed_or_a_fold_is_given_once():
    assert "seeds has 0 twice" in refusal("seeds", [0, 1, 0])
    assert "folds has 'P1' twice" in refusal("folds", ["P1", "P1"])


def test_a_list_of_which_nothing_would_come_is_refused():
    for key in ("seeds", "folds", "stages", "regions.diameters_um"):
        assert f"{key} is empty; give at least one" in refusal(key, [])
    plain = to_dict(run_config(Path("stores"), Path("out")))
    build_section(RunConfig, changed(plain, {"data.test": [], "genes.exclude": []}, "test"))


def refusal(key: str, value: list[Any]) -> str:
    plain = to_dict(run_config(Path("stores"), Path("out")))
    with pytest.raises(SchemaError) as told:
        build_section(RunConfig, changed(plain, {key: value}, "test"))
    return str(told.value)


def test_a_key_says_what_it_may_be_and_where_it_stands(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {stores: s}\nout: o\nstages: [{name: a, steps: 1, weights: {spot/contrastive: 1}}]\n"
    )
    with pytest.raises(ConfigError) as told:
        load_config(RunConfig, path, ["model.omics.heads=0"])
    assert str(told.value) == (
        f"{path} with --set model.omics.heads=0: 'model.omics.heads' is 0, expected a number from "
        "1 to 1024"
    )


@pytest.mark.parametrize(
    ("limit", "inside", "outside"),
    [
        (Range(0, 1), [0, 1], [-0.1, 1.1]),
        (Range(0, 1, "low"), [1e-9, 1], [0]),
        (Range(0, 1, "high"), [0], [1]),
        (Range(2), [2, 1e300], [1]),
        (Range(None, 2), [-1e300, 2], [3]),
    ],
)
def test_a_range_holds_its_limits_unless_open(limit, inside, outside):
    @dataclasses.dataclass(frozen=True)
    class Section:
        value: Annotated[float, limit] | None = None

    for value in (*inside, None):
        assert build_section(Section, {"value": value}).value == value
    for value in outside:
        with pytest.raises(SchemaError, match="'value' is"):
            build_section(Section, {"value": value})
