"""Leaks between training and test samples, and from pretraining, are found; clean folders are."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from PIL import Image
from scipy import sparse

from eval.hest_bench.audit import (
    Finding,
    audit_task,
    corpus_of,
    patients_of,
    read_patient_table,
    shared_part,
)
from eval.hest_bench.layout import BenchTask, read_tasks
from eval.hest_bench.samples import (
    MAX_BITS,
    SampleFacts,
    alike_part,
    difference_hash,
    read_facts,
    spot_keys,
)
from preprocessing.errors import DataError
from tests.eval.hest_bench.bench_folder import SAMPLES, write_split


def audited(folder: Path, **changes) -> list[Finding]:
    (task,) = read_tasks(folder)
    known = facts_of(task)
    return audit_task(task, known, changes.pop("patients", patients_of(task, folder)), **changes)


def facts_of(task: BenchTask) -> dict[str, SampleFacts]:
    return {sample.sample_id: read_facts(sample) for sample in task.samples}


def test_a_clean_folder_has_no_finding(bench: Path, task: Path) -> None:
    assert audited(bench) == []
    assert patients_of(read_tasks(task)[0], bench)["sim002"] == "patient02"


def test_a_sample_or_a_patient_on_both_sides_is_found(bench: Path, task: Path) -> None:
    write_split(task, 1, SAMPLES, ["sim002"])
    (found,) = [f for f in audited(bench) if f.check == "sample"]
    assert (found.kind, found.split) == ("leak", "1")
    write_split(task, 1, ["sim001", "sim003"], ["sim002"])
    path = task / "metadata" / "sim002.json"
    path.write_text(json.dumps({"patient": "patient01"}))
    found = [f for f in audited(bench) if f.check == "patient"]
    assert [f.split for f in found] == ["0", "1"]
    assert "patient 'patient01' is in training (sim001) and in test (sim002)" in found[1].text
    assert str(found[1]).startswith("LEAK TOY, fold 1")


def test_unknown_patients_are_told_and_a_table_helps(
    bench: Path, task: Path, tmp_path: Path
) -> None:
    shutil.rmtree(task / "metadata")
    (found,) = audited(bench)
    assert (found.kind, found.check) == ("unchecked", "patient")
    table = tmp_path / "HEST_v1.csv"
    rows = [f"{name},Patient 1,A study" for name in SAMPLES]
    table.write_text("\n".join(["id,patient,dataset_title", *rows]))
    patients = patients_of(read_tasks(bench)[0], bench, table)
    assert patients["sim003"] == "A study: Patient 1"
    assert len(audited(bench, patients=patients)) == 6
    table.write_text("sample,patient\na,b\n")
    with pytest.raises(DataError, match="columns id and patient"):
        read_patient_table(table)


def test_metadata_that_disagree_are_refused(bench: Path, task: Path) -> None:
    (bench / "metadata").mkdir()
    (bench / "metadata" / "sim001.json").write_text(json.dumps({"patient": "other"}))
    with pytest.raises(DataError, match="different metadata"):
        patients_of(read_tasks(bench)[0], bench)


def test_a_copied_section_is_found_under_another_name_and_order(bench: Path, task: Path) -> None:
    source, target = (task / "patches" / f"{name}.h5" for name in SAMPLES[:2])
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:  # the patches of sim001 in another order, as sim002
        images = file["img"][:][::-1]
        file["img"][:] = images
    names = anndata.read_h5ad(task / "adata" / "sim001.h5ad", backed="r").obs_names
    with h5py.File(target, "r+") as file:
        del file["barcode"]
        file["barcode"] = np.array([name.encode() for name in names])
    shutil.copy(task / "adata" / "sim001.h5ad", task / "adata" / "sim002.h5ad")
    found = audited(bench)
    assert {(f.check, f.split) for f in found} == {
        ("counts", "0"),
        ("counts", "1"),
        ("patches", "0"),
        ("patches", "1"),
    }
    assert "100 % of the counts of test sample sim002 are those of sim001" in found[2].text


def test_the_same_image_under_another_name_is_found_after_it_was_stored_anew(
    bench: Path, task: Path
) -> None:
    source, target = (task / "patches" / f"{name}.h5" for name in SAMPLES[:2])
    with h5py.File(source) as own, h5py.File(target, "r+") as other:
        n = min(len(own["img"]), len(other["img"]))
        for i in range(n):  # another brightness, compressed again: no pixel need be equal
            brighter = Image.fromarray((own["img"][i] * 0.9 + 12).astype(np.uint8))
            brighter.save(file := io.BytesIO(), "JPEG", quality=85)
            other["img"][i] = np.asarray(Image.open(file))
    found = [f for f in audited(bench) if f.check == "patches"]
    assert {f.split for f in found} == {"0", "1"}
    assert "look like some of" in found[0].text
    assert found[0].kind == "leak"


def cut_rows(grey: np.ndarray) -> list[np.ndarray]:
    return [grey[9 * r : 9 * r + 9].mean(axis=0) for r in range(8)]


def test_hashes_equal_a_loop_over_means_and_pairs() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 72, 72, 3)).astype(np.uint8)
    images[1:3] = images[0]
    images[2, :40, :9] = 255
    images[4] = 200
    slow = []
    for image in images:
        grey = image.mean(axis=2)
        rows = [[row[8 * c : 8 * c + 8].mean() for c in range(9)] for row in cut_rows(grey)]
        bits = [right > left for row in rows for left, right in pairwise(row)]
        slow.append(np.packbits(bits).view(np.uint64)[0])
    found = difference_hash(images)
    assert found[:4].tolist() == slow[:4]
    assert found[4] == 0  # blank
    assert (difference_hash(images // 2 + 20) == found)[:2].all()
    part = alike_part(found, found[:1])
    near = [int(a ^ found[0]).bit_count() <= MAX_BITS for a in found[:4]]
    assert part == np.mean(near) > 0
    assert alike_part(found[4:], found) == 0


def test_pretraining_is_found_by_id_and_by_content(bench: Path, toy_stores: Path) -> None:
    by_id, unread = corpus_of("hibio", ["sim003", "elsewhere"], None)
    assert unread == ["sim003", "elsewhere"]
    (found,) = audited(bench, corpora=[by_id])
    assert (found.check, "id of test sample sim003" in found.text) == ("pretraining", True)
    by_content, unread = corpus_of("hibio", ["sim003"], toy_stores)
    assert unread == []
    renamed = replace(by_content, slides=("new",), keys={"new": by_content.keys["sim003"]})
    (found,) = audited(bench, corpora=[renamed])
    assert "slide new, which has 100 % of the spots of test sample sim003" in found.text
    (found,) = audited(bench, corpora=[by_content])
    assert found.kind == "leak"
    other = replace(by_content, keys={"sim003": np.array([1, 2], np.uint64)})
    (found,) = audited(bench, corpora=[other])
    assert found.kind == "unchecked"
    assert "but other counts" in found.text
    kin = replace(by_content, slides=("kin",), keys={}, patients={"study: 1": "kin"})
    patients = {"sim001": "study: 1", "sim002": "study: 2", "sim003": "study: 3"}
    (found,) = audited(bench, corpora=[kin], patients=patients)
    assert found.kind == "leak"
    assert "slide kin of patient 'study: 1', whom test sample sim001 is of" in found.text
    assert list(by_content.patients.values()) == ["sim003"]


def test_values_that_are_no_counts_are_told(bench: Path) -> None:
    (task,) = read_tasks(bench)
    known = facts_of(task)
    known["sim001"] = replace(known["sim001"], whole=False)
    (found,) = audit_task(task, known, dict.fromkeys(SAMPLES, ""), [])[:1]
    assert "sim001 is not whole numbers" in found.text


def test_keys_do_not_depend_on_the_order_of_genes_and_differ_for_other_counts() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, (40, 60))
    genes = np.array([f"G{i}" for i in range(60)])
    order = rng.permutation(60)
    keys = spot_keys(sparse.csr_matrix(counts, dtype=float), genes)
    turned = spot_keys(sparse.csr_matrix(counts[:, order], dtype=float), genes[order])
    np.testing.assert_array_equal(keys, turned)
    assert len(set(keys.tolist())) == 40
    counts[3, 5] += 1
    changed = spot_keys(sparse.csr_matrix(counts, dtype=float), genes)
    assert np.flatnonzero(changed != keys).tolist() == [3]
    few = np.zeros((1, 60))
    few[0, :9] = 2
    assert spot_keys(sparse.csr_matrix(few), genes).tolist() == [0]


def test_the_shared_part_counts_spots_with_a_key() -> None:
    own, other = np.array([0, 1, 2, 3], np.uint64), np.array([0, 3, 2, 9], np.uint64)
    assert shared_part(own, other) == pytest.approx(2 / 3)
    assert shared_part(np.zeros(3, np.uint64), other) == 0.0
