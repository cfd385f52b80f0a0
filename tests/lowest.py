"""Checks that the lowest allowed version of each direct requirement is installed (`make test-lowest`).

A bound that lies below the installed version is a promise that was not tested: another package asks for more, or
that version cannot be had. Usage: python tests/lowest.py dat-client[torch,webdataset]
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from packaging.requirements import Requirement
from packaging.version import Version


def requirements(distribution: str, extras: set[str]) -> list[Requirement]:
    """Returns the requirements of an installed distribution, with those of the named extras."""
    found: list[Requirement] = []
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        if requirement.name == distribution:  # an extra that names others
            found += requirements(distribution, requirement.extras)
        elif not requirement.name.startswith("dat-"):
            found.append(requirement)
    return found


def untested_bound(requirement: Requirement) -> str | None:
    """Returns a sentence if the lowest version that a requirement allows is not the installed one."""
    installed = importlib.metadata.version(requirement.name)
    bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
    if len(bounds) != 1:
        return f"{requirement} has no lowest version"
    if Version(bounds[0]) == Version(Version(installed).public):  # without +cu121 and the like
        return None
    return f"{requirement} allows {bounds[0]}, but {installed} was installed and tested"


def main() -> None:
    """Prints the Python version and each bound that was not tested; exits with status 1 if there is any."""
    asked = Requirement(sys.argv[1])
    checked = requirements(asked.name, asked.extras)
    problems = sorted({problem for problem in map(untested_bound, checked) if problem})
    for problem in problems:
        print(problem)
    print(f"{asked} on Python {platform.python_version()}: {len(checked)} bounds, {len(problems)} not tested")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
