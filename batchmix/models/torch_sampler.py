"""The torch backend's form of sampling and of what a token does to its row, for all rows at once, on the CPU.

The order is vLLM's: logit bias and allowed tokens, minimum length, penalties, the tokens that a grammar allows, then
temperature, min-p, top-k, top-p. Rows that do not use a step are not touched by it, so what one row asks for never
changes another's answer. Log-probabilities are those of the model, before any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batchmix.kernels.row_state import Finish, Flag, Number, Real, RowTensors, State
from batchmix.models.backend import HostRows, Logprobs
from batchmix.models.philox import uniform
from batchmix.models.torch_grammar import FewTokens, apply_grammars

_BUCKET = 128  # tokens whose probabilities are summed together before the running sum
_CACHED_ROWS = 8  # of a vocabulary of 32,000, 1 MB
_CANDIDATES = 256  # most likely tokens that are sorted first; a row that needs more sorts 8 times as many


def sample(logits: Tensor, rows: RowTensors, host: HostRows) -> tuple[Tensor, Logprobs | None, Tensor | None]:
    """The next tokens, see `Operators`. logits float32 [R, V] are changed in place."""
    wanted = np.flatnonzero(host.num_logprobs >= 0)
    raw = logits[torch.from_numpy(wanted)].log_softmax(-1) if len(wanted) else None
    untouched = _untouched(logits, rows)
    _apply_bias(logits, rows)
    _forbid_stopping(logits, rows)
    _apply_penalties(logits, rows)
    wide, narrow = apply_grammars(logits, rows, host.allowed_tokens)
    tokens = wide.new_empty(len(logits))
    keep_logits = rows.logprob_history is not None
    tokens[wide] = _sample_among(logits, wide, rows, wide, keep_logits)
    for few in narrow:
        place = _sample_among(few.logits, torch.arange(len(few.rows)), rows, few.rows, keep_logits)
        tokens[few.rows] = few.token_ids.gather(1, place[:, None])[:, 0]
    processed_logprobs = _among_allowed(logits, tokens, wide, narrow, untouched, rows)
    if raw is None:
        return tokens, None, processed_logprobs
    return tokens, find_logprobs(raw, tokens[torch.from_numpy(wanted)], wanted, host), processed_logprobs


def _sample_among(logits: Tensor, places: Tensor, rows: RowTensors, which: Tensor, keep_logits: bool) -> Tensor:
    """The column that each of the rows `which` chooses, int64 [N]; its logits are in row places[i] of `logits`.

    keep_logits: whether they are read again; otherwise they may be modified in place.
    """
    columns = torch.empty_like(which)
    temperature = rows.reals[Real.TEMPERATURE, which]
    is_random = temperature > 0
    greedy, random = torch.nonzero(~is_random)[:, 0], torch.nonzero(is_random)[:, 0]
    if len(greedy):
        columns[greedy] = _most_likely(logits if len(greedy) == len(logits) else logits[places[greedy]])
    if len(random):
        scaled = logits if len(random) == len(logits) and not keep_logits else logits[places[random]]
        drawing = which[random]
        scaled -= scaled.amax(-1, keepdim=True)  # before the division, which a tiny temperature would make overflow
        scaled /= temperature[random, None]
        seed, row_key, number = rows.numbers[Number.SEED : Number.SAMPLE + 1, drawing]
        u = uniform(seed, row_key, number, rows.state[State.GENERATED, drawing])
        columns[random] = _draw(_filter(scaled, rows, drawing), u)
    return columns


def _untouched(logits: Tensor, rows: RowTensors) -> dict[int, Tensor]:
    """Logits [V] of rows that ask for log-probabilities among what is allowed, where a bias or a penalty changes any."""
    if rows.logprob_history is None:
        return {}
    early = rows.state[State.GENERATED] < rows.numbers[Number.MIN_TOKENS]
    changed = (rows.numbers[Number.BIAS_ROW] >= 0) | rows.flags[Flag.PENALISED] | early
    asked = changed & rows.flags[Flag.PROCESSED_LOGPROBS]
    return {row: logits[row].clone() for row in torch.nonzero(asked)[:, 0].tolist()}


def _among_allowed(
    logits: Tensor, tokens: Tensor, wide: Tensor, narrow: Sequence[FewTokens], untouched: dict[int, Tensor],
    rows: RowTensors,
) -> Tensor | None:  # fmt: skip
    """Each chosen token's log-probability among those whose logits are not -inf, float32 [R]; 0 where not asked for."""
    if rows.logprob_history is None:
        return None
    found, asked = torch.zeros(len(logits)), rows.flags[Flag.PROCESSED_LOGPROBS]
    # Rows, copies of their logits, and which tokens those are of, None: of all. As many together as the cache holds.
    groups = chain(
        ((few.rows, few.logits, few.token_ids) for few in narrow),
        ((some, logits[some], None) for some in torch.split(wide[asked[wide]], _CACHED_ROWS) if len(some)),
    )
    for which, allowed, ids in groups:
        for place, row in enumerate(which.tolist()):
            if row in untouched:
                own = untouched[row] if ids is None else untouched[row][ids[place]]
                allowed[place] = own.masked_fill(allowed[place] == float("-inf"), float("-inf"))
        # Of few tokens the place of the first: behind a row's own ids are zeros.
        column = tokens[which] if ids is None else (ids == tokens[which, None]).int().argmax(-1)
        allowed -= allowed.amax(-1, keepdim=True)
        chosen = allowed.gather(1, column[:, None])[:, 0]
        found[which] = chosen - _sum(allowed.exp_()).log()
    return found.masked_fill_(~asked, 0.0)


def find_logprobs(logprobs: Tensor, tokens: Tensor, wanted: np.ndarray, host: HostRows) -> Logprobs:
    """What is logged of the rows `wanted` int64 [N], which have chosen `tokens` [N]; logprobs float32 [N, V]."""
    chosen, counts = logprobs.gather(1, tokens[:, None].long()), host.num_logprobs[wanted]  # [N, 1]; [N]
    top = logprobs.new_zeros(len(logprobs), int(counts.max()))
    top_ids = torch.zeros(top.shape, dtype=torch.int64, device=top.device)
    # Rows of one count at a time: which ones of tied tokens topk takes depends on how many it is asked for.
    for count in np.unique(counts).tolist():
        rows = torch.from_numpy(np.flatnonzero(counts == count)).to(top.device)
        top[rows, :count], top_ids[rows, :count] = logprobs[rows].topk(count, dim=-1)
    return Logprobs(wanted, chosen[:, 0], (logprobs > chosen).sum(-1) + 1, top_ids, top)


def _most_likely(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row, [R, V] -> int64 [R]. By buckets: torch's argmax on a CPU compares
    one number at a time, 10 ms for 256 rows of 32,000, this 1.5."""
    buckets = _buckets(logits, float("-inf"))
    bucket = buckets.amax(-1).argmax(-1)  # [R]
    inside = buckets.gather(1, bucket[:, None, None].expand(-1, 1, _BUCKET))[:, 0]  # [R, 128]
    return bucket * _BUCKET + inside.argmax(-1)


def _buckets(values: Tensor, padding: float) -> Tensor:
    """values [R, V] as [R, buckets, 128]. Without a copy where V is a multiple of 128: F.pad copies for 0 columns too,
    2.4 ms for 256 rows of 32,000."""
    missing = -values.shape[1] % _BUCKET
    padded = F.pad(values, (0, missing), value=padding) if missing else values
    return padded.view(len(values), -1, _BUCKET)


def _apply_bias(logits: Tensor, rows: RowTensors) -> None:
    bias_row = rows.numbers[Number.BIAS_ROW]
    which = torch.from_numpy(np.flatnonzero(bias_row.numpy() >= 0))
    if len(which):
        logits[which] += rows.biases[bias_row[which]]


def _forbid_stopping(logits: Tensor, rows: RowTensors) -> None:
    """No end-of-sequence and no stop token before a row's min_tokens."""
    early = np.flatnonzero(rows.state[State.GENERATED].numpy() < rows.numbers[Number.MIN_TOKENS].numpy())
    if not len(early):
        return
    index = torch.from_numpy(early)
    logits[index[:, None], rows.eos_token_ids] = float("-inf")
    stop_token_ids = rows.stop_token_ids.numpy()[early]
    row, column = np.nonzero(stop_token_ids >= 0)
    logits[torch.from_numpy(early[row]), torch.from_numpy(stop_token_ids[row, column])] = float("-inf")


def _apply_penalties(logits: Tensor, rows: RowTensors) -> None:
    """Repetition (Keskar et al. 2019, over prompt and output), presence and frequency (OpenAI, over the output)."""
    which = torch.from_numpy(np.flatnonzero(rows.flags[Flag.PENALISED].numpy()))
    if not len(which):
        return
    assert rows.output_counts is not None
    assert rows.in_prompt is not None
    x = logits[which]
    counts = rows.output_counts[which]
    repetition = rows.reals[Real.REPETITION_PENALTY, which, None]
    seen = rows.in_prompt[which] | (counts > 0)
    x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    x -= rows.reals[Real.FREQUENCY_PENALTY, which, None] * counts
    x -= rows.reals[Real.PRESENCE_PENALTY, which, None] * (counts > 0)
    logits[which] = x


def _filter(scaled: Tensor, rows: RowTensors, which: Tensor) -> Tensor:
    """Unnormalised probabilities, zero where min-p, top-k or top-p drops a token, in place. `scaled` [N, V]: logits of
    the rows `which` int64 [N] over the temperature, each row's largest 0."""
    weights = scaled.exp_()
    top_p, min_p = rows.reals[Real.TOP_P, which], rows.reals[Real.MIN_P, which]
    top_k = rows.numbers[Number.TOP_K, which]
    vocab = scaled.shape[1]
    limited = torch.nonzero((top_p < 1) | ((top_k > 0) & (top_k < vocab)) | (min_p > 0))[:, 0]
    candidates, least = _CANDIDATES, weights.new_zeros(len(weights), 1)  # what is below `least` is dropped
    while len(limited):
        some = weights if len(limited) == len(weights) else weights[limited]
        threshold, undecided = _threshold(
            some, top_p[limited, None], top_k[limited, None], min_p[limited, None], min(candidates, vocab)
        )
        least[limited[~undecided]] = threshold[~undecided]
        limited = limited[undecided]
        candidates *= 8
    return weights.masked_fill_(weights < least, 0.0) if bool(least.any()) else weights


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
    buckets = _buckets(weights, 0.0)
    return buckets, buckets.sum(-1).double()


def _sum(weights: Tensor) -> Tensor:
    """Row sums [R], in an order that does not depend on the number of rows."""
    return _bucket_sums(weights)[1].cumsum(-1)[:, -1].float()


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """The first token where the running sum of `weights` float32 [R, V] passes u float64 [R] times the total."""
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


def post_update(tokens: Tensor, rows: RowTensors, processed_logprobs: Tensor | None = None) -> None:
    """Append a token to each row and see which rows have ended, see `Operators`. tokens int64 [R]."""
    state, numbers, flags = rows.state, rows.numbers, rows.flags
    ended = torch.nonzero(state[State.FINISH])[:, 0]
    rings = [rows.history] if rows.logprob_history is None else [rows.history, rows.logprob_history]
    before = state[:, ended], [ring[ended] for ring in rings]
    place = state[State.GENERATED, :, None] % rows.history.shape[1]
    rows.history.scatter_(1, place, tokens[:, None].int())
    if processed_logprobs is not None and rows.logprob_history is not None:
        rows.logprob_history.scatter_(1, place, processed_logprobs[:, None])
    state[State.TOKEN] = tokens
    state[State.CONTEXT] += 1
    state[State.GENERATED] += 1
    if rows.output_counts is not None:
        counted = torch.nonzero(flags[Flag.PENALISED] & (state[State.FINISH] == Finish.RUNNING))[:, 0]
        rows.output_counts[counted, tokens[counted]] += 1
    generated, min_tokens = state[State.GENERATED], numbers[Number.MIN_TOKENS]
    finish = torch.where(generated >= numbers[Number.MAX_TOKENS], Finish.LENGTH, Finish.RUNNING)
    reason = torch.zeros_like(tokens)
    finish, reason = _search_stop_strings(tokens, rows, finish, reason)
    finish = _follow_grammars(tokens, rows, finish)
    may_stop = generated >= min_tokens
    hit = (tokens[:, None] == rows.stop_token_ids).any(1) & may_stop
    finish, reason = finish.masked_fill(hit, Finish.STOP_TOKEN), torch.where(hit, tokens, reason)
    hit = torch.isin(tokens, rows.eos_token_ids) & ~flags[Flag.IGNORE_EOS] & may_stop
    state[State.FINISH] = finish.masked_fill(hit, Finish.EOS)
    state[State.STOP_REASON] = reason
    if len(ended):
        state[:, ended] = before[0]
        for ring, kept in zip(rings, before[1], strict=True):
            ring[ended] = kept


def _search_stop_strings(tokens: Tensor, rows: RowTensors, finish: Tensor, reason: Tensor) -> tuple[Tensor, Tensor]:
    """Take the tokens in the rows' automata; `finish` and `reason` [R] with the rows that have a stop string."""
    base, old = rows.numbers[Number.STOP_BASE], rows.state[State.STOP_STATE]
    if not bool((base >= 0).any()):
        return finish, reason
    # Rows that search no stop string here, those below min_tokens too, walk from row 0 and are masked out.
    searched = (base >= 0) & (rows.state[State.GENERATED] > rows.numbers[Number.MIN_TOKENS])
    base = torch.where(searched, base, 0)
    state = rows.automata[base + torch.where(searched, old, 0), tokens]
    matched = rows.automata[base + state, -1]
    rows.state[State.STOP_STATE] = torch.where(searched, state, old)
    hit = searched & (matched >= 0)
    return finish.masked_fill(hit, Finish.STOP_STRING), torch.where(hit, matched, reason)


def _follow_grammars(tokens: Tensor, rows: RowTensors, finish: Tensor) -> Tensor:
    """Take the tokens in the rows' grammars; `finish` with the rows whose text cannot be longer, [R] -> [R]."""
    guided = torch.nonzero(rows.numbers[Number.GRAMMAR_BASE] >= 0)[:, 0]
    if not len(guided):
        return finish
    assert rows.grammar_states is not None
    assert rows.grammar_classes is not None
    states, current = rows.grammar_states, rows.state[State.GRAMMAR_STATE]
    base = rows.numbers[Number.GRAMMAR_BASE, guided]
    token_class = rows.grammar_classes[rows.numbers[Number.GRAMMAR_CLASS, guided], tokens[guided]]
    current[guided] = state = states[base + current[guided] + token_class, 0].long()
    over, longer = states[base + state].unbind(-1)
    left = (rows.numbers[Number.MAX_TOKENS] - rows.state[State.GENERATED])[guided]
    why = torch.where(over > 0, Finish.WHOLE, Finish.LENGTH)
    return finish.index_copy(0, guided, torch.where(longer > left, why, finish[guided]))
