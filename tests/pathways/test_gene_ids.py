"""Kinds of gene identifiers, and the one transform that is offered."""

import pytest

from pathways import detect_id_type, strip_versions


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["TP53", "HLA-A", "C1orf112", "MT-CO1", "AC012345.1"], "symbol"),
        (["Trp53", "Actb", "mt-Co1", "0610009B22Rik", "H2-K1"], "mouse_symbol"),
        (["ENSG00000141510", "ENSG00000075624.17", "ENSG00000002586.20_PAR_Y"], "ensembl"),
        (["ENSMUSG00000059552"], "ensembl"),
        (["7157", "60"], "entrez"),
        (["TP53", "ENSG00000141510"], "unknown"),
        (["a gene", "?"], "unknown"),
        ([], "unknown"),
    ],
)
def test_kind(names: list[str], kind: str) -> None:
    assert detect_id_type(names) == kind
    assert detect_id_type(iter(names[::-1])) == kind


def test_four_of_five_decide() -> None:
    assert detect_id_type(["A1", "B1", "C2", "D2", "Actb"]) == "symbol"
    assert detect_id_type(["A1", "B1", "C2", "Rik1", "Actb"]) == "unknown"


def test_only_ensembl_versions_are_stripped() -> None:
    names = ["ENSG00000141510.16", "AC012345.1", "ENSG00000002586.20_PAR_Y", "ENST00000269305.9"]
    assert strip_versions(names).tolist() == [
        "ENSG00000141510",
        "AC012345.1",
        "ENSG00000002586_PAR_Y",
        "ENST00000269305",
    ]
    assert strip_versions(strip_versions(names)).tolist() == strip_versions(names).tolist()
