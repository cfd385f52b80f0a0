"""The documents of this project, parsed: code blocks, commands, links and names of files."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))]
OTHERS = [Path(name) for name in ("ARCHITECTURE.md", "CHANGELOG.md", "client/README.md", "deploy/README.md")]

_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        line: the line in the page on which its code begins.
        info: what follows the language, such as `needs=pytorch_lightning` or `not-run: needs a cluster`.
    """

    page: Path
    line: int
    language: str
    info: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: Path) -> str:
    """The page's text."""
    return (ROOT / page).read_text()


def blocks(page: Path, language: str) -> list[Block]:
    """The page's code blocks in one language, in order."""
    text = text_of(page)
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[1], found[2].strip(), found[3])
        for found in _BLOCK.finditer(text)
        if found[1] == language
    ]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's `console` blocks, without variables before them and comments."""
    lines: list[str] = []
    for block in blocks(page, "console"):
        lines += re.findall(r"^\$ (.*)$", block.code.replace("\\\n", " "), re.M)
    return [_without_variables(shlex.split(line, comments=True)) for line in lines]


def spans(page: Path) -> list[str]:
    """The page's inline code, outside of its code blocks."""
    return [" ".join(span.split()) for span in _SPAN.findall(_BLOCK.sub("", text_of(page)))]


def links(page: Path) -> list[str]:
    """The targets of the page's links that are files of this project, with their #anchors."""
    return [target for target in _LINK.findall(_BLOCK.sub("", text_of(page))) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", text_of(page)), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words
