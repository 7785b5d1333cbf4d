"""The documentation's Python snippets run, each as a test of its own, and show what they claim.

A block opened by ```python runs; one opened by ```python no-run does not.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "docs" / "recipes.md"
DOCS = ROOT / "docs"
PAGES = [RECIPES, DOCS / "heads.md", DOCS / "debugging.md", ROOT / "README.md"]
FENCE = re.compile(r"^(`{3,})(.*)$")
HEADING = re.compile(r"^#{1,6} +(.*)$")
LINE_LENGTH = 100
# What a section's snippets import and machines with a GPU may lack.
NEEDED = {"TRL": ("trl", "datasets"), "A teacher behind a server": ("requests",)}


class Snippet(NamedTuple):
    """A block of a page, ``line`` being the page's line (from 1) that holds its first line."""

    page: Path
    title: str
    line: int
    source: str


def snippets(page: Path) -> list[Snippet]:
    """The blocks of a page that are to run, under the title of their section."""
    found: list[Snippet] = []
    title, fence, info, start, body = page.name, "", "", 0, list[str]()
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        mark = FENCE.match(text)
        if fence:
            if mark and mark[1] == fence and not mark[2].strip():
                if info == "python":
                    found.append(Snippet(page, title, start, "\n".join(body) + "\n"))
                fence = ""
            else:
                body.append(text)
        elif mark:
            fence, info, start, body = mark[1], mark[2].strip(), number + 1, []
        elif heading := HEADING.match(text):
            title = heading[1]
    assert not fence, f"{page.name}: the block at line {start - 1} is not closed"
    return found


def all_snippets() -> list[pytest.param]:
    """Test ids are page and section title, numbered where a section has several blocks."""
    cases = []
    for page in PAGES:
        if not page.exists():
            continue
        seen: dict[str, int] = {}
        for snippet in snippets(page):
            seen[snippet.title] = nth = seen.get(snippet.title, 0) + 1
            name = f"{page.stem}: {snippet.title}" + (f" ({nth})" if nth > 1 else "")
            cases.append(pytest.param(snippet, id=name))
    return cases


@pytest.mark.parametrize("snippet", all_snippets())
def test_snippet_runs(
    snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    for package in NEEDED.get(snippet.title, ()):
        pytest.importorskip(package, reason=f"this recipe needs {package}")
    # Blank lines in front make tracebacks name the page's own lines.
    source = "\n" * (snippet.line - 1) + snippet.source
    if "__main__" in snippet.source:
        run_as_script(source, tmp_path)
        return
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # the tensors are tiny, and threads wait for each other on busy cores
    with torch.random.fork_rng(devices=[]):
        exec(compile(source, str(snippet.page), "exec"), {"__name__": "snippet"})


def run_as_script(source: str, folder: Path) -> None:
    """Processes that a snippet spawns import it, so it has to be a file."""
    script = folder / "snippet.py"
    script.write_text(source, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_recipe_has_a_snippet() -> None:
    sections = re.findall(r"^## +(.*)$", RECIPES.read_text(encoding="utf-8"), re.MULTILINE)
    assert sections
    assert {snippet.title for snippet in snippets(RECIPES)} >= set(sections) >= set(NEEDED)


@pytest.mark.parametrize("snippet", [pytest.param(s, id=s.title) for s in snippets(RECIPES)])
def test_recipe_asserts_its_claim_and_fits_the_page(snippet: Snippet) -> None:
    nodes = list(ast.walk(ast.parse(snippet.source)))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert "assert_close" in named or any(isinstance(node, ast.Assert) for node in nodes)
    longest = max(len(text) for text in snippet.source.splitlines())
    assert longest <= LINE_LENGTH


def test_table_of_contents_links_to_every_section() -> None:
    text = RECIPES.read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.*)\]\(#(.*)\)$", text, re.MULTILINE)
    sections = re.findall(r"^## +(.*)$", text, re.MULTILINE)
    assert [title for title, _ in listed] == sections
    for title, anchor in listed:
        # How GitHub makes an anchor of a heading.
        assert anchor == re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
