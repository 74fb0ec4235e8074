"""Shared by all tests: no network, GPU tests only where there is a GPU, and `batchmix` as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

# OpenMP reads it when torch is loaded. Threads that spin at barriers take minutes where tests share two cores.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the hub fails at once
_CACHE = tempfile.TemporaryDirectory(prefix="batchmix-tests-")
# But for compiled kernels, which take half a minute and whose names hold all that they depend on.
_KERNELS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchmix" / "kernels"
_KERNELS.mkdir(parents=True, exist_ok=True)
(Path(_CACHE.name) / "batchmix").mkdir()
(Path(_CACHE.name) / "batchmix" / "kernels").symlink_to(_KERNELS)
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # tables of grammars are kept there: none of another run's, and none for it
os.environ["PYTHONSAFEPATH"] = "1"  # subprocesses: the repository's own folders are not importable by their bare names
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as what a shell starts in the background has it, and its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
if os.environ.get("PYTEST_XDIST_WORKER"):  # processes that share the machine's cores
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it where a kernel is decorated, so before any kernel's import
    if find_spec("triton"):  # which is for Linux
        import faster_interpreter  # noqa: F401

KERNEL_TESTS = Path(__file__).parent / "kernels"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU what needs one is skipped; where there is one, `-m gpu` also takes all kernel tests."""
    for item in items:
        if torch.cuda.is_available() and KERNEL_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def batchmix(tmp_path: Path) -> Run:
    """`batchmix("generate", "data.path=...")` runs the command in an empty folder, `tmp_path`."""

    def run(*arguments: str, cwd: Path = tmp_path, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "batchmix", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]

    return run
