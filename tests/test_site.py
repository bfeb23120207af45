"""The documentation site: its navigation, and that what its pages type is understood."""

import argparse
import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from eval.ablation.config import GridConfig
from hibio.cli import COMMANDS
from hibio.cli.command import build_parser
from hibio.config.files import load_config
from hibio.config.run import RunConfig
from tests.test_docs import pages

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(bash|python|)\n(.*?)^```", re.M | re.S)
HERE = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.M | re.S)
QUOTED = re.compile(r"^\| `(.+?)` \|", re.M)

spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
assert spec is not None
assert spec.loader is not None
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield text


def navigation() -> list[str]:
    """The pages that mkdocs.yml names, without its Python tags."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    return list(build.in_order(config["nav"]))


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `hibio` line of a block."""
    text = HERE.sub("", text).replace("\\\n", " ")
    for line in re.findall(r"^(?:\w+=\S+ )?hibio (.*)$", text, re.M):
        line = re.sub(r"\d?>&?\s*\S+", "", re.sub(r"\$\w+", "1", line))
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        ends = (i for i, word in enumerate(words) if set(word) <= set("|&;"))
        yield words[: next(ends, len(words))]


def misunderstood(page: Path, parser: argparse.ArgumentParser) -> Iterator[str]:
    for block in blocks(page, "bash", ""):
        for words in commands(block):
            try:
                parser.parse_args(words)
            except SystemExit:
                yield f"{page.name}: hibio {' '.join(words)}"


def test_the_navigation_names_pages_and_readme_has_the_parts_that_pages_show():
    named = [name for name in navigation() if "*" not in name]
    assert len(named) == len(set(named)) > 10
    assert [n for n in named if not (ROOT / "docs" / n).exists() and not (ROOT / n).exists()] == []
    for page in pages(ROOT):
        for part in build.PART.findall(page.read_text(encoding="utf-8")):
            assert build.part(part)
    with pytest.raises(ValueError, match="no section 'Gone'"):
        build.part("Gone")


def test_every_command_of_the_pages_is_understood(capsys):
    parser = build_parser(COMMANDS)
    assert sum(1 for p in pages(ROOT) for b in blocks(p, "bash", "") for _ in commands(b)) > 30
    assert [told for page in pages(ROOT) for told in misunderstood(page, parser)] == []


def test_a_command_that_is_not_there_is_found(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("```bash\nhibio check stores | head -3\nhibio check --gone x\n```\n")
    assert [*misunderstood(page, build_parser(COMMANDS))] == ["page.md: hibio check --gone x"]


@pytest.mark.parametrize(
    "page", sorted((ROOT / "docs/tutorials").glob("*.md")), ids=lambda p: p.stem
)
def test_the_code_of_a_tutorial_is_valid(page, tmp_path, monkeypatch):
    """Python parses; the YAML files that it writes are configurations."""
    for block in blocks(page, "python"):
        ast.parse(block)
    monkeypatch.chdir(tmp_path)
    known = sorted((ROOT / "docs/tutorials").glob("*.md"))
    files = [file for one in known for block in blocks(one, "bash") for file in HERE.findall(block)]
    for name, _, text in files:  # all, since one may be the base of another
        Path(name).write_text(text)
    here = {name for block in blocks(page, "bash") for name, *_ in HERE.findall(block)}
    for name in sorted(name for name in here if name.endswith(".yaml")):
        load_config(GridConfig if "\nrows:" in Path(name).read_text() else RunConfig, Path(name))


def told(tree: ast.AST) -> Iterator[str]:
    """Texts of the code, with `…` where a value is put in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_of_the_how_to_are_those_of_the_code():
    files = [path for folder in build.CODE for path in (ROOT / folder).rglob("*.py")]
    texts = "\n".join(text for path in files for text in told(ast.parse(path.read_text())))
    quoted = QUOTED.findall((ROOT / "docs/howto/errors.md").read_text(encoding="utf-8"))
    assert len(quoted) > 30
    assert [message for message in quoted if message not in texts] == []


def sentences(page: Path) -> set[str]:
    """Sentences and cells of tables, seven words and more, without code blocks."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.split(r"(?<=[.:;?!])\s+|\||\n\s*\n", text)
    return {" ".join(one.split()) for one in found if len(one.split()) > 6}


def test_readme_and_the_site_say_nothing_twice():
    """The site shows parts of README; what it says beside them is its own."""
    readme = sentences(ROOT / "README.md")
    assert len(readme) > 50
    others = [page for page in pages(ROOT) if page != ROOT / "README.md"]
    assert [
        (page.name, readme & sentences(page)) for page in others if readme & sentences(page)
    ] == []


@pytest.mark.parametrize(
    ("source", "page", "text", "becomes"),
    [
        ("README.md", "index.md", "](docs/data.md#units)", "](data.md#units)"),
        ("README.md", "results/index.md", "](docs/data.md)", "](../data.md)"),
        ("docs/method.md", "method.md", "](results)", "](results/index.md)"),
        ("docs/scale.md", "scale.md", "](../benchmarks/scale.py)", "](benchmarks/scale.py)"),
        ("docs/scale.md", "scale.md", "](gone.md)", "](gone.md)"),
        ("docs/scale.md", "scale.md", "](https://a.org/b)", "](https://a.org/b)"),
    ],
)
def test_links_lead_to_the_same_file_in_the_site(source, page, text, becomes):
    assert build.relinked(text, source, page) == becomes
