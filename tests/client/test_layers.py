"""The layers of dat_client: a module imports only from its own layer and from those below."""

from __future__ import annotations

import ast
from pathlib import Path

import dat_client

LAYERS = [
    "_version",
    "errors",
    "wire",
    "calls",
    "transports",
    "client",
    "aio",
    "torch",
    "integrations",
    "lightning",
]
ROOT = Path(dat_client.__file__).parent


def layer_of(module: str) -> int | None:
    """The layer of dat_client.MODULE, None for the modules that read datasets, which only use errors and wire."""
    name = module.split(".")[0]
    return LAYERS.index(name) if name in LAYERS else None


def imports_of(path: Path) -> set[str]:
    """Modules of dat_client that a file imports, also inside functions; `from dat_client import x` names x."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            if node.module == "dat_client":
                found |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("dat_client."):
                found.add(node.module.removeprefix("dat_client."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("dat_client.") for a in node.names if a.name.startswith("dat_client.")}
    return found


def test_imports_point_down() -> None:
    upward = []
    checked = 0
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        layer = layer_of(module)
        for imported in imports_of(path) if module != "__init__" else ():
            checked += 1
            target = layer_of(imported)
            if layer is None:
                allowed = target is None or target <= LAYERS.index("wire")
            else:
                allowed = target is not None and target <= layer
            if not allowed:
                upward.append(f"{module} imports {imported}")
    assert checked > 50
    assert upward == []
