"""Kernel tests run on the GPU, or without one under Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ahead_of_time import Compiler


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()
