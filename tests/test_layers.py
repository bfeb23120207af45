"""The order of layers (docs/architecture.md): upper may import lower, never the reverse.

Imports are read from the syntax tree, those inside functions and under TYPE_CHECKING too, so that
nothing has to run. A checker that finds nothing is worthless, so each rule has a planted violation.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pathways", "preprocessing", "hibio", "eval")

#: Top first; parts of one layer do not import each other. The name of a package is its __init__
#: alone, that of a folder below is everything in it that has no closer name here.
LAYERS = (
    ("train",),
    ("hibio.cli", "hibio.eval", "hibio.pathways", "hibio.preprocessing"),
    ("hibio.fit",),
    ("eval",),
    ("eval.view",),
    ("eval.view.cohort", "eval.view.page"),
    ("eval.view.slide",),
    ("eval.view.model", "eval.view.tiles"),
    ("eval.against", "eval.ablation", "eval.hest_bench", "eval.predict"),
    ("eval.predict.run",),
    ("eval.predict.fit",),
    ("eval.index", "eval.predict.labels"),
    ("eval.export", "eval.query", "eval.run", "eval.search"),
    ("eval.indexed",),
    ("eval.report", "eval.settings"),
    ("eval.compare",),
    ("eval.peers", "eval.tasks"),
    ("eval.folds",),
    ("eval.embed",),
    ("eval.tables",),
    ("eval.measures", "eval.results"),
    ("eval.errors",),
    ("hibio.run",),
    ("hibio.training.trainer",),
    ("hibio.training.grad_cache",),
    ("hibio.training.engine", "hibio.training.log", "hibio.training.plan"),
    ("hibio.training.curriculum", "hibio.training.objective", "hibio.training.region_state"),
    ("hibio.training",),
    ("hibio.bank", "hibio.interop", "hibio.paths"),
    ("hibio.backbones", "hibio.model"),
    ("hibio.share",),
    ("hibio.model_card",),
    ("hibio.readout",),
    ("hibio.data", "hibio.encoders"),
    ("hibio.backbones.resolve",),
    ("hibio.backbones.networks",),
    ("hibio.backbones.registry",),
    ("hibio.artifacts",),
    ("hibio.checkpoint", "hibio.regions"),
    ("hibio.config", "hibio.losses"),
    ("hibio", "hibio.batch", "hibio.keys"),
    ("preprocessing",),
    ("preprocessing.run",),
    (
        "preprocessing.gene_ids",
        "preprocessing.hest_layout",
        "preprocessing.manifest",
        "preprocessing.qc",
    ),
    ("preprocessing.readers", "preprocessing.registration", "preprocessing.stain"),
    ("preprocessing.store", "preprocessing.tissue"),
    ("preprocessing.coexpression", "preprocessing.patches", "preprocessing.selection"),
    (
        "preprocessing.leiden",
        "preprocessing.pages",
        "preprocessing.pseudo_spots",
        "preprocessing.simulate",
        "preprocessing.slide_row",
        "preprocessing.slides",
        "preprocessing.tfidf",
    ),
    ("preprocessing.workers", "preprocessing.zarr_bounds"),
    (
        "preprocessing.graphs",
        "preprocessing.handcrafted",
        "preprocessing.hdf5",
        "preprocessing.spot_table",
    ),
    ("preprocessing.files",),
    ("preprocessing.image_transform", "preprocessing.scale", "preprocessing.sections"),
    ("preprocessing.canvas", "preprocessing.errors", "preprocessing.findings"),
    ("pathways",),
    ("pathways.anchors", "pathways.catalog", "pathways.controls"),
    ("pathways.database",),
    ("pathways.coverage", "pathways.files"),
    ("pathways.errors",),
)
#: What a part must not import, although it stands lower or belongs to others.
FORBIDDEN = {
    "pathways": {"torch", "torchvision", "timm", "deepspeed"},
    "preprocessing": {"torch", "torchvision", "timm", "deepspeed"},
    "hibio.config": {"torch"},
    "hibio.keys": {"torch"},
    "hibio.regions": {"torch"},
    "eval": {"hibio.training"},
}
#: The only parts of ours that train.py joins.
TRAIN_MAY_IMPORT = {"hibio.cli", "hibio.config", "hibio.run", "hibio.training"}
#: The only module that may import it at all.
ONLY_IN = {"deepspeed": "hibio.training.engine.deepspeed"}
#: Imported where they are used, never while a module loads.
LAZY = {
    "cucim",
    "dask",
    "deepspeed",
    "distributed",
    "faiss",
    "geopandas",
    "higra",
    "huggingface_hub",
    "imagecodecs",
    "matplotlib",
    "mlflow",
    "pyarrow",
    "pyvips",
    "shapely",
    "spatialdata",
    "starlette",
    "tensorboard",
    "timm",
    "torchvision",
    "uvicorn",
    "wandb",
    "wsidata",
    "zarr",
}


@dataclass(frozen=True)
class Import:
    """One import statement: which module imports what, where, and whether on loading."""

    module: str
    target: str
    line: int
    on_load: bool

    def told(self, reason: str) -> str:
        return f"{self.module}:{self.line} imports {self.target}: {reason}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files(root: Path) -> list[Path]:
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return [*files, *root.glob("train.py")]


def nodes(tree: ast.AST, on_load: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs when the module is loaded."""
    for child in ast.iter_child_nodes(tree):
        inside = on_load and not isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = False
        yield child, inside
        yield from nodes(child, inside)


def imports_of(path: Path, root: Path, known: set[str]) -> Iterator[Import]:
    module = module_name(path, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, on_load in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, on_load)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield Import(module, inner if inner in known else origin, node.lineno, on_load)


def belongs(module: str, part: str) -> bool:
    """Whether a module is a part or lies in it."""
    return module == part or module.startswith(f"{part}.")


def layer_of(module: str) -> tuple[int, str] | None:
    """The rank and the part that names a module most closely."""
    named = [
        (len(part), rank, part)
        for rank, parts in enumerate(LAYERS)
        for part in parts
        if module == part or (part not in PACKAGES and belongs(module, part))
    ]
    return max(named)[1:] if named else None


def complaint(found: Import) -> str | None:
    """What is wrong with one import, if anything is."""
    top = found.target.partition(".")[0]
    if top in LAZY and found.on_load:
        return f"{top} is imported where it is used, inside a function"
    if top in ONLY_IN and found.module != ONLY_IN[top]:
        return f"only {ONLY_IN[top]} may"
    for part, names in FORBIDDEN.items():
        if belongs(found.module, part) and any(belongs(found.target, name) for name in names):
            return f"{part} must not"
    if top not in PACKAGES and found.target != "train":
        return None
    upper, lower = layer_of(found.module), layer_of(found.target)
    if upper is None or lower is None:
        return "one of the two is in no layer; place it in LAYERS of tests/test_layers.py"
    if found.module == "train" and lower[1] not in TRAIN_MAY_IMPORT:
        return f"train.py joins only {', '.join(sorted(TRAIN_MAY_IMPORT))}"
    if upper[1] != lower[1] and upper[0] >= lower[0]:
        return f"{upper[1]} is not above {lower[1]}"
    return None


def violations(root: Path) -> list[str]:
    files = source_files(root)
    known = {module_name(path, root) for path in files}
    homeless = [f"{module}: in no layer" for module in sorted(known) if layer_of(module) is None]
    found = [one for path in files for one in imports_of(path, root, known)]
    told = [one.told(reason) for one in found if (reason := complaint(one))]
    return homeless + list(dict.fromkeys(told))


def circles(root: Path) -> list[list[str]]:
    """Modules that need each other, imports under TYPE_CHECKING and in functions included."""
    files = source_files(root)
    known = {module_name(path, root) for path in files}
    graph = {
        module_name(path, root): {one.target for one in imports_of(path, root, known)} & known
        for path in files
    }
    names = sorted(graph)
    place = {name: index for index, name in enumerate(names)}
    rows = [place[name] for name in names for _ in graph[name]]
    columns = [place[target] for name in names for target in graph[name]]
    edges = sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(names),) * 2)
    count, label = connected_components(edges, connection="strong")
    groups = [[name for name in names if label[place[name]] == one] for one in range(count)]
    return [group for group in groups if len(group) > 1]


def test_no_module_needs_itself():
    assert circles(ROOT) == []


def test_a_planted_circle_is_found(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/a.py").write_text("def f():\n    from eval.b import x\n")
    (tmp_path / "eval/b.py").write_text("if TYPE_CHECKING:\n    from eval import c\n")
    (tmp_path / "eval/c.py").write_text("from eval.d import y\n")
    (tmp_path / "eval/d.py").touch()
    assert circles(tmp_path) == []
    (tmp_path / "eval/d.py").write_text("import eval.a\n")
    assert circles(tmp_path) == [["eval.a", "eval.b", "eval.c", "eval.d"]]


def test_the_layers_hold():
    assert len(source_files(ROOT)) > 20
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("pathways/files.py", "import torch", "pathways must not"),
        ("pathways/files.py", "def f():\n    from torch import nn", "pathways must not"),
        ("pathways/files.py", "from preprocessing import atomic", "is not above"),
        ("preprocessing/run/__init__.py", "import torch.nn as nn", "preprocessing must not"),
        ("preprocessing/run/__init__.py", "from hibio.config import load_config", "is not above"),
        ("preprocessing/readers/visium.py", "from hibio import keys", "is not above"),
        ("hibio/data/slide.py", "from ..model import HiBio", "is not above hibio.model"),
        ("hibio/data/slide.py", "from hibio import model", "is not above hibio.model"),
        ("hibio/data/slide.py", "from . import collate\nimport eval.run", "is not above eval"),
        ("hibio/losses/region.py", "from hibio.encoders import mlp", "is not above"),
        ("hibio/model.py", "def f():\n    import hibio.training.trainer", "is not above"),
        ("hibio/batch.py", "if TYPE_CHECKING:\n    from hibio.model import HiBio", "is not above"),
        ("hibio/regions.py", "import torch", "hibio.regions must not"),
        ("hibio/config/files.py", "import torch", "hibio.config must not"),
        ("hibio/surprise.py", "", "in no layer"),
        ("eval/run.py", "def f():\n    from hibio.training import stages", "eval must not"),
        ("eval/run.py", "from hibio import training", "eval must not"),
        ("eval/report.py", "import matplotlib.pyplot as plt", "inside a function"),
        ("eval/report.py", "try:\n    import dask\nexcept ImportError:\n    pass", "inside"),
        ("eval/report.py", "class A:\n    import spatialdata", "inside a function"),
        ("hibio/training/trainer.py", "def f():\n    import deepspeed", "only hibio.training"),
        ("hibio/training/engine/deepspeed.py", "import deepspeed", "inside a function"),
        ("hibio/training/engine/torch.py", "def f():\n    import deepspeed", "only hibio.training"),
        ("train.py", "from eval.run import evaluate", "train.py joins only"),
        ("train.py", "from hibio.model import HiBio", "train.py joins only"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, code, words):
    for name in ("collate", "model", "training/stages", "training/trainer", "encoders/mlp", "keys"):
        (tmp_path / "hibio" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hibio" / f"{name}.py").touch()
    (tmp_path / "hibio/collate.py").unlink()
    for folder in ("hibio/training", "hibio/encoders", "preprocessing"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "hibio/data").mkdir()
    (tmp_path / "hibio/data/collate.py").touch()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(code + "\n")
    found = violations(tmp_path)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("hibio/training/engine/deepspeed.py", "def f():\n    import deepspeed"),
        ("eval/report.py", "if TYPE_CHECKING:\n    import matplotlib"),
        ("eval/report.py", "def f():\n    from matplotlib import pyplot"),
        ("eval/report.py", "from hibio.run import build\nfrom eval.measures import metrics"),
        ("hibio/cli.py", "def f():\n    from eval.run import evaluate"),
        ("hibio/data/slide.py", "import torch\nfrom hibio.artifacts import Artifacts"),
        ("train.py", "from hibio.run import build\nfrom hibio.config import load_config"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(code + "\n")
    assert violations(tmp_path) == []


def test_lower_packages_do_not_load_torch():
    files = [path for path in source_files(ROOT) if path.parts[len(ROOT.parts)] in PACKAGES[:2]]
    modules = [module_name(path, ROOT) for path in files]
    assert "preprocessing" in modules
    code = "import anndata, importlib, sys\nif 'torch' in sys.modules:\n    sys.exit(77)\n"
    code += f"for name in {modules!r}:\n    importlib.import_module(name)\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    if done.returncode == 77:
        pytest.skip("this anndata loads torch itself")
    assert done.returncode == 0, done.stderr or "torch was loaded"
