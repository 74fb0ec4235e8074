"""What the processes of a run listen on, seen from outside while it runs."""

from __future__ import annotations

import ipaddress
import os
import time
from pathlib import Path

import psutil
import pytest
from processes import TICKETS, finish, listening, start

from batchmix.distributed import tensor_parallel as tensor


@pytest.mark.slow  # four whole runs
@pytest.mark.parametrize(
    ("settings", "listens"),
    [
        pytest.param([], False, id="plain"),
        pytest.param(["engine.data_parallel_size=2"], False, id="data-parallel"),
        pytest.param(["model.tensor_parallel_size=2"], True, id="tensor-parallel"),
        pytest.param(["engine.data_parallel_size=2", "model.tensor_parallel_size=2"], True, id="both"),
    ],
)
def test_a_run_listens_on_loopback_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], listens: bool
) -> None:
    """Also where the machine's own settings name other interfaces, as a cluster's do."""
    others = [name for name in psutil.net_if_addrs() if name != "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", others[0] if others else "eth0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(TICKETS.read_text(encoding="utf-8").splitlines()[:40]) + "\n", encoding="utf-8")
    process = start(data, tmp_path / "out", "engine.device=cpu", *settings, threads=1)
    seen: set[str] = set()
    while process.poll() is None:
        seen |= listening(process.pid)
        time.sleep(0.2)
    code, output = finish(process)
    assert code == 0, output
    assert bool(seen) is listens
    assert all(ipaddress.ip_address(address).is_loopback for address in seen), seen


def test_the_ranks_meet_on_loopback() -> None:
    before = listening(os.getpid())
    store = tensor._loopback_store()
    assert listening(os.getpid()) - before <= {"127.0.0.1"}
    assert any(socket.laddr.port == store.port for socket in psutil.Process().net_connections("tcp"))
    store.set("key", "value")
    assert store.get("key") == b"value"
