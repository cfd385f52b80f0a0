from __future__ import annotations

from pathlib import Path

from tests import plain_english

SOURCE = '''"""Reads a header."""


def read(data, what):
    """What the server sent."""
    self.kept, header_length = data
    return [item for item in data]


class Header:
    """Is this a header?"""
'''


def test_fragments_and_names_are_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    assert sorted(plain_english.problems_of_code(path)) == [
        (4, "name 'what' does not say what the value is"),
        (5, "docstring is a fragment: 'What the server sent.'"),
        (6, "name 'kept' does not say what the value is"),
    ]


def test_words_are_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("It starts.\nIt starts anew.\nThis is no header.\nIt is no longer there.\n")
    assert list(plain_english.problems_of_text(path)) == [
        (2, "'anew': write again"),
        (3, "'is no header': write is not a ..."),
    ]
