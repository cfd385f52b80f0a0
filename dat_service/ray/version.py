"""The versions of Ray that this service works with.

Two things tie it to one minor version: `dat-haproxy` amends a configuration that Ray renders from a template of its
own, and RayService calls private functions of Ray Serve. tests/service/ray/test_version.py checks everything that
is relied on.
"""

from __future__ import annotations

FIRST, END = (2, 60), (2, 61)
SUPPORTED = f">={FIRST[0]}.{FIRST[1]},<{END[0]}.{END[1]}"


class UnsupportedRay(RuntimeError):
    """Another version of Ray is installed than the ones that this service works with."""


def check_version(installed: str) -> None:
    """Raises UnsupportedRay unless the installed version, for example "2.60.0", is supported."""
    major, minor = installed.split(".")[:2]
    if not (major.isdigit() and minor.isdigit() and FIRST <= (int(major), int(minor)) < END):
        raise UnsupportedRay(
            f"ray {installed} is installed, but this service works with {SUPPORTED} only; "
            f"run: pip install 'ray[serve]{SUPPORTED}'"
        )
