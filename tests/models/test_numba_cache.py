"""Compiled kernels on disk: loaded without numba, and compiled anew where a file is not what was written."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchmix.models import numba_cache
from batchmix.models.numba_cache import load_kernels
from batchmix.user_cache import user_cache


def own_file() -> Path:
    """Where the kernels of this machine are kept, which are compiled by then."""
    load_kernels(torch.float32)
    return user_cache("kernels") / f"float32-{numba_cache._key()}"


def norm(kernels: numba_cache.Kernels) -> torch.Tensor:
    x, out = torch.arange(1.0, 9.0).view(2, 4), torch.zeros(2, 4)
    kernels("rms_norm", 2, 4, 1e-5, x, torch.ones(4), out)
    return out


@pytest.mark.slow  # starts a process
def test_kernels_are_compiled_once_and_loaded_without_numba():
    load_kernels(torch.float32)
    code = (
        "import sys, torch; from batchmix.models import numba_cache\n"
        "numba_cache._compile = None\n"
        "numba_cache.load_kernels(torch.float32)\n"
        "assert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_damaged_file_is_compiled_anew(monkeypatch, tmp_path, caplog):
    expected = norm(load_kernels(torch.float32))
    own = own_file()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = user_cache("kernels") / own.name
    copy.parent.mkdir(parents=True)
    monkeypatch.setattr(numba_cache, "_compile", lambda dtype: own.read_bytes()[32:])
    load = load_kernels.__wrapped__
    for content in (b"", own.read_bytes()[:-1], own.read_bytes()[:99] + b"x" + own.read_bytes()[100:]):
        copy.write_bytes(content)
        with caplog.at_level(logging.INFO):
            assert torch.equal(norm(load(torch.float32)), expected)
        assert "compiled the CPU kernels" in caplog.text
        caplog.clear()
        assert copy.read_bytes() == own.read_bytes()
    with caplog.at_level(logging.INFO):
        load(torch.float32)
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_reported(monkeypatch, tmp_path, caplog):
    own = own_file()
    (tmp_path / "batchmix").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(numba_cache, "_compile", lambda dtype: own.read_bytes()[32:])
    norm(load_kernels.__wrapped__(torch.float32))
    assert "compiled anew at each start" in caplog.text


def test_what_is_missing_is_named(monkeypatch):
    assert numba_cache.unavailable() is None
    monkeypatch.setattr(numba_cache, "find_spec", lambda name: None)
    reason = numba_cache.unavailable()
    assert reason is not None
    assert re.fullmatch(r"numba and llvmlite cannot be imported \(pip install .*\[cpu\]'?\)", reason)
    monkeypatch.undo()
    monkeypatch.setattr(numba_cache, "_openmp", lambda: None)
    assert numba_cache.unavailable() == "torch's threads are not GNU OpenMP's"


def test_a_tensor_that_is_not_dense_is_refused():
    with pytest.raises(AssertionError):
        load_kernels(torch.float32)("rms_norm", 4, 2, 1e-5, torch.zeros(2, 4).T, torch.ones(2), torch.zeros(4, 2))
