"""The documentation's Python snippets run, each as a test of its own, and its links lead somewhere.

A block opened by ```python runs; one opened by ```python no-run does not. A recipe says in a line
"Needs: `package`, `package`" what its snippets import besides torch and this package.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import DOCS, FENCE, ROOT, Snippet, snippets

RECIPES = sorted((DOCS / "recipes").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NEEDS = re.compile(r"^Needs: (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LINE_LENGTH = 100
# What a process of gloo now and then says when it dies after its last line: a thread of
# torch's is still there when the interpreter has gone. Such a snippet runs once more.
TEARDOWN = "terminate called without an active exception"
WITHOUT_ASKING = {"torch", "numpy", "opd_kernels", *sys.stdlib_module_names}


def all_snippets() -> list[pytest.param]:
    """Test ids are page and section title, numbered where a section has several blocks."""
    cases = []
    for page in PAGES:
        seen: dict[str, int] = {}
        for snippet in snippets(page):
            seen[snippet.title] = nth = seen.get(snippet.title, 0) + 1
            name = f"{page.stem}: {snippet.title}" + (f" ({nth})" if nth > 1 else "")
            cases.append(pytest.param(snippet, id=name))
    return cases


@pytest.mark.parametrize("snippet", all_snippets())
def test_snippet_runs(
    snippet: Snippet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: int,
) -> None:
    for package in imported(snippet) - WITHOUT_ASKING:
        pytest.importorskip(package, reason=f"this snippet needs {package}")
    # Blank lines in front make tracebacks name the page's own lines.
    source = "\n" * (snippet.line - 1) + snippet.source
    if "__main__" in snippet.source:
        printed = run_as_script(source, tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
        with torch.random.fork_rng(devices=[]):
            exec(compile(source, str(snippet.page), "exec"), {"__name__": "snippet"})
        printed = capsys.readouterr().out
    if snippet.page in RECIPES:
        assert re.search(r"loss -?\d+\.\d+", printed), "a recipe prints its loss"


def needed(page: Path) -> set[str]:
    """The packages that a page says it needs."""
    said = NEEDS.search(page.read_text(encoding="utf-8"))
    return set(re.findall(r"`([^`]+)`", said[1])) if said else set()


def imported(snippet: Snippet) -> set[str]:
    """The packages that a snippet imports, this package's optional ones included."""
    names = set()
    for node in ast.walk(ast.parse(snippet.source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    integrations = {"server": {"requests"}, "trl": {"trl", "requests", "transformers"}}
    for name, packages in integrations.items():
        if f"opd_kernels.integrations.{name}" in names:
            names |= packages
    return {name.split(".")[0] for name in names}


def run_as_script(source: str, folder: Path) -> str:
    """What it prints. Processes that a snippet spawns import it, so it has to be a file."""
    script = folder / "snippet.py"
    script.write_text(source, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(script)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if TEARDOWN not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem) for page in (*RECIPES, DOCS / "heads.md")]
)
def test_a_recipe_has_a_snippet_and_says_what_it_needs(page: Path) -> None:
    found = snippets(page)
    assert found
    head = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert NEEDS.search("\n".join(head)), 'expected "Needs: ..." below the title'
    outside = set().union(*map(imported, found)) - WITHOUT_ASKING
    assert outside == needed(page)
    for snippet in found:
        nodes = list(ast.walk(ast.parse(snippet.source)))
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert "assert_close" in named or any(isinstance(node, ast.Assert) for node in nodes)
        assert max(len(text) for text in snippet.source.splitlines()) <= LINE_LENGTH


def without_code(page: Path) -> str:
    """A page without its blocks, in which brackets are no links and # is no heading."""
    kept, fence = [], ""
    for text in page.read_text(encoding="utf-8").splitlines():
        mark = FENCE.match(text)
        if mark and (not fence or mark[1] == fence):
            fence = "" if fence else mark[1]
        elif not fence:
            kept.append(text)
    return "\n".join(kept)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#{1,6} +(.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to no file, or to no heading of one."""
    broken = []
    for link in LINK.findall(without_code(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


LINKED = [*PAGES, ROOT / "benchmarks" / "NOTES.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in LINKED]
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A page, other\n```\n# code\n```\n")
    page.write_text(
        "[a](other.md) [b](other.md#a-page-other) [c](#here) [d](https://example.org/none)\n"
        "[e](none.md) [f](other.md#code) [g](#there)\n```\n[h](none.md)\n```\n## Here\n"
    )
    assert broken_links(page) == ["none.md", "other.md#code", "#there"]


def test_the_index_links_to_every_page() -> None:
    links = LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links}
    assert {page for page in PAGES if page.is_relative_to(DOCS)} - linked <= {DOCS / "README.md"}
