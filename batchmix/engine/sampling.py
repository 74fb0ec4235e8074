"""From logits to tokens, for all rows at once.

The order is vLLM's: logit bias and allowed tokens, minimum length, penalties, the tokens that a grammar allows, then
temperature, min-p, top-k, top-p. Rows that do not use a step are not touched by it, so what one row asks for never changes another's answer. Log-probabilities
are those of the model, before any of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.engine.grammar_masks import FewTokens, apply_grammars
from batchmix.engine.input_batch import InputBatch
from batchmix.engine.philox import uniform

_BUCKET = 128  # tokens whose probabilities are summed together before the running sum
_CACHED_ROWS = 8  # of a vocabulary of 32,000, 1 MB
_CANDIDATES = 256  # most likely tokens looked at first; a row that needs more looks at 8 times as many


@dataclass
class Logprobs:
    """Of the rows `rows` of a step (ordinals within the step)."""

    rows: np.ndarray  # int64 [N]
    chosen: Tensor  # float32 [N]
    top_ids: Tensor  # int64 [N, k], k the most that a row asks for
    top: Tensor  # float32 [N, k]


def choose(logits: Tensor, slots: InputBatch, first: int) -> tuple[Tensor, Logprobs | None, Tensor | None]:
    """The next token of slots first..first+R-1, see `Operators`. logits float32 [R, V] are changed in place."""
    span = slice(first, first + len(logits))
    wanted = np.flatnonzero(slots.num_logprobs[span] >= 0)
    raw = logits[torch.from_numpy(wanted)].log_softmax(-1) if len(wanted) else None
    untouched = _untouched(logits, slots, span)
    _apply_bias(logits, slots, span)
    _forbid_stopping(logits, slots, span)
    _apply_penalties(logits, slots, span)
    wide, narrow = apply_grammars(logits, slots, span)
    tokens = wide.new_empty(len(logits))
    tokens[wide] = _choose_among(logits, wide, slots, span, wide)
    for few in narrow:
        place = _choose_among(few.logits, torch.arange(len(few.rows)), slots, span, few.rows)
        tokens[few.rows] = few.token_ids.gather(1, place[:, None])[:, 0]
    processed_logprobs = _among_allowed(logits, tokens, wide, narrow, untouched, slots, span)
    if raw is None:
        return tokens, None, processed_logprobs
    chosen = raw.gather(1, tokens[torch.from_numpy(wanted), None])[:, 0]
    top_ids, top = largest(raw, slots.num_logprobs[span][wanted])
    return tokens, Logprobs(wanted, chosen, top_ids, top), processed_logprobs


def _choose_among(logits: Tensor, places: Tensor, slots: InputBatch, span: slice, rows: Tensor) -> Tensor:
    """The column that each of `rows` (of the span) chooses, int64 [N]; its logits are in row places[i] of `logits`."""
    columns = torch.empty_like(rows)
    is_random = slots.temperature[span][rows] > 0
    greedy, random = torch.nonzero(~is_random)[:, 0], torch.nonzero(is_random)[:, 0]
    if len(greedy):
        columns[greedy] = _most_likely(logits if len(greedy) == len(logits) else logits[places[greedy]])
    if len(random):
        scaled, drawing = logits[places[random]], rows[random]
        scaled -= scaled.amax(-1, keepdim=True)  # before the division, which a tiny temperature would make overflow
        scaled /= slots.temperature[span][drawing, None]
        columns[random] = _draw(_filter(scaled, slots, span, drawing), _uniform(slots, span, drawing))
    return columns


def _untouched(logits: Tensor, slots: InputBatch, span: slice) -> dict[int, Tensor]:
    """The logits [V] of rows that ask for log-probabilities among what is allowed, where a bias or a penalty changes them."""
    if slots.logprob_history is None:
        return {}
    changed = (slots.bias_row[span] >= 0) | slots.penalised[span] | (slots.generated[span] < slots.min_tokens[span])
    return {row: logits[row].clone() for row in torch.nonzero(changed & slots.processed_logprobs[span])[:, 0].tolist()}


def _among_allowed(
    logits: Tensor,
    tokens: Tensor,
    wide: Tensor,
    narrow: Sequence[FewTokens],
    untouched: dict[int, Tensor],
    slots: InputBatch,
    span: slice,
) -> Tensor | None:
    """The log-probability of each chosen token among those whose logits are not -inf, float32 [R]; 0 where not asked for."""
    if slots.logprob_history is None:
        return None
    found = torch.zeros(len(logits))
    asked = slots.processed_logprobs[span]
    for rows, allowed, ids in _rows_by_width(logits, wide[asked[wide]], narrow, asked):
        for place, row in enumerate(rows.tolist()):
            if row in untouched:
                own = untouched[row] if ids is None else untouched[row][ids[place]]
                allowed[place] = own.masked_fill(allowed[place] == float("-inf"), float("-inf"))
        # Of few tokens the place of the first: behind a row's own ids are zeros.
        column = tokens[rows] if ids is None else (ids == tokens[rows, None]).int().argmax(-1)
        allowed -= allowed.amax(-1, keepdim=True)
        chosen = allowed.gather(1, column[:, None])[:, 0]
        found[rows] = chosen - _sum(allowed.exp_()).log()
    return found


def _rows_by_width(
    logits: Tensor, wide: Tensor, narrow: Sequence[FewTokens], asked: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows, copies of their logits, and which tokens those are of; None: of all. As many together as the cache holds."""
    for first in range(0, len(wide), _CACHED_ROWS):
        rows = wide[first : first + _CACHED_ROWS]
        yield rows, logits[rows], None
    for few in narrow:
        here = asked[few.rows]
        if here.any():
            yield few.rows[here], few.logits[here], few.token_ids[here]


def largest(logprobs: Tensor, counts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Ids and values of the counts[i] largest of row i, descending, zeros after them: [N, V] -> [N, k] each.

    Rows of one count at a time, because which ones of tied tokens topk takes depends on how many it is asked for.
    """
    values = logprobs.new_zeros(len(logprobs), int(counts.max()))
    ids = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for count in np.unique(counts).tolist():
        rows = torch.from_numpy(np.flatnonzero(counts == count)).to(logprobs.device)
        values[rows, :count], ids[rows, :count] = logprobs[rows].topk(count, dim=-1)
    return ids, values


def _most_likely(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row, [R, V] -> int64 [R].

    By buckets, because torch's argmax on a CPU compares one number at a time: 10 ms for 256 rows of 32,000, this 1.5.
    """
    buckets = F.pad(logits, (0, -logits.shape[1] % _BUCKET), value=float("-inf")).view(len(logits), -1, _BUCKET)
    bucket = buckets.amax(-1).argmax(-1)  # [R]
    inside = buckets.gather(1, bucket[:, None, None].expand(-1, 1, _BUCKET))[:, 0]  # [R, 128]
    return bucket * _BUCKET + inside.argmax(-1)


def _uniform(slots: InputBatch, span: slice, rows: Tensor) -> Tensor:
    return uniform(
        slots.seed[span][rows], slots.row_key[span][rows], slots.sample[span][rows], slots.generated[span][rows]
    )


def _apply_bias(logits: Tensor, slots: InputBatch, span: slice) -> None:
    bias_row = slots.bias_row[span]
    rows = torch.from_numpy(np.flatnonzero(bias_row.numpy() >= 0))
    if len(rows):
        logits[rows] += slots.biases.data[bias_row[rows]]


def _forbid_stopping(logits: Tensor, slots: InputBatch, span: slice) -> None:
    """No end-of-sequence and no stop token before a row's min_tokens."""
    rows = np.flatnonzero(slots.generated[span].numpy() < slots.min_tokens[span].numpy())
    if not len(rows):
        return
    index = torch.from_numpy(rows)
    logits[index[:, None], slots.eos_token_ids] = float("-inf")
    row, column = np.nonzero(slots.stop_token_ids[span].numpy()[rows] >= 0)
    token = slots.stop_token_ids[span].numpy()[rows[row], column]
    logits[torch.from_numpy(rows[row]), torch.from_numpy(token)] = float("-inf")


def _apply_penalties(logits: Tensor, slots: InputBatch, span: slice) -> None:
    """Repetition (Keskar et al. 2019, over prompt and output), presence and frequency (OpenAI, over the output)."""
    rows = torch.from_numpy(np.flatnonzero(slots.penalised[span].numpy()))
    if not len(rows):
        return
    assert slots.output_counts is not None
    assert slots.in_prompt is not None
    x = logits[rows]
    counts = slots.output_counts[span][rows]
    repetition = slots.repetition_penalty[span][rows, None]
    seen = slots.in_prompt[span][rows] | (counts > 0)
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x -= slots.frequency_penalty[span][rows, None] * counts
    x -= slots.presence_penalty[span][rows, None] * (counts > 0)
    logits[rows] = x


def _filter(scaled: Tensor, slots: InputBatch, span: slice, rows: Tensor) -> Tensor:
    """Unnormalised probabilities, zero where min-p, top-k or top-p drops a token. [R, V], changed in place -> [R, V].

    `scaled` are logits over the temperature, each row's largest 0.
    """
    weights = scaled.exp_()
    top_p, top_k, min_p = (values[span][rows] for values in (slots.top_p, slots.top_k, slots.min_p))
    vocab = scaled.shape[1]
    limited = torch.nonzero((top_p < 1) | ((top_k > 0) & (top_k < vocab)) | (min_p > 0))[:, 0]
    candidates = _CANDIDATES
    while len(limited):
        threshold, undecided = _threshold(
            weights[limited], top_p[limited, None], top_k[limited, None], min_p[limited, None], min(candidates, vocab)
        )
        done = ~undecided
        kept = weights[limited[done]]
        weights[limited[done]] = kept.masked_fill(kept < threshold[done], 0.0)
        limited = limited[undecided]
        candidates *= 8
    return weights


def _threshold(weights: Tensor, top_p: Tensor, top_k: Tensor, min_p: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The weight below which tokens are dropped [R, 1], and which rows need more candidates to tell [R].

    weights [R, V] with maximum 1. Tokens that tie with the last one kept are kept. With how many candidates a row is
    decided, and so how its sums are rounded, depends on that row alone.
    """
    vocab = weights.shape[1]
    best = weights.topk(candidates, dim=-1).values  # [R, candidates], descending
    rank = torch.arange(candidates, device=weights.device)
    limit = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab)  # [R, 1]
    kept = (best >= min_p) & (rank < limit)
    # The mass that top-p refers to: of all tokens that min-p and top-k leave, seen among the candidates or not.
    running = (best * kept).cumsum(-1)
    mass = running[:, -1:]
    unseen = kept[:, -1:] & (limit > candidates)
    if bool(unseen.any()):
        mass = torch.where(unseen, _sum(torch.where(weights >= min_p, weights, 0.0))[:, None], mass)
    kept &= (running - best * kept < top_p * mass) | (top_p >= 1) | (rank == 0)  # the most likely token always stays
    undecided = unseen & (kept[:, -1:] | (limit < vocab))  # the mass of a top-k shows only among the candidates
    last = kept.sum(-1, keepdim=True) - 1
    return best.gather(1, last), undecided[:, 0]


def _bucket_sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """weights [R, V] as buckets [R, V / 128, 128], and their sums, float64 [R, V / 128]."""
    buckets = F.pad(weights, (0, -weights.shape[1] % _BUCKET)).view(len(weights), -1, _BUCKET)
    return buckets, buckets.sum(-1).double()


def _sum(weights: Tensor) -> Tensor:
    """Row sums [R], in an order that does not depend on the number of rows."""
    return _bucket_sums(weights)[1].cumsum(-1)[:, -1].float()


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sampling: the first token at which the running sum passes u times the total.

    weights float32 [R, V], u float64 [R] in (0, 1) -> int64 [R].
    """
    buckets, sums = _bucket_sums(weights)
    running = sums.cumsum(-1)
    target = u[:, None] * running[:, -1:]
    bucket = (running <= target).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)  # [R, 1]
    inside = buckets.gather(1, bucket[..., None].expand(-1, 1, _BUCKET))[:, 0].double()  # [R, 128]
    passed = (running - sums).gather(1, bucket) + inside.cumsum(-1) <= target
    place = passed.sum(-1)
    # Rounding may leave the bucket's own sum a hair below the target: then its last possible token.
    last = _BUCKET - 1 - (inside.flip(-1) > 0).int().argmax(-1)
    return bucket[:, 0] * _BUCKET + torch.minimum(place, last)
