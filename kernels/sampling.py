"""From logits to tokens, one program a row: what batchmix/engine/sampling.py does, in the same order.

Logit bias and allowed tokens, minimum length, penalties, a grammar's tokens, temperature, min-p, top-k, top-p, then the
draw. Steps that a
row does not use are skipped for it, so what one row asks for never changes another's answer.

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
from batchmix.kernels.launch import kernel, next_power_of_2, operator

# Tokens that a program looks at together, 4 a thread: loops are unrolled, so 8 a thread need over 128 registers, and a
# thread of 16 warps has no more. One program an SM then. Untuned.
_BLOCK = 2048
_WARPS = 16


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


_OF_ROWS = (
    "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "row_key_ptr", "sample_ptr", "generated_ptr",
    "min_tokens_ptr", "stop_ptr", "bias_row_ptr", "penalised_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr",
    "counts_ptr", "in_prompt_ptr", "wants_logprob_ptr", "among_allowed_ptr", "grammar_base_ptr", "grammar_state_ptr",
    "grammar_class_ptr", "max_tokens_ptr",
)  # fmt: skip


@kernel("R", "num_eos", "num_stop", of_rows=_OF_ROWS)
def sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, row_key_ptr, sample_ptr, generated_ptr,
    min_tokens_ptr, eos_ptr, stop_ptr, bias_row_ptr, biases_ptr, penalised_ptr, repetition_ptr, presence_ptr,
    frequency_ptr, counts_ptr, in_prompt_ptr, wants_logprob_ptr, among_allowed_ptr, grammar_base_ptr, grammar_state_ptr,
    grammar_class_ptr, max_tokens_ptr, grammar_tables_ptr, grammar_classes_ptr, tokens_ptr, logprobs_ptr, workspace_ptr, R, V, logits_stride,
    num_eos, num_stop, BLOCK: tl.constexpr,
):  # fmt: skip
    weights_ptr = workspace_ptr + tl.program_id(0).to(tl.int64) * V
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64)
        temperature = tl.load(temperature_ptr + row)
        position = tl.load(generated_ptr + row)
        forbidding = position < tl.load(min_tokens_ptr + row)  # no end before min_tokens
        bias_row = tl.load(bias_row_ptr + row).to(tl.int64)
        penalised = tl.load(penalised_ptr + row)
        wants_logprob = tl.load(wants_logprob_ptr + row)
        processed_logprobs = tl.load(among_allowed_ptr + row)
        if grammar_tables_ptr is not None:
            grammar_base = tl.load(grammar_base_ptr + row).to(tl.int64)
            grammar_row = grammar_base + tl.load(grammar_state_ptr + row).to(tl.int64)
            grammar_class = tl.load(grammar_class_ptr + row).to(tl.int64)
            left = tl.load(max_tokens_ptr + row) - position - 1  # after this token

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
                    repetition, presence = tl.load(repetition_ptr + row), tl.load(presence_ptr + row)
                    x = _penalised(x, counts, in_prompt, repetition, presence, tl.load(frequency_ptr + row))
            if grammar_tables_ptr is not None:  # noqa: SIM102
                if grammar_base >= 0:
                    kind = tl.load(grammar_classes_ptr + grammar_class * V + columns, mask=inside, other=0)
                    need = tl.load(grammar_tables_ptr + (grammar_row + kind) * 2 + 1, mask=inside, other=0)
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
            top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
            threshold = threshold_of(weights_ptr, V, top_k, top_p, min_p, BLOCK)
            random = uniform_bits(
                tl.load(seed_ptr + row), tl.load(row_key_ptr + row), tl.load(sample_ptr + row), position
            )
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
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    row_key: Tensor,
    sample: Tensor,
    generated: Tensor,
    min_tokens: Tensor,
    eos_token_ids: Tensor,
    stop_token_ids: Tensor,
    bias_row: Tensor,
    biases: Tensor,
    penalised: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
    output_counts: Tensor | None,
    in_prompt: Tensor | None,
    wants_logprob: Tensor,
    processed_logprobs: Tensor,
    grammar_base: Tensor | None = None,
    grammar_state: Tensor | None = None,
    grammar_class: Tensor | None = None,
    max_tokens: Tensor | None = None,
    grammar_tables: Tensor | None = None,
    grammar_classes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next token of each row and the log-probability that the model gives it, before any of the steps below.

    Of all tokens, or of those that the steps leave to choose from.

    logits float32 [R, V] of any row stride, V below 2^19, not changed. The rest are a row's wishes, [R] unless it says
    otherwise, as in the engine's slots:

    - temperature float32: 0 takes the most likely token, the first of those that tie; top_k int64 (0 or less, or V or
      more: all), top_p float32 (1: all), min_p float32 (0: all)
    - seed, row_key, sample int64: with `generated` the key of the row's random number
    - generated, min_tokens int64: below min_tokens no eos_token_ids, int64 [N], and none of the row's stop_token_ids,
      int64 [R, W], -1 where there are fewer
    - bias_row int64, a row of biases, float32 [tables, V], added to the logits (-inf: not allowed); -1: none
    - penalised bool, whether the row has penalties: repetition_penalty, presence_penalty, frequency_penalty float32;
      output_counts int32 [R, V] and in_prompt bool [R, V], None where no row has penalties
    - wants_logprob bool; processed_logprobs bool: the log-probability among the tokens that are not at -inf in the end
    - grammar_base int64, the row of grammar_tables, int32 [rows, 2], at which the row's grammar begins, -1: none; grammar_state
      int64, the row of its state, counted from there; grammar_class int64, a row of grammar_classes, int32 [grammars, V]: each
      token's class. Row grammar_base + grammar_state + class holds in its second column how many tokens must follow the
      token; those for which max_tokens, int64, leaves too few are not allowed. All None where no row has a grammar

    -> tokens int64 [R], each in 0..V-1, and log-probabilities float32 [R], 0 where neither is wanted.
    """
    (rows, vocab), device = logits.shape, logits.device
    assert logits.dtype == torch.float32, logits.dtype
    assert logits.stride(1) == 1
    assert 0 < vocab <= MAX_VOCABULARY, vocab
    assert (output_counts is None) == (in_prompt is None)
    assert biases.shape[1] == vocab
    per_row = [
        temperature, top_k, top_p, min_p, seed, row_key, sample, generated, min_tokens, eos_token_ids, stop_token_ids,
        bias_row, biases, penalised, repetition_penalty, presence_penalty, frequency_penalty, output_counts, in_prompt,
        wants_logprob, processed_logprobs, grammar_base, grammar_state, grammar_class, max_tokens, grammar_tables, grammar_classes,
    ]  # fmt: skip
    assert len({tensor is None for tensor in per_row[-6:]}) == 1
    assert all(tensor is None or tensor.is_contiguous() for tensor in per_row)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=device)
    if rows:
        # A program takes every programs-th row, so the weights of all rows never exist at once: 128 KB an SM.
        programs = min(rows, current_gpu(device).num_sms)
        workspace = torch.empty(programs, vocab, dtype=torch.float32, device=device)
        block = min(_BLOCK, next_power_of_2(vocab))
        # No fused multiply-add: penalties round as the torch backend's do.
        sample_kernel[(programs,)](
            logits, *per_row, tokens, logprobs, workspace, rows, vocab, logits.stride(0), len(eos_token_ids),
            stop_token_ids.shape[1], BLOCK=block, num_warps=max(1, block * _WARPS // _BLOCK),
            enable_fp_fusion=False,
        )  # fmt: skip
    return tokens, logprobs


@sample.register_fake
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
