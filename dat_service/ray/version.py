"""Checks that the installed version of Ray is one that this service works with.

The service works with one minor version of Ray, for two reasons. `dat-haproxy` amends a configuration that Ray
renders from its own template, and RayService calls private functions of Ray Serve.
tests/service/ray/test_version.py checks all details of Ray on which these two rely.
"""

from __future__ import annotations

FIRST, END = (2, 60), (2, 61)
SUPPORTED = f">={FIRST[0]}.{FIRST[1]},<{END[0]}.{END[1]}"


class UnsupportedRay(RuntimeError):
    """The installed version of Ray is not one that this service works with."""


def check_version(installed: str) -> None:
    """Raises UnsupportedRay unless the installed version, for example "2.60.0", is supported."""
    major, minor = installed.split(".")[:2]
    if not (major.isdigit() and minor.isdigit() and FIRST <= (int(major), int(minor)) < END):
        raise UnsupportedRay(
            f"ray {installed} is installed, but this service works with {SUPPORTED} only; "
            f"run: pip install 'ray[serve]{SUPPORTED}'"
        )
