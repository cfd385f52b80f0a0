"""The floors of ARCHITECTURE.md: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORBIDDEN = {
    "client/dat_client": {"dat_workers", "dat_service", "fastapi", "ray"},
    "workers/dat_workers": {"dat_service", "fastapi", "starlette"},
}
# The words and formats that both sides share live on the client's side, which needs numpy alone.
SHARED = ("dat_client.wire", "dat_client.errors")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names if not f"{name}.".startswith(tuple(f"{s}." for s in SHARED))}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_nothing_points_up(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    found = {f"{path.name}: {name}" for path in files for name in imported(path) & FORBIDDEN[folder]}
    assert not found


def test_workers_use_only_the_vocabulary_and_the_formats_of_the_client() -> None:
    allowed = ("dat_client.wire", "dat_client.dataset_format.", "dat_client.errors")
    found = [
        f"{path.name}: {node.module}"
        for path in sorted((ROOT / "workers/dat_workers").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dat_client")
    ]
    assert any("dataset_format" in use for use in found)
    assert not [use for use in found if not use.split(": ")[1].startswith(allowed)]


FORMATS = ", ".join(f"dat_client.dataset_format.{name}" for name in ("manifest", "naming", "tar_samples", "views"))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dat_client", {"torch", "ray"}),
        (f"import {FORMATS}", {"torch", "webdataset", "fsspec", "ray"}),
        ("import dat_service.cli.main", {"torch", "ray", "fastapi"}),
    ],
)
def test_light_imports_stay_light(statement: str, absent: set[str]) -> None:
    code = f"import sys; {statement}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "numpy" in loaded or "typer" in loaded
    assert not loaded & absent
