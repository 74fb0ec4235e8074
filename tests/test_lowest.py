"""pyproject.toml states a lower bound for all that it asks for: `make test-lowest` tests exactly those releases."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from lowest import PYPROJECT, lower_bound, requirements
from packaging.requirements import Requirement
from packaging.version import Version

EXTRAS = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]


def test_every_direct_dependency_has_a_lower_bound() -> None:
    bounds = {(one.name, frozenset(one.extras)): lower_bound(one) for one in requirements()}
    for extra in EXTRAS:
        for one in requirements(extra):
            key = one.name, frozenset(one.extras)
            assert bounds.setdefault(key, lower_bound(one)) == lower_bound(one), f"{one.name} has two lower bounds"
    with pytest.raises(ValueError, match="flask has no lower bound"):
        lower_bound(Requirement("flask"))


def test_constraints_are_within_the_bounds() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (PYPROJECT.parent / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for one in requirements(*EXTRAS):
        version = pinned.get(one.name.lower().replace("_", "-"))
        assert version is None or one.specifier.contains(Version(version)), (
            f"constraints.txt pins {one.name}=={version}"
        )


def test_pre_commit_has_the_ruff_of_the_constraints() -> None:
    hooks = (PYPROJECT.parent / ".pre-commit-config.yaml").read_text()
    pinned = re.search(r"^ruff==(\S+)$", (PYPROJECT.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert set(re.findall(r"ruff==([^\]]+)", hooks)) == {pinned[1]}


def test_another_release_than_the_lowest_is_named() -> None:
    """This environment has newer ones, unless `make test-lowest` made it."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("helpers") / "lowest.py")], capture_output=True, text=True
    )
    newer = [one.name for one in requirements("dev") if f"{one.name}: pyproject.toml allows" in done.stderr]
    assert done.returncode == bool(newer)
    assert len(newer) == len(done.stderr.splitlines())
