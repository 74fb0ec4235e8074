"""What runs in a step, which requests start and which are preempted: host logic, which never waits for the device.

A step takes a token of every running sequence first, then prompt chunks up to a token budget. Under tensor parallelism
every rank schedules alike, so nothing here is decided by a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from batchmix.engine.block_manager import BlockPool, PrefixCache
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.request import EngineLimits, Request, ScheduledChunk, Step
from batchmix.observability.engine_stats import EngineStats
from batchmix.records import Prompt

MIN_BUDGET = 1024  # tokens of a step with chunks: with fewer, reading the weights takes longer than arithmetic
_RAMP = 1 / 3  # share of startable among running and startable sequences from which steps are as large as they may be
# Share of the growth that running sequences are expected to have for which KV blocks are held back. The rest relies on
# others ending first, and on preemption where they do not: benchmarks/bench_schedule.py compares it with 1.
_RESERVE = 0.25
_FIRST_MEAN = 256.0  # tokens of an answer, before there are any
_NEW_MEAN = 0.1  # weight of the completions of one step in the mean length of answers


class Scheduler:
    """The requests of a run: waiting, in prefill, running; their slots and KV blocks; and the next step."""

    def __init__(
        self, make_batch: Callable[[EngineLimits], InputBatch], limits: EngineLimits, stats: EngineStats
    ) -> None:
        self.block_size, self.stats = limits.block_size, stats
        self.waiting: deque[Request] = deque()
        self.mean_answer = 0.0  # tokens of the completions so far
        self._prompts, self._prompt_tokens = 0, 0  # so far, and their tokens that no prefix covers
        self._make_batch = make_batch
        self.renew(limits)

    def renew(self, limits: EngineLimits) -> None:
        """Make room for `max_num_seqs` sequences, none of which is there; requests that wait stay."""
        self.limits = limits
        self.running: list[Request] = []  # of slot 0, 1, ...
        self.prefilling: Request | None = None  # whose chunks do not fit one step; the only one
        self.scoring: list[Request] = []  # whose log-probabilities are on their way to the host
        self.pool = BlockPool(limits.num_blocks)
        self.prefixes = PrefixCache(self.pool, self.block_size)
        self.batch = self._make_batch(limits)

    def add(self, request: Request) -> None:
        """Let a request wait."""
        self.waiting.append(request)
        self._prompts += 1
        self._prompt_tokens += self._uncached_tokens(request.prompt)

    @property
    def is_idle(self) -> bool:
        """Whether no request is here."""
        return not (self.waiting or self.running or self.prefilling or self.scoring)

    # The next step.

    def schedule(self, jump_forward: list[list[int]], num_steps: int) -> Step | None:
        """A token of every running sequence, then chunks. None where what is queued has to be read back first.

        `jump_forward`: forced tokens of each running sequence. `num_steps`: decode steps at most, where nothing waits.
        """
        if jump_forward:
            self.batch.planned[: len(self.running)] += list(map(len, jump_forward))
        tokens_of = {id(sequence): tokens for sequence, tokens in zip(self.running, jump_forward, strict=False)}
        steps = self._allocate_decode(1 if self.waiting or self.prefilling else num_steps)
        if self.running and not steps:
            return None
        # Some may have been preempted. The others keep the tokens that blocks were allocated for.
        jump_forward = [tokens_of[id(sequence)] for sequence in self.running] if jump_forward else []
        step = Step(len(self.running), max(1, steps), jump_forward)
        if self.waiting or self.prefilling:
            free = self._free_tokens()
            self._add_chunks(step, self._budget(free) - step.num_tokens, free)
        if step.chunks:  # of sequences that were preempted just now, where nothing waited before
            step.num_steps = 1
        for chunk in step.chunks:  # blocks of choices: what is queued later may write to them
            self.pool.release(chunk.blocks[len(chunk.request.blocks) :])
        self.stats.waiting = len(self.waiting)
        return step if step.chunks or step.num_decode else None

    def _budget(self, free: float) -> int:
        """Tokens of the next step. With R sequences of P prompt and A answer tokens R / A answers end a step, so R (1 +
        P / A) tokens keep the batch full."""
        most, running = self.limits.max_num_batched_tokens, len(self.running)
        if not running or self._num_startable(running, free) >= running * _RAMP / (1 - _RAMP):
            return most
        prompt, answer = self._prompt_tokens / max(1, self._prompts), self.mean_answer or _FIRST_MEAN
        held = self.limits.num_blocks * self.block_size / (prompt + (answer + self.block_size) / 2)
        rows = min(self.batch.capacity, held)
        return int(min(most, max(MIN_BUDGET, rows * (1 + prompt / answer))))

    def _num_startable(self, limit: int, free: float) -> int:
        """Sequences that find slots, and blocks among `free` tokens; counted up to `limit`."""
        slots, found = self.batch.capacity - len(self.running), 0
        for request in self.waiting:
            samples = min(len(request.samples), slots - found)
            needed = self._needed_tokens(request.prompt, samples)
            if samples <= 0 or found >= limit or needed > free:
                break
            found, free = found + samples, free - needed
        return found

    def _free_tokens(self) -> float:
        """Free KV-cache tokens, net of the expected growth of running sequences."""
        planned = self.batch.planned[: len(self.running)]
        expected = np.maximum(self.mean_answer or _FIRST_MEAN, 2.0 * planned)
        growth = np.minimum(expected, self.batch.host["max_tokens"][: len(self.running)]) - planned
        return self._num_available() * self.block_size - _RESERVE * float(np.maximum(growth, 0).sum())

    def _needed_tokens(self, prompt: Prompt, samples: int) -> float:
        """KV-cache tokens of a prompt and the expected growth of its samples."""
        growth = _RESERVE * min(self.mean_answer or _FIRST_MEAN, prompt.sampling.max_tokens) + self.block_size
        return self._uncached_tokens(prompt) + samples * growth

    def _uncached_tokens(self, prompt: Prompt) -> int:
        """The prompt's tokens that are likely not in the cache."""
        return len(prompt.token_ids) - prompt.shared_tokens // self.block_size * self.block_size

    # Decoding sequences.

    def _allocate_decode(self, most: int) -> int:
        """Allocate the blocks that sequences write to in up to `most` steps; how many steps, 0 where none has tokens
        left. Where blocks run out, the most recently started sequences are preempted."""
        batch = self.batch
        while self.running:
            active, left = len(self.running), batch.left()
            steps = min(most, int(left.max()))
            if steps <= 0:
                return 0
            # The position that is written last: what is planned ends with a token that is not in the cache yet.
            last = batch.prompt_tokens[:active] + batch.planned[:active] - 2 + np.minimum(steps, left)
            missing = last // self.block_size + 1 - batch.num_blocks[:active]
            slots = np.flatnonzero(missing > 0)
            slots = np.repeat(slots, missing[slots])  # a slot as often as it needs blocks
            if len(slots) <= self._num_available():
                batch.add_blocks(slots, self._allocate(len(slots)))
                return steps
            if batch.pending:  # some may have ended
                return 0
            self.preempt(max(range(active), key=lambda slot: self.running[slot].order))
        return 0

    def preempt(self, slot: int) -> None:
        """Take a sequence out of the batch. It starts over later; its random numbers are keyed, so it ends the same."""
        sequence = self.running[slot]
        self.stats.preempted += 1
        self.stats.completion_tokens -= int(self.batch.outputs.count[slot])
        self.finish(slot)
        if self.waiting and self.waiting[0].prompt is sequence.prompt:
            self.waiting[0].samples[:0] = sequence.samples
        else:
            self.waiting.appendleft(sequence)

    def finish(self, slot: int) -> None:
        """Take a sequence out of the batch; that of the last slot moves into its slot."""
        sequence = self.running[slot]
        self.pool.release(self.batch.block_table[slot, : self.batch.num_blocks[slot]].tolist())
        self.batch.remove(slot, sequence.prompt.sampling)
        self.running[slot] = self.running[-1]
        self.running.pop()

    def record_answers(self, lengths: Iterable[int]) -> None:
        """Take the lengths of answers that have ended in one step into their mean."""
        mean = float(np.mean(list(lengths)))
        self.mean_answer = (1 - _NEW_MEAN) * self.mean_answer + _NEW_MEAN * mean if self.mean_answer else mean

    # Prompts.

    def _add_chunks(self, step: Step, room: int, free: float) -> None:
        """Fill the step with chunks of the request in prefill, then of those that start with `free` KV-cache tokens. A
        chunk that is longer than the room is the only one, where prompts are not to be cut there."""
        while room > 0:
            request = self.prefilling
            if request is None:
                request = self.prefilling = self._start(step, free)
                if request is None:
                    return
                free -= self._needed_tokens(request.prompt, len(request.samples))
            chunk = self._next_chunk(step, request, room)
            if chunk is None:
                return
            step.chunks.append(chunk)
            room -= chunk.length
            self._record_chunk(step, chunk)

    def _next_chunk(self, step: Step, request: Request, room: int) -> ScheduledChunk | None:
        """The next tokens of a prompt, or the rest of it and its next choice, with blocks of its own."""
        ids, start, blocks, choice = request.prompt.token_ids, request.computed, request.blocks, None
        # What is computed once: of a prompt that choices follow only whole blocks, the rest with each choice.
        end = len(ids) if request.choices is None else len(blocks) * self.block_size
        if start == end and request.choices is not None:
            choice = request.next_choice
            tokens = [*ids[start:], *request.choices[choice]]
            needed = -(-len(tokens) // self.block_size)
            if (len(tokens) > room and step.chunks) or needed > self._num_available():
                return None
            blocks = blocks + self._allocate(needed)
        else:
            limits = self.limits
            length = min(limits.prefill_chunk - start % limits.prefill_chunk, end - start)
            if length > room and limits.cuts_prompts:  # at whole blocks, which others may share
                length = (start + room) // self.block_size * self.block_size - start
            if length <= 0 or (length > room and step.chunks):
                return None
            tokens = list(ids[start : start + length])
        is_last = choice is None and start + len(tokens) == len(ids)
        return ScheduledChunk(step.num_tokens, start, len(tokens), blocks, request, tokens, choice, is_last)

    def _record_chunk(self, step: Step, chunk: ScheduledChunk) -> None:
        """The chunk is in a step. Its blocks can be read by what comes behind it, in the same step too: each layer
        writes all keys and values before it attends."""
        request = chunk.request
        if chunk.choice is None:
            request.computed = chunk.start + chunk.length
            shared = min(request.prompt.shared_tokens, request.computed)
            self.prefixes.keep(request.prompt.token_ids, shared, request.blocks)
        else:
            request.next_choice += 1
        if chunk.is_last:
            self.prefilling = None
            step.block_copies += self._start_samples(request)
        elif request.choices is not None and request.next_choice == len(request.choices):
            self.prefilling = None
            self.scoring.append(request)

    def _start(self, step: Step, free: float) -> Request | None:
        """Take the first waiting request into prefill, with blocks for as many samples as there are slots."""
        if not self.waiting:
            return None
        request, size = self.waiting[0], self.block_size
        prompt, samples, length = request.prompt, request.samples, len(request.prompt.token_ids)
        if request.choices is None:
            samples = samples[: self.batch.capacity - len(self.running)]
            alone = not (self.running or self.scoring or step.chunks)
            if not samples or not (alone or self._needed_tokens(prompt, len(samples)) <= free):
                return None
            held = needed = -(-(length + 1) // size)
        else:  # its last token is computed with each choice
            held, needed = (length - 1) // size, -(-(length + max(map(len, request.choices))) // size)
        shared = self.prefixes.lookup(prompt.token_ids, min(prompt.shared_tokens, held * size))
        if needed - len(shared) > self._num_available():
            self.pool.release(shared)
            return None
        request.blocks, request.computed = shared + self._allocate(held - len(shared)), len(shared) * size
        if request.choices is None:
            samples = samples[: 1 + self._num_available()]  # each further sample has a last block of its own
            request.sample_blocks = self._allocate(len(samples) - 1)
        else:
            request.num_pending, request.logprobs = len(request.choices), np.zeros(len(request.choices))
        self.waiting.popleft()
        if len(samples) < len(request.samples):
            self.waiting.appendleft(Request(prompt, request.samples[len(samples) :]))
            request.samples = samples
        self.stats.shared_tokens += request.computed
        return request

    def _start_samples(self, request: Request) -> list[tuple[int, int]]:
        """Give a slot to each sample of a prompt whose last chunk is in the step. Blocks to copy, (from, to) each."""
        prompt = request.prompt
        limit = min(prompt.sampling.max_tokens, self.limits.max_model_len - len(prompt.token_ids))
        copies = []
        for number, sample in enumerate(request.samples):
            blocks = list(request.blocks)
            if number:  # full blocks are shared, the last one is the sample's own
                self.pool.share(blocks[:-1])
                copies.append((blocks[-1], request.sample_blocks[number - 1]))
                blocks[-1] = request.sample_blocks[number - 1]
            slot = self.batch.add(prompt, sample, limit)
            self.batch.add_blocks(np.full(len(blocks), slot), blocks)
            self.running.append(Request(prompt, [sample]))
        return copies

    # Blocks.

    def _num_available(self) -> int:
        """Blocks that are free, or can be: prefixes stay in the cache only for as long as there is room."""
        return self.pool.num_free + self.pool.num_only_kept

    def _allocate(self, count: int) -> list[int]:
        """`count` of the blocks that are available."""
        self.prefixes.release(count - self.pool.num_free)
        return self.pool.take(count)

    # Out of memory.

    def requeue_all(self) -> int:
        """Let all that runs or is in prefill wait again, in the order of its start; count prompts."""
        again: dict[int, Request] = {}
        found = sorted(self.running, key=lambda sequence: sequence.order) + self.scoring
        for one in found + ([self.prefilling] if self.prefilling else []):
            known = again.setdefault(id(one.prompt), Request(one.prompt, [], one.choices, one.end_tokens))
            known.samples += one.samples
        self.waiting.extendleft(reversed(again.values()))
        return len(again)
