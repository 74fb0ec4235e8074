"""From admitted prompts to rows with a first token: all prompts packed, without padding, in as few steps as they fit."""

from __future__ import annotations

import time

import torch

from batchmix.engine.state import Admission, Row, State
from batchmix.engine.step import Piece, choose, pad, prefill
from batchmix.model.mixtral import Mixtral
from batchmix.report.device_clock import DeviceClock


class Prefill:
    """Runs `state.admissions`, which become rows."""

    def __init__(
        self, model: Mixtral, state: State, device_clock: DeviceClock, max_model_len: int, chunk_tokens: int
    ) -> None:
        self.model, self.state, self.device_clock = model, state, device_clock
        self.max_model_len, self.chunk_tokens = max_model_len, chunk_tokens

    def run(self) -> None:
        """Run all prompts' chunks through the model, as many together as fit max_num_batched_tokens, and start the rows.

        A chunk that alone is longer runs alone: cutting it would change how its sums are rounded.
        """
        stats = self.state.stats
        stats.first_prefill_time = stats.first_prefill_time or time.time()
        stats.refills += bool(self.state.rows)
        pack: list[tuple[Admission, Piece]] = []
        room = self.state.max_num_batched_tokens
        for admission in self.state.admissions:
            token_ids = admission.prompt.token_ids
            for start in range(admission.cached, len(token_ids), self.chunk_tokens):
                piece = Piece(token_ids[start : start + self.chunk_tokens], start, admission.blocks)
                # What a chunk reads of earlier ones may be of its own step: each layer writes before it attends.
                if pack and len(piece.token_ids) > room:
                    self._run_pack(pack)
                    pack, room = [], self.state.max_num_batched_tokens
                pack.append((admission, piece))
                room -= len(piece.token_ids)
        if pack:
            self._run_pack(pack)
        self._start(self.state.admissions)
        self.state.admissions, self.state.idle_reads = [], 0.0

    def _run_pack(self, pack: list[tuple[Admission, Piece]]) -> None:
        hidden, ends = prefill(self.model, self.state, self.device_clock, [piece for _, piece in pack])
        for (admission, piece), end in zip(pack, ends, strict=True):
            if piece.start + len(piece.token_ids) == len(admission.prompt.token_ids):
                admission.last_hidden = hidden[end - 1].clone()

    def _start(self, admissions: list[Admission]) -> None:
        """Give every sample its slot and its first token."""
        state, model, slots = self.state, self.model, self.state.slots
        first = len(state.rows)
        size = state.cache.block_size
        hidden = []
        for admission in admissions:
            prompt, blocks = admission.prompt, admission.blocks
            num_full = len(prompt.token_ids) // size
            limit = min(prompt.sampling.max_tokens, self.max_model_len - len(prompt.token_ids))
            for i, sample in enumerate(admission.samples):
                if i:  # full blocks are shared, the last one is the sample's own
                    own = state.take(1)
                    state.cache.copy_block(admission.blocks[-1], own[0])
                    state.pool.share(admission.blocks[:-1])
                    blocks = admission.blocks[:-1] + own
                assert num_full in (len(blocks), len(blocks) - 1)
                slot = slots.add(prompt, sample, limit)
                slots.give_blocks(slot, blocks)
                state.rows.append(Row(prompt, sample, state.num_admitted, list(blocks)))
                state.num_admitted += 1
                assert admission.last_hidden is not None
                hidden.append(admission.last_hidden)
        padding = pad(len(hidden), model.ops.row_tile) - len(hidden)
        stacked = torch.stack(hidden + [torch.zeros_like(hidden[0])] * padding)
        slots.upload()
        with self.device_clock.work("prefill"):
            choose(model, slots, first, model.logits(stacked)[: len(hidden)])
        slots.queued(first, first + len(hidden), 1)
        slots.look()
