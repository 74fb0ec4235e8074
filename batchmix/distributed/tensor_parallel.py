"""`model.tensor_parallel_size`: the processes that share one model, started by the run itself.

Rank 0 is the run: source, prompt, plan, engine and sink. The others run the same engine on the batches that rank 0 hands
them and drop what comes out. They decide nothing and have nothing to save, so they are simply killed when rank 0 is
through, for whatever reason.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.config import Config
from batchmix.distributed.workers import Parent, Worker
from batchmix.engine.build import start_engine
from batchmix.engine.device import nth_device, select_device
from batchmix.errors import BatchmixError
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.prompts.tokenizer import load_tokenizer
from batchmix.records import Batch

_HOST, _LOOPBACK = "127.0.0.1", "lo"
# Of a collective. Rank 0 may wait for its disk for long; what has died is noticed by `_Watch`, not by a timeout.
_TIMEOUT = timedelta(days=1)
_GRACE = (
    10.0  # seconds for rank 0 to come out of a collective with a dead rank: at once with gloo, maybe never with NCCL
)


class TPWorkers:
    """The other ranks, seen from rank 0."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers

    def broadcast(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, each handed to the other ranks before it is given here; for one call of `Engine.generate` each."""
        for batch in batches:
            self._send(Batch([replace(prompt, columns={}) for prompt in batch.prompts]))
            yield batch
        self._send(None)

    def _send(self, batch: Batch | None) -> None:
        for worker in self._workers:
            worker.send(batch)


def print_last_words(error: BatchmixError) -> None:
    """Of a process that hangs and will be ended."""
    print(f"batchmix: error: {error}", file=sys.stderr, flush=True)


@contextmanager
def tensor_parallel(
    config: Config, give_up: Callable[[BatchmixError], None] = print_last_words
) -> Iterator[tuple[TensorParallel, TPWorkers]]:
    """The ranks of `model.tensor_parallel_size`, alive for the length of the block.

    A rank that dies ends the block with the one exception that says so. Where the block hangs on the dead rank,
    `give_up` is called with it from a thread, and the process ends.
    """
    size = config.model.tensor_parallel_size
    if size == 1:
        yield TensorParallel(), TPWorkers([])
        return
    store = _loopback_store()
    first = select_device(config.engine).device
    workers = []
    for rank in range(1, size):
        engine = replace(config.engine, device=str(nth_device(first, rank)))
        name = f"tensor-parallel rank {rank} of {size}"
        workers.append(Worker(name, _follow, replace(config, engine=engine), rank, store.port))
    watch = _Watch(workers, give_up)
    try:
        with _joined(config, 0, store):
            yield TensorParallel(0, size), TPWorkers(workers)
    except (RuntimeError, OSError):  # from a collective with, or a message to, a rank that is gone, or our own
        failure = watch.failure_soon()
        if failure is None:
            raise
        raise failure from None
    finally:
        watch.close()
        for worker in workers:
            worker.kill()


def _loopback_store() -> TCPStore:
    """Where the ranks find each other. The host that TCPStore is given is whom clients ask: its server would listen on
    every interface, and answers whoever connects, so it is handed a socket of the loopback interface."""
    listener = socket.create_server((_HOST, 0))
    port: int = listener.getsockname()[1]
    return TCPStore(
        _HOST, port, is_master=True, wait_for_workers=False, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


def _follow(parent: Parent, config: Config, rank: int, port: int) -> None:
    """What a rank above 0 does until it is killed: one stream of batches after another."""
    checkpoint = open_checkpoint(config.model)
    tokenizer = load_tokenizer(checkpoint.folder, config.data.chat_template)
    store = TCPStore(_HOST, port, is_master=False, timeout=_TIMEOUT)
    with _joined(config, rank, store):
        tp = TensorParallel(rank, config.model.tensor_parallel_size)
        engine = start_engine(checkpoint, tokenizer, config.engine, lambda: False, tp)
        while True:
            for _ in engine.generate(iter(parent.receive, None)):
                pass


@contextmanager
def _joined(config: Config, rank: int, store: Store) -> Iterator[None]:
    """In torch.distributed's default group: gloo for tensors on the CPU, NCCL for those on GPUs."""
    # Whatever a cluster's own settings are: these ranks are on one machine, and nothing of theirs asks who connects.
    os.environ |= {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}
    device = select_device(config.engine).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store, rank=rank, world_size=config.model.tensor_parallel_size, timeout=_TIMEOUT,
    )  # fmt: skip
    try:
        yield
    finally:
        dist.destroy_process_group()


class _Watch:
    """Notices ranks that die, in a thread."""

    def __init__(self, workers: list[Worker], give_up: Callable[[BatchmixError], None]) -> None:
        self._workers = workers
        self._give_up = give_up
        self._failure: BaseException | None = None
        self._failed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-ranks", daemon=True)
        self._thread.start()

    def failure_soon(self) -> BaseException | None:
        """Why a rank ended, if one did; waits a little, since a broken connection may be seen before its cause."""
        self._failed.wait(2.0)
        return self._failure

    def close(self) -> None:
        """The ranks may end now."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set() and self._failure is None:
            Worker.wait(self._workers, 0.2)
            for worker in self._workers:
                for message in worker.messages():
                    if isinstance(message, BaseException):
                        self._failure = self._failure or message

            time.sleep(0.05)  # a rank that has ended well is ready at once for ever
        if self._failure is None:
            return
        self._failed.set()
        if not self._closed.wait(_GRACE):
            self._give_up(BatchmixError(str(self._failure)))
            os._exit(1)
