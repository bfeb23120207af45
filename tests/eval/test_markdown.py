"""The Markdown tables: every value stands in them, missing ones are dashes."""

from __future__ import annotations

from pathlib import Path

from eval.report.markdown import markdown_table, write_markdown

METRIC = "omics_ari/kmeans"


def test_means_values_chance_and_notes_are_written(tmp_path: Path) -> None:
    entry = {"mean": 0.25, "std": 0.1, "n": 2, "values": [0.2, 0.3], "unit": "ARI", "chance": 0.0}
    other = {**entry, "mean": 0.5, "std": None, "n": 1, "values": [0.5], "keys": ["B/0/s"]}
    models = {"hibio": {METRIC: {**entry, "keys": ["A/0/s", "B/0/s"]}}, "lsa": {METRIC: other}}
    results = {
        "data": {"command": "hibio eval", "seeds": [0]},
        "tasks": {"domains": {"models": models, "notes": ["a note"], "short": [METRIC]}},
    }
    text = write_markdown(tmp_path / "r.md", results).read_text()
    assert "| hibio | 0.250 ± 0.100 (n=2) |" in text
    assert "| lsa | 0.500 (n=1) |" in text
    assert "| A/0/s | 0.200 | – |" in text
    assert "| B/0/s | 0.300 | 0.500 |" in text
    assert "| *chance* | 0.000 |" in text
    assert "- a note" in text
    assert "- command: hibio eval" in text


def test_texts_of_users_are_no_markup():
    table = markdown_table(["a|b", "<script>"], [["x\ny", "[link](u)"], ["a\\|b", "\\[link](u)"]])
    assert table.splitlines() == [
        "| a\\|b | &lt;script&gt; |",
        "|---|---|",
        "| x y | \\[link](u) |",
        r"| a\\\|b | \\\[link](u) |",  # a backslash of a text escapes nothing
    ]
