"""What it takes to know a data set of 100 million rows before the first of them is read: time and memory.

    python benchmarks/bench_plan_large.py [--rows 100000000] [--save]

The Parquet files are synthetic: 1,000 names (hard links) of one file of 100 row groups of 1,000 rows, whose columns are
so repetitive that it is small; readers see 1,000 files with a footer of 100 row groups each. Measured is all that `batchmix
generate` does before it reads rows: find the files, look at their first bytes, read schemas and row counts from the
footers, fingerprint them, and take the rows of one of 8 workers apart from what is done (every other one of ten million).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import save

from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source

FILES, GROUP_ROWS = 1000, 1000


def write_files(folder: Path, rows: int) -> None:
    per_file = rows // FILES
    table = pa.table({"id": pa.array(np.zeros(per_file, np.int64)), "prompt": pa.array(["Say hello."] * per_file)})
    first = folder / "rows-0000.parquet"
    pq.write_table(table, first, row_group_size=GROUP_ROWS)
    for number in range(1, FILES):
        os.link(first, folder / f"rows-{number:04}.parquet")


def measure(folder: str, rows: int) -> None:
    """In a process of its own, so that the peak is that of the planning."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    started = time.perf_counter()
    source = open_source(DataConfig(path=folder), ShardConfig(3, 8))
    opened = time.perf_counter() - started
    assert source.num_rows == rows, source.num_rows
    source.fingerprint()
    fingerprinted = time.perf_counter() - started
    done = RowSet()
    for start in range(0, rows // 10, 1_000_000):
        done.add_many(np.arange(start, start + 1_000_000, 2))
    mine = done.num_of_shard(3, 8) + done.num_of_shard(2, 8)
    first = next(source.rows(done)).row
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    assert (first, mine) == (3, rows // 10 // 8), (first, mine)
    print(f"{opened:.3f} {fingerprinted:.3f} {seconds:.3f} {before:.3f} {peak:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000, help="a multiple of 10,000,000")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-cpu-plan-large.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.rows)
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_files(Path(temporary), args.rows)
        size = Path(temporary, "rows-0000.parquet").stat().st_size
        command = [sys.executable, __file__, "--rows", str(args.rows), "--measure", temporary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    opened, fingerprinted, seconds, before, peak = map(float, said.split())
    print(f"{args.rows:,} rows in {FILES:,} files of {args.rows // FILES // GROUP_ROWS} row groups ({size:,} bytes each): files and"
          f" footers {opened:.1f} s, with fingerprints {fingerprinted:.1f} s, to the first row of shard 3 of 8 {seconds:.1f} s;"
          f" peak memory {peak:.2f} GiB, {before:.2f} GiB of it Python and its libraries")  # fmt: skip
    if args.save:
        save("plan-large", {"rows": args.rows, "files": FILES, "footers_seconds": round(opened, 2),
                            "fingerprints_seconds": round(fingerprinted, 2), "seconds": round(seconds, 2),
                            "peak_gib": round(peak, 3), "imports_gib": round(before, 3)})  # fmt: skip


if __name__ == "__main__":
    main()
