"""The plan of an ablation: keys, rows, cells, numbers that never move, and what is refused."""

from pathlib import Path

import pytest

from eval.ablation.config import CohortsConfig, axis_name, load_grid
from eval.ablation.plan import cohorts_of, plan
from eval.ablation.run import listing, part_of
from hibio.cli import COMMANDS
from hibio.cli.command import build_parser
from hibio.config.files import ConfigError, changed, to_dict
from preprocessing.errors import DataError
from tests.hibio.ablation_grids import ROWS, TABLED, grid_of, write_grid

# ------------------------------------------------------------------ keys
DATA = {"a": {"b": 1, "c": {"x": 1, "y": 2}}, "stages": [{"w": {"p": 1}}, {"w": {"q": 2}}]}


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("a.b", 5, lambda d: d["a"]["b"] == 5),
        ("a.c", {"x": 9}, lambda d: d["a"]["c"] == {"x": 9, "y": 2}),
        ("stages.1.w.q", 0, lambda d: d["stages"][1] == {"w": {"q": 0}}),
        ("stages.*.w.p", 0, lambda d: d["stages"] == [{"w": {"p": 0}}, {"w": {"q": 2}}]),
        ("stages", [1], lambda d: d["stages"] == [1]),
        ("new.key", 1, lambda d: d["new"] == {"key": 1}),
    ],
)
def test_a_dotted_key_reaches_its_place_and_nothing_else(key, value, read):
    before = repr(DATA)
    result = changed(DATA, {key: value}, "rows.x")
    assert read(result)
    assert repr(DATA) == before
    untouched = [name for name in DATA if name != key.split(".")[0]]
    assert all(result[name] == DATA[name] for name in untouched)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("a..b", "is no key"),
        ("a.b.c", "is the value 1"),
        ("stages.2.w", "a list of 2"),
        ("stages.*.v.p", "no entry of the list has this key"),
        ("stages.*", "a list of 2"),
    ],
)
def test_keys_that_lead_nowhere_are_refused_with_the_row(key, words):
    with pytest.raises(ConfigError, match=rf"rows\.x.*{words}"):
        changed(DATA, {key: 0}, "rows.x")


def test_short_axis_names_unless_two_end_alike():
    assert axis_name("data.train_patients", {"data.train_patients": 0, "signal": 0}) == (
        "train_patients"
    )
    alike = {"model.omics.width": 0, "model.vision.width": 0}
    assert axis_name("model.omics.width", alike) == "model.omics.width"


# ------------------------------------------------------------------ jobs
def test_jobs_are_numbered_fold_by_fold_row_by_row_seed_by_seed(toy_stores, tmp_path):
    settings = {"seeds": [0, 1], "folds": ["patient01", "patient03"]}
    grid = grid_of(tmp_path, toy_stores, settings=settings, baselines=True)
    jobs = plan(grid)
    assert [job.number for job in jobs] == list(range(1, 11))
    expected = []
    for fold in (1, 3):
        for row in ROWS:
            expected += [f"all/{row}/fold-patient0{fold}/seed-{seed}" for seed in (0, 1)]
        expected.append(f"all/baselines/fold-patient0{fold}/seed-0")
    assert [job.name for job in jobs] == expected
    assert [job.name for job in plan(grid)] == expected
    for job in jobs:
        assert job.reference.config.variant == "flat"
        assert job.job.config.folds == (job.job.fold,)
        assert job.job.config.seeds == (job.job.seed,)
        assert job.folder == grid.out / job.name


def test_a_row_differs_from_the_run_in_what_it_names(toy_stores, tmp_path):
    first, second = (to_dict(job.job.config) for job in plan(grid_of(tmp_path, toy_stores)))
    assert second["stages"][0]["weights"].pop("pathway/kl") == 0.25
    assert (first.pop("variant"), second.pop("variant")) == ("flat", "pathways")
    assert first == second


def test_every_cell_runs_every_row_on_the_same_test_slides(toy_stores, tmp_path):
    sweep = {"genes.keyword_genes": [8, 16], "data.train_patients": [1, 2]}
    jobs = plan(grid_of(tmp_path, toy_stores, sweep=sweep))
    assert len(jobs) == 2 * 2 * len(ROWS)
    cells = list(dict.fromkeys(job.cell.name for job in jobs))
    assert cells == [f"keyword_genes={k},train_patients={n}" for k in (8, 16) for n in (1, 2)]
    for job in jobs:
        assert job.job.config.genes.keyword_genes == job.cell.point["keyword_genes"]
        assert job.reference.config.genes.keyword_genes == job.cell.point["keyword_genes"]
        assert job.job.config.data.train_patients == job.cell.point["train_patients"]


def test_the_order_of_groups_is_the_order_of_rows(toy_stores, tmp_path):
    rows = {**ROWS, "soft": {"stages.0.weights.pathway/kl": 0.1}}
    grid = grid_of(tmp_path, toy_stores, rows=rows, groups={"anchors": ["soft", "pathways"]})
    assert grid.ordered_rows == ("soft", "pathways", "flat")
    assert [grid.group_of(row) for row in grid.ordered_rows] == ["anchors", "anchors", ""]


def test_the_folder_of_stores_may_be_given(toy_stores, tmp_path):
    grid = grid_of(tmp_path, tmp_path / "nothing")
    assert all(job.job.config.data.stores == toy_stores for job in plan(grid, toy_stores))


@pytest.mark.parametrize(("index", "numbers"), [(1, [1, 2]), (2, [3]), (3, [4, 5])])
def test_parts_are_neighbours_and_cover_every_job_once(index, numbers):
    assert part_of([1, 2, 3, 4, 5], index, 3) == numbers


def test_without_parts_an_index_is_one_job():
    assert part_of("abc", None, None) == list("abc")
    assert [part_of("abc", i, None) for i in (1, 2, 3)] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("index", "parts", "words"),
    [(0, None, "from 1 to 3"), (4, None, "from 1 to 3"), (1, 4, "1 to that"), (None, 2, "--index")],
)
def test_an_index_beyond_the_list_is_refused(index, parts, words):
    with pytest.raises(ConfigError, match=words):
        part_of("abc", index, parts)


def test_the_list_has_a_line_a_job_with_its_state(toy_stores, tmp_path):
    grid = grid_of(tmp_path, toy_stores)
    lines = listing(grid, plan(grid)).splitlines()
    assert [line.split() for line in lines] == [
        ["1", "all/flat/fold-patient03/seed-0", "-"],
        ["2", "all/pathways/fold-patient03/seed-0", "-"],
    ]


# ------------------------------------------------------------------ simulated cohorts
def test_cohorts_are_named_by_their_settings(tmp_path):
    config = CohortsConfig({"n_slides": 3, "n_patients": 3}, {"signal": (0.2, 0.8)})
    low, high = cohorts_of(config, tmp_path)
    assert (low.config.signal, high.config.signal) == (0.2, 0.8)
    assert low.patients == ("patient01", "patient02", "patient03")
    assert low.stores.parent == tmp_path / "cohorts"
    again = next(
        cohorts_of(CohortsConfig({"n_patients": 3, "n_slides": 3}, config.sweep), tmp_path)
    )
    assert again.stores == low.stores != high.stores
    finer = CohortsConfig(config.simulate, config.sweep, patch_px=16)
    assert next(cohorts_of(finer, tmp_path)).stores != low.stores


def test_a_cohort_like_real_sections_says_only_what_differs(tmp_path):
    config = CohortsConfig({"n_slides": 4, "n_patients": 4}, {"signal": (0.2,)}, like="her2st")
    (cohort,) = cohorts_of(config, tmp_path)
    assert (cohort.config.pitch_um, cohort.config.n_slides, cohort.config.signal) == (200, 4, 0.2)
    with pytest.raises(DataError, match="her2st, mob"):
        next(cohorts_of(CohortsConfig(like="mouse"), tmp_path))


def test_a_grid_of_cohorts_is_planned_without_simulating(toy_stores, tmp_path):
    cohorts = {"simulate": {"n_slides": 3, "n_patients": 3}, "sweep": {"signal": [0.2, 0.8]}}
    settings = {"folds": ["each"]}
    grid = grid_of(tmp_path, toy_stores, cohorts=cohorts, settings=settings)
    jobs = plan(grid)
    assert len(jobs) == 2 * 3 * len(ROWS)
    assert {job.job.fold for job in jobs} == {"patient01", "patient02", "patient03"}
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--data cannot be used"):
        plan(grid, toy_stores)


@pytest.mark.parametrize(
    ("simulate", "words"),
    [
        ({"n_slide": 3}, "did you mean 'n_slides'"),
        ({"signal": 2.0}, "outside 0 to 1"),
        ({"signal": "high"}, "expected a number"),
    ],
)
def test_simulator_settings_are_checked_when_planned(tmp_path, simulate, words):
    with pytest.raises((ConfigError, DataError), match=words):
        list(cohorts_of(CohortsConfig(simulate), tmp_path))


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "flatt"}, "reference names the row 'flatt'.*did you mean 'flat'"),
        ({"rows": {}}, r"rows: none"),
        ({"groups": {"g": ["nobody"]}}, r"groups\.g names the row 'nobody'"),
        ({"groups": {"g": ["flat"], "h": ["flat"]}}, "'flat' twice"),
        (
            {"terms": {"t": {"row": "pathways", "control": "pathway"}}},
            r"terms\.t\.control.*did you mean 'pathways'",
        ),
        ({"rows": {"flat": {}, "baselines": {}}}, r"rows\.baselines: a row's name"),
        ({"rows": {"flat": {}, "a/b": {}}}, "letters, digits"),
        ({"tasks": {}}, "tasks needs a task"),
        ({"tasks": {"retrieval": []}}, "tasks needs a task"),
        ({"tasks": {"retreival": ["x"]}}, "did you mean 'retrieval'"),
        ({"tasks": {"outcome": ["auroc"]}}, "scores all folds of a seed together"),
        ({"sweep": {"genes.keyword_genes": []}}, "needs values that differ"),
        ({"sweep": {"genes.keyword_genes": [8, 8]}}, "needs values that differ"),
        ({"level": 1.0}, "level 1.0 must lie"),
        ({"refrence": "flat"}, "did you mean 'reference'"),
    ],
)
def test_grids_that_cannot_be(toy_stores, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        grid_of(tmp_path, toy_stores, **changes)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"x": {"model.omics.widht": 3}}, r"rows\.x: unknown key.*model\.omics\.width"),
        ({"x": {"modell.dim": 3}}, r"rows\.x: unknown key 'modell'; did you mean 'model'"),
        ({"x": {"genes.keyword_genes": "many"}}, r"rows\.x.*whole number"),
        ({"x": {"stages.0.weights.pathway/kll": 1.0}}, r"rows\.x.*did you mean 'pathway/kl'"),
        ({"x": {"folds": ["patient01"]}}, r"rows\.x: folds must be the same"),
        ({"x": {}}, "rows 'flat' and 'x' have the same settings"),
        ({"x": {"seeds": [0]}}, "rows 'flat' and 'x' have the same settings"),
    ],
)
def test_rows_that_cannot_be(toy_stores, tmp_path, rows, words):
    grid = grid_of(tmp_path, toy_stores, rows={"flat": {}, **rows})
    with pytest.raises(ConfigError, match=words):
        plan(grid)


def test_a_row_given_twice_is_an_error_of_the_file(toy_stores, tmp_path):
    path = write_grid(tmp_path, toy_stores)
    text = path.read_text()
    path.write_text(text.replace("  flat: {}\n", "  flat: {}\n  flat: {}\n"))
    assert path.read_text() != text
    with pytest.raises(ConfigError, match="key 'flat' is given twice"):
        load_grid(path)


def test_an_empty_folder_of_stores_says_what_to_do(toy_stores, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, DataError), match=r"empty|no store"):
        plan(grid_of(tmp_path, toy_stores), tmp_path / "empty")


def test_a_missing_run_is_named(toy_stores, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        plan(grid_of(tmp_path, toy_stores, run="none.yaml"))


def test_settings_can_be_overridden_from_the_command_line(toy_stores, tmp_path):
    path = write_grid(tmp_path, toy_stores, tasks=TABLED)
    grid = load_grid(path, ["settings.seeds=[3, 4]", "draws=100"], tmp_path / "elsewhere")
    assert [job.job.seed for job in plan(grid)] == [3, 4, 3, 4]
    assert (grid.draws, grid.out) == (100, tmp_path / "elsewhere")


# ------------------------------------------------------------------ what is shipped
SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs" / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_grid_can_be_planned_and_names_its_own_command(path, toy_stores, tmp_path):
    command = path.read_text().splitlines()[0].removeprefix("# ").split()
    options = build_parser(COMMANDS).parse_args(command[1:])
    assert options.config.name == path.name
    simulated = load_grid(path).cohorts is not None
    assert simulated == (options.data is None)
    folds = [] if simulated else ["settings.folds=[patient01]"]
    grid = load_grid(path, folds, tmp_path / "out")
    jobs = plan(grid, None if simulated else toy_stores)
    cells = {job.cell.name for job in jobs}
    seeds = len({job.job.seed for job in jobs})
    assert len(jobs) == len(cells) * (len(grid.rows) * seeds + grid.baselines)
    assert seeds >= 2
    if simulated:  # the test patients exist and are few enough
        held_out = set(jobs[0].job.fold.split("+"))
        for job in jobs:
            patients = set(job.cell.cohort.patients)
            assert held_out < patients
            limit = job.job.config.data.train_patients
            assert limit is None or limit <= len(patients - held_out)


def test_the_grid_of_the_documentation_is_one(toy_stores, tmp_path):
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "ablation.md").read_text()
    (tmp_path / "grid.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    run = root / "configs" / "her2st_flat.yaml"
    settings = [f"run={run}", "sweep={}", "settings.folds=[each]"]
    grid = load_grid(tmp_path / "grid.yaml", settings, tmp_path / "out")
    assert len(plan(grid, toy_stores)) == 3 * (3 * 3 + 1)
    for path in SHIPPED:
        assert f"`{path.stem}`" in text
