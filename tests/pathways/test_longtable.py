"""Long tables source, target, weight as TSV and CSV."""

import gzip
from pathlib import Path

import pytest

from pathways import PathwayError, load_pathways


def test_separators_gzip_and_optional_weight(tmp_path: Path) -> None:
    rows = [("P", "NA", "2"), ("P", "G2", "-0.5"), ("Q r", "G2", "1")]
    for name, mark in (("a.tsv", "\t"), ("a.csv", ","), ("a.tsv.gz", "\t"), ("a.csv.gz", ",")):
        lines = [mark.join(("extra", "target", "source", "weight"))]
        lines += [mark.join(("1", gene, source, weight)) for source, gene, weight in rows]
        data = "\r\n".join([*lines, "", ""]).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        database = load_pathways(name, root=tmp_path)
        assert database.names == ("P", "Q r")
        assert database.genes_of("P") == ("NA", "G2")  # NA is a gene here, not a missing value
        assert database.table["weight"].tolist() == [2.0, -0.5, 1.0]
    (tmp_path / "b.tsv").write_text("source\ttarget\nP\tG1\n")
    assert load_pathways("b.tsv", tmp_path).table["weight"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tf\ttarget\nA\tG\n", ["line 1", "source missing", "tf, target"]),
        ("source\ttarget\tweight\nA\tG\t1\nA\tH\tbig\n", ["line 3", "'big'"]),
        ("source\ttarget\tweight\nA\tG\t0\n", ["line 2", "other than 0"]),
        ("source\ttarget\tweight\nA\tG\tnan\n", ["line 2", "finite"]),
        ("source\ttarget\nA\tG\n\nB\tG\nA\tG\n", ["line 2", "line 5", "G in A"]),
        ("source\ttarget\nA\t\n", ["line 2", "empty source or target"]),
        ("source\ttarget\nA\tG\tx\n", ["line 2", "3 fields, the header has 2"]),
        ("source target\nA G\n", ["line 1", "missing"]),
        ("source\ttarget\n", ["no rows"]),
        ("", ["empty"]),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(text)
    with pytest.raises(PathwayError) as caught:
        load_pathways(str(path))
    for word in [str(path), *words]:
        assert word in str(caught.value)
