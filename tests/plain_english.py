"""Exits 1 for wording and names that this project decided against, and shows where they are.

Three rules, all from experience with sentences that had to be read twice:

- A docstring begins with a whole sentence or an imperative, not with a fragment such as "What the server says".
- Data are named after what they are (`reported_at_s`, `missing_keys`), not `said`, `what` or `seen`.
- Code and documents do not contain the words of WORDS.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("client/dat_client", "workers/dat_workers", "dat_service", "examples", "benchmarks")
DOCUMENTS = ("*.md", "docs/*.md", "client/*.md", "deploy/*.md")

FRAGMENTS = {"What", "Who", "Whose", "Which", "Where", "When", "How", "Of", "That", "Those", "Its", "By", "None"}
NAMES = {"what", "who", "said", "told", "asked", "made", "given", "seen", "kept", "one", "other"}
WORDS = {
    r"\banew\b": "again",
    r"\bfor ever\b": "forever",
    r"\bat hand\b": "available",
    r"\bwhoever\b": "the role: the client, the caller, anyone who",
    r"\bDESIGN\.md": "the fact itself: the project has no such file",
    r"\bis no (?!longer|more|reason|need|room|such)\w+": "is not a ...",
}


def problems_of_code(path: Path) -> Iterator[tuple[int, str]]:
    """Line and complaint for each docstring and name of a Python file that breaks a rule."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if first.partition(" ")[0] in FRAGMENTS and not first.endswith("?"):
                yield node.body[0].lineno, f"docstring is a fragment: {first[:60]!r}"
        name = stored_name(node)
        if name.strip("_") in NAMES:
            yield node.lineno, f"name {name!r} does not say what the value is"  # type: ignore[attr-defined]


def stored_name(node: ast.AST) -> str:
    """The name that a node gives to a value or function, "" if it gives none."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
            return name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return name
    return ""


def problems_of_text(path: Path) -> Iterator[tuple[int, str]]:
    """Line and complaint for each word of WORDS in a file."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for pattern, better in WORDS.items():
            if found := re.search(pattern, line, re.I):
                yield number, f"{found[0]!r}: write {better}"


def main() -> int:
    """Prints all problems; returns the exit status."""
    code = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
    documents = sorted(path for pattern in DOCUMENTS for path in ROOT.glob(pattern))
    problems = [(path, *problem) for path in code for problem in problems_of_code(path)]
    problems += [(path, *problem) for path in [*code, *documents] for problem in problems_of_text(path)]
    for path, line, complaint in sorted(problems):
        print(f"{path.relative_to(ROOT)}:{line}: {complaint}")
    print(f"plain English: {len(problems)} problems in {len(code)} modules and {len(documents)} documents")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
