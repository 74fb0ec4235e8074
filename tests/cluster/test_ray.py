"""A real Ray cluster of several nodes on this machine: nodes that come and are lost while a run is at work."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from processes import TICKETS, finish, start, wait_for

pytestmark = pytest.mark.cluster

ROWS = 200
LONGER = ["sampling.max_tokens=40", "sampling.ignore_eos=true", "sampling.n=2", "engine.max_num_seqs=4"]
UNITS = ["cluster=ray", "cluster.rows_per_unit=10"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = TICKETS.read_text(encoding="utf-8").splitlines()[:ROWS]
    lines[7] = "{broken"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("undisturbed")
    code, output = finish(start(data, out, *LONGER, "engine.max_num_seqs=256", threads=1))
    assert code == 0, output
    return read(out)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs nothing itself."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


def read(out: Path) -> dict[tuple[int, int], tuple[Any, ...]]:
    """All columns by row and sample."""
    rows = ds.dataset(out, format="arrow").to_table().to_pylist()
    found = {(row["row"], row["sample_index"]): tuple(row.items()) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def more_parts(out: Path) -> Callable[[], bool]:
    """Whether more has been committed since this call."""
    there = len(list(out.glob("part-*")))
    return lambda: len(list(out.glob("part-*"))) > there + 1


def test_nodes_that_are_lost_and_nodes_that_join(cluster, data, tmp_path, expected):
    out = tmp_path / "out"
    first, second = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    process = start(data, out, *LONGER, *UNITS, f"cluster.address={cluster.address}", threads=1)
    wait_for(more_parts(out), process)
    cluster.remove_node(first, allow_graceful=False)
    wait_for(more_parts(out), process)
    cluster.add_node(num_cpus=1)
    cluster.remove_node(second, allow_graceful=False)  # what is left can only run on the node that has joined
    code, output = finish(process)
    assert code == 0, output
    assert output.count("a worker is lost") >= 2, output  # more where Ray puts new ones on a node that is gone
    assert (out / ".batchmix/SUCCESS").exists()
    assert read(out) == expected
    assert len(expected) == 2 * ROWS


def test_a_signal_commits_and_the_next_run_does_the_rest_elsewhere(cluster, data, tmp_path, expected):
    out = tmp_path / "out"
    cluster.add_node(num_cpus=1)
    process = start(data, out, *LONGER, *UNITS, f"cluster.address={cluster.address}", threads=1)
    wait_for(more_parts(out), process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 75, output
    assert "interrupted by SIGTERM" in output
    kept = read(out)
    assert 0 < len(kept) < 2 * ROWS
    code, output = finish(start(data, out, *LONGER, *UNITS, "cluster.address=local", "cluster.workers=1", threads=1))
    assert code == 0, output
    assert read(out) == expected


def test_what_is_wrong_is_said_in_one_line(data, tmp_path):
    code, output = finish(start(data, tmp_path / "out", *UNITS, "cluster.address=auto"))
    assert code == 1
    last = output.strip().splitlines()[-1]
    assert last.startswith("batchmix: error: cluster.address=auto: no Ray cluster there")
    assert "Traceback" not in output
