"""Stretches of a guided text that are the only possible one: their tokens are appended without a step for each.

A row whose grammar leaves one token, then one token again, gets all of them at once (jump-forward decoding, as SGLang calls
it). Their keys and values are computed in the step that follows, behind the rows' own tokens: to the attention each is a row
at its own position, and a layer writes all keys and values before it attends. So each token is computed just as in a step of
its own, with the same bits wherever those do not depend on the other rows in the batch, and the model runs once instead of
many times.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.input_batch import InputBatch
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.backend import DecodeTokens


def may_jump_forward(batch: InputBatch) -> bool:
    """Whether a row is there whose grammar may leave no choice."""
    return batch.grammars.used and any(
        grammar is not None and grammar.forced for grammar in batch.grammars.of_slot[: batch.num_active]
    )


def find_jump_forward(batch: InputBatch, most: int) -> list[list[int]]:
    """The tokens that must come next, of each active row, `most` in all; all that was queued has been read back.

    The last token of max_tokens and one after which the text may end are left to a step of their own, which sees that.
    Rows with penalties or log-probabilities take every step, which counts and logs each token.
    """
    found: list[list[int]] = []
    host, outputs = batch.host, batch.outputs
    for slot in range(batch.num_active):
        grammar = batch.grammars.of_slot[slot]
        if grammar is None or host["penalised"][slot] or host["wants_logprob"][slot]:
            found.append([])
            continue
        count = int(outputs.count[slot])
        state = batch.grammars.follow(slot, outputs.tokens[slot], count)
        tokens = grammar.jump_forward_tokens(state)[: max(0, min(most, int(host["max_tokens"][slot]) - count - 1))]
        most -= len(tokens)
        found.append(tokens)
    return found


def append_jump_forward(batch: InputBatch, runs: list[list[int]], width: int) -> tuple[DecodeTokens, Tensor]:
    """Append each row's run to its answer, on host and device: what the step computes, and its token ids, int64 [L]."""
    outputs, device, rows = batch.outputs, batch.async_copy.device, len(runs)
    jumping = np.flatnonzero([len(run) > 0 for run in runs])
    owners: list[int] = []
    tokens: list[int] = []
    positions: list[int] = []
    states = []
    for slot in jumping.tolist():
        run, count = runs[slot], int(outputs.count[slot])
        grammar = batch.grammars.of_slot[slot]
        assert grammar is not None
        states.append(grammar.after(batch.grammars.follow(slot, outputs.tokens[slot], count), run))
        last = int(outputs.tokens[slot, count - 1])
        context = int(batch.prompt_tokens[slot]) + count - 1
        owners += [slot] * len(run)
        tokens += [last, *run[:-1]]
        positions += range(context, context + len(run))
        outputs.append_jump_forward(slot, run)
    index, more = (
        async_copy_to_gpu(jumping, device),
        async_copy_to_gpu(np.array([len(runs[s]) for s in jumping]), device),
    )
    last_tokens = np.array([runs[slot][-1] for slot in jumping])
    batch.token.index_copy_(0, index, async_copy_to_gpu(last_tokens, device))
    batch.grammar_state.index_copy_(0, index, async_copy_to_gpu(np.array(states), device))
    batch.context.index_add_(0, index, more)
    batch.generated.index_add_(0, index, more)

    table = np.concatenate((batch.block_table[:rows, :width], batch.block_table[owners, :width]))
    own = batch.decode_tokens(rows, rows, width)
    behind = async_copy_to_gpu(np.array(positions), device)
    decode = DecodeTokens(
        torch.cat((own.positions, behind)),
        torch.cat((own.running, torch.ones_like(behind, dtype=torch.bool))),
        async_copy_to_gpu(table, device),
        np.append(own.host_positions, positions),
        table,
    )
    return decode, torch.cat((batch.token[:rows], async_copy_to_gpu(np.array(tokens), device)))
