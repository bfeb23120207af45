"""House rules that ruff does not know (docs/architecture.md), each with a planted violation."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layers import imports_of, module_name, source_files

ROOT = Path(__file__).resolve().parents[1]
CODE = ("pathways", "preprocessing", "hibio", "eval")
FOLDERS = (*CODE, "tests", "benchmarks", "configs", ".ci")
TEXT = {".py", ".yaml", ".yml", ".cfg", ".toml", ".sh", ".md"}
NO_SUFFIX = {"Makefile", "run"}

FILE_LINES, TEST_LINES, TRAIN_LINES, FUNCTION_LINES = 500, 500, 100, 60
FACE_LINES, ALONE = 40, 0.12
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
PICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MACHINE = re.compile(r"(?<![\w.~/-])/(work|tmp|root|home|Users|mnt|scratch|private)(/|\b)")
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b")
COMMAND = re.compile(r"^# .*\b(python|torchrun|deepspeed|hibio|make)\b")


def text_files(root: Path) -> list[Path]:
    inside = [path for folder in FOLDERS for path in (root / folder).rglob("*")]
    files = [path for path in [*inside, *root.iterdir()] if path.is_file()]
    return sorted(path for path in files if path.suffix in TEXT or path.name in NO_SUFFIX)


def python_files(root: Path) -> list[Path]:
    return [path for path in text_files(root) if path.suffix == ".py"]


def long_files(path: Path, root: Path) -> Iterator[str]:
    """Files stay short enough to be read in one go."""
    limit = TEST_LINES if path.relative_to(root).parts[0] == "tests" else FILE_LINES
    limit = TRAIN_LINES if path == root / "train.py" else limit
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > limit:
        yield f"{lines} lines, at most {limit}"


def long_functions(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} has {lines} lines, at most {FUNCTION_LINES}"


def swallowed_errors(tree: ast.AST) -> Iterator[str]:
    """`except:` and `except Exception:` that do nothing hide every bug there is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            broad = any(name in caught.split(", ") for name in ("Exception", "BaseException"))
            silent = all(
                isinstance(one, ast.Pass | ast.Continue)
                or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
                for one in node.body
            )
            if not caught or (broad and silent):
                yield f"line {node.lineno} swallows errors; name what is expected and tell it"


def unpickling(tree: ast.AST) -> Iterator[str]:
    """Reading a pickle runs whatever its writer put in."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.keyword):
            told = ast.unparse(node)
            if told in ("allow_pickle=True", "weights_only=False"):
                yield f"line {node.lineno} reads pickles ({told})"
        for name in names:
            if name.partition(".")[0] in PICKLE:
                yield f"imports the pickle module {name}"


def mutable_globals(tree: ast.Module) -> Iterator[str]:
    """`global` statements: state that no signature shows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno} changes the global {', '.join(node.names)}"


def bad_lines(path: Path, pattern: re.Pattern[str], what: str) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if pattern.search(line):
            yield f"line {number} has {what}: {line.strip()[:60]}"


def config_without_command(path: Path) -> Iterator[str]:
    """A shipped config begins with the command that runs this very file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    if not (COMMAND.match(first) and path.name in first):
        yield f"the first line must be '# COMMAND ... {path.name}', found {first[:60]!r}"


def complaints_about(path: Path, root: Path) -> Iterator[str]:
    part = path.relative_to(root).parts[0]
    if path != ROOT / "tests" / Path(__file__).name:  # this file names what it looks for
        yield from bad_lines(path, MACHINE, "a machine's path")
    if part == "configs" and path.suffix in (".yaml", ".yml"):
        yield from config_without_command(path)
    if path.suffix != ".py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from long_files(path, root)
    for rule in (long_functions, swallowed_errors, unpickling, mutable_globals):
        yield from rule(tree)
    if {path.stem, path.parent.name} & VAGUE:
        yield "a module is named by what is in it, not utils, helpers or common"
    if part in CODE or path.name == "train.py":
        yield from bad_lines(path, LEFTOVER, "something unfinished")


def violations(root: Path) -> list[str]:
    files = text_files(root)
    return [f"{p.relative_to(root)}: {told}" for p in files for told in complaints_about(p, root)]


def one_importer(root: Path) -> tuple[list[str], int]:
    """Modules that one other module imports and that are no door; and how many there are."""
    files = source_files(root)
    known = {module_name(path, root) for path in files}
    importers: dict[str, set[str]] = {name: set() for name in known}
    for path in files:
        for found in imports_of(path, root, known):
            if found.target in known and found.target != found.module:
                importers[found.target].add(found.module)
    faces = {module_name(p, root) for p in files if is_face(p)}
    rooms = [name for name in sorted(known - faces) if name != "train"]
    alone = [f"{n} <- {min(by)}" for n in rooms if len(by := importers[n]) == 1 and not by & faces]
    return alone, len(rooms)


def is_face(path: Path) -> bool:
    """A short `__init__.py`: a face or a table, whose entries are doors."""
    return path.name == "__init__.py" and len(path.read_text().splitlines()) < FACE_LINES


def test_most_modules_are_shared_or_doors():
    alone, rooms = one_importer(ROOT)
    assert rooms > 100
    assert len(alone) <= ALONE * rooms, (
        f"{len(alone)} of {rooms} modules have one importer only, at most {ALONE:.0%} should: join "
        "one with its importer where the idea is one (files may have 500 lines), or make it an "
        f"entry of a package's table: {', '.join(alone)}"
    )


def test_a_module_with_one_importer_is_found(tmp_path):
    for file in ("eval/__init__.py", "eval/a.py", "eval/b.py", "eval/tasks/__init__.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "eval/tasks/door.py").write_text("import eval.b\n")
    (tmp_path / "eval/tasks/__init__.py").write_text("from eval.tasks import door\n")
    (tmp_path / "eval/a.py").write_text("import eval.b\n")
    assert one_importer(tmp_path) == ([], 3)
    (tmp_path / "eval/tasks/door.py").write_text("")
    assert one_importer(tmp_path) == (["eval.b <- eval.a"], 3)


def test_the_rules_hold():
    assert len(python_files(ROOT)) > 20
    assert violations(ROOT) == []


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * 60
PLANTED = [
    ("hibio/model.py", "x = 1\n" * 501, "501 lines, at most 500"),
    ("tests/test_x.py", "x = 1\n" * 501, "at most 500"),
    ("train.py", "x = 1\n" * 101, "at most 100"),
    ("eval/run.py", LONG_FUNCTION, "f has 61 lines"),
    ("eval/run.py", "class A:\n    async " + LONG_FUNCTION.replace("    ", "        "), "61 lines"),
    ("eval/run.py", "try:\n    f()\nexcept Exception:\n    pass\n", "swallows"),
    (
        "eval/run.py",
        "for x in y:\n    try:\n        f()\n    except:\n        continue\n",
        "swallow",
    ),
    ("hibio/batch.py", "from pickle import load\n", "module pickle"),
    ("hibio/batch.py", "import numpy\nnumpy.load(f, allow_pickle=True)\n", "allow_pickle"),
    ("hibio/batch.py", "import torch\ntorch.load(f, weights_only=False)\n", "weights_only"),
    ("hibio/batch.py", "def f():\n    global x\n    x = 1\n", "changes the global x"),
    ("hibio/batch.py", "path = '/work/main'\n", "a machine's path"),
    ("configs/a.yaml", "# python train.py --config configs/a.yaml\nout: /tmp/x\n", "machine's"),
    ("README.md", "Look into /root/data.\n", "a machine's path"),
    ("preprocessing/readers/utils.py", "", "not utils"),
    ("pathways/common/gmt.py", "", "not utils"),
    ("pathways/gmt.py", "x = 1  # TODO more\n", "unfinished"),
    ("pathways/gmt.py", "def f():\n    raise NotImplementedError\n", "unfinished"),
    ("configs/a.yaml", "seed: 1\n", "must be '# COMMAND"),
    ("configs/a.yaml", "# A nice configuration\nseed: 1\n", "must be '# COMMAND"),
    ("configs/a.yaml", "# python train.py --config configs/b.yaml\n", "must be '# COMMAND"),
]


@pytest.mark.parametrize(("file", "text", "words"), PLANTED)
def test_a_planted_violation_is_found(tmp_path, file, text, words):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1
    assert found[0].startswith(f"{file}: ")
    assert words in found[0]


FINE = [
    ("hibio/model.py", "x = 1\n" * 500),
    ("tests/test_x.py", "x = 1\n" * 500),
    ("eval/run.py", LONG_FUNCTION.replace("    x = 1\n", "", 1)),
    ("eval/run.py", "try:\n    f()\nexcept KeyError:\n    pass\n"),
    ("eval/run.py", "try:\n    f()\nexcept Exception as error:\n    tell(error)\n"),
    ("hibio/batch.py", "x = 'a/work/b', 'https://x.org/home/', 'and/or', './root', '~/work'\n"),
    ("configs/a.yaml", "# python train.py --config configs/a.yaml\nseed: 1\n"),
    ("README.md", "`hibio demo --out demo`\n"),
]


@pytest.mark.parametrize(("file", "text"), FINE)
def test_what_is_allowed_is_not_reported(tmp_path, file, text):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []
