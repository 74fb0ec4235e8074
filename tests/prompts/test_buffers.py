"""What is on its way keeps to a number of bytes, whatever the size of a row."""

from __future__ import annotations

import gc
import json
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import build_prompts

from batchmix.checkpoints.checkpoint import TINY
from batchmix.input import arrow_readers
from batchmix.input.chunk import everything
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.find_files import find_files
from batchmix.input.formats import read_chunks
from batchmix.input.rowset import RowSet
from batchmix.input.source import open_source
from batchmix.observability.clock import StageClock
from batchmix.planning.in_flight import InFlight
from batchmix.planning.planner import Limits, plan
from batchmix.prompts.buffers import BoundedQueue, Buffers, buffered_bytes, num_bytes, take
from batchmix.prompts.read_ahead import read_ahead
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import Completion, InputRow, Prompt
from batchmix.sampling import SamplingConfig

MB = 1 << 20


def prompt(row: int, size: int, n: int = 1, error: str | None = None) -> Prompt:
    return Prompt(row, str(row), {}, array("i", [1]), SamplingConfig(n=n), error, num_bytes=size)


def test_the_default_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, expected in ((1 << 30, 128 * MB), (100 << 30, 2 << 30), (1 << 50, 4 << 30)):
        monkeypatch.setattr("batchmix.prompts.buffers.free_bytes", lambda free=free: free)
        assert buffered_bytes(None) == pytest.approx(expected)
    assert buffered_bytes(8 * MB, processes=4) == 2 * MB
    buffers = Buffers.of(MB)
    assert sum(vars(buffers).values()) + buffers.pending <= MB * 1.1


@pytest.mark.parametrize(
    "value",
    [
        "x" * MB,
        b"x" * MB,
        [1] * 200_000,
        {"a": ["x" * MB]},
        [{"role": "user", "content": "é" * MB}],
        array("i", [1] * MB),
    ],
)
def test_num_bytes_counts_what_a_value_holds(value: Any) -> None:
    assert 0.9 * MB < num_bytes(value) < 12 * MB
    assert num_bytes(None) < 1000


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=40), items=st.integers(1, 5), limit=st.integers(0, 500))
def test_a_queue_keeps_to_its_bytes_and_its_order(sizes: list[int], items: int, limit: int) -> None:
    queue: BoundedQueue[int] = BoundedQueue(items, limit)
    thread = threading.Thread(target=lambda: [queue.put(place, size) for place, size in enumerate(sizes)])
    thread.start()
    assert [queue.get() for _ in sizes] == list(range(len(sizes)))
    thread.join()
    assert queue.peak_bytes <= max([limit, *sizes])
    assert queue.bytes == 0
    with pytest.raises(Empty):
        queue.get(timeout=0.001)


def test_read_ahead_reads_no_more_than_its_bytes() -> None:
    made = 0

    def items() -> Iterator[bytes]:
        nonlocal made
        for _ in range(20):
            made += 1
            yield b"x" * 100

    ahead = read_ahead(items(), 10, 250, len)  # type: ignore[arg-type]
    next(ahead)
    time.sleep(0.1)
    assert made <= 5, "one is taken, two wait, one is on its way, and a thread is never sure"
    assert len(list(ahead)) == 19


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 100), st.booleans()), min_size=1, max_size=60),
    window=st.integers(1, 300), batch=st.integers(1, 200), flight=st.integers(1, 400), n=st.integers(1, 3),
)  # fmt: skip
def test_windows_batches_and_prompts_in_flight_keep_to_their_bytes(
    sizes: list[tuple[int, bool]], window: int, batch: int, flight: int, n: int
) -> None:
    held = peak = 0

    def read() -> Iterator[Prompt]:
        nonlocal held, peak
        for row, (size, bad) in enumerate(sizes):
            held += size
            peak = max(peak, held)
            yield prompt(row, size, n, "bad" if bad else None)

    limits = Limits(1000, 1000, 16, 64, window_bytes=window, batch_bytes=batch)
    in_flight = InFlight(flight)
    running: list[Prompt] = []
    seen: list[int] = []
    largest = max(size for size, _ in sizes)

    def complete(done: Prompt) -> None:
        for sample in range(1 if done.error else n):
            in_flight.completed(Completion(done, sample, [], "stop"))
        seen.append(done.row)

    for given_batch in in_flight.admit(plan(read(), limits)):
        if not given_batch.prompts:
            complete(running.pop(0))
            continue
        size = sum(each.num_bytes for each in given_batch.prompts)
        assert size <= max(batch, largest)
        running += given_batch.prompts
        assert in_flight.bytes <= max(flight, size)
    while running:
        complete(running.pop(0))
    assert sorted(seen) == list(range(len(sizes)))
    assert in_flight.bytes == 0


def test_take_ends_with_the_row_that_fills_it() -> None:
    rows = (InputRow(number, "", {"a": "x" * 1000}) for number in range(10))
    assert len(take(rows, 100, 2500)) == 3
    assert len(take(rows, 2, 10**9)) == 2
    assert len(take(rows, 100, 1)) == 1
    assert len(take(rows, 100, 10**9)) == 4


@pytest.mark.parametrize("keep", [True, False])
def test_prompts_of_large_rows_are_read_a_few_at_a_time(tmp_path: Path, keep: bool) -> None:
    """Of 60 rows of 200 KB no more are alive at once than 1 MB of buffers and what is in work allow."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": "hi", "pad": "x" * 200_000}) + "\n" for _ in range(60)))
    data = DataConfig(str(path), columns=None if keep else [], max_buffered_bytes=MB)
    source = open_source(data, ShardConfig())
    alive = most = 0

    class Counted(dict[str, Any]):
        def __init__(self, *values: Any) -> None:
            nonlocal alive, most
            super().__init__(*values)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def rows() -> Iterator[InputRow]:
        for row in source.rows(RowSet()):
            row.columns = Counted(row.columns)
            yield row

    found = 0
    for made in build_prompts(
        rows(), data=data, sampling=SamplingConfig(), tokenizer=load_tokenizer(TINY), max_model_len=4096,
        vocab_size=32000, keep=source.schema.names, clock=StageClock(),
    ):  # fmt: skip
        assert made.num_bytes > 200_000 or not keep
        found += 1
    assert found == 60
    gc.collect()
    assert most <= 6


def test_a_text_that_cannot_fit_is_not_tokenised(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 2_000_000}) + '\n{"prompt": "hi"}\n')
    data = DataConfig(str(path), columns=[])
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None

    class Checked:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode_chats(self, chats: Any) -> Any:
            assert len(chats) == 1
            return tokenizer.encode_chats(chats)

    bad, good = build_prompts(
        open_source(data, ShardConfig()).rows(RowSet()), data=data, sampling=SamplingConfig(), tokenizer=Checked(),  # type: ignore[arg-type]
        max_model_len=4096, vocab_size=32000, keep=[], clock=StageClock(),
    )  # fmt: skip
    assert bad.error is not None
    assert bad.error.startswith("prompt has 10000000 characters; more than ")
    assert bad.error.endswith(" tokens of model.max_model_len")
    assert good.error is None


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_large_rows_of_column_wise_files_become_objects_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(arrow_readers, "_BATCH_BYTES", 100_000)
    table = pa.table({"prompt": [str(number).ljust(10_000, "é") for number in range(300)]})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    (file,) = find_files([str(tmp_path / name)], DataConfig(str(tmp_path)))
    chunks = list(read_chunks(file, everything))
    assert max(len(chunk.records) for chunk in chunks) <= 10
    assert [number for chunk in chunks for number in chunk.numbers] == list(range(300))
