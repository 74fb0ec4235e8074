"""The sink stage: completions become committed part files, in a thread of its own.

A row is committed with all its samples in one part, and a part appears whole or not at all; so the `row` columns of
the parts there are say which rows are done.
"""

from __future__ import annotations

import errno
import threading
import time
from queue import Empty

from batchmix.observability.clock import StageClock
from batchmix.output.detokenize import detokenize
from batchmix.output.parts import PartLog
from batchmix.prompts.buffers import BoundedQueue, Buffers, buffered_bytes
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.records import Completion, RowSamples

_QUEUE_DEPTH = 64  # lists of completions; with the row being built, all that waits for the disk
_COMPLETION_BYTES = 500  # of one without tokens
_LOGPROB_BYTES = 150  # of a token and its log-probability
_CHUNK = 256  # completions handed over at once
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk, the quota, the file size limit


class Sink:
    """Commits completions to `log`. A context manager: leaving it commits what is whole.

    `write` and `close` raise what went wrong in the thread.
    """

    def __init__(
        self,
        log: PartLog,
        *,
        tokenizer: Tokenizer | None,
        rows_per_shard: int,
        flush_seconds: float,
        clock: StageClock,
        buffers: Buffers | None = None,
    ) -> None:
        """`buffers`: what may wait; a part has no more bytes than that either. None: as the configuration's default."""
        self._log = log
        self._buffers = buffers or Buffers.of(buffered_bytes(None))
        self._tokenizer = tokenizer
        self._rows_per_shard = rows_per_shard
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._queue: BoundedQueue[list[Completion] | None] = BoundedQueue(_QUEUE_DEPTH, self._buffers.queued)
        self._outgoing: list[Completion] = []
        self._outgoing_bytes = 0
        self._handed_over = time.monotonic()
        self._samples = RowSamples()
        self._pending: list[Completion] = []  # whole rows, not committed yet
        self._pending_rows = self._pending_bytes = 0
        self._pending_since = 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)
        self._thread.start()

    def write(self, completion: Completion) -> None:
        """Hand over one sample of one row; a row that could not be run comes once for all its samples."""
        self._outgoing.append(completion)
        self._outgoing_bytes += _size(completion)
        full = len(self._outgoing) >= _CHUNK or self._outgoing_bytes >= self._buffers.queued // 4
        if full or time.monotonic() - self._handed_over > 1.0:
            self._hand_over()

    def close(self) -> None:
        """Commit every whole row and end the thread. Rows that miss samples are not committed."""
        self._hand_over()
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_over(self) -> None:
        self._raise()
        if self._outgoing:
            self._queue.put(self._outgoing, self._outgoing_bytes)
            self._outgoing, self._outgoing_bytes = [], 0
        self._handed_over = time.monotonic()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        ended = False
        try:
            while not ended:
                completions = self._next()
                ended = completions is None
                self._add(completions or [])
                if ended or (self._pending and time.monotonic() - self._pending_since >= self._flush_seconds):
                    self._commit()
        except BaseException as error:
            self._error = error
            while not ended:  # so that nobody waits for room in the queue
                ended = self._queue.get() is None

    def _next(self) -> list[Completion] | None:
        """The next completions; none of them where pending rows must be committed before any came; None at the end."""
        wait = max(0.0, self._pending_since + self._flush_seconds - time.monotonic()) if self._pending else None
        if wait is not None and wait > threading.TIMEOUT_MAX:  # flush_seconds=inf: by rows_per_shard alone
            wait = None
        try:
            return self._queue.get(timeout=wait)
        except Empty:
            return []

    def _add(self, completions: list[Completion]) -> None:
        with self._clock.stage("write"):
            detokenize(completions, self._tokenizer)
        for completion in completions:
            samples = self._whole_row(completion)
            if not samples:
                continue
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending += samples
            self._pending_rows += 1
            self._pending_bytes += sum(map(_size, samples))
            if self._pending_rows == self._rows_per_shard or self._pending_bytes >= self._buffers.pending:
                self._commit()

    def _whole_row(self, completion: Completion) -> list[Completion]:
        """All samples of the row if this was the last that was missing, else none."""
        prompt = completion.prompt
        if prompt.error is not None:
            return [Completion.failed(prompt, prompt.error, i) for i in range(prompt.sampling.n)]
        return self._samples.add(completion)

    def _commit(self) -> None:
        if not self._pending:
            return
        with self._clock.stage("write"):
            self._log.commit(self._pending)
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


def _size(completion: Completion) -> int:
    """About its bytes, with the prompt's columns, which each sample of a row has in the output."""
    size = _COMPLETION_BYTES + completion.prompt.num_bytes + 40 * len(completion.token_ids) + 4 * completion.num_tokens
    if completion.logprobs is not None:
        size += sum(_LOGPROB_BYTES * (1 + len(entry.top)) for entry in completion.logprobs)
    return size
