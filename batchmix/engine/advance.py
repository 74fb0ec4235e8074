"""What a new token does to its row, for all rows at once: the torch backend's form of kernels/slots.py."""

from __future__ import annotations

import torch
from torch import Tensor

from batchmix.engine.input_batch import EOS, LENGTH, RUNNING, STOP_STRING, STOP_TOKEN, WHOLE, InputBatch


def advance(
    slots: InputBatch, first: int, tokens: Tensor, decoded: bool = False, processed_logprobs: Tensor | None = None
) -> None:
    """Append one token to slots first..first+R-1 and see which rows have ended. tokens int64 [R].

    `decoded`: after a decode step, which has put the token before it into the cache. Rows that have ended stay as
    they are. The torch backend's form, on the CPU.
    """
    span = slice(first, first + len(tokens))
    rows, ended = slots.state, first + torch.nonzero(slots.finish[span])[:, 0]
    rings = [slots.history] if slots.logprob_history is None else [slots.history, slots.logprob_history]
    before = rows[:, ended], [ring[ended] for ring in rings]
    slots.token[span] = tokens
    place = slots.generated[span, None] % slots.history.shape[1]
    slots.history[span].scatter_(1, place, tokens[:, None].int())
    if processed_logprobs is not None and slots.logprob_history is not None:
        slots.logprob_history[span].scatter_(1, place, processed_logprobs[:, None])
    slots.generated[span] += 1
    if decoded:
        slots.context[span] += 1
    if slots.output_counts is not None:
        counted = torch.nonzero(slots.penalised[span] & (slots.finish[span] == RUNNING))[:, 0]
        slots.output_counts[first + counted, tokens[counted]] += 1
    generated = slots.generated[span]
    finish = torch.where(generated >= slots.max_tokens[span], LENGTH, RUNNING)
    reason = torch.zeros_like(tokens)
    may_stop = generated >= slots.min_tokens[span]
    base = slots.stop_base[span]
    if bool((base >= 0).any()):
        # Rows that search no stop string here, those below min_tokens too, walk from row 0 and are masked out.
        searched = (base >= 0) & (generated > slots.min_tokens[span])
        base, old = torch.where(searched, base, 0), slots.stop_state[span]
        state = slots.automata.data[base + torch.where(searched, old, 0), tokens]
        matched = slots.automata.data[base + state, -1]
        slots.stop_state[span] = torch.where(searched, state, old)
        hit = searched & (matched >= 0)
        finish, reason = finish.masked_fill(hit, STOP_STRING), torch.where(hit, matched, reason)
    finish = _follow_grammars(slots, span, tokens, finish)
    hit = (tokens[:, None] == slots.stop_token_ids[span]).any(1) & may_stop
    finish, reason = finish.masked_fill(hit, STOP_TOKEN), torch.where(hit, tokens, reason)
    hit = torch.isin(tokens, slots.eos_token_ids) & ~slots.ignore_eos[span] & may_stop
    slots.finish[span] = finish.masked_fill(hit, EOS)
    slots.stop_reason[span] = reason
    if len(ended):
        rows[:, ended] = before[0]
        for ring, kept in zip(rings, before[1], strict=True):
            ring[ended] = kept


def _follow_grammars(slots: InputBatch, span: slice, tokens: Tensor, finish: Tensor) -> Tensor:
    """Take the tokens in the rows' grammars; `finish` with the rows whose text cannot be longer, [R] -> [R]."""
    guided = torch.nonzero(slots.grammar_base[span] >= 0)[:, 0]
    if not len(guided):
        return finish
    states, rows = slots.grammars.states.data, slots.grammar_state[span]
    base = slots.grammar_base[span][guided]
    token_class = slots.grammars.classes.data[slots.grammar_class[span][guided], tokens[guided]]
    rows[guided] = state = states[base + rows[guided] + token_class, 0].long()
    over, longer = states[base + state].unbind(-1)
    left = (slots.max_tokens[span] - slots.generated[span])[guided]
    why = torch.where(over > 0, WHOLE, LENGTH)
    return finish.index_copy(0, guided, torch.where(longer > left, why, finish[guided]))
