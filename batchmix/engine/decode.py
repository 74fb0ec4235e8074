"""Decode: a window of steps for all rows that run, each as one captured graph where there are graphs."""

from __future__ import annotations

from functools import partial

import numpy as np

from batchmix.engine.completion import hear, listen
from batchmix.engine.forced import append_jump_forward, find_jump_forward, wants_skipping
from batchmix.engine.graphs import Step, pad_to_capture_size
from batchmix.engine.kv_cache import OutOfBlocks
from batchmix.engine.state import State
from batchmix.engine.step import choose, pad
from batchmix.model.mixtral import Mixtral
from batchmix.report.device_clock import DeviceClock


class Decode:
    """Runs `state.rows`."""

    def __init__(self, model: Mixtral, state: State, device_clock: DeviceClock, steps_per_read: int) -> None:
        self.model, self.state, self.device_clock, self.steps_per_read = model, state, device_clock, steps_per_read

    def run(self) -> None:
        """Queue a few tokens for every active row, or one where the host keeps their log-probabilities or finds their masks.

        Nothing is queued where all rows will have ended once what is queued already is done.
        """
        state, model, slots = self.state, self.model, self.state.slots
        wants_logprobs = bool(slots.host["wants_logprob"][: len(state.rows)].any())
        skipping = wants_skipping(slots)
        if wants_logprobs or skipping:
            hear(state, all_of_it=True)
        runs = find_jump_forward(slots, state.max_num_batched_tokens) if skipping else []
        slots.planned[: len(runs)] += np.array([len(run) for run in runs], np.int64)
        run_of = {id(row): run for row, run in zip(state.rows, runs, strict=False)}
        on_host = bool(slots.grammars.texts)
        steps = self._take_blocks(1 if wants_logprobs or skipping or on_host else self.steps_per_read)
        if not steps:
            hear(state, all_of_it=True)
            return
        active = len(state.rows)
        # Rows may have given way. The others keep the runs that blocks were taken for.
        runs = [run_of[id(row)] for row in state.rows] if skipping else []
        # A power of two, so that a graph serves for a while.
        width = 1 << int(slots.num_blocks[:active].max() - 1).bit_length()
        width = min(width, slots.block_table.shape[1])
        captured = state.graphs.enabled and not wants_logprobs and not any(runs) and not on_host
        # A captured step runs over free slots too, so that few sizes serve all.
        size = pad_to_capture_size(state.capture_sizes, active) if captured else pad(active, model.ops.row_tile)
        slots.upload()
        if any(runs):
            self._forced_step(runs, width)
            return
        model.ops.find_shared(model, state.cache, slots, size)
        model.expert_load.set_num_valid(active)
        for _ in range(steps):
            step: Step = partial(self._step, size if captured else active, size, width)
            if captured:
                step = state.graphs.prepare((size, width), slots.tables(), step)
            # Each step apart: gaps between them are no work.
            with self.device_clock.work("decode", size if captured else None):
                step()
        self._end(active, steps)

    def _end(self, active: int, steps: int) -> None:
        """So many steps are queued."""
        state = self.state
        state.idle_reads += steps * state.startable / (state.startable + active)
        state.slots.queued(0, active, steps)
        state.slots.look()
        state.stats.running = active
        state.stats.kv_blocks_used = state.pool.num_used

    def _forced_step(self, runs: list[list[int]], width: int) -> None:
        """A step in which rows with forced tokens take them all, and one more."""
        model, slots, active = self.model, self.state.slots, len(self.state.rows)
        lanes = append_jump_forward(slots, runs)
        size, rows = len(lanes.token), active + sum(map(len, runs))
        self.state.stats.jump_forward_tokens += rows - active
        self.state.stats.completion_tokens += rows - active
        model.expert_load.set_num_valid(rows)
        cache = self.state.cache
        with self.device_clock.work("decode"):
            attend = cache.around_decode(model.ops.decode(model, cache, lanes, rows, size, width), lanes, rows)
            hidden = model(lanes.token, attend)
            first = hidden[: pad(active, model.ops.row_tile)]
            choose(model, slots, 0, model.logits(first)[:active])
        self._end(active, 1)

    def _step(self, rows: int, size: int, width: int) -> None:
        """A token for slots 0..rows-1, in a step of `size` tokens; nothing here waits for the device."""
        model, slots, cache = self.model, self.state.slots, self.state.cache
        attend = cache.around_decode(model.ops.decode(model, cache, slots, rows, size, width), slots, rows)
        logits = model.logits(model(slots.token[:size], attend))[:rows]
        if slots.grammars.texts:  # while the model runs
            listen(self.state, all_of_it=True)
        choose(model, slots, 0, logits)

    def _take_blocks(self, most: int) -> int:
        """The blocks that rows write to in up to so many steps; returns how many steps, 0 where no row is left.

        Where there are too few, rows that have ended meanwhile make room, then the youngest rows give way.
        """
        state, slots = self.state, self.state.slots
        while state.rows:
            left = slots.left()
            steps = min(most, int(left.max()))
            # The position that is written last: what is planned ends with a token that is not in the cache yet.
            last = slots.prompt_tokens[: len(left)] + slots.planned[: len(left)] - 2 + np.minimum(steps, left)
            missing = np.maximum(last // state.cache.block_size + 1 - slots.num_blocks[: len(left)], 0)
            needing = np.repeat(np.arange(len(left)), missing)  # a slot as often as it needs blocks
            try:
                blocks = state.take(len(needing))
            except OutOfBlocks:
                if slots.looks:
                    hear(state, all_of_it=True)
                else:
                    state.preempt(max(range(len(left)), key=lambda slot: state.rows[slot].order))
                continue
            for slot, block in zip(needing.tolist(), blocks, strict=True):
                slots.give_blocks(slot, [block])
                state.rows[slot].blocks.append(block)
            return steps
        return 0
