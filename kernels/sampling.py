"""From logits to tokens, one program a row: what batchmix/models/torch_sampler.py does, in the same order.

Logit bias and allowed tokens, minimum length, penalties, a grammar's tokens, temperature, min-p, top-k, top-p, then the
draw. Steps that a row does not use are skipped for it, so what one row asks for never changes another's answer.

What agrees exactly with the torch backend, given the same logits: greedy tokens (the first of the largest logits,
after bias and penalties rounded as there), the random numbers, and the rules. Weights may differ in their last bits
(the GPU's exp is not the CPU's), and their sums are exact here (draw.py) where torch rounds them. So a drawn token is
another one only where its running sum meets the random number, or a threshold meets a weight, within such a rounding.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (a jitted function has no types that mypy could see; launchers are fully typed)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchmix.kernels.draw import MAX_VOCABULARY, draw, threshold_of, uniform_bits
from batchmix.kernels.gpu import current_gpu
from batchmix.kernels.launch import constexprs, kernel, next_power_of_2, operator
from batchmix.kernels.row_state import Flag, Number, Real, State, check_block

# Tokens that a program looks at together, 4 a thread: loops are unrolled, so 8 a thread need over 128 registers, and a
# thread of 16 warps has no more. One program an SM then. Untuned.
_BLOCK = 2048
_WARPS = 16

_GENERATED, _GRAMMAR_STATE = constexprs(State.GENERATED, State.GRAMMAR_STATE)
_MAX_TOKENS, _MIN_TOKENS, _TOP_K = constexprs(Number.MAX_TOKENS, Number.MIN_TOKENS, Number.TOP_K)
_SEED, _ROW_KEY, _SAMPLE, _BIAS_ROW = constexprs(Number.SEED, Number.ROW_KEY, Number.SAMPLE, Number.BIAS_ROW)
_GRAMMAR_BASE, _GRAMMAR_CLASS = constexprs(Number.GRAMMAR_BASE, Number.GRAMMAR_CLASS)
_TEMPERATURE, _TOP_P, _MIN_P = constexprs(Real.TEMPERATURE, Real.TOP_P, Real.MIN_P)
_REPETITION, _PRESENCE, _FREQUENCY = constexprs(Real.REPETITION_PENALTY, Real.PRESENCE_PENALTY, Real.FREQUENCY_PENALTY)
_PENALISED, _WANTS_LOGPROB, _PROCESSED_LOGPROBS = constexprs(
    Flag.PENALISED, Flag.WANTS_LOGPROB, Flag.PROCESSED_LOGPROBS
)


@triton.jit
def _without(x, columns, ids_ptr, count):
    """-inf at the columns that `count` ids name."""
    for i in range(count):
        x = tl.where(columns == tl.load(ids_ptr + i), float("-inf"), x)
    return x


@triton.jit
def _penalised(x, counts, in_prompt, repetition, presence, frequency):
    """Repetition (Keskar et al. 2019, over prompt and output), presence and frequency (OpenAI, over the output)."""
    repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
    x = tl.where(in_prompt | (counts > 0), repeated, x)
    x -= frequency * counts.to(tl.float32)
    return x - tl.where(counts > 0, presence, 0.0)


@kernel(
    "R", "num_eos", "num_stop", "state_stride", "numbers_stride", "reals_stride", "flags_stride",
    of_rows=("state_ptr", "numbers_ptr", "reals_ptr", "flags_ptr", "stop_ptr", "counts_ptr", "in_prompt_ptr"),
)  # fmt: skip
def sample_kernel(
    logits_ptr, state_ptr, numbers_ptr, reals_ptr, flags_ptr, eos_ptr, stop_ptr, biases_ptr, counts_ptr, in_prompt_ptr,
    grammar_states_ptr, grammar_classes_ptr, tokens_ptr, logprobs_ptr, workspace_ptr, R, V, logits_stride, state_stride,
    numbers_stride, reals_stride, flags_stride, num_eos, num_stop, BLOCK: tl.constexpr,
):  # fmt: skip
    weights_ptr = workspace_ptr + tl.program_id(0).to(tl.int64) * V
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64)
        state, number, real, flag = state_ptr + row, numbers_ptr + row, reals_ptr + row, flags_ptr + row
        temperature = tl.load(real + reals_stride * _TEMPERATURE)
        position = tl.load(state + state_stride * _GENERATED)
        forbidding = position < tl.load(number + numbers_stride * _MIN_TOKENS)  # no end before min_tokens
        bias_row = tl.load(number + numbers_stride * _BIAS_ROW)
        penalised = tl.load(flag + flags_stride * _PENALISED)
        wants_logprob = tl.load(flag + flags_stride * _WANTS_LOGPROB)
        processed_logprobs = tl.load(flag + flags_stride * _PROCESSED_LOGPROBS)
        if grammar_states_ptr is not None:
            grammar_base = tl.load(number + numbers_stride * _GRAMMAR_BASE)
            grammar_row = grammar_base + tl.load(state + state_stride * _GRAMMAR_STATE)
            grammar_class = tl.load(number + numbers_stride * _GRAMMAR_CLASS)
            left = tl.load(number + numbers_stride * _MAX_TOKENS) - position - 1  # after this token

        largest_raw = tl.full((BLOCK,), float("-inf"), tl.float32)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        place = tl.arange(0, BLOCK)
        largest_allowed = tl.full((BLOCK,), float("-inf"), tl.float32)
        total_allowed = tl.zeros((BLOCK,), tl.float32)  # of exp(logit - largest_allowed)
        tl.debug_barrier()  # the row before is done with the workspace
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < V
            raw = tl.load(logits_ptr + offset * logits_stride + columns, mask=inside, other=float("-inf"))
            largest_raw = tl.maximum(largest_raw, raw)
            x = raw
            if bias_row >= 0:
                x += tl.load(biases_ptr + bias_row * V + columns, mask=inside, other=0.0)
            if forbidding:
                x = _without(x, columns, eos_ptr, num_eos)
                x = _without(x, columns, stop_ptr + offset * num_stop, num_stop)
            if counts_ptr is not None:  # noqa: SIM102 - this one is decided at compile time
                if penalised:
                    counts = tl.load(counts_ptr + offset * V + columns, mask=inside, other=0)
                    in_prompt = tl.load(in_prompt_ptr + offset * V + columns, mask=inside, other=0) != 0
                    repetition = tl.load(real + reals_stride * _REPETITION)
                    presence = tl.load(real + reals_stride * _PRESENCE)
                    frequency = tl.load(real + reals_stride * _FREQUENCY)
                    x = _penalised(x, counts, in_prompt, repetition, presence, frequency)
            if grammar_states_ptr is not None:  # noqa: SIM102
                if grammar_base >= 0:
                    kind = tl.load(grammar_classes_ptr + grammar_class * V + columns, mask=inside, other=0)
                    need = tl.load(grammar_states_ptr + (grammar_row + kind) * 2 + 1, mask=inside, other=0)
                    x = tl.where(need <= left, x, float("-inf"))
            if processed_logprobs:
                allowed = tl.where(x > float("-inf"), raw, float("-inf"))
                higher = tl.maximum(largest_allowed, allowed)
                top = tl.where(higher > float("-inf"), higher, 0.0)  # -inf less -inf is no number
                total_allowed = total_allowed * tl.exp(largest_allowed - top) + tl.exp(allowed - top)
                largest_allowed = higher
            place = tl.where(x > largest, columns, place)
            largest = tl.maximum(largest, x)
            if temperature > 0:
                tl.store(weights_ptr + columns, x, mask=inside)
        best = tl.max(largest)
        token = tl.min(tl.where(largest == best, place, V - 1))

        if (temperature > 0) & (best > float("-inf")):
            tl.debug_barrier()
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                x = tl.load(weights_ptr + columns, mask=columns < V, other=float("-inf"))
                # The difference first: over a tiny temperature a logit itself would overflow.
                x = tl.exp(tl.div_rn(x - best, tl.zeros_like(x) + temperature))
                tl.store(weights_ptr + columns, x, mask=columns < V)
            tl.debug_barrier()
            top_k = tl.load(number + numbers_stride * _TOP_K)
            top_p = tl.load(real + reals_stride * _TOP_P)
            min_p = tl.load(real + reals_stride * _MIN_P)
            threshold = threshold_of(weights_ptr, V, top_k, top_p, min_p, BLOCK)
            seed = tl.load(number + numbers_stride * _SEED)
            row_key = tl.load(number + numbers_stride * _ROW_KEY)
            random = uniform_bits(seed, row_key, tl.load(number + numbers_stride * _SAMPLE), position)
            token = draw(weights_ptr, V, threshold, random, BLOCK)
            token = tl.minimum(token, V - 1)  # of logits that are NaN too: a token indexes tables
        tl.store(tokens_ptr + row, token.to(tl.int64))

        logprob = 0.0
        if wants_logprob:
            best_raw = tl.max(largest_raw)
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, V, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                source = logits_ptr + offset * logits_stride + columns
                total += tl.exp(tl.load(source, mask=columns < V, other=float("-inf")) - best_raw)
            chosen = tl.load(logits_ptr + offset * logits_stride + token)
            logprob = (chosen - best_raw) - tl.log(tl.sum(total))
        elif processed_logprobs:
            best_allowed = tl.max(largest_allowed)
            total = tl.sum(total_allowed * tl.exp(largest_allowed - best_allowed))
            chosen = tl.load(logits_ptr + offset * logits_stride + token)
            logprob = (chosen - best_allowed) - tl.log(total)
        tl.store(logprobs_ptr + row, logprob)


@operator("sample")
def sample(
    logits: Tensor,
    state: Tensor,
    numbers: Tensor,
    reals: Tensor,
    flags: Tensor,
    eos_token_ids: Tensor,
    stop_token_ids: Tensor,
    biases: Tensor,
    output_counts: Tensor | None,
    in_prompt: Tensor | None,
    grammar_states: Tensor | None,
    grammar_classes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The next token of each row and the log-probability that the model gives it, before any of the steps below.

    Of all tokens, or of those that the steps leave to choose from.

    logits float32 [R, V] of any row stride, V below 2^19, not changed. All others are fields of `RowTensors`.

    -> tokens int64 [R], each in 0..V-1, and log-probabilities float32 [R], 0 where neither is wanted.
    """
    (rows, vocab), device = logits.shape, logits.device
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.stride(1) == 1
    assert 0 < vocab <= MAX_VOCABULARY, vocab
    assert (output_counts is None) == (in_prompt is None)
    assert (grammar_states is None) == (grammar_classes is None)
    assert biases.shape[1] == vocab
    blocks = state, numbers, reals, flags
    for block, fields in zip(blocks, (State, Number, Real, Flag), strict=True):
        check_block(block, fields, rows)
    tables = eos_token_ids, stop_token_ids, biases, output_counts, in_prompt, grammar_states, grammar_classes
    assert all(tensor is None or tensor.is_contiguous() for tensor in tables)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    if rows:
        # A program takes every programs-th row, so the weights of all rows never exist at once: 128 KB an SM.
        programs = min(rows, current_gpu(device).num_sms)
        workspace = torch.empty(programs, vocab, dtype=torch.float32, device=device)
        columns = min(_BLOCK, next_power_of_2(vocab))
        # No fused multiply-add: penalties round as the torch backend's do.
        sample_kernel[(programs,)](
            logits, *blocks, *tables, tokens, logprobs, workspace, rows, vocab, logits.stride(0),
            *(block.stride(0) for block in blocks), len(eos_token_ids), stop_token_ids.shape[1], BLOCK=columns,
            num_warps=max(1, columns * _WARPS // _BLOCK), enable_fp_fusion=False,
        )  # fmt: skip
    return tokens, logprobs


@sample.register_fake
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
