"""Exits 1 unless both distributions and the newest entry of CHANGELOG.md carry one version."""

import re
import sys
import tomllib
from pathlib import Path

root = Path(__file__).parent.parent
found = {
    name: tomllib.loads((root / name).read_text())["project"]["version"]
    for name in ("pyproject.toml", "client/pyproject.toml")
}
for name in ("dat_service/__init__.py", "client/dat_client/_version.py"):
    match = re.search(r'__version__ = "(.+?)"', (root / name).read_text())
    found[name] = match.group(1) if match else "none"
entry = re.search(r"^## (\d\S*)", (root / "CHANGELOG.md").read_text(), re.M)
found["CHANGELOG.md"] = entry.group(1) if entry else "none"
if len(set(found.values())) != 1:
    sys.exit(f"versions differ: {found}")
print(f"version {found['CHANGELOG.md']}")
