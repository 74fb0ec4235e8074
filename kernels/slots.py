"""What a new token does to its row: batchmix/engine/advance.py, for all rows in one kernel.

The engine reads the result every few steps, not after each, so a row that has ended may still be in the batch: it is
left alone, and what it ended with stays.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from batchmix.kernels.launch import cdiv, kernel, operator

RUNNING, EOS, STOP_TOKEN, STOP_STRING, LENGTH = range(5)  # why a row ended: engine/slots.py's numbers
WHOLE = 6
_RUNNING, _EOS, _STOP_TOKEN = tl.constexpr(RUNNING), tl.constexpr(EOS), tl.constexpr(STOP_TOKEN)
_STOP_STRING, _LENGTH, _WHOLE = tl.constexpr(STOP_STRING), tl.constexpr(LENGTH), tl.constexpr(WHOLE)
_BLOCK_ROWS = 32  # a program of one warp; every load waits for memory, so many small programs. Untuned


_OF_ROWS = (
    "token_ptr", "context_ptr", "generated_ptr", "finish_ptr", "reason_ptr", "state_ptr", "history_ptr",
    "logprob_history_ptr", "counts_ptr", "penalised_ptr", "max_tokens_ptr", "min_tokens_ptr", "ignore_eos_ptr",
    "stop_ptr", "stop_base_ptr", "grammar_state_ptr", "grammar_base_ptr", "grammar_class_ptr",
)  # fmt: skip


@kernel("R", "num_eos", "num_stop", "history_length", of_rows=_OF_ROWS)
def advance_kernel(
    tokens_ptr, logprobs_ptr, token_ptr, context_ptr, generated_ptr, finish_ptr, reason_ptr, state_ptr, history_ptr,
    logprob_history_ptr, counts_ptr, penalised_ptr, max_tokens_ptr, min_tokens_ptr, ignore_eos_ptr, eos_ptr, stop_ptr,
    stop_base_ptr, automata_ptr, grammar_state_ptr, grammar_base_ptr, grammar_class_ptr, grammar_tables_ptr, grammar_classes_ptr, R,
    V, num_eos, num_stop, history_length, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    running = row < R
    running &= tl.load(finish_ptr + row, mask=running, other=_EOS) == _RUNNING
    token = tl.load(tokens_ptr + row, mask=running, other=0)
    place = tl.load(generated_ptr + row, mask=running, other=0)
    generated = place + 1
    tl.store(token_ptr + row, token, mask=running)
    tl.store(generated_ptr + row, generated, mask=running)
    if context_ptr is not None:
        tl.store(context_ptr + row, tl.load(context_ptr + row, mask=running, other=0) + 1, mask=running)
    written = row * history_length + place % history_length
    tl.store(history_ptr + written, token.to(history_ptr.dtype.element_ty), mask=running)
    if logprobs_ptr is not None:
        tl.store(logprob_history_ptr + written, tl.load(logprobs_ptr + row, mask=running, other=0.0), mask=running)
    if counts_ptr is not None:
        penalised = running & (tl.load(penalised_ptr + row, mask=running, other=0) != 0)
        count = counts_ptr + row * V + token
        tl.store(count, tl.load(count, mask=penalised, other=0) + 1, mask=penalised)

    min_tokens = tl.load(min_tokens_ptr + row, mask=running, other=0)
    finish = tl.where(generated >= tl.load(max_tokens_ptr + row, mask=running, other=0), _LENGTH, _RUNNING)
    reason = tl.zeros_like(token)
    # Stop strings are looked for in the text after min_tokens; an automaton is V + 1 columns wide, the last one saying
    # which string is complete in a state.
    base = tl.load(stop_base_ptr + row, mask=running, other=-1).to(tl.int64)
    searched = running & (base >= 0) & (generated > min_tokens)
    state = tl.load(state_ptr + row, mask=searched, other=0)
    state = tl.load(automata_ptr + (base + state) * (V + 1) + token, mask=searched, other=0).to(tl.int64)
    matched = tl.load(automata_ptr + (base + state) * (V + 1) + V, mask=searched, other=-1).to(tl.int64)
    tl.store(state_ptr + row, state, mask=searched)
    finish = tl.where(matched >= 0, _STOP_STRING, finish)
    reason = tl.where(matched >= 0, matched, reason)

    # A grammar's rows are states by classes of tokens, a state's first row saying how it may end (engine/slots.py).
    if grammar_tables_ptr is not None:
        grammar = tl.load(grammar_base_ptr + row, mask=running, other=-1).to(tl.int64)
        guided = running & (grammar >= 0)
        kinds = tl.load(grammar_class_ptr + row, mask=guided, other=0).to(tl.int64)
        kind = tl.load(grammar_classes_ptr + kinds * V + token, mask=guided, other=0)
        state = grammar + tl.load(grammar_state_ptr + row, mask=guided, other=0).to(tl.int64) + kind
        state = tl.load(grammar_tables_ptr + state * 2, mask=guided, other=0).to(tl.int64)
        tl.store(grammar_state_ptr + row, state, mask=guided)
        over = tl.load(grammar_tables_ptr + (grammar + state) * 2, mask=guided, other=0)
        longer = tl.load(grammar_tables_ptr + (grammar + state) * 2 + 1, mask=guided, other=0)
        left = tl.load(max_tokens_ptr + row, mask=running, other=0) - generated
        finish = tl.where(guided & (longer > left), tl.where(over > 0, _WHOLE, _LENGTH), finish)

    stopped = token < 0
    for i in range(num_stop):
        stopped |= token == tl.load(stop_ptr + row * num_stop + i, mask=running, other=-1)
    stopped &= generated >= min_tokens
    finish = tl.where(stopped, _STOP_TOKEN, finish)
    reason = tl.where(stopped, token, reason)

    ended = token < 0
    for i in range(num_eos):
        ended |= token == tl.load(eos_ptr + i)
    heeds_eos = tl.load(ignore_eos_ptr + row, mask=running, other=0) == 0
    finish = tl.where(ended & heeds_eos & (generated >= min_tokens), _EOS, finish)
    tl.store(finish_ptr + row, finish.to(tl.int64), mask=running)
    tl.store(reason_ptr + row, reason, mask=running)


@operator(
    "advance",
    mutates_args=(
        "token", "context", "generated", "finish", "stop_reason", "stop_state", "history", "logprob_history",
        "output_counts", "grammar_state",
    ),
)  # fmt: skip
def advance(
    tokens: Tensor,
    logprobs: Tensor | None,
    token: Tensor,
    context: Tensor | None,
    generated: Tensor,
    finish: Tensor,
    stop_reason: Tensor,
    stop_state: Tensor,
    history: Tensor,
    logprob_history: Tensor | None,
    output_counts: Tensor | None,
    penalised: Tensor,
    max_tokens: Tensor,
    min_tokens: Tensor,
    ignore_eos: Tensor,
    eos_token_ids: Tensor,
    stop_token_ids: Tensor,
    stop_base: Tensor,
    automata: Tensor,
    grammar_state: Tensor | None,
    grammar_base: Tensor | None,
    grammar_class: Tensor | None,
    grammar_tables: Tensor | None,
    grammar_classes: Tensor | None,
) -> None:
    """Append a token to each running row and see which rows have ended. Rows with finish != RUNNING stay as they are.

    tokens int64 [R] in 0..V-1, and logprobs float32 [R] of them or None. The row's state, changed in place, [R] and
    int64 unless it says otherwise:

    - token, the last one; generated, how many; context, the tokens before it whose keys and values are in the cache:
      one more after a decode step, None after a prefill
    - finish, why the row ended: RUNNING, EOS, STOP_TOKEN, WHOLE, STOP_STRING or LENGTH, which count in this order where
      several hold; stop_reason, the stop token, or the ordinal of the stop string
    - stop_state, of the row's automaton
    - history int32 [R, L] and logprob_history float32 [R, L] (where there are logprobs): the n-th token goes to
      column n % L, so that L below max_tokens makes a ring for an engine that reads it in time
    - output_counts int32 [R, V], counted for penalised rows; None where no row is

    What the row asked for, [R]: penalised bool, max_tokens and min_tokens int64, ignore_eos bool, stop_token_ids
    int64 [R, W] (-1 where there are fewer), stop_base int64, the row of `automata` (any integers, [states, V + 1]: next
    state by token, then the string complete in a state or -1) at which the row's automaton begins, -1: none.
    eos_token_ids int64 [N].

    Grammars, as `sample` takes them, all None where no row has one: grammar_state, changed in place, becomes the first column
    of the token's row in grammar_tables. A state's own row says whether its text is over (WHOLE), and how many tokens a
    longer text takes, 0 where the text may not end: a row for which max_tokens leaves fewer ends (LENGTH).
    """
    rows, vocab = len(tokens), automata.shape[1] - 1
    arguments = [
        tokens, logprobs, token, context, generated, finish, stop_reason, stop_state, history, logprob_history,
        output_counts, penalised, max_tokens, min_tokens, ignore_eos, eos_token_ids, stop_token_ids, stop_base, automata,
        grammar_state, grammar_base, grammar_class, grammar_tables, grammar_classes,
    ]  # fmt: skip
    assert len({tensor is None for tensor in arguments[-5:]}) == 1
    assert all(tensor is None or tensor.is_contiguous() for tensor in arguments)
    assert history.dtype == torch.int32, history.dtype
    assert (logprobs is None) == (logprob_history is None)
    assert logprob_history is None or logprob_history.shape == history.shape
    assert output_counts is None or output_counts.shape == (rows, vocab), (output_counts.shape, vocab)
    if rows:
        advance_kernel[(cdiv(rows, _BLOCK_ROWS),)](
            *arguments, rows, vocab, len(eos_token_ids), stop_token_ids.shape[1], history.shape[1],
            BLOCK=_BLOCK_ROWS, num_warps=1,
        )  # fmt: skip


@advance.register_fake
def _(tokens: Tensor, *_: object) -> None:
    return None
