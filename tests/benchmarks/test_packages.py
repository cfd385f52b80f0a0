"""The installed packages hold neither peers nor stand-ins, and need nothing of benchmarks/."""

from __future__ import annotations

import re

from tests.conftest import ROOT

PACKAGES = ("client/dat_client", "workers/dat_workers", "dat_service")


def test_packages_do_not_import_benchmarks_or_peers() -> None:
    modules = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 50
    foreign = re.compile(r"^\s*(?:from|import) (benchmarks|tests|litserve|tritonclient|diffusers)\b", re.M)
    assert {str(path.relative_to(ROOT)): foreign.findall(path.read_text()) for path in modules
            if foreign.search(path.read_text())} == {}  # fmt: skip
