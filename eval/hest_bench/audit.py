"""Leakage audit of a benchmark folder: what test samples share with training and pretraining.

A finding is a leak, or something that could not be checked; nothing is passed over in silence.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from eval.compare.paired import listed
from eval.hest_bench.layout import BenchTask, Sample
from eval.hest_bench.samples import SampleFacts, alike_part, spot_keys
from preprocessing.errors import DataError
from preprocessing.readers.hest import METADATA, patient_of, read_metadata
from preprocessing.store import SlideStore
from preprocessing.store.read import stores_in

SHARED = 0.01  # share of a test sample's keys found elsewhere that makes it a duplicate
ALIKE = 0.1  # the same of patches that look the same: tissue has patches that are alike by chance

Kind = Literal["leak", "unchecked"]


@dataclass(frozen=True)
class Finding:
    """One line of the audit.

    Args:
        kind: leak, or unchecked: the information is not there.
        check: sample, patient, counts, patches or pretraining.
        task: name of the task.
        split: number of the fold, "" where it concerns all of them.
        text: what was found, in words.
    """

    kind: Kind
    check: str
    task: str
    split: str
    text: str

    def __str__(self) -> str:
        """The line as it is printed."""
        fold = f", fold {self.split}" if self.split else ""
        return f"{'LEAK' if self.kind == 'leak' else 'NOT CHECKED'} {self.task}{fold}: {self.text}"


@dataclass(frozen=True)
class Corpus:
    """What a checkpoint was trained on.

    Args:
        name: of the checkpoint.
        slides: ids of the slides of its training and of its warm start.
        keys: slide -> sorted keys of its spots' counts, of those whose stores are at hand.
        patients: patient -> one of their slides, of the same.
    """

    name: str
    slides: tuple[str, ...]
    keys: Mapping[str, np.ndarray]
    patients: Mapping[str, str] = field(default_factory=dict)


def patients_of(task: BenchTask, folder: Path, table: Path | None = None) -> dict[str, str]:
    """Patient of each sample for which one is known.

    Looked for in the split files (column patient), in ``metadata/<sample>.json`` of the task or of
    the benchmark folder (as HEST-1k has it), and in a metadata table of HEST (columns id, patient,
    dataset_title).

    Raises:
        DataError: two of these disagree, or the table lacks its columns.
    """
    rows = {} if table is None else read_patient_table(table)
    found: dict[str, str] = {}
    for sample in task.samples:
        places = [task.root / METADATA, folder / METADATA]
        files = [p / f"{sample.sample_id}.json" for p in dict.fromkeys(places)]
        stated = [patient_of(read_metadata(path), "") for path in files if path.is_file()]
        stated.append(rows.get(sample.sample_id, ""))
        known = {name for name in stated if name}
        if len(known) > 1:
            raise DataError(
                f"task {task.name}: sample {sample.sample_id} has the patients {sorted(known)} in "
                "different metadata; correct one of them"
            )
        name = sample.patient or next(iter(known), "")
        if name:
            found[sample.sample_id] = name
    return found


def read_patient_table(path: Path) -> dict[str, str]:
    """Patient by sample id from a metadata table of HEST-1k (``HEST_v1_*.csv``).

    Raises:
        DataError: not a CSV with the columns id and patient.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"id", "patient"} <= set(reader.fieldnames or ()):
                raise DataError(f"{path}: expected the columns id and patient (and dataset_title)")
            return {(row["id"] or "").strip(): patient_of(row, "") for row in reader}
    except (UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from error


def audit_task(
    task: BenchTask,
    facts: Mapping[str, SampleFacts],
    patients: Mapping[str, str],
    corpora: Sequence[Corpus] = (),
) -> list[Finding]:
    """Every finding of a task; ``corpora`` are those of the checkpoints that are measured."""
    findings = _unknown_patients(task, patients)
    odd = [name for name, own in facts.items() if not own.whole]
    if odd:
        text = f"X of {listed(odd)} is not whole numbers: counts may be normalised already"
        findings.append(Finding("unchecked", "counts", task.name, "", text))
    for split in task.splits:
        for test in split.test:
            for train in split.train:
                findings += _pair(task, split.name, (test, train), facts, patients)
    for corpus in corpora:
        findings += _pretraining(task, facts, patients, corpus)
    return findings


def corpus_of(name: str, slides: Iterable[str], stores: Path | None) -> tuple[Corpus, list[str]]:
    """The training corpus of a checkpoint; the content of slides whose store is in a folder.

    Returns:
        The corpus, and the slides whose content cannot be compared.
    """
    keys: dict[str, np.ndarray] = {}
    patients: dict[str, str] = {}
    listed = tuple(dict.fromkeys(slides))
    for path in [] if stores is None else stores_in(stores):
        with SlideStore(path) as store:
            if store.slide_id in listed and store.has_counts:
                found = spot_keys(store.counts().astype(np.float64), store.gene_names)
                keys[store.slide_id] = np.unique(found[found > 0])
                patients.setdefault(store.patient_id, store.slide_id)
    return Corpus(name, listed, keys, patients), [slide for slide in listed if slide not in keys]


def shared_part(own: np.ndarray, others: np.ndarray) -> float:
    """Share of the keys of one sample (0 is no key) that another has too; 0 without any key."""
    keyed = own[own > 0]
    return float(np.isin(keyed, others).mean()) if len(keyed) else 0.0


def _pair(
    task: BenchTask,
    split: str,
    pair: tuple[Sample, Sample],
    facts: Mapping[str, SampleFacts],
    patients: Mapping[str, str],
) -> list[Finding]:
    """What a test sample shares with a training sample of the same fold."""
    test, train = (sample.sample_id for sample in pair)
    if test == train:
        text = f"sample {test} is in training and in test"
        return [Finding("leak", "sample", task.name, split, text)]
    found = []
    if test in patients and patients[test] == patients.get(train):
        text = f"patient {patients[test]!r} is in training ({train}) and in test ({test})"
        found.append(Finding("leak", "patient", task.name, split, text))
    for check, keys in (("counts", "spot_keys"), ("patches", "patch_keys")):
        part = shared_part(getattr(facts[test], keys), getattr(facts[train], keys))
        if part >= SHARED:
            text = f"{100 * part:.0f} % of the {check} of test sample {test} are those of {train}"
            found.append(Finding("leak", check, task.name, split, text))
    part = alike_part(facts[test].patch_hashes, facts[train].patch_hashes)
    if part >= ALIKE and not any(finding.check == "patches" for finding in found):
        text = f"{100 * part:.0f} % of the patches of test sample {test} look like some of {train}"
        found.append(Finding("leak", "patches", task.name, split, text))
    return found


def _unknown_patients(task: BenchTask, patients: Mapping[str, str]) -> list[Finding]:
    unknown = [s.sample_id for s in task.samples if s.sample_id not in patients]
    if not unknown:
        return []
    text = (
        f"the patient of {len(unknown)} of {len(task.samples)} samples is not known "
        f"({listed(unknown)}); give the metadata table of HEST-1k with --metadata"
    )
    return [Finding("unchecked", "patient", task.name, "", text)]


def _pretraining(
    task: BenchTask,
    facts: Mapping[str, SampleFacts],
    patients: Mapping[str, str],
    corpus: Corpus,
) -> list[Finding]:
    """Test samples that a checkpoint has seen, by id, by content and by patient."""
    found = []
    for name in sorted({s.sample_id for split in task.splits for s in split.test}):
        alike = {slide: shared_part(facts[name].spot_keys, k) for slide, k in corpus.keys.items()}
        best = max(alike, key=lambda slide: alike[slide], default="")
        kind: Kind = "leak"
        if name in corpus.slides and alike.get(name, 1.0) < SHARED:
            kind = "unchecked"
            seen = (
                f"a slide with the id of test sample {name} but other counts: another slide, or "
                "another version of this one"
            )
        elif name in corpus.slides:
            seen = f"a slide with the id of test sample {name}"
        elif best and alike[best] >= SHARED:
            share = f"{100 * alike[best]:.0f} %"
            seen = f"slide {best}, which has {share} of the spots of test sample {name}"
        elif patients.get(name) in corpus.patients:
            slide, patient = corpus.patients[patients[name]], patients[name]
            seen = f"slide {slide} of patient {patient!r}, whom test sample {name} is of"
        else:
            continue
        text = f"{corpus.name} was trained on {seen}"
        found.append(Finding(kind, "pretraining", task.name, "", text))
    return found
