"""`batchmix plan` of a sample: which rows it takes, what it says of all, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix import plan as plan_module
from batchmix.config import Config
from batchmix.input.config import DataConfig, ShardConfig
from batchmix.input.source import open_source
from batchmix.plan import plan_report
from batchmix.planning.config import PlanConfig
from batchmix.planning.sampled_rows import OneIn, sample
from batchmix.planning.survey import Survey

ROWS = 400


@pytest.fixture(params=["a.jsonl", "a.parquet"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Prompts of 1, 2, 3, ... tokens: rows that lie side by side are alike, as in data that is sorted."""
    path = tmp_path / request.param
    rows = [{"prompt_token_ids": [5] * (row + 1)} for row in range(ROWS)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(data: Path, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    config = Config(data=DataConfig(str(data)), plan=PlanConfig(expected_tokens=10, **options))  # type: ignore[arg-type]
    config.output.dir = ""
    plan_report(config)
    return capsys.readouterr().out


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 60), st.integers(1, 4), st.integers(0, 3))
@settings(deadline=None)
def test_a_sample_is_evenly_spaced_in_each_shard(start: int, length: int, stride: int, shards: int, index: int) -> None:
    rows = np.arange(start, start + length)[~OneIn(stride, shards).mask(start, start + length)]
    mine = rows[rows % shards == index % shards]
    assert set(np.diff(mine)) <= {stride * shards}
    assert abs(len(mine) - length / stride / shards) < 1


@pytest.mark.parametrize(("most", "stride"), [(None, 1), (1000, 1), (ROWS, 1), (399, 2), (40, 10), (1, ROWS)])
def test_no_more_rows_than_asked_for(data: Path, most: int | None, stride: int) -> None:
    source = open_source(DataConfig(str(data)), ShardConfig())
    total, skipped = sample(source, most, 1)
    assert total == (None if most is None and data.suffix == ".jsonl" else ROWS)
    assert [row.row for row in source.rows(skipped)] == list(range(0, ROWS, stride))


def test_a_sample_tells_of_all_rows(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = ROWS * (ROWS + 1) // 2
    assert printed(data, capsys).startswith(f"{ROWS} rows, {tokens:,} prompt tokens\n")
    text = printed(data, capsys, sample_rows=100)
    found = re.match(
        r"400 rows, about ([\d,]+) prompt tokens \(within ([\d.]+)%, 95 %\): estimated from 100 rows", text
    )
    assert found is not None, text
    assert int(found[1].replace(",", "")) == pytest.approx(tokens, rel=float(found[2]) / 100)
    assert "rows that will be refused: 0 of these 100" in text


def test_the_error_of_an_estimate_is_what_samples_show() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 2000)
    outside = 0
    for seed in range(200):
        survey = Survey(8)
        for length in np.random.default_rng(seed + 1).choice(lengths, 100, replace=False):
            survey.rows += 1
            survey._count(int(length))
        estimated = survey.prompt_tokens * 20
        outside += abs(estimated - lengths.sum()) > survey.prompt_tokens_error(2000) * estimated
    assert 2 <= outside <= 20  # of 200, 10 are expected
    assert Survey(8).prompt_tokens_error(100) == 0


def test_hours_dollars_and_cards(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(data, capsys, sample_rows=10, dollars_per_hour=3600 * 1e3, deadline_hours=1e-9)
    assert re.search(r" s in all and [\d,]+\.\d\d dollars, assuming", text)
    assert re.search(r"within 1 s: ([\d,]+) cards, \1 copies of the model \(engine.data_parallel_size=", text)
    assert "run it so: engine.max_num_seqs=" in text
    assert "1 card will do" in printed(data, capsys, deadline_hours=5.0)


def test_ctrl_c_ends_the_reading_and_what_was_read_is_the_sample(
    data: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar(plan_module.tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            os.kill(os.getpid(), signal.SIGINT)
            return None

    monkeypatch.setattr(plan_module, "tqdm", Bar)
    text = printed(data, capsys, sample_rows=ROWS)
    assert text.startswith("400 rows, about")
    assert "estimated from 1 rows" in text
    assert "interrupted: what follows is estimated from the first 1 rows" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
