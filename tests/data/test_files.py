"""Changes to a folder that a crash cannot leave half done."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from batchmix.data.files import exchange, finish_exchange


class Crash(BaseException):
    """The end of the process, which no `except Exception` sees."""


@pytest.mark.parametrize("steps", range(20))
def test_an_exchange_that_crashes_is_whole_once_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    staging = tmp_path / "_merge"
    staging.mkdir()
    for name in ("old1", "old2", "kept", "_merge/new1", "_merge/new2"):
        (tmp_path / name).write_text(name)
    left = steps

    def crashing(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, crashing(getattr(owner, name)))
        with contextlib.suppress(Crash):
            exchange(tmp_path, staging, [staging / "new1", staging / "new2"], [tmp_path / "old1", tmp_path / "old2"])
    finish_exchange(tmp_path)
    there = {path.name for path in tmp_path.iterdir()}
    before, after = {"old1", "old2", "kept", "_merge"}, {"new1", "new2", "kept"}
    assert there - {"._journal.json.tmp"} == (before if "old1" in there else after)
