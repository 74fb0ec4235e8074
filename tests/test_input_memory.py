"""Peak memory of whole runs over rows of any size, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import zstandard

pytestmark = pytest.mark.slow  # starts processes that load torch and read hundreds of MB
_MB = 1 << 20
_BUFFERS = 64 * _MB


def _peak(folder: Path, *arguments: str) -> int:
    """Bytes at most in memory of `batchmix generate`."""
    # Started by a shell, since on Linux a process's ru_maxrss begins at that of the process that started it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", (
        "import resource, sys; from batchmix.cli import main; code = main(sys.argv[1:]) or 0; "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    ), "generate", f"data.max_buffered_bytes={_BUFFERS}", "sampling.max_tokens=1", *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("peak", 1)[1]) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize(
    ("kept", "prompt"), [("[]", "hi"), ("null", "hi"), ("[]", "")]
)  # "": all but the last cannot be run
def test_memory_does_not_grow_with_the_number_of_large_rows(tmp_path: Path, kept: str, prompt: str) -> None:
    peaks = []
    for count in (5, 400):
        with (tmp_path / "in.jsonl").open("w") as file:
            for row in range(count):
                text = prompt if row < count - 1 else "hi"
                file.write(json.dumps({"prompt": text, "pad": f"{row} " * (_MB // 8)}) + "\n")
        peaks.append(_peak(tmp_path, "data.path=in.jsonl", f"output.dir=out{count}", f"data.columns={kept}"))
        assert ds.dataset(tmp_path / f"out{count}", format="arrow").count_rows() == count
    assert peaks[1] - peaks[0] < 3 * _BUFFERS


def test_a_line_of_gigabytes_in_a_few_kilobytes_is_an_error_row(tmp_path: Path) -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    with (tmp_path / "in.jsonl.zst").open("wb") as file:
        file.write(packer.compress(b'{"prompt": "'))
        for _ in range(1000):
            file.write(packer.compress(b"a" * _MB))
        file.write(packer.compress(b'"}\n{"prompt": "hi"}\n') + packer.flush())
    assert _peak(tmp_path, "data.path=in.jsonl.zst", "output.dir=out") < 1 << 30
    rows = ds.dataset(tmp_path / "out", format="arrow").to_table().sort_by("row").to_pylist()
    assert [row["error"] is None for row in rows] == [False, True]
    assert rows[0]["error"].endswith("row 1: the line is longer than 64 MiB")
