"""Bad input to the command line: exit code 1, one line on stderr, nothing half-written."""

import shutil

import pytest
import yaml

from hibio import cli
from hibio.checkpoint import NAME
from hibio.config.files import dump_config
from hibio.config.training import StageConfig
from hibio.run import expand
from preprocessing.store.read import stores_in
from tests.hibio.ablation_grids import write_grid
from tests.hibio.toy import SPOT, assert_refused, edit_store, rename_genes, run_config


# ------------------------------------------------------------------ manifests
def edited_manifest(source, target, edit) -> None:
    """A copy of the toy manifest with absolute paths, its lines edited."""
    text = source.read_text().splitlines()
    header, rows = text[0].split(","), [line.split(",") for line in text[1:]]
    for row in rows:
        for column in ("image", "counts", "labels"):
            row[header.index(column)] = str(source.parent / row[header.index(column)])
    lines = edit([header, *rows])
    target.write_text("\n".join(",".join(line) for line in lines) + "\n")


def test_prepare_without_a_column(run, toy_cohort, tmp_path):
    edited_manifest(toy_cohort, tmp_path / "m.csv", lambda rows: [row[1:] for row in rows])
    assert_refused(run("prepare", tmp_path / "m.csv", "--out", tmp_path / "out"), "slide_id")
    assert not (tmp_path / "out").exists()


def test_prepare_with_one_id_twice(run, toy_cohort, tmp_path):
    edited_manifest(toy_cohort, tmp_path / "m.csv", lambda rows: [*rows, rows[1]])
    result = run("prepare", tmp_path / "m.csv", "--out", tmp_path / "out")
    assert_refused(result, "sim001", "row 5", "row 2")
    assert not (tmp_path / "out").exists()


def test_prepare_with_a_missing_file_fails_that_slide_alone(run, toy_cohort, tmp_path):
    def edit(rows):
        rows[2][rows[0].index("image")] = str(tmp_path / "none.tif")
        return rows[:3]

    edited_manifest(toy_cohort, tmp_path / "m.csv", edit)
    out = tmp_path / "out"
    code, told, errors = run("prepare", tmp_path / "m.csv", "--out", out, "--patch-px", 16)
    assert code == 1
    assert "Traceback" not in told + errors
    (line,) = [line for line in told.splitlines() if line.startswith("sim002")]
    assert "failed" in line
    assert "none.tif" in line
    assert [path.name for path in out.iterdir()] == ["sim001.h5"]
    assert run("check", out)[0] == 0


def test_prepare_of_a_manifest_that_is_not_there(run, tmp_path):
    assert_refused(run("prepare", tmp_path / "none.csv", "--out", tmp_path / "out"), "none.csv")


def test_a_simulation_that_cannot_be(run, tmp_path):
    assert_refused(
        run("simulate", "--out", tmp_path / "c", "--slides", 2, "--patients", 3), "n_patients=3"
    )
    assert not (tmp_path / "c").exists()


# ------------------------------------------------------------------ training
@pytest.fixture
def config_file(toy_stores, tmp_path):
    config = run_config(toy_stores, tmp_path / "run", stages=(StageConfig("spot", 1, SPOT),))
    dump_config(config, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def test_an_unknown_key_names_the_nearest(run, config_file, tmp_path):
    settings = yaml.safe_load(config_file.read_text())
    settings["model"]["embed_dims"] = 8
    config_file.write_text(yaml.safe_dump(settings))
    result = run("train", "--config", config_file)
    assert_refused(result, "config.yaml", "model.embed_dims", "did you mean 'model.embed_dim'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.vision.wdith=3", "did you mean 'model.vision.width'?"),
        ("seeds=zero", "seeds"),
        ("nonsense", "KEY=VALUE"),
        ("sampler.balance=patient", "one of: slide, spot"),
        ("folds=[patient9]", "patient 'patient9'"),
        ("model.omics.name=transformer", "graph_hierarchy, mlp"),
        ("model.vision.name=feature", "did you mean 'features'?"),
        ("data.image=uni", "no features 'uni'"),
        ("data.image=null", "has no vision tower"),
        ("genes.tfidf=bm52", "bm25"),
        ("genes.selector=hgv", "hvg"),
        ("pathways.source=defalut", "default"),
        ("genes.min_spots=100000", "genes.min_spots"),
        ("objective.negatives=hard", "same_slide"),
    ],
)
def test_bad_settings(run, config_file, tmp_path, setting, words):
    assert_refused(run("train", "--config", config_file, "--set", setting), words)
    assert not list(tmp_path.rglob("model.safetensors"))


def test_training_without_stores(run, config_file, tmp_path):
    for folder in ("none", "here"):
        stores = tmp_path / folder
        result = run("train", "--config", config_file, "--set", f"data.stores={stores}")
        assert_refused(result, str(stores), "hibio prepare")
    assert not (tmp_path / "run").exists()


def test_training_on_ensembl_ids_with_sets_of_symbols(run, config_file, toy_stores, tmp_path):
    names = [f"ENSG{i:011d}" for i in range(400)]
    for path in stores_in(toy_stores):
        edit_store(path, tmp_path / "ids" / path.name, rename_genes(names))
    result = run("train", "--config", config_file, "--set", f"data.stores={tmp_path / 'ids'}")
    assert_refused(result, "ENSG", "symbol")
    assert not list(tmp_path.rglob("model.safetensors"))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_training_on_a_truncated_store(run, config_file, toy_stores, tmp_path, share):
    for path in stores_in(toy_stores):
        edit_store(path, tmp_path / "torn" / path.name, lambda file: None)
    torn = tmp_path / "torn" / "sim002.h5"
    torn.write_bytes(torn.read_bytes()[: int(share * torn.stat().st_size)])
    result = run("train", "--config", config_file, "--set", f"data.stores={torn.parent}")
    assert_refused(result, "sim002.h5")
    assert not list(tmp_path.rglob("model.safetensors"))
    code, told, _ = run("check", torn.parent)
    assert code == 1
    assert any(line.startswith("FAIL") and "sim002" in line for line in told.splitlines())


# ------------------------------------------------------------------ from a checkpoint on
@pytest.fixture(scope="module")
def trained(toy_stores, tmp_path_factory):
    """A run folder, trained through the command line."""
    out = tmp_path_factory.mktemp("trained")
    config = run_config(toy_stores, out / "run", stages=(StageConfig("spot", 1, SPOT),))
    dump_config(config, out / "config.yaml")
    assert cli.main(["train", "--config", str(out / "config.yaml")]) == 0
    (job,) = expand(config)
    return job.folder / NAME


def test_a_second_training_needs_resume(run, trained):
    config = trained.parents[4] / "config.yaml"
    assert_refused(run("train", "--config", config), "--resume")
    code, told, _ = run("train", "--config", config, "--resume", trained.parents[3])
    assert code == 0
    assert "next: hibio eval" in told
    assert_refused(run("train", "--config", config, "--resume", "typo"), "nothing to resume")


def test_embedding_and_checking_a_checkpoint(run, trained, toy_stores, tmp_path):
    assert run("check", trained.parents[3])[0] == 0
    code, told, _ = run("embed", "--checkpoint", trained, "--data", toy_stores, "--out", tmp_path)
    assert code == 0
    assert "3 files" in told
    assert {path.name for path in tmp_path.glob("*.h5ad")} == {f"sim00{i}.h5ad" for i in (1, 2, 3)}


@pytest.mark.parametrize("name", ["config.yaml", "artifacts.h5", "model.safetensors"])
@pytest.mark.parametrize("command", ["embed", "query", "check"])
def test_a_truncated_checkpoint(run, trained, toy_stores, tmp_path, name, command):
    torn = tmp_path / "torn" / "checkpoint"
    shutil.copytree(trained, torn)
    path = torn / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if command == "check":
        code, told, errors = run("check", torn)
        assert code == 1
        assert "FAIL" in told
        assert "Traceback" not in told + errors
        return
    more = ["--gene-set", "default"] if command == "query" else []
    out = tmp_path / "out"
    result = run(command, "--checkpoint", torn, "--data", toy_stores, "--out", out, *more)
    assert_refused(result, name)
    assert not out.exists() or not any(out.iterdir())


def test_a_truncated_trainer_state_stops_a_resume(run, trained, tmp_path):
    shutil.copytree(trained.parents[3], tmp_path / "copy")
    (state,) = (tmp_path / "copy").rglob("trainer.pt")
    state.write_bytes(state.read_bytes()[:100])
    config = trained.parents[4] / "config.yaml"
    assert_refused(run("train", "--config", config, "--resume", tmp_path / "copy"), "trainer.pt")


def test_a_folder_that_is_no_checkpoint(run, toy_stores, tmp_path):
    out = tmp_path / "out"
    for command, more in (("embed", []), ("query", ["--gene-set", "default"]), ("eval", [])):
        result = run(command, "--checkpoint", tmp_path, "--data", toy_stores, "--out", out, *more)
        assert_refused(result, "no checkpoint")
        assert not out.exists()


# ------------------------------------------------------------------ files of others
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train/config.yaml", ("train", "--config", "own.yaml", "--set", "out=train")),
        ("ablate/table.csv", ("ablate", "--config", "grid.yaml", "--out", "ablate")),
        ("hest/report.html", ("hest-bench", "nothing", "--out", "hest")),
        ("qc/index.html", ("qc", "stores", "--out", "qc")),
        ("against/against.md", ("eval", "--against", "a", "b", "--out", "against")),
    ],
)
def test_a_file_of_somebody_else_stays(run, toy_stores, tmp_path, name, words):
    place = tmp_path / "here"
    (place / "stores").symlink_to(toy_stores)
    dump_config(run_config(toy_stores, place / "run"), place / "own.yaml")
    shutil.copy(write_grid(tmp_path, toy_stores), place)
    shutil.copy(tmp_path / "run.yaml", place)
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text("somebody's")
    before = sorted(place.rglob("*"))
    assert_refused(run(*words), (place / name).name, "is there", "give another --out")
    assert (place / name).read_text() == "somebody's"
    assert sorted(place.rglob("*")) == before
