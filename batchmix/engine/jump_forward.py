"""Jump-forward decoding: what a grammar leaves no choice about is appended without a step for each token.

Keys and values of such tokens are computed in the step that follows, behind the rows' own tokens: to the attention each
is a row at its own position, so it is computed just as in a step of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchmix.engine.input_batch import InputBatch
from batchmix.kernels.row_state import State
from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.models.step_tokens import DecodeTokens


def find_jump_forward(batch: InputBatch, most: int) -> list[list[int]]:
    """The tokens that must come next, of each active row, `most` in all; all that was queued has been read back.

    The last token of max_tokens, one after which the text may end, and all of rows with penalties or log-probabilities
    are left to steps of their own.
    """
    found: list[list[int]] = [[] for _ in range(batch.num_active)]
    host, outputs = batch.host, batch.outputs
    for slot in np.flatnonzero(~(host["penalised"] | host["wants_logprob"])[: batch.num_active]).tolist():
        row = batch.grammars.rows[slot]
        if row is not None and row.grammar is not None:
            count = int(outputs.count[slot])
            left = min(most, int(host["max_tokens"][slot]) - count - 1)
            found[slot] = row.grammar.jump_forward_tokens(row.follow(outputs.tokens[slot], count))[: max(0, left)]
            most -= len(found[slot])
    return found


def append_jump_forward(batch: InputBatch, runs: list[list[int]], width: int) -> tuple[DecodeTokens, Tensor]:
    """Append each row's run to its answer, on host and device: what the step computes, and its token ids, int64 [L]."""
    outputs, device, rows = batch.outputs, batch.async_copy.device, len(runs)
    owners, tokens, positions, changes = list[int](), list[int](), list[int](), list[tuple[int, ...]]()
    for slot, run in enumerate(runs):
        if not run:
            continue
        count, row = int(outputs.count[slot]), batch.grammars.rows[slot]
        assert row is not None
        assert row.grammar is not None
        changes.append((slot, len(run), run[-1], row.grammar.after(row.follow(outputs.tokens[slot], count), run)))
        context = int(batch.prompt_tokens[slot]) + count - 1
        owners += [slot] * len(run)
        tokens += [int(outputs.tokens[slot, count - 1]), *run[:-1]]
        positions += range(context, context + len(run))
        outputs.append_jump_forward(slot, run)
    index, more, last, state = async_copy_to_gpu(np.array(changes).T, device)
    behind, ids = async_copy_to_gpu(np.array((positions, tokens)), device)
    batch.token.index_copy_(0, index, last)
    batch.state[State.GRAMMAR_STATE].index_copy_(0, index, state)
    batch.context.index_add_(0, index, more)
    batch.generated.index_add_(0, index, more)
    table = np.concatenate((batch.block_table[:rows, :width], batch.block_table[owners, :width]))
    own = batch.decode_tokens(rows, rows, width)
    decode = DecodeTokens(
        torch.cat((own.positions, behind)), torch.cat((own.running, torch.ones_like(behind, dtype=torch.bool))),
        async_copy_to_gpu(table, device), np.append(own.host_positions, positions), table,
    )  # fmt: skip
    return decode, torch.cat((batch.token[:rows], ids))
