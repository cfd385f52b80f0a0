"""The layers that pyproject.toml declares (`[tool.importlinter]`) are kept, and a forbidden import is noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FORMATS = ", ".join(f"dat_client.dataset_format.{name}" for name in ("manifest", "naming", "tar_samples", "views"))
PACKAGES = {"client": "dat_client", "workers": "dat_workers", ".": "dat_service"}


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    """Runs import-linter over the packages below `tree`, with the contracts of this project."""
    search_path = os.pathsep.join(str(tree / folder) for folder in PACKAGES)
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", ROOT / "pyproject.toml"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": search_path}, cwd=tree,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("workers/dat_workers/request.py", "import dat_service.settings", "the workers stand on the client"),
        ("client/dat_client/client.py", "import ray", "The client needs no part of a server"),
        ("client/dat_client/wire/messages.py", "import dat_client.client", "Layers of the client"),
        ("dat_service/worker.py", "import dat_service.http.app", "Layers of the service"),
        ("workers/dat_workers/errors.py", "import dat_workers.discretizer", "Layers of the codec side"),
        ("workers/dat_workers/request.py", "import dat_client.client", "the client's vocabulary alone"),
    ],
)
def test_a_forbidden_import_is_noticed(tmp_path: Path, module: str, statement: str, contract: str) -> None:
    for folder, package in PACKAGES.items():
        ignore = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / folder / package, tmp_path / folder / package, ignore=ignore)
    target = tmp_path / module
    # within a function: a late import counts as well
    target.write_text(f"{target.read_text()}\n\ndef late() -> None:\n    {statement}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(contract in line for line in result.stdout.splitlines() if line.endswith("BROKEN")), result.stdout


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
