"""Config: YAML to dataclasses and back, and what a user is told when a key or a value is wrong."""

import dataclasses
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hibio.config.data import GenesConfig
from hibio.config.files import (
    ConfigError,
    apply_overrides,
    changed,
    dump_config,
    load_config,
    load_saved,
    merge,
    to_dict,
)
from hibio.config.run import RunConfig
from hibio.run import _variant


@dataclass(frozen=True)
class Optim:
    """A section with a rule of its own."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}, expected more than 0; try 1e-4")


@dataclass(frozen=True)
class Stage:
    """An item of a list of sections."""

    name: str
    epochs: int = 1
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Knn:
    """One arm of a union."""

    k: int = 6


@dataclass(frozen=True)
class Radius:
    """The other arm."""

    radius_um: float = 150.0


@dataclass(frozen=True)
class Run:
    """A whole file."""

    seed: int = 0
    dim: int | Literal["auto"] = "auto"
    variant: Literal["log", "raw", "bm25"] = "log"
    out: Path = Path("runs")
    weights_file: Path | None = None
    amp: bool = False
    label: str = ""
    optim: Optim = field(default_factory=lambda: Optim(lr=0.5))
    warm: Optim | None = None
    stages: tuple[Stage, ...] = ()
    sizes: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    graph: Knn | Radius = field(default_factory=Knn)


@dataclass(frozen=True)
class Needs:
    """A file without defaults."""

    data: Path
    inner: Stage


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, cls: type = Run, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    return str(caught.value)


def test_empty_file_gives_the_defaults(tmp_path):
    assert load_config(Run, write(tmp_path, "# nothing\n")) == Run()


def test_every_supported_kind(tmp_path):
    text = """
    seed: 3
    dim: 64
    variant: raw
    out: a/b
    weights_file: w.pt
    amp: true
    optim: {lr: 1e-4, betas: [0, 1], clip: 1}
    warm: {lr: "2e-5"}
    stages:
      - {name: spot, weights: {spot/contrastive: 1}}
      - {name: region, epochs: 2}
    sizes: [1, 2]
    extra: {anything: [1, {x: 1e-3}], none: null}
    graph: {radius_um: 80}
    """
    config = load_config(Run, write(tmp_path, text))
    assert config == Run(
        seed=3,
        dim=64,
        variant="raw",
        out=Path("a/b"),
        weights_file=Path("w.pt"),
        amp=True,
        optim=Optim(lr=1e-4, betas=(0.0, 1.0), clip=1.0),
        warm=Optim(lr=2e-5),
        stages=(Stage("spot", weights={"spot/contrastive": 1.0}), Stage("region", epochs=2)),
        sizes=[1, 2],
        extra={"anything": [1, {"x": 1e-3}], "none": None},
        graph=Radius(80.0),
    )
    assert type(config.optim.clip) is float
    assert type(config.stages[0].weights["spot/contrastive"]) is float


def test_section_given_in_part_keeps_the_parents_default(tmp_path):
    config = load_config(Run, write(tmp_path, "optim: {clip: 2.0}"))
    assert config.optim == Optim(lr=0.5, clip=2.0)


TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["1e-4", "1.5e3", "yes", "null", "~", "0x1F", "2020-01-01", "- a", "a: b"]),
)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), NUMBER, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
OPTIM = st.builds(
    Optim,
    lr=st.floats(min_value=1e-12, max_value=1e6),
    betas=st.tuples(NUMBER, NUMBER),
    clip=st.none() | NUMBER,
)
RUN = st.builds(
    Run,
    seed=st.integers(),
    dim=st.integers() | st.just("auto"),
    variant=st.sampled_from(["log", "raw", "bm25"]),
    out=st.text(string.ascii_letters + "/. ", max_size=8).map(Path),
    weights_file=st.none() | st.just(Path("w")),
    amp=st.booleans(),
    label=TEXT,
    optim=OPTIM,
    warm=st.none() | OPTIM,
    stages=st.lists(
        st.builds(Stage, TEXT, st.integers(), st.dictionaries(TEXT, NUMBER, max_size=2)), max_size=2
    ).map(tuple),
    sizes=st.lists(st.integers(), max_size=3),
    extra=st.dictionaries(TEXT, PLAIN, max_size=3),
    graph=st.builds(Knn, st.integers()) | st.builds(Radius, NUMBER),
)


@settings(max_examples=60, deadline=None)
@given(RUN)
def test_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump_config(config, path)
    assert load_config(Run, path) == config
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_dump_is_plain_yaml_that_others_can_read(tmp_path):
    path = tmp_path / "c.yaml"
    dump_config(Run(optim=Optim(lr=1e-5), label="1e-4"), path)
    plain = yaml.safe_load(path.read_text())
    assert plain == to_dict(Run(optim=Optim(lr=1e-5), label="1e-4"))
    assert plain["optim"]["betas"] == [0.9, 0.999]
    assert plain["out"] == "runs"


def test_dump_refuses_what_yaml_cannot_hold_and_leaves_the_old_file(tmp_path):
    path = write(tmp_path, "seed: 1\n")
    with pytest.raises(ConfigError, match="cannot be written"):
        dump_config(Run(extra={"x": object()}), path)
    assert path.read_text() == "seed: 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_of_an_older_version_says_what_became_of_it(tmp_path):
    text = message(write(tmp_path, "optim: {amp: true}"))
    assert "optim.amp: a key of an older HiBio; write optim.precision" in text
    assert "cannot be trained on" in text
    stage = "{name: one, steps: 1, weights: {spot/contrastive: 1}}"
    for key, fixed in (("graph_smoothing", 0), ("graph_spots", 2000)):
        text = f"out: r\ndata: {{stores: s}}\nstages: [{stage}]\ngenes: {{{key}: "
        old = write(tmp_path, text + "7}")
        assert f"genes.{key}: a key of an older HiBio; leave it out" in message(old, RunConfig)
        assert load_saved(RunConfig, old).genes == GenesConfig()
        same = write(tmp_path, text + f"{fixed}}}")  # as in every run of before
        assert load_config(RunConfig, same).genes == GenesConfig()
        text = f"out: r\ndata: {{stores: s}}\nstages: [{stage}]\nvariants: {{v: {{genes: {{{key}: "
        (variant,) = load_config(RunConfig, write(tmp_path, text + f"{fixed}}}}}}}")).variants
        assert changed({}, {f"genes.{key}": fixed}, "row") == {"genes": {}}
        config = load_config(RunConfig, write(tmp_path, text + "7}}}"))
        with pytest.raises(ConfigError, match=f"v: variants.v.genes.{key}: a key of an older Hi"):
            _variant(config, variant)


def test_unknown_key_names_file_full_key_nearest_and_all(tmp_path):
    path = write(tmp_path, "optim: {clipp: 1.0}")
    text = message(path)
    assert text.startswith(f"{path}: ")
    assert "unknown key 'optim.clipp'" in text
    assert "did you mean 'optim.clip'?" in text
    assert "betas, clip, lr" in text


def test_unknown_key_in_a_list_names_its_place(tmp_path):
    text = message(write(tmp_path, "stages: [{name: a}, {name: b, epoch: 2}]"))
    assert "'stages.1.epoch'" in text
    assert "'stages.1.epochs'" in text


@pytest.mark.parametrize(
    ("line", "key", "found"),
    [
        ("seed: 1.0", "seed", "float 1.0"),
        ("seed: '1'", "seed", "str '1'"),
        ("seed: true", "seed", "bool True"),
        ("amp: 1", "amp", "int 1"),
        ("label: no", "label", "bool False"),
        ("label: 1e4", "label", "put it in quotes"),
        ("out: 3", "out", "int 3"),
        ("optim: {lr: fast}", "optim.lr", "str 'fast'"),
        ("optim: {lr: true}", "optim.lr", "bool True"),
        ("optim: {betas: [1.0]}", "optim.betas", "a list of 2 values"),
        ("optim: 3", "optim", "a section"),
        ("optim: null", "optim", "nothing (null)"),
        ("sizes: {a: 1}", "sizes", "a list"),
        ("sizes: [1, x]", "sizes.1", "str 'x'"),
        ("extra: [1]", "extra", "a section"),
        ("extra: {1: a}", "extra.1", "in quotes"),
        ("dim: 2.5", "dim", "a whole number"),
        ("stages: [{name: a, weights: {x: y}}]", "stages.0.weights.x", "a number"),
    ],
)
def test_types_are_checked_not_coerced(tmp_path, line, key, found):
    text = message(write(tmp_path, line))
    assert f"'{key}'" in text
    assert found in text


def test_literal_lists_choices_and_the_nearest(tmp_path):
    text = message(write(tmp_path, "variant: bm24"))
    assert "expected one of: log, raw, bm25" in text
    assert "did you mean 'bm25'" in text


def test_missing_key_and_missing_key_of_a_section(tmp_path):
    assert "required key 'data' is missing" in message(write(tmp_path, "inner: {name: a}"), Needs)
    text = message(write(tmp_path, "data: x\ninner: {epochs: 2}"), Needs)
    assert "required key 'inner.name' is missing" in text


def test_a_sections_own_rule_is_told_with_file_and_section(tmp_path):
    path = write(tmp_path, "optim: {lr: -1}")
    text = message(path)
    assert text.startswith(f"{path}: section 'optim': lr is -1.0")


def test_union_of_sections_that_cannot_be_told_apart(tmp_path):
    text = message(write(tmp_path, "graph: {}"))
    assert "fits Knn and Radius alike" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not valid YAML"),
        (b"seed: 1\nseed: 2\n", "'seed' is given twice"),
        (b"- 1\n", "'key: value' lines"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"x: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"base: 3\n", "must name one YAML file"),
        (b"base: gone.yaml\n", "run.yaml: base: "),
    ],
)
def test_broken_files(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert words in message(path)


def test_missing_file(tmp_path):
    assert "none.yaml: no such file" in message(tmp_path / "none.yaml")


def test_base_is_relative_to_its_file_and_merged_by_section(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, "seed: 1\noptim: {lr: 0.1, clip: 1.0}\nsizes: [1, 2]\n", "root.yaml")
    write(tmp_path, "base: ../root.yaml\nlabel: mid\nsizes: [3]\n", "sub/mid.yaml")
    path = write(tmp_path, "base: sub/mid.yaml\noptim: {lr: 0.2}\n")
    config = load_config(Run, path)
    assert config == Run(seed=1, optim=Optim(0.2, clip=1.0), sizes=[3], label="mid")


def test_error_names_the_file_that_set_the_key(tmp_path):
    base = write(tmp_path, "optim: {lrr: 1}\n", "root.yaml")
    path = write(tmp_path, "base: root.yaml\nseed: 1\n")
    assert message(path).startswith(f"{base}: unknown key 'optim.lrr'")
    assert "--set seeds=2" in message(write(tmp_path, "seed: 1\n"), overrides=("seeds=2",))


def test_base_circle(tmp_path):
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in message(tmp_path / "a.yaml")


def test_overrides_reach_sections_lists_and_absent_sections(tmp_path):
    path = write(tmp_path, "stages: [{name: a}, {name: b}]\nwarm: null\n")
    overrides = [
        "stages.1.epochs=5",
        "optim.lr=1e-4",
        "warm.clip=1",
        "dim=auto",
        "label=",
        "amp=on",
    ]
    with pytest.raises(ConfigError, match="label"):
        load_config(Run, path, overrides)
    overrides[4] = "label=''"
    config = load_config(Run, path, overrides)
    assert config.stages == (Stage("a"), Stage("b", epochs=5))
    assert config.optim.lr == 1e-4
    assert config.warm == Optim(clip=1.0)
    assert config.amp is True


def test_a_star_reaches_every_entry_of_a_list_and_is_named_when_it_is_wrong(tmp_path):
    path = write(tmp_path, "stages: [{name: a, epochs: 1}, {name: b, epochs: 2}]\n")
    assert [stage.epochs for stage in load_config(Run, path, ["stages.*.epochs=7"]).stages] == [
        7,
        7,
    ]
    assert "--set stages.*.epochs=x" in message(path, overrides=("stages.*.epochs=x",))
    with pytest.raises(ConfigError, match="no entry of the list has this key"):
        load_config(Run, path, ["stages.*.weights.x=1"])


def test_override_value_may_hold_an_equals_sign():
    assert apply_overrides({}, ["a.b=x=y"]) == {"a": {"b": "x=y"}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "expected KEY=VALUE"),
        ("a..b=1", "expected KEY=VALUE"),
        ("seed=[1", "not YAML"),
        ("list.2.x=1", "a list of 2"),
        ("list.-1=1", "a list of 2"),
        ("list.x=1", "it has no 'x'"),
        ("seed.x=1", "is the value 1"),
    ],
)
def test_bad_overrides(override, words):
    with pytest.raises(ConfigError, match="--set") as caught:
        apply_overrides({"seed": 1, "list": [{}, {}]}, [override])
    assert words in str(caught.value)


def test_inputs_are_not_modified():
    data = {"a": {"b": [1, {"c": 2}]}}
    kept = {"a": {"b": [1, {"c": 2}]}}
    changed = apply_overrides(data, ["a.b.1.c=3"])
    joined = merge(data, {"a": {"d": 1}})
    joined["a"]["b"].append(0)
    assert data == kept
    assert changed == {"a": {"b": [1, {"c": 3}]}}


NESTED = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
MAPPING = st.dictionaries(st.sampled_from("abc"), NESTED, max_size=3)


def leaves(data: dict, above: tuple = ()) -> dict:
    """Slow reference: every path to a value that is no mapping."""
    found = {}
    for key, value in data.items():
        inner = leaves(value, (*above, key)) if isinstance(value, dict) else {(*above, key): value}
        found.update(inner)
    return found


@settings(deadline=None)
@given(MAPPING, MAPPING)
def test_merge_against_paths(base, patch):
    merged = leaves(merge(base, patch))
    ours = leaves(patch)
    assert all(merged[path] == value for path, value in ours.items())
    for path, value in merged.items():
        assert ours.get(path, leaves(base).get(path)) == value
    assert merge(base, {}) == base
    assert merge(base, base) == base


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().seed = 3  # type: ignore[misc]
