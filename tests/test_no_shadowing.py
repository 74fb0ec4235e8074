"""PyPI has a package called `kernels`, and transformers uses it where `find_spec` finds one: ours must not be found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOK = "from importlib.util import find_spec as f; s = f({name!r}); print(s and (s.origin, *(s.submodule_search_locations or ())))"


@pytest.mark.parametrize("name", ["kernels", "jobs", "conf"])
def test_top_level_folders_are_not_importable(name: str) -> None:
    found = subprocess.run([sys.executable, "-c", LOOK.format(name=name)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert str(ROOT) not in found.stdout


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow  # 5 s and more
def test_transformers_imports_from_the_repository_root() -> None:
    code = "from transformers import MixtralForCausalLM"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_nothing_imports_the_folders_by_their_bare_names() -> None:
    code = "import sys, batchmix.hydra_app, batchmix.jobs.generate, batchmix.conf; print('kernels' in sys.modules or 'jobs' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr
