"""Stretches of a guided text that are the only possible one: their tokens are appended without a step for each.

A row whose grammar leaves one token, then one token again, gets all of them at once. Their keys and values are computed in
the decode step that follows, as lanes of their own behind the rows' lanes: to the attention a lane is a row with its own
position, and a layer writes all keys and values before it attends. So each token is computed just as in a step of its
own, with the same bits wherever those do not depend on a row's company, and the model runs once instead of many times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.async_copy import async_copy_to_gpu
from batchmix.engine.kv_cache import SCRATCH_BLOCK
from batchmix.engine.slots import InputBatch
from batchmix.kernels.row_state import Finish


@dataclass(frozen=True)
class Lanes:
    """The tokens of a step: those of the slots first, then forced ones. What `Operators.decode` reads of slots."""

    token: Tensor  # int64 [size]
    context: Tensor  # int64 [size]
    finish: Tensor  # int64 [size]
    prompt_tokens: np.ndarray  # int64 [lanes]: with `planned`, as in slots, where each token stands
    planned: np.ndarray
    block_table: np.ndarray  # int32 [size, blocks per row]
    device_blocks: Tensor


def wants_skipping(slots: InputBatch) -> bool:
    """Whether a row is there whose grammar may have forced stretches."""
    return any(grammar is not None and grammar.forced for grammar in slots.grammars.of_slot[: slots.num_active])


def find_jump_forward(slots: InputBatch, most: int) -> list[list[int]]:
    """The tokens that must come next, of each active row, `most` in all; all that was queued has been heard of.

    The last token of max_tokens and one after which the text may end are left to a step of their own, which sees that.
    Rows with penalties or log-probabilities take every step, which counts and logs each token.
    """
    found: list[list[int]] = []
    host, answers = slots.host, slots.answers
    for slot in range(slots.num_active):
        grammar = slots.grammars.of_slot[slot]
        if grammar is None or host["penalised"][slot] or host["wants_logprob"][slot]:
            found.append([])
            continue
        count = int(answers.count[slot])
        state = slots.grammars.follow(slot, answers.tokens[slot], count)
        run = grammar.jump_forward_tokens(state)[: max(0, min(most, int(host["max_tokens"][slot]) - count - 1))]
        most -= len(run)
        found.append(run)
    return found


def append_jump_forward(slots: InputBatch, runs: list[list[int]]) -> Lanes:
    """Append each active row's run to its answer, on host and device; the lanes of the step that computes them."""
    answers, device = slots.answers, slots.async_copy.device
    skipping = np.flatnonzero([len(run) > 0 for run in runs])
    owners: list[int] = []
    tokens: list[int] = []
    positions: list[int] = []
    states = []
    for slot in skipping.tolist():
        run, count = runs[slot], int(answers.count[slot])
        grammar = slots.grammars.of_slot[slot]
        assert grammar is not None
        states.append(grammar.after(slots.grammars.follow(slot, answers.tokens[slot], count), run))
        last = int(answers.tokens[slot, count - 1])
        context = int(slots.prompt_tokens[slot]) + count - 1
        owners += [slot] * len(run)
        tokens += [last, *run[:-1]]
        positions += range(context, context + len(run))
        answers.append(slot, run)
    lengths = np.array([len(runs[slot]) for slot in skipping])
    index, more = async_copy_to_gpu(skipping, device), async_copy_to_gpu(lengths, device)
    last_tokens = np.array([runs[slot][-1] for slot in skipping])
    slots.token.index_copy_(0, index, async_copy_to_gpu(last_tokens, device))
    slots.grammar_state.index_copy_(0, index, async_copy_to_gpu(np.array(states), device))
    slots.context.index_add_(0, index, more)
    slots.generated.index_add_(0, index, more)

    active, tile = slots.num_active, slots.row_tile
    padding = -(active + len(owners)) % tile
    scratch = np.full((padding, slots.block_table.shape[1]), SCRATCH_BLOCK, np.int32)
    table = np.concatenate((slots.block_table[:active], slots.block_table[owners], scratch))

    def lanes(of_slots: Tensor, forced: list[int], beyond: int) -> Tensor:
        behind = async_copy_to_gpu(np.array([*forced, *[beyond] * padding]), device)
        return torch.cat((of_slots[:active], behind))

    return Lanes(
        lanes(slots.token, tokens, 0),
        lanes(slots.context, positions, 0),
        lanes(slots.finish, [Finish.RUNNING] * len(owners), Finish.FREE),
        np.append(slots.prompt_tokens[:active], positions),
        np.append(slots.planned[:active], np.ones(len(owners), np.int64)),
        table,
        async_copy_to_gpu(table, device),
    )
