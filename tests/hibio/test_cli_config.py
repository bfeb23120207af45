"""`hibio config`: what is shipped is found by name anywhere, and the schema says what YAML may."""

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

from eval.ablation.config import GridConfig, load_grid
from hibio import cli
from hibio.cli import config as command
from hibio.config import files
from hibio.config.data import GenesConfig
from hibio.config.files import SHIPPED, ConfigError, find_config, load_config, shipped_names
from hibio.config.run import RunConfig
from hibio.config.schema import json_schema

ROOT = Path(__file__).resolve().parents[2]
YAMLS = [name for name in shipped_names() if "." not in name]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_every_file_of_configs_is_shipped_and_listed(capsys):
    """The package has them as they are in the checkout: one folder, two ways to it."""
    inside = [path.relative_to(SHIPPED) for path in SHIPPED.rglob("*") if path.is_file()]
    outside = (ROOT / "configs").rglob("*")
    assert {*inside} == {p.relative_to(ROOT / "configs") for p in outside if p.is_file()}
    lines = told(capsys, "list").splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert {"her2st", "ablation/regions", "manifests/shared_data.csv"} <= {*shipped_names()}
    assert told(capsys, "show", "her2st") == (SHIPPED / "her2st.yaml").read_text()


def test_a_file_of_the_user_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("demo") == find_config("configs/demo.yaml") == SHIPPED / "demo.yaml"
    (tmp_path / "demo").mkdir()  # what `hibio demo` wrote is no configuration
    assert find_config("demo") == SHIPPED / "demo.yaml"
    Path("demo.yaml").write_text("out: mine\n")
    assert find_config("demo.yaml") == Path("demo.yaml")
    with pytest.raises(ConfigError, match=r"her2stt: no such file.*did you mean.*her2st"):
        find_config("her2stt")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        load_config(RunConfig, "none.yaml")


@pytest.mark.parametrize("name", shipped_names())
def test_the_end_of_a_shipped_name_is_enough_or_hinted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    end = name.rpartition("/")[2]
    if sum(one.rpartition("/")[2] == end for one in shipped_names()) == 1 or end == name:
        assert find_config(end) == find_config(name)
    with pytest.raises(ConfigError, match=rf"did you mean '{name}'"):
        find_config(f"{name}s.yaml" if "." not in name else name[:-2])
    with pytest.raises(ConfigError, match=rf"did you mean '{re.escape(end)}'\?"):
        find_config(end[:-1])


def test_an_end_of_two_shipped_names_lists_both(monkeypatch):
    shipped = {"a/x": Path("a/x.yaml"), "b/x": Path("b/x.yaml")}
    monkeypatch.setattr(files, "_shipped", lambda: shipped)
    with pytest.raises(ConfigError, match=r"did you mean 'a/x' or 'b/x'|'b/x' or 'a/x'"):
        find_config("x.yaml")


@pytest.mark.parametrize("name", YAMLS)
def test_a_copy_says_the_same_from_another_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told(capsys, "copy", name.rpartition("/")[2], "--out", "mine.yaml")
    assert "configs/" not in Path("mine.yaml").read_text().partition("\n")[0]
    if name.startswith("ablation/"):
        mine, shipped = load_grid(Path("mine.yaml")), load_grid(Path(name))
        assert mine.run.samefile(shipped.run)
        assert dataclasses.replace(mine, run=shipped.run) == shipped
    else:
        assert load_config(RunConfig, "mine.yaml") == load_config(RunConfig, name)


def test_a_file_based_on_one_of_the_users_own_is_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("seeds: [7]\n")
    Path("mine.yaml").write_text("base: base.yaml\n")
    told(capsys, "copy", "mine.yaml", "--out", "other.yaml")
    assert f"base: {(tmp_path / 'base.yaml').resolve()}" in Path("other.yaml").read_text()


def test_a_copy_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told(capsys, "copy", "manifests/shared_data.csv")
    assert (
        Path("shared_data.csv").read_bytes() == (SHIPPED / "manifests/shared_data.csv").read_bytes()
    )
    assert cli.main(["config", "copy", "manifests/shared_data.csv"]) == 1
    assert "--out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def validators():
    """Schema class -> its validator; the schemas are valid themselves."""
    of = pytest.importorskip("jsonschema").Draft202012Validator
    schemas = {cls: json_schema(cls) for cls in (RunConfig, GridConfig)}
    for schema in schemas.values():
        of.check_schema(schema)
    return {cls: of(schema) for cls, schema in schemas.items()}


@pytest.mark.parametrize("name", YAMLS)
def test_every_shipped_file_fits_the_schema(name, validators):
    data = yaml.load(find_config(name).read_text(), Loader=files._Loader)  # 1e-4 is a number
    cls = GridConfig if name.startswith("ablation/") else RunConfig
    assert [error.message for error in validators[cls].iter_errors(data)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.omics.widht", 64),
        ("genes.rank", 0),
        ("genes.rank", "20"),
        ("genes.min_slide_fraction", 0.0),  # excluded
        ("genes.graph", "circle"),
        ("stages", [{"steps": 5}]),  # a name is required
        ("data", None),
        ("seeds", [-1]),
        ("base", 5),
        ("out", None),
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(key, value, validators):
    """And the file without the fault passes both."""
    good = {"out": "o", "data": {"stores": "s"}, "stages": [{"name": "a", "steps": 5}]}
    assert validators[RunConfig].is_valid(good)
    bad = copy.deepcopy(good)
    node = bad
    *above, last = key.split(".")
    for part in above:
        node = node.setdefault(part, {})
    node[last] = value
    assert not validators[RunConfig].is_valid(bad)
    del bad["out"]  # without a base the file must say it
    assert not validators[RunConfig].is_valid({**good, "out": 5})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("refrence", "none"),
        ("rows", {"none": 5}),
        ("draws", "many"),
        ("tasks", {"retrieval": "mrr"}),  # metrics are a list
        ("terms", {"t": {"row": "none", "controll": "none"}}),
        ("cohorts", {"sweeps": {}}),
    ],
)
def test_what_a_grid_may_not_hold_the_schema_refuses(key, value, validators, tmp_path):
    shipped = find_config("ablation/anchors").read_text()
    good = {**yaml.load(shipped, Loader=files._Loader), "run": "her2st_flat"}
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps(good))
    load_grid(path)
    assert validators[GridConfig].is_valid(good)
    bad = {**good, key: value}
    path.write_text(json.dumps(bad))
    with pytest.raises(ConfigError, match=key):
        load_grid(path)
    assert not validators[GridConfig].is_valid(bad)


def test_the_schema_tells_words_ranges_defaults_and_choices(capsys):
    schema = json.loads(told(capsys, "schema"))
    genes = schema["properties"]["genes"]["properties"]
    assert (genes["rank"]["minimum"], genes["rank"]["maximum"]) == (1, 4096)
    assert genes["min_slide_fraction"]["exclusiveMinimum"] == 0
    assert genes["graph"]["enum"] == ["knn", "delaunay", "random"]
    assert genes["target_genes"]["default"] == 200
    assert genes["exclude"]["description"].startswith("genes never used, by name or shell pattern")
    assert schema["anyOf"] == [{"required": ["base"]}, {"required": ["out", "data", "stages"]}]
    assert set(json.loads(told(capsys, "schema", "--grid"))["properties"]) > {"rows", "base"}
    assert set(command.ACTIONS) == {"list", "show", "copy", "schema"}


def test_every_key_of_a_run_has_words():
    def silent(schema, above=()):
        for name, one in schema.get("properties", {}).items():
            if "description" not in one and "properties" not in one:
                yield ".".join((*above, name))
            yield from silent(one, (*above, name))
            yield from silent(one.get("items", {}), (*above, name))

    assert list(silent(json_schema(RunConfig))) == []


def test_the_words_of_a_key_are_the_same_where_python_strips_docstrings(monkeypatch):
    """As Python 3.13 does."""
    before = json_schema(GenesConfig)
    monkeypatch.setattr(GenesConfig, "__doc__", inspect.cleandoc(GenesConfig.__doc__))
    assert json_schema(GenesConfig) == before
