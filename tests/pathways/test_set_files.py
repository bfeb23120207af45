"""Gene-set files as programs and hands write them: all genes with their weights, or a word."""

import gzip
import json
import re
import warnings
from pathlib import Path

import pytest

from pathways import PathwayError, load_pathways

SETS = {
    "S0": ("ERBB2", "GRB7", "STARD3", "MIEN1"),
    "S1": ("CD3D", "CD2", "HLA-A", "TRAC"),
    "S2": ("COL1A2", "SPARC", "FN1", "ACTA2"),
}
ONES = {(name, gene): 1.0 for name, genes in SETS.items() for gene in genes}


def gmt(descriptions: dict[str, str] | None = None, sets: dict = SETS) -> str:
    told = descriptions or {}
    rows = [[n, *([told[n]] if n in told else []), *genes] for n, genes in sets.items()]
    return "\n".join("\t".join(row) for row in rows) + "\n"


def loaded(folder: Path, name: str, data: bytes | str) -> tuple[dict, list[str]]:
    """(set, gene) -> weight, and the warnings."""
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = load_pathways(str(path)).table
    found = {(s, t): w for s, t, w in table.itertuples(index=False)}
    return found, [str(one.message) for one in told]


NA = dict.fromkeys(SETS, "na")
PLAIN = gmt(NA)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.gmt", PLAIN, ""),
        ("a.gmt", gmt(), "description of 3 sets looks like a gene"),
        ("a.gmt", gmt({"S0": "na", "S1": "na"}), "description of 1 sets looks like a gene"),
        ("a.gmt", gmt({"S0": "KEGG", "S1": "REACTOME", "S2": "WP254"}), ""),
        ("a.gmt", gmt({"S0": "R-HSA-1", "S1": "R-HSA-22", "S2": "hsa04110"}), ""),
        ("a.gmt", gmt({"S0": "ABC1", "S1": "ABC2", "S2": "ABC3"}), ""),  # numbered in a column
        ("a.gmt", re.sub(r"([^\t\n]+)", r'"\1"', PLAIN), ""),
        ("a.gmt", PLAIN.encode("utf-16"), ""),
        ("a.gmt.gz", gzip.compress(PLAIN.encode("utf-16")), ""),
        (
            "a.csv",
            ("source,target\n" + "".join(f"{s},{g}\n" for s, g in ONES)).encode("utf-16"),
            "",
        ),
        ("s.csv", "source;target\n" + "".join(f"{s};{g}\n" for s, g in ONES), ""),
        ("s.tsv", "source,target\n" + "".join(f"{s},{g}\n" for s, g in ONES), ""),
        ("m.csv", "gs_cat,gs_name,gene_symbol\n" + "".join(f"H,{s},{g}\n" for s, g in ONES), ""),
        ("c.tsv", "term\tgene\n" + "".join(f"{s}\t{g}\n" for s, g in [*ONES, *ONES]), "12 pairs"),
        (
            "a.gmx",
            "\n".join(
                "\t".join(row)
                for row in zip(*[(n, "na", *g) for n, g in SETS.items()], strict=True)
            ),
            "",
        ),
        ("a.json", json.dumps({n: {"geneSymbols": g, "pmid": "1"} for n, g in SETS.items()}), ""),
        ("b.json", json.dumps(SETS), ""),
    ],
)
def test_the_same_sets(tmp_path: Path, name: str, data: bytes | str, said: str) -> None:
    found, told = loaded(tmp_path, name, data)
    assert found == ONES
    assert (said in " ".join(told)) if said else not told


def test_mouse_sets_without_descriptions(tmp_path: Path) -> None:
    sets = {name: tuple(gene.capitalize() for gene in genes) for name, genes in SETS.items()}
    found, told = loaded(tmp_path, "a.gmt", gmt(None, sets))
    assert len(found) == len(ONES)
    assert "looks like a gene" in told[0]
    found, told = loaded(tmp_path, "b.gmt", gmt(dict.fromkeys(SETS, "Immune"), sets))
    assert (len(found), told) == (len(ONES), [])


def test_a_list_is_one_set_named_after_its_file(tmp_path: Path) -> None:
    for name in ("mine.grp", "mine.txt", "mine.txt.gz"):
        found, told = loaded(tmp_path, name, "# a comment\nCD3D\n\nCD2\n")
        assert (found, told) == ({("mine", "CD3D"): 1.0, ("mine", "CD2"): 1.0}, [])
    with pytest.raises(PathwayError, match="no gene; expected a list of genes, one a line"):
        loaded(tmp_path, "b.grp", "CD3D\tCD2\n")


@pytest.mark.parametrize("step", [0.0, 0.25])
def test_the_weights_of_enrichr(tmp_path: Path, step: float) -> None:
    weights = {pair: 1 + step * (i % 4) for i, pair in enumerate(ONES)}
    rows = [
        "\t".join([name, "", *(f"{gene},{weights[name, gene]:.2f}" for gene in genes)])
        for name, genes in SETS.items()
    ]
    assert loaded(tmp_path, "a.gmt", "\n".join(rows)) == (weights, [])


@pytest.mark.parametrize(
    "date",
    [
        *("1-Mar", "Sep-02", "2023-03-01", "2023-03-01 00:00:00", "2-Sep-19", "01. Mrz", "1. Dez"),
        *("3/1/2023", "01.09.23", "1-Sept", "Mar-2001", "1-MAR"),
    ],
)
def test_dates_of_excel_are_named(tmp_path: Path, date: str) -> None:
    for name, text in (("a.gmt", f"S\tna\tCD2\t{date}\n"), ("a.csv", f"source,target\nS,{date}\n")):
        told = loaded(tmp_path, name, text)[1]
        assert re.search(rf"1 genes are dates \({date}\): Excel made them", told[0])
    assert not loaded(tmp_path, "b.grp", "MARCHF1\nSEPTIN2\nMARCH1\nDEC1\nsep-1\nMARS2\n")[1]
    assert not loaded(tmp_path, "b.grp", "44256\n44257\n7157\n")[1]  # Entrez ids
    numbers = loaded(tmp_path, "b.grp", "CD2\n44256\nCD3D\nCD4\n7157\n")[1]
    assert ["1 genes are numbers of days (44256): Excel" in one for one in numbers] == [True]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.gmt", PLAIN.encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.gmx", "A\tB\nna\tna\n", "2 lines; expected names, descriptions and genes"),
        ("a.gmx", "A\tA\nna\tna\nCD2\tCD3D\n", "names used twice: A"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[1]", "expected an object"),
        ("a.json", json.dumps({"A": {"genes": ["CD2"]}}), "'A' has no list of texts"),
        ("a.csv", "gs_cat,gene_symbol\nH,CD2\n", "gs_name, gene_symbol; term, gene"),
    ],
)
def test_what_is_no_file_of_sets(tmp_path: Path, name: str, data: bytes | str, said: str) -> None:
    with pytest.raises(PathwayError, match=said):
        loaded(tmp_path, name, data)
