"""The published folder layout: what is read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.hest_bench.layout import _inside, read_gene_list, read_tasks
from preprocessing.errors import DataError
from tests.eval.hest_bench.bench_folder import SAMPLES, TASK, write_csv, write_split


def test_folds_samples_and_genes_are_read_in_order(bench: Path, task: Path) -> None:
    write_split(task, 10, SAMPLES[:1], SAMPLES[1:])
    (found,) = read_tasks(bench)
    assert (found.name, [s.name for s in found.splits]) == (TASK, ["0", "1", "2", "10"])
    assert [s.sample_id for s in found.samples] == list(SAMPLES)
    assert found.splits[1].test[0].patches == task / "patches" / "sim002.h5"
    assert found.splits[1].train[0].expression == task / "adata" / "sim001.h5ad"
    assert list(found.genes) == json.loads((task / "var_50genes.json").read_text())["genes"]
    assert read_tasks(task)[0].splits == found.splits
    with pytest.raises(DataError, match="did you mean 'TOY'"):
        read_tasks(bench, ["TOI"])


def test_a_folder_without_tasks_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected .*splits/train_0.csv"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("a", "../a.h5", "adata/sim001.h5ad"), "stay inside"),
        (("a", "/etc/hostname", "adata/sim001.h5ad"), "stay inside"),
        (("a", "patches/sim001.h5", "adata/../../x.h5ad"), "stay inside"),
        (("a", "C:\\x.h5", "adata/sim001.h5ad"), "stay inside"),
        (("a", "..\\x.h5", "adata/sim001.h5ad"), "stay inside"),
        (("a", "", "adata/sim001.h5ad"), "stay inside"),
        (("../a", "patches/sim001.h5", "adata/sim001.h5ad"), "no plain name"),
        (("..", "patches/sim001.h5", "adata/sim001.h5ad"), "no plain name"),
        (("a", "patches/none.h5", "adata/sim001.h5ad"), "is missing"),
    ],
)
def test_paths_cannot_escape(task: Path, row: tuple[str, str, str], words: str) -> None:
    write_csv(task / "splits" / "test_0.csv", [row])
    with pytest.raises(DataError, match=words):
        read_tasks(task)


@given(st.text(max_size=30))
def test_no_text_leads_out_of_the_folder(text: str) -> None:
    root = Path("bench/task")
    try:
        path = _inside(root, text, "here")
    except DataError:
        return
    assert path.resolve().is_relative_to(root.resolve())  # pragma: no cover - nothing is there


def test_files_that_do_not_fit_are_refused(task: Path) -> None:
    path = "patches/sim001.h5", "adata/sim001.h5ad"
    write_csv(task / "splits" / "test_1.csv", [("sim001", *path), ("sim001", *path)])
    with pytest.raises(DataError, match="listed twice"):
        read_tasks(task)
    write_csv(task / "splits" / "test_1.csv", [("sim001", "patches/sim002.h5", path[1])])
    with pytest.raises(DataError, match="other files"):
        read_tasks(task)
    (task / "splits" / "test_1.csv").write_text("sample_id,patches_path\na,b\n")
    with pytest.raises(DataError, match="no column 'expr_path'"):
        read_tasks(task)
    (task / "splits" / "test_1.csv").unlink()
    with pytest.raises(DataError, match="fold 1 lacks"):
        read_tasks(task)


@pytest.mark.parametrize(
    "content", ["[1]", "{}", '{"genes": []}', '{"genes": [1]}', '{"genes": ["A", "A"]}', "{"]
)
def test_a_gene_list_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "g.json").write_text(content)
    with pytest.raises(DataError, match=r"g\.json"):
        read_gene_list(tmp_path / "g.json")
