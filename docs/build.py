"""What mkdocs cannot do alone: files beside docs/, parts of README, executed tutorials, checks.

``hooks`` of mkdocs.yml; run by ``make docs``. docs/ is the source; nothing is written into it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import posixpath
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "docs"
DATA = ROOT.parent / "shared" / "data"
CODE = ("hibio", "pathways", "preprocessing", "eval", "configs")
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md")  # pages that are not in docs/
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
PART = re.compile(r"<!-- README: (.+?) -->")
NEEDS = re.compile(r"<!-- needs: (.+?) -->")
SHOWS = re.compile(r"<!-- shows: (.+?) -->")
DOORS = re.compile(r"<!-- doors: (.+?) -->")
HEADING = re.compile(r"^## (.+)$", re.M)
MATH = re.compile(r'<(div|span) class="arithmatex">\s*\\[\[(](.*?)\\[\])]\s*</\1>', re.S)
SECONDS = 600  # of one cell

# Scripts that are in no Python package, from npm: what draws docs/architecture.md, and what lets
# the search run in a page that is read as a file. Name: package, file in it, its sha256.
VENDORED = {
    "mermaid.min.js": (
        "mermaid@11.12.0",
        "package/dist/mermaid.min.js",
        "07e37dfa97b337ccc85365d57eddf99b9706f09db3b59b260d0333b23b343c4b",
    ),
    "iframe-worker.js": (
        "iframe-worker@1.0.4",
        "package/shim/index.js",
        "e8e412dbcfea9b7e31b5ffa288d7b6035915e714c542f4176a0cdbe262fc9609",
    ),
}


def part(name: str) -> str:
    """One part of README: what stands before its first section, or the section of a name.

    Raises:
        ValueError: README has no such section.
    """
    opening, *rest = HEADING.split((ROOT / "README.md").read_text(encoding="utf-8"))
    parts = {"opening": opening.partition("\n")[2], **dict(zip(rest[::2], rest[1::2], strict=True))}
    if name not in parts:
        raise ValueError(f"README.md has no section {name!r}; it has {', '.join(parts)}")
    return parts[name].strip()


def site_path(path: str) -> str:
    """Where a file of the repository is in the site, both relative to their root."""
    moved = {"README.md": "index.md", "docs/results": "docs/results/index.md"}
    return moved.get(path, path).removeprefix("docs/")


def relinked(text: str, source: str, page: str) -> str:
    """The text of ``source`` (in the repository) with its links as ``page`` (in the site) needs.

    Links to files that are not there stay as they are, so that mkdocs complains of them.
    """

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / target).exists():
            return match[0]
        link = posixpath.relpath(site_path(target), posixpath.dirname(page) or ".")
        return f"{match[1]}{link}{match[3]}"

    return LINK.sub(moved, text)


def source_of(page: Any) -> str:
    """Where the text of a page is in the repository."""
    return Path(page.abs_src_path).resolve().relative_to(ROOT).as_posix()


# ---------------------------------------------------------------- tutorials


def cells(path: Path) -> Any:
    """A tutorial as a notebook that was not run: its ``bash`` and ``python`` blocks are cells."""
    import jupytext

    kernel = "{display_name: Python 3, language: python, name: python3}"
    header = f"---\njupyter:\n  kernelspec: {kernel}\n---\n\n"
    return jupytext.reads(header + path.read_text(encoding="utf-8"), fmt="md")


def needed(path: Path) -> list[str]:
    """Data that a tutorial needs and that is not beside this checkout."""
    found = NEEDS.search(path.read_text(encoding="utf-8"))
    return [name for name in found[1].split() if not (DATA / name).exists()] if found else []


def key_of(tutorials: Iterable[Path]) -> str:
    """What decides the outputs of all tutorials: their cells, the code, and the data at hand."""
    digest = hashlib.sha256()
    for path in tutorials:
        sources = [cell.source for cell in cells(path).cells if cell.cell_type == "code"]
        digest.update(repr((path.name, needed(path), sources)).encode())
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in sorted(path for path in files if "__pycache__" not in path.parts):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_tutorials(tutorials: list[Path]) -> dict[str, Any]:
    """Every tutorial by name, run in one folder in their order, or as it was run before."""
    import shutil

    import nbformat

    done = CACHE / key_of(tutorials)
    if not done.is_dir():
        shutil.rmtree(CACHE, ignore_errors=True)
        (CACHE / "work").mkdir(parents=True)
        (CACHE / "new").mkdir()
        for path in tutorials:
            nbformat.write(executed(path, CACHE / "work"), CACHE / "new" / f"{path.stem}.ipynb")
        (CACHE / "new").rename(done)
    return {path.stem: nbformat.read(done / f"{path.stem}.ipynb", 4) for path in tutorials}


def executed(path: Path, work: Path) -> Any:
    """A tutorial, run in a folder; not run where its data are not at hand.

    Raises:
        ValueError: a cell failed; with what it told.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = cells(path)
    for cell in notebook.cells:  # so that no command fails in silence
        cell.source = re.sub(r"\A%%bash\n", "%%bash\nset -eo pipefail\n", cell.source)
    if needed(path):
        return notebook
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ.update(OMP_NUM_THREADS="1", DATA=str(DATA), REPOSITORY=str(ROOT), PATH=commands)
    resources = {"metadata": {"path": str(work)}}
    try:
        NotebookClient(notebook, timeout=SECONDS, resources=resources).execute()
    except CellExecutionError:
        ran = [cell for cell in notebook.cells if cell.get("outputs")]
        told = "".join(output.get("text", output.get("evalue", "")) for output in ran[-1].outputs)
        raise ValueError(f"{path.name} failed at\n{ran[-1].source}\n{told}") from None
    return notebook


def opening(path: Path) -> str:
    """What stands under the title of a tutorial: its notebook, and whether it was run."""
    text = f"[Download this page as a notebook]({path.stem}.ipynb){{.md-button}}"
    if missing := needed(path):
        text += f"\n\n!!! note\n\n    Not run in this build: {', '.join(missing)} is not at hand."
    return text


def page_text(prose: Any, notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """A tutorial with its outputs under its cells, and the pictures among them by file name.

    Args:
        prose: the notebook as it is written now.
        notebook: the same cells of code with their outputs.
        name: of the tutorial.
    """
    outputs = iter([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])
    text, pictures = [], {}
    for cell in prose.cells:
        if cell.cell_type != "code":
            text.append(cell.source)
            continue
        magic, _, body = cell.source.partition("\n")
        shell = magic == "%%bash"
        text.append(f"```{'bash' if shell else 'python'}\n{body if shell else cell.source}\n```")
        told, before = "", len(pictures)
        for output in next(outputs):
            data = output.get("data", {})
            if "image/png" in data:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(data["image/png"])
            else:
                told += output.get("text", data.get("text/plain", ""))
        if told.strip():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", told)), default=0))
            text.append(f"{fence}{{.text .output}}\n{readable(told)}\n{fence}")
        text += [f"![What the block above draws]({file})" for file in list(pictures)[before:]]
    return "\n\n".join(text), pictures


def readable(text: str) -> str:
    """Output of a command without the overwritten states of progress bars and machine paths."""
    lines = [line.rpartition("\r")[2] for line in text.rstrip().splitlines()]
    return "\n".join(lines).replace(str(DATA), "$DATA").replace(str(ROOT), "$REPOSITORY")


# ---------------------------------------------------------------- mkdocs


def on_config(config: Any) -> Any:
    """``FOLDER/*.md`` in the navigation becomes the pages of the folder that are not named."""
    pages = {path.relative_to(ROOT).as_posix() for p in BESIDE for path in ROOT.glob(p)}
    pages |= {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages -= set(in_order(config.nav))

    def filled(entries: list[Any]) -> Iterator[Any]:
        for entry in entries:
            if isinstance(entry, str) and "*" in entry:
                folder = posixpath.dirname(entry)
                yield from sorted(page for page in pages if posixpath.dirname(page) == folder)
            elif isinstance(entry, dict):
                yield {k: list(filled(v)) if isinstance(v, list) else v for k, v in entry.items()}
            else:
                yield entry

    config.nav = list(filled(config.nav))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add what is linked outside docs/, the notebooks, their pictures, and scripts."""
    from mkdocs.structure.files import File

    def add(uri: str, **of: Any) -> None:
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, **of))

    for pattern in BESIDE:
        for path in ROOT.glob(pattern):
            add(path.relative_to(ROOT).as_posix(), abs_src_path=str(path))
    for uri in sorted({target for page in files.documentation_pages() for target in linked(page)}):
        if (ROOT / uri).is_file() and not uri.startswith("docs/"):
            add(uri, abs_src_path=str(ROOT / uri))
    for uri, content in tutorial_files(config):
        add(uri, content=content)
    for name in VENDORED:
        add(f"assets/{name}", content=vendored(name))
    return files


def tutorial_files(config: Any) -> Iterator[tuple[str, str | bytes]]:
    """Notebooks, pictures and shown pages of the tutorials; their texts are kept in `TUTORIALS`."""
    import nbformat

    named = [ROOT / "docs" / uri for uri in in_order(config.nav) if uri.startswith("tutorials/")]
    tutorials = [path for path in named if path.stem != "index"]
    ran = run_tutorials(tutorials)
    for path in tutorials:
        text, pictures = page_text(cells(path), ran[path.stem], path.stem)
        head = rf"\g<0>\n\n{opening(path)}"
        TUTORIALS[path.stem] = re.sub(r"^# .*$", head, text, count=1, flags=re.M)
        yield f"tutorials/{path.stem}.ipynb", nbformat.writes(ran[path.stem])
        for shown in SHOWS.findall(text):
            yield from shown_files(shown)
        for file, picture in pictures.items():
            yield f"tutorials/{file}", picture


TUTORIALS: dict[str, str] = {}  # name -> text with outputs, of the build that is under way


def shown_files(shown: str) -> Iterator[tuple[str, bytes]]:
    """A page that a tutorial wrote and what lies beside and below it, if it is an `index.html`."""
    page = CACHE / "work" / shown
    for path in sorted(page.parent.rglob("*")) if page.name == "index.html" else [page]:
        if path.is_file():
            yield f"tutorials/{path.relative_to(CACHE / 'work').as_posix()}", path.read_bytes()


def in_order(entries: list[Any]) -> Iterator[str]:
    """The pages of a navigation."""
    for entry in entries:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            yield from in_order(value) if isinstance(value, list) else [value]


def linked(page: Any) -> Iterator[str]:
    """Files of the repository that a page links."""
    source = source_of(page)
    for match in LINK.finditer(Path(page.abs_src_path).read_text(encoding="utf-8")):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))


def vendored(name: str) -> bytes:
    """A script from npm, fetched once.

    Raises:
        ValueError: it is not the file of the pinned version.
    """
    package, member, sha256 = VENDORED[name]
    kept = ROOT / ".cache" / name
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        command = ["npm", "pack", package, "--silent"]
        told = subprocess.run(command, cwd=kept.parent, check=True, capture_output=True)
        archive = kept.parent / told.stdout.decode().split()[-1]
        with tarfile.open(archive) as tar:
            file = tar.extractfile(member)
            kept.write_bytes(file.read() if file else b"")
        archive.unlink()
    found = hashlib.sha256(kept.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{kept} of {package} has the sha256 {found}, not {sha256}; remove it")
    return kept.read_bytes()


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in parts of README and outputs of tutorials; links as the site needs them."""
    uri, source = page.file.src_uri, source_of(page.file)
    name = Path(uri).stem
    text = relinked(
        TUTORIALS.get(name, markdown) if uri.startswith("tutorials/") else markdown, source, uri
    )
    text = SHOWS.sub(r"[Open it](\1){.md-button}", text)
    text = DOORS.sub(lambda match: doors(match[1]), text)
    return PART.sub(lambda match: relinked(part(match[1]), "README.md", uri), text)


def doors(package: str) -> str:
    """The public names of a package, each as mkdocstrings documents it where it lives."""
    face = importlib.import_module(package)
    public = [getattr(face, name) for name in face.__all__ if not name.startswith("__")]
    return "\n\n".join(f"::: {one.__module__}.{one.__qualname__}" for one in public)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas become MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(unescape(match[2]), display=display)

    return MATH.sub(drawn, html)


class _Page(HTMLParser):
    """The links and anchors of a page of the built site."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect from one tag."""
        of = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := of.get(key))}
        target = of.get("href") or of.get("src")
        if target and (tag, of.get("rel")) != ("link", "canonical"):
            (self.links if tag == "a" else self.loads).append(target)


def on_post_build(config: Any) -> None:
    """Every link of the built site leads somewhere, and no page needs the network to be read.

    Raises:
        ValueError: one does not.
    """
    site = Path(config.site_dir)
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    count, wrong = Counter[str](), []
    for path, page in pages.items():
        for target in [*page.links, *page.loads]:
            outside = bool(re.match(r"[a-z]+:|//", target))
            count["outside" if outside else "inside"] += 1
            if outside and target in page.loads and not target.startswith("data:"):
                wrong.append(f"{path.relative_to(site)} loads {target}")
            elif not outside and not leads(target, path, pages):
                wrong.append(f"{path.relative_to(site)} links to {target}, which is not there")
    if wrong:
        raise ValueError("\n".join(wrong))
    print(f"{len(pages)} pages, {count['inside']} links checked, {count['outside']} to elsewhere")


def leads(target: str, path: Path, pages: dict[Path, _Page]) -> bool:
    """Whether a link of a page leads to a file, and to an anchor in it."""
    file, _, anchor = target.partition("#")
    found = (path.parent / file).resolve() if file else path
    found = found / "index.html" if found.is_dir() else found
    return found.is_file() and (not anchor or found not in pages or anchor in pages[found].anchors)
