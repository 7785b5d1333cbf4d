"""The pages of the documentation and the code blocks in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^(`{3,})(.*)$")
HEADING = re.compile(r"^#{1,6} +(.*)$")


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
