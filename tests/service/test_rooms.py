"""dat_service is built in floors: a folder or top-level module imports from lower floors only."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import ROOT

PACKAGE = ROOT / "dat_service"

# from the bottom up; rooms on one floor do not know each other
FLOORS = [
    {"settings", "admission", "observability", "ports", "processes", "__init__"},
    {"worker", "launch"},
    {"inference"},
    {"http"},
    {"ray"},
    {"bench"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """Returns the rooms that a module imports, also inside functions and for type checking alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] == "dat_service"]
    return {name[1] for name in parts if len(name) > 1 and name[1] in FLOOR}


def test_every_room_has_its_floor() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == set(FLOOR)
    assert len(FLOORS) <= 7


def test_imports_lead_down() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for imported in imported_rooms(path) - {room}:
            if FLOOR[imported] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {imported}")
    assert wrong == []
