"""`python tests/helpers/lowest.py` fails unless this environment has the lowest release of every direct dependency."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for here, and with `extras`."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.marker is None or one.marker.evaluate()]


def lower_bound(requirement: Requirement) -> Version:
    """Of `name>=1.2`; a requirement without one is a ValueError."""
    bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==")]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} has no lower bound")
    return bounds[0]


def main() -> None:
    """A bound that another package's own bound outdoes is one that nobody gets, so it should say so."""
    wrong = []
    for one in requirements("dev"):
        bound, installed = lower_bound(one), Version(version(one.name))
        if Version(installed.base_version) != bound:
            wrong.append(f"{one.name}: pyproject.toml allows {bound}, installed is {installed}")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
