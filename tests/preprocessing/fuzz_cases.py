"""Damaged inputs, by number and seed, and what `prepare` and `check` make of them.

A case is a folder with a manifest, m.csv, whose files one damage went over. It is tried in a
process of its own with limited memory and time, because the libraries may crash or never return.
"""

import gzip
import io
import re
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np

from hibio.cli.check import check_path
from preprocessing import prepare
from preprocessing.errors import DataError
from preprocessing.run.preparation import SlideResult
from preprocessing.run.sifting import SlideTask
from preprocessing.slide_row import SlideRow
from preprocessing.workers import Lost, in_processes
from tests.preprocessing.fuzz_bases import BASES, PATCH, manifest

MEMORY_BYTES = 4 * 2**30
CASE_S = 60.0
BAD = ("unexpected", "traceback", "hang", "half a store")
Damage = Callable[[Path, np.random.Generator], None]


@dataclass(frozen=True)
class Case:
    """One damaged input: number, valid input, damage and seed."""

    number: int
    base: str
    damage: str
    seed: int

    @property
    def name(self) -> str:
        """A plain name, which is also its folder."""
        return f"{self.number:04d}"


def draw_cases(count: int, seed: int = 0) -> list[Case]:
    """Every damage on every input in turn, in a mixed order that depends on the seed only."""
    pairs = [(b, d) for b in BASES for d in (*FILE_DAMAGE, *_special(b))]
    pairs += [("csv", d) for d in MANIFESTS for _ in range(2)]
    rng = np.random.default_rng(seed)
    cases: list[Case] = []
    while len(cases) < count:
        for at in rng.permutation(len(pairs))[: count - len(cases)]:
            cases.append(Case(len(cases), *pairs[at], seed=int(rng.integers(2**31))))
    return cases


def _special(base: str) -> list[str]:
    fits = {"h5": HDF5_DAMAGE, "h5ad": HDF5_DAMAGE, "loom": HDF5_DAMAGE, "store": HDF5_DAMAGE}
    text = ("legacy_st", "visium mex", "csv", "xenium mex", "cosmx", "visium h5", "hd cells h5")
    picture = ("jpeg", "png", "tiled jpeg", "tiled deflate", "ome-tiff", "strips")
    found = list(fits.get(base.split()[-1], ()))
    found += list(TEXT_DAMAGE) if base in text else []
    return found + (["huge header"] if base in picture else [])


def run_cases(cases: list[Case], folder: Path, workers: int) -> Iterator[tuple[Case, SlideResult]]:
    """Try the cases -> what became of each; the status is "done" or "failed"."""
    good = folder / "good"
    for base in {case.base for case in cases}:
        (good / base).mkdir(parents=True, exist_ok=True)
        BASES[base](good / base)
    known = {case.name: case for case in cases}
    tasks = {}
    for case in cases:
        row = SlideRow(case.name, "p", good / case.base, f"{case.damage}|{case.seed}")
        tasks[case.name] = SlideTask(row, folder / case.name / "out", PATCH)
    for name, result in in_processes(attempt_case, tasks, workers, CASE_S):
        if isinstance(result, Lost):
            result = SlideResult(name, "failed", result.reason, seconds=result.seconds)
        yield known[name], result


def attempt_case(task: SlideTask) -> SlideResult:
    """In a process: copy, damage, prepare, check."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    folder, good = task.store.parent, task.row.counts_path
    begin = time.monotonic()
    damage, seed = task.row.format.split("|")
    shutil.copytree(good, folder)
    rng = np.random.default_rng(int(seed))
    (_damages()[damage])(folder, rng)
    try:
        verdict = _verdict(folder)
    except Exception as error:  # noqa: BLE001 - this is what the case looks for
        verdict = f"traceback {type(error).__name__}: {error}"
    shutil.rmtree(folder, ignore_errors=True)
    status = "failed" if verdict.startswith(BAD) else "done"
    seconds = time.monotonic() - begin
    return SlideResult(task.row.slide_id, status, verdict[:400], 0, seconds)  # type: ignore[arg-type]


def _verdict(folder: Path) -> str:
    out = folder / "out"
    checked = ""
    if out.is_dir():
        found = check_path(next(out.glob("[!.]*.h5"), out))
        checked = f"check {max((f.level for f in found), key=['PASS', 'WARN', 'FAIL'].index)}; "
    check_path(folder / "m.csv")
    try:
        report = prepare(folder / "m.csv", out, patch=PATCH)
    except DataError as error:
        return f"{checked}refused: {error}"
    rows = report.rows
    for row in rows:
        if row.reason.startswith("unexpected"):
            return f"unexpected {row.reason}"
    for path in out.glob("*.h5"):
        if path.name.startswith(".") or (rows[0].status == "failed" and not checked):
            return f"half a store {path.name} ({rows[0].reason})"
    escaped = {p.name for p in folder.parent.iterdir()} - {folder.name, "good"}
    if any(not re.fullmatch(r"\d{4}", name) for name in escaped):
        return f"half a store outside: {escaped}"
    return checked + (f"refused: {report.failed[0].reason}" if report.failed else "prepared")


def outcome(result: SlideResult) -> str:
    """A word for the table: prepared, refused, crash (contained), or one of `BAD`."""
    if result.status == "failed":
        reason = result.reason
        if reason.startswith("no result after"):
            return "hang"
        return next((b for b in BAD if reason.startswith(b)), "crash, contained")
    return "refused" if "refused" in result.reason else "prepared"


def _files(folder: Path) -> list[Path]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "m.csv"]
    stores = [p for p in found if p.parent.name == "out"]
    return stores or found


def _pick(folder: Path, rng: np.random.Generator, *endings: str) -> Path:
    found = [p for p in _files(folder) if not endings or p.name.endswith(endings)]
    return (found or _files(folder))[int(rng.integers(len(found or _files(folder))))]


def _edit(change: Callable[[bytearray, np.random.Generator], bytes | bytearray]) -> Damage:
    def damage(folder: Path, rng: np.random.Generator) -> None:
        path = _pick(folder, rng)
        path.write_bytes(change(bytearray(path.read_bytes()), rng))

    return damage


def _flipped(bits: int, first: float = 1.0) -> Damage:
    def change(data: bytearray, rng: np.random.Generator) -> bytearray:
        for at in rng.integers(0, max(1, int(8 * len(data) * first)), bits):
            data[at // 8] ^= 1 << (at % 8)
        return data

    return _edit(change)


def _overwritten(data: bytearray, rng: np.random.Generator) -> bytearray:
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 400))
    data[at : at + size] = bytes([int(rng.choice([0, 255]))]) * min(size, len(data) - at)
    return data


def _repeated(data: bytearray, rng: np.random.Generator) -> bytearray:
    first, second = sorted(int(v) for v in rng.integers(0, len(data) + 1, 2))
    return data[:second] + data[first:]


def _zipped(data: bytearray, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(50_000_000))
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _bomb() -> bytes:
    """8 GB of text in 8 MB."""
    return gzip.compress((b"a\t" * 500 + b"1\n") * 32_000, 9, mtime=0) * 256


def _become_folder(folder: Path, rng: np.random.Generator) -> None:
    path = _pick(folder, rng)
    path.unlink()
    path.mkdir()


def _other_type(folder: Path, rng: np.random.Generator) -> None:
    from tests.preprocessing.fuzz_bases import _tissue

    path = _pick(folder, rng)
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = np.arange(5)
    picture = io.BytesIO()
    from PIL import Image

    Image.fromarray(_tissue()).save(picture, "PNG")
    others = [b"a,b\n1,2\n", picture.getvalue(), (folder / "other.h5").read_bytes(), b"%PDF-1.4 x"]
    path.write_bytes(others[int(rng.integers(len(others)))])


FILE_DAMAGE: dict[str, Damage] = {
    "truncated": _edit(lambda data, rng: data[: int(rng.integers(len(data)))]),
    "end cut": _edit(lambda data, rng: data[: -int(rng.integers(1, 60))]),
    "empty": _edit(lambda data, rng: b""),
    "1 bit flipped": _flipped(1),
    "9 bits flipped": _flipped(9),
    "200 bits flipped": _flipped(200),
    "header flipped": _flipped(3, 0.02),
    "overwritten": _edit(_overwritten),
    "a part repeated": _edit(_repeated),
    "garbage": _edit(lambda data, rng: rng.bytes(max(64, len(data)))),
    "garbage behind": _edit(lambda data, rng: data + rng.bytes(3000)),
    "zip bomb": _edit(_zipped),
    "gzip bomb": _edit(lambda data, rng: _bomb()),
    "other type": _other_type,
    "a folder instead": _become_folder,
    "missing": lambda folder, rng: _pick(folder, rng).unlink(),
}

_TOKENS = ["", "nan", "inf", "-1", "1e308", "1.5", "-0", "=cmd()", "é" * 9, "\0", '"',
           "x" * 200_000, "99999999999999999999", "None", "\t", ",", "\r", "0x10", "١"]  # fmt: skip


def _text(change: Callable[[list[str], np.random.Generator], list[str]]) -> Damage:
    def damage(folder: Path, rng: np.random.Generator) -> None:
        path = _pick(folder, rng, ".csv", ".tsv", ".gz", ".mtx", ".json", ".geojson")
        data = path.read_bytes()
        packed = data[:2] == b"\x1f\x8b"
        lines = (gzip.decompress(data) if packed else data).decode("latin-1").split("\n")
        new = "\n".join(change(lines, rng)).encode("utf-8", "replace")
        path.write_bytes(gzip.compress(new) if packed else new)

    return damage


def _token(lines: list[str], rng: np.random.Generator) -> list[str]:
    for _ in range(int(rng.integers(1, 4))):
        row = int(rng.integers(len(lines)))
        parts = re.split(r"([,\t ])", lines[row])
        parts[2 * int(rng.integers((len(parts) + 1) // 2))] = str(rng.choice(_TOKENS))
        lines[row] = "".join(parts)
    return lines


def _column(lines: list[str], rng: np.random.Generator) -> list[str]:
    mark = "\t" if "\t" in lines[0] else ","
    width = len(lines[0].split(mark))
    order = rng.integers(0, width, max(1, width + int(rng.integers(-1, 2))))
    rows = [line.split(mark) for line in lines]
    return [mark.join(row[i] for i in order if i < len(row)) for row in rows]


TEXT_DAMAGE: dict[str, Damage] = {
    "odd values": _text(_token),
    "rows twice": _text(lambda lines, rng: lines[:-1] + lines[-4:]),
    "columns mixed": _text(_column),
    "rows left out": _text(lambda lines, rng: lines[:: int(rng.integers(2, 5))]),
    "no header": _text(lambda lines, rng: lines[1:]),
    "one long line": _text(lambda lines, rng: ["".join(lines) * 50]),
}


def _hdf5(change: Callable[[h5py.File, str, np.random.Generator], None]) -> Damage:
    def damage(folder: Path, rng: np.random.Generator) -> None:
        path = _pick(folder, rng, ".h5", ".h5ad", ".loom")
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visititems(lambda n, o: names.append(n) if isinstance(o, h5py.Dataset) else None)
            change(file, names[int(rng.integers(len(names)))], rng)

    return damage


def _replaced(file: h5py.File, name: str, **made: object) -> None:
    kept = dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, **made).attrs.update(kept)


def _shape_bomb(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    dtype = file[name].dtype if file[name].dtype.kind in "iuf" else np.dtype("i8")
    shape = (int(10 ** rng.integers(8, 14)),) + (10**4,) * (file[name].ndim - 1)
    chunks = (1 << 16,) + (1,) * (len(shape) - 1)
    _replaced(file, name, shape=shape, dtype=dtype, chunks=chunks, compression="gzip")


def _shape_attribute(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    huge = np.array([int(10 ** rng.integers(3, 18)), int(10 ** rng.integers(3, 18))])
    found = [file, *(v for v in file.values() if isinstance(v, h5py.Group))]
    for group in found:
        if "shape" in group.attrs:
            group.attrs["shape"] = huge
        if isinstance(group.get("shape"), h5py.Dataset):
            group["shape"][:] = huge


def _value(file: h5py.File, name: str, rng: np.random.Generator) -> None:
    data = file[name]
    if data.size and data.dtype.kind in "iuf" and data.ndim:
        limits = np.iinfo(data.dtype) if data.dtype.kind in "iu" else np.finfo(data.dtype)
        odd = rng.choice([limits.max, limits.min, -1 if data.dtype.kind != "u" else 3])
        data[tuple(int(rng.integers(n)) for n in data.shape)] = odd
    else:
        _replaced(file, name, data=np.arange(3.0))


HDF5_DAMAGE: dict[str, Damage] = {
    "HDF5 bomb": _hdf5(_shape_bomb),
    "absurd shape": _hdf5(_shape_attribute),
    "odd value": _hdf5(_value),
    "a dataset gone": _hdf5(lambda file, name, rng: file.__delitem__(name)),
    "other values": _hdf5(lambda f, n, r: _replaced(f, n, data=r.random((3, 2)))),
    "texts for numbers": _hdf5(lambda f, n, r: _replaced(f, n, data=["", "é", "x" * 9999])),
    "a group instead": _hdf5(lambda f, n, r: (f.__delitem__(n), f.create_group(n), None)[2]),
    "a link outside": _hdf5(
        lambda f, n, r: (f.__delitem__(n), f.__setitem__(n, h5py.ExternalLink("/etc/hosts", "x")))[
            1
        ]
    ),
    "a link in a ring": _hdf5(lambda f, n, r: (f.__delitem__(n), f.__setitem__(n, f["/"]))[1]),
}


def _huge_header(folder: Path, rng: np.random.Generator) -> None:
    """A width and height that no memory holds, in an otherwise sound picture."""
    path = _pick(folder, rng)
    data = bytearray(path.read_bytes())
    side = int(rng.choice([40_000, 65_000, 2**31 - 1]))
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif data[:2] == b"\xff\xd8":
        at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
        data[at + 5 : at + 9] = struct.pack(">HH", min(side, 65_000), min(side, 65_000))
    else:
        start = struct.unpack("<I", data[4:8])[0]
        for at in range(
            start + 2, start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0], 12
        ):
            if struct.unpack("<H", data[at : at + 2])[0] in (256, 257):
                data[at + 2 : at + 4] = struct.pack("<H", 4)
                data[at + 8 : at + 12] = struct.pack("<I", side)
    path.write_bytes(data)


def _rows(*rows: dict[str, str]) -> Damage:
    return lambda folder, rng: manifest(folder, *rows)


def _raw(change: Callable[[bytes, np.random.Generator], bytes]) -> Damage:
    def damage(folder: Path, rng: np.random.Generator) -> None:
        (folder / "m.csv").write_bytes(change((folder / "m.csv").read_bytes(), rng))

    return damage


_OK = {"counts": "counts.csv", "format": "csv", "spots": "cells.csv", "mpp": "0.5"}
MANIFESTS: dict[str, Damage] = {
    **{f"slide_id {n[:20]!r}": _rows(_OK | {"slide_id": n}) for n in (
        "../../escaped", "/escaped", "a/b", "..", ".hidden", "", "a\0b", "x" * 5000, "é",
        "-rf", "a b", "CON", "s1.h5", "..\\x")},
    **{f"{c} {v[:20]!r}": _rows(_OK | {c: v}) for c, v in (
        ("counts", "../../../../etc/passwd"), ("counts", "/etc"), ("counts", "/dev/zero"),
        ("counts", "/proc/self/mem"), ("counts", "a\0b"), ("counts", "x" * 5000), ("counts", "."),
        ("image", "/dev/zero"), ("image", "."), ("image", "counts.csv"), ("labels", "/dev/null"),
        ("labels", "."), ("spots", "/dev/random"), ("mpp", "1e-300"), ("mpp", "1e300"),
        ("mpp", "nan"), ("mpp", "-1"), ("format", "visium"), ("format", "xenium"),
        ("format", "h5ad"), ("format", "\0"), ("modality", "dna"), ("modality", "protein"),
        ("patient_id", ""), ("patient_id", "x" * 100_000), ("tissue", "\0\n\r,"))},
    "an id twice": _rows(_OK, _OK),
    "flipped manifest": _raw(lambda data, rng: bytes(b ^ (rng.random() < 0.02) for b in data)),
    "cut manifest": _raw(lambda data, rng: data[: int(rng.integers(len(data)))]),
    "garbage manifest": _raw(lambda data, rng: rng.bytes(500)),
    "UTF-16 manifest": _raw(lambda data, rng: data.decode().encode("utf-16")),
    "gzipped manifest": _raw(lambda data, rng: gzip.compress(data)),
    "open quote": _raw(lambda data, rng: data + b'"' + b"x" * 200_000),
    "NUL in manifest": _raw(lambda data, rng: data + b"\0,\0,\0"),
}  # fmt: skip


def _damages() -> dict[str, Damage]:
    special = {"huge header": _huge_header}
    return FILE_DAMAGE | TEXT_DAMAGE | HDF5_DAMAGE | MANIFESTS | special
