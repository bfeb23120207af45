"""The manifest: every bad row is reported at once, arbitrary text never crashes the reader."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing import DataError, read_manifest
from preprocessing.manifest import scan_manifest, write_manifest
from preprocessing.slide_row import COLUMNS, SlideRow

HEADER = "slide_id,patient_id,counts,format"


def manifest(tmp_path: Path, text: str) -> Path:
    (tmp_path / "counts.tsv").write_text("x")
    path = tmp_path / "manifest.csv"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_manifest_or_to_root(tmp_path: Path):
    path = manifest(tmp_path, f"{HEADER},mpp,image\nA1,A,counts.tsv,visium, 0.5 ,\n\n")
    (row,) = read_manifest(path)
    assert row == SlideRow("A1", "A", tmp_path / "counts.tsv", "visium", mpp=0.5)
    (row,) = scan_manifest(path, root=tmp_path / "else")[0]
    assert row.counts == tmp_path / "else" / "counts.tsv"


def test_rows_survive_writing_and_reading(tmp_path: Path):
    (tmp_path / "a b,c.tsv").write_text("x")
    outside = tmp_path / "counts.tsv"
    outside.write_text("x")
    rows = [
        SlideRow("A1", "Ann, B", tmp_path / "in" / "c.tsv", "visium", mpp=1 / 3, tissue='"skin"'),
        SlideRow("B2", "B", outside, "legacy_st", spots=tmp_path / "a b,c.tsv", pitch_um=200.0),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c.tsv").write_text("x")
    write_manifest(rows, tmp_path / "in" / "m.csv")
    assert read_manifest(tmp_path / "in" / "m.csv") == rows
    assert '\nA1,"Ann, B",c.tsv,visium' in (tmp_path / "in" / "m.csv").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (f"{HEADER}\n", "no rows"),
        ("slide_id,patient_id,format\nA1,A,visium\n", "header: column 'counts' is missing"),
        (f"{HEADER},imge\n", "unknown column 'imge'.*did you mean 'image'"),
        (f"{HEADER},mpp,mpp\n", "'mpp' occurs twice"),
        (HEADER.replace(",", ";") + "\n", "separate the cells by commas"),
        (f"{HEADER}\nA1,A,gone.tsv,visium\n", "A1: counts file .*gone.tsv does not exist"),
        (f"{HEADER}\nA1,A,counts.tsv\n", "row 2: 3 cells, the header has 4"),
        (f"{HEADER}\n../x,A,counts.tsv,visium\n", r"row 2: slide_id '\.\./x' is not a plain name"),
        (f"{HEADER}\n..,A,counts.tsv,visium\n", "not a plain name"),
        (f"{HEADER}\na/b,A,counts.tsv,visium\n", "not a plain name"),
        (f"{HEADER}\nA1,,counts.tsv,visium\n", "patient_id is empty"),
        (f"{HEADER}\nA1,A,,visium\n", "counts is empty"),
        (f"{HEADER}\nA1,A,counts.tsv,visum\n", "'visum'.*did you mean 'visium'"),
        (f"{HEADER}\nA1,A,counts.tsv,legacy_st\n", "legacy_st needs the column 'spots'"),
        (f"{HEADER},mpp\nA1,A,counts.tsv,visium,half\n", "row 2: mpp 'half' is not a number"),
        (f"{HEADER},mpp\nA1,A,counts.tsv,visium,-1\n", "mpp is -1; expected a positive"),
        (f"{HEADER},pitch_um\nA1,A,counts.tsv,visium,inf\n", "pitch_um is inf"),
        (f"{HEADER}\nA1,A,counts.tsv,visium\nA1,B,counts.tsv,visium\n", "row 3.*'A1'.*row 2"),
        (f'{HEADER}\n"A1,A,counts.tsv,visium\n', "not a CSV text file"),
        (f"{HEADER}\nA1,A,counts.tsv,h5d\n", "'h5d'.*did you mean 'h5ad'"),
        (f"{HEADER}\nA1,A,,loom\n", "counts is empty"),
        (f"{HEADER},modality\nA1,A,counts.tsv,csv,atac\n", "'atac' is unknown; choose rna or prot"),
        (f"{HEADER},role\nA1,A,counts.tsv,csv,held\n", "role 'held' is unknown; choose train or"),
        (f"{HEADER},modality\nA1,A,counts.tsv,legacy_st,protein\n", "legacy_st holds RNA"),
        (f"{HEADER},spots\nA1,A,counts.tsv,h5ad,counts.tsv\n", "leave the column 'spots' empty"),
        (f"{HEADER},pitch_um\nA1,A,counts.tsv,hest,1\n", "holds spots already.*'pitch_um'"),
        (f"{HEADER},bin_um\nA1,A,counts.tsv,visium,8\n", "no bins of Visium HD.*'bin_um'"),
        (f"{HEADER},bin_um\nA1,A,hd,visium_hd,4\n", "bin_um is 4; .* bins of 2, 8, 16 um"),
        (f"{HEADER},pitch_um\nA1,A,hd,visium_hd,4\n", "give bin_um and leave pitch_um empty"),
        (f"{HEADER},image_scale\nA1,A,counts.tsv,xenium,1\n", "image_scale is given without"),
        (
            f"{HEADER},outcome\nA1,A,counts.tsv,visium,1\nA2,A,counts.tsv,visium,0\n",
            "patient A: the column outcome differs between the slides.*A1: '1', A2: '0'",
        ),
        (
            f"{HEADER},outcome\nA1,A,counts.tsv,visium,1\nA2,A,counts.tsv,visium,\n",
            "patient A: the column outcome differs.*A2: ''",
        ),
    ],
)
def test_bad_manifests_are_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(DataError, match=said):
        read_manifest(manifest(tmp_path, text))


def test_roles(tmp_path: Path):
    lines = ["A1,A,counts.tsv,csv,test", "A2,A,counts.tsv,csv,train", "B1,B,counts.tsv,csv,"]
    text = "\n".join([f"{HEADER},role", *lines, ""])
    (tmp_path / "m.csv").write_text(text)
    rows = read_manifest(tmp_path / "m.csv", check_files=False)
    assert [row.role for row in rows] == ["test", "train", ""]
    write_manifest(rows, tmp_path / "again.csv")
    assert read_manifest(tmp_path / "again.csv", check_files=False) == rows


def test_modality_and_outcome(tmp_path: Path):
    text = (
        f"{HEADER},modality,outcome\nA1,A,counts.tsv,csv,protein,relapse\nB1,B,counts.tsv,csv,,\n"
    )
    first, second = read_manifest(manifest(tmp_path, text))
    assert (first.modality, first.outcome) == ("protein", "relapse")
    assert (second.modality, second.outcome) == ("rna", "")
    write_manifest([first, second], tmp_path / "again.csv")
    assert read_manifest(tmp_path / "again.csv") == [first, second]


def test_all_problems_are_listed_at_once(tmp_path: Path):
    text = f"{HEADER},mpp\n../x,A,counts.tsv,visium,\nA1,A,counts.tsv,merfish,x\nB,B,no,visium,\n"
    with pytest.raises(DataError) as caught:
        read_manifest(manifest(tmp_path, text))
    message = str(caught.value)
    for part in ("4 problems", "row 2: slide_id", "row 3: unknown format", "row 3: mpp", "slide B"):
        assert part in message
    assert "\n" not in message


def test_bytes_that_are_no_text_and_no_file(tmp_path: Path):
    path = tmp_path / "m.csv"
    path.write_bytes(b"\xff\xfe\x00slide")
    with pytest.raises(DataError, match="not a CSV text file"):
        read_manifest(path)
    with pytest.raises(DataError, match="does not exist"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(DataError, match="not a file"):
        read_manifest(tmp_path)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path):
    path = manifest(tmp_path, "")
    path.write_bytes(f"\ufeff{HEADER}\r\nA1,A,counts.tsv,visium\r\n".encode())
    assert read_manifest(path)[0].slide_id == "A1"


CELLS = st.one_of(
    st.text(max_size=12),
    st.sampled_from([*COLUMNS, "visium", "legacy_st", "A1", "0.5", "nan", "1e999", "\0", '"', ""]),
)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=200),
        st.binary(max_size=200),
        st.lists(st.lists(CELLS, min_size=4, max_size=5), min_size=1, max_size=4).map(
            lambda rows: "\n".join([f"{HEADER},mpp", *(",".join(r) for r in rows)])
        ),
    )
)
def test_arbitrary_text_gives_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, text: str | bytes
):
    path = tmp_path_factory.getbasetemp() / "arbitrary.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        rows = read_manifest(path)
    except DataError:
        return
    assert rows
    assert all(isinstance(row, SlideRow) and row.slide_id for row in rows)


def test_a_path_that_a_spreadsheet_would_run_is_written_from_its_folder(tmp_path: Path):
    (tmp_path / "=1+1.h5").touch()
    row = SlideRow("s", "P", tmp_path / "=1+1.h5", "visium")
    write_manifest([row], tmp_path / "m.csv")
    assert ",./=1+1.h5," in (tmp_path / "m.csv").read_text()
    (found,) = read_manifest(tmp_path / "m.csv")
    assert found.counts.resolve() == row.counts
