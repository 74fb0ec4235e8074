"""What a new token does to its row: post_update of batchmix/models/torch_sampler.py, for all rows in one kernel.

The engine reads the result every few steps, not after each, so a row that has ended may still be in the batch: it is
left alone, and what it ended with stays.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from batchmix.kernels.launch import cdiv, constexprs, kernel, operator
from batchmix.kernels.row_state import Finish, Flag, Number, State, check_block

_RUNNING, _EOS, _STOP_TOKEN, _STOP_STRING = constexprs(
    Finish.RUNNING, Finish.EOS, Finish.STOP_TOKEN, Finish.STOP_STRING
)
_LENGTH, _WHOLE = constexprs(Finish.LENGTH, Finish.WHOLE)
_TOKEN, _CONTEXT, _GENERATED, _FINISH, _STOP_REASON, _STOP_STATE, _GRAMMAR_STATE = constexprs(*State)
_MAX_TOKENS, _MIN_TOKENS, _STOP_BASE = constexprs(Number.MAX_TOKENS, Number.MIN_TOKENS, Number.STOP_BASE)
_GRAMMAR_BASE, _GRAMMAR_CLASS = constexprs(Number.GRAMMAR_BASE, Number.GRAMMAR_CLASS)
_PENALISED, _IGNORE_EOS = constexprs(Flag.PENALISED, Flag.IGNORE_EOS)
_BLOCK_ROWS = 32  # a program of one warp; every load waits for memory, so many small programs. Untuned


@kernel(
    "R", "num_eos", "num_stop", "history_length", "state_stride", "numbers_stride", "flags_stride",
    of_rows=("state_ptr", "numbers_ptr", "flags_ptr", "history_ptr", "logprob_history_ptr", "counts_ptr", "stop_ptr"),
)  # fmt: skip
def post_update_kernel(
    tokens_ptr, logprobs_ptr, state_ptr, numbers_ptr, flags_ptr, history_ptr, logprob_history_ptr, counts_ptr, eos_ptr,
    stop_ptr, automata_ptr, grammar_states_ptr, grammar_classes_ptr, R, V, state_stride, numbers_stride, flags_stride,
    history_length, num_eos, num_stop, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    state, number, flag = state_ptr + row, numbers_ptr + row, flags_ptr + row
    running = row < R
    running &= tl.load(state + state_stride * _FINISH, mask=running, other=_EOS) == _RUNNING
    token = tl.load(tokens_ptr + row, mask=running, other=0)
    place = tl.load(state + state_stride * _GENERATED, mask=running, other=0)
    context = tl.load(state + state_stride * _CONTEXT, mask=running, other=0)
    generated = place + 1
    tl.store(state + state_stride * _TOKEN, token, mask=running)
    tl.store(state + state_stride * _CONTEXT, context + 1, mask=running)
    tl.store(state + state_stride * _GENERATED, generated, mask=running)
    written = row * history_length + place % history_length
    tl.store(history_ptr + written, token.to(history_ptr.dtype.element_ty), mask=running)
    if logprobs_ptr is not None:
        tl.store(logprob_history_ptr + written, tl.load(logprobs_ptr + row, mask=running, other=0.0), mask=running)
    if counts_ptr is not None:
        penalised = running & (tl.load(flag + flags_stride * _PENALISED, mask=running, other=0) != 0)
        count = counts_ptr + row * V + token
        tl.store(count, tl.load(count, mask=penalised, other=0) + 1, mask=penalised)

    max_tokens = tl.load(number + numbers_stride * _MAX_TOKENS, mask=running, other=0)
    min_tokens = tl.load(number + numbers_stride * _MIN_TOKENS, mask=running, other=0)
    finish = tl.where(generated >= max_tokens, _LENGTH, _RUNNING)
    reason = tl.zeros_like(token)
    # Stop strings are looked for in the text after min_tokens.
    base = tl.load(number + numbers_stride * _STOP_BASE, mask=running, other=-1)
    searched = running & (base >= 0) & (generated > min_tokens)
    walked = tl.load(state + state_stride * _STOP_STATE, mask=searched, other=0)
    walked = tl.load(automata_ptr + (base + walked) * (V + 1) + token, mask=searched, other=0).to(tl.int64)
    matched = tl.load(automata_ptr + (base + walked) * (V + 1) + V, mask=searched, other=-1).to(tl.int64)
    tl.store(state + state_stride * _STOP_STATE, walked, mask=searched)
    finish = tl.where(matched >= 0, _STOP_STRING, finish)
    reason = tl.where(matched >= 0, matched, reason)

    if grammar_states_ptr is not None:
        grammar = tl.load(number + numbers_stride * _GRAMMAR_BASE, mask=running, other=-1)
        guided = running & (grammar >= 0)
        kinds = tl.load(number + numbers_stride * _GRAMMAR_CLASS, mask=guided, other=0)
        kind = tl.load(grammar_classes_ptr + kinds * V + token, mask=guided, other=0)
        entry = grammar + tl.load(state + state_stride * _GRAMMAR_STATE, mask=guided, other=0) + kind
        following = tl.load(grammar_states_ptr + entry * 2, mask=guided, other=0).to(tl.int64)
        tl.store(state + state_stride * _GRAMMAR_STATE, following, mask=guided)
        over = tl.load(grammar_states_ptr + (grammar + following) * 2, mask=guided, other=0)
        longer = tl.load(grammar_states_ptr + (grammar + following) * 2 + 1, mask=guided, other=0)
        finish = tl.where(guided & (longer > max_tokens - generated), tl.where(over > 0, _WHOLE, _LENGTH), finish)

    stopped = token < 0
    for i in range(num_stop):
        stopped |= token == tl.load(stop_ptr + row * num_stop + i, mask=running, other=-1)
    stopped &= generated >= min_tokens
    finish = tl.where(stopped, _STOP_TOKEN, finish)
    reason = tl.where(stopped, token, reason)

    ended = token < 0
    for i in range(num_eos):
        ended |= token == tl.load(eos_ptr + i)
    heeds_eos = tl.load(flag + flags_stride * _IGNORE_EOS, mask=running, other=0) == 0
    finish = tl.where(ended & heeds_eos & (generated >= min_tokens), _EOS, finish)
    tl.store(state + state_stride * _FINISH, finish.to(tl.int64), mask=running)
    tl.store(state + state_stride * _STOP_REASON, reason, mask=running)


@operator("post_update", mutates_args=("state", "history", "logprob_history", "output_counts"))
def post_update(
    tokens: Tensor,
    logprobs: Tensor | None,
    state: Tensor,
    numbers: Tensor,
    flags: Tensor,
    history: Tensor,
    logprob_history: Tensor | None,
    output_counts: Tensor | None,
    eos_token_ids: Tensor,
    stop_token_ids: Tensor,
    automata: Tensor,
    grammar_states: Tensor | None,
    grammar_classes: Tensor | None,
) -> None:
    """Append a token to each running row and see which rows have ended. Rows with finish != RUNNING stay as they are.

    tokens int64 [R] in 0..V-1; logprobs float32 [R] of them for logprob_history, None where there is none. All others are
    fields of `RowTensors`; `state`, the histories and output_counts change in place.
    """
    rows, vocab = len(tokens), automata.shape[1] - 1
    blocks = state, numbers, flags
    for block, fields in zip(blocks, (State, Number, Flag), strict=True):
        check_block(block, fields, rows)
    tables = [
        history, logprob_history, output_counts, eos_token_ids, stop_token_ids, automata, grammar_states, grammar_classes,
    ]  # fmt: skip
    assert all(tensor is None or tensor.is_contiguous() for tensor in (tokens, logprobs, *tables))
    assert history.dtype == torch.int32, history.dtype
    assert (logprobs is None) == (logprob_history is None)
    assert (grammar_states is None) == (grammar_classes is None)
    assert logprob_history is None or logprob_history.shape == history.shape
    assert output_counts is None or output_counts.shape == (rows, vocab), (output_counts.shape, vocab)
    if rows:
        post_update_kernel[(cdiv(rows, _BLOCK_ROWS),)](
            tokens, logprobs, *blocks, *tables, rows, vocab, *(block.stride(0) for block in blocks), history.shape[1],
            len(eos_token_ids), stop_token_ids.shape[1], BLOCK=_BLOCK_ROWS, num_warps=1,
        )  # fmt: skip


@post_update.register_fake
def _(tokens: Tensor, *_: object) -> None:
    return None
