"""Decode: a few steps for all rows that run, each as one captured graph where there are graphs."""

from __future__ import annotations

from functools import partial

import numpy as np

from batchmix.engine.graphs import rung
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
        """A few tokens for every active row, or one if their log-probabilities are wanted, which the host keeps."""
        state, model, slots = self.state, self.model, self.state.slots
        active, host = len(state.rows), slots.host
        wants_logprobs = bool(host["wants_logprob"][:active].any())
        left = int((host["max_tokens"][:active] - host["generated"][:active]).max())
        steps = 1 if wants_logprobs else min(self.steps_per_read, left)
        self._take_blocks(steps)
        active = len(state.rows)
        # A power of two, so that a graph serves for a while.
        width = 1 << int(slots.num_blocks[:active].max() - 1).bit_length()
        width = min(width, slots.block_table.shape[1])
        captured = state.graphs.enabled and not wants_logprobs
        # A captured step runs over free slots too, so that few sizes serve all.
        size = rung(state.ladder, active) if captured else pad(active, model.ops.row_tile)
        slots.upload()
        model.ops.find_shared(model, state.cache, slots, size)
        with self.device_clock.work("decode"):
            for _ in range(steps):
                if not captured:
                    self._step(active, size, width)
                else:
                    state.graphs.run((size, width), slots.tables(), partial(self._step, size, size, width))
        state.stats.running = active
        state.stats.kv_blocks_used = state.pool.num_used

    def _step(self, rows: int, size: int, width: int) -> None:
        """A token for slots 0..rows-1, in a step of `size` tokens; nothing here waits for the device."""
        model, slots, cache = self.model, self.state.slots, self.state.cache
        attend = cache.around_decode(model.ops.decode(model, cache, slots, rows, size, width), slots, rows)
        hidden = model(slots.token[:size], attend)
        choose(model, slots, 0, model.logits(hidden)[:rows], decoded=True)

    def _take_blocks(self, steps: int) -> None:
        """The blocks that rows write to in so many steps; the youngest rows give way where there are too few."""
        state, slots = self.state, self.state.slots
        while True:
            active = len(state.rows)
            host, held = slots.host, slots.num_blocks[:active]
            left = host["max_tokens"][:active] - host["generated"][:active]
            last = host["context"][:active] + np.minimum(steps, left) - 1  # position that is written last
            missing = np.maximum(last // state.cache.block_size + 1 - held, 0)
            needing = np.repeat(np.arange(active), missing)  # a slot as often as it needs blocks
            try:
                blocks = state.take(len(needing))
            except OutOfBlocks:
                state.put_back(max(range(active), key=lambda slot: state.rows[slot].order))
                continue
            for slot, block in zip(needing.tolist(), blocks, strict=True):
                slots.block_table[slot, len(state.rows[slot].blocks)] = block
                state.rows[slot].blocks.append(block)
            held += missing
            return
