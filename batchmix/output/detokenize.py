"""Generated token ids to text, cut where a stop string ended it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from batchmix.prompts.stop_strings import find_stop
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.prompts.vocabulary import join, strip_start
from batchmix.records import Completion


def detokenize(completions: Sequence[Completion], tokenizer: Tokenizer | None) -> None:
    """Fill `text` of each completion that has no error; without a tokenizer it stays None.

    Where a stop string ended the row, the text ends before it (after it with `include_stop_str_in_output`) and
    `stop_reason` becomes that string. The first `min_tokens` tokens are not searched: a row cannot stop there, and the
    automaton of the others starts in state INSIDE, not START.
    """
    if tokenizer is None:
        return
    for skip in (True, False):
        chosen = [
            completion
            for completion in completions
            if completion.error is None and completion.prompt.sampling.skip_special_tokens is skip
        ]
        texts = tokenizer.decode([completion.token_ids for completion in chosen], skip)
        for completion, text in zip(chosen, texts, strict=True):
            completion.text = text
            if completion.guided_logprobs is not None:
                completion.token_ends = _ends(completion, tokenizer)
            if completion.finish_reason == "stop" and completion.prompt.sampling.stop:
                _cut(completion, tokenizer)


def _ends(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """Where each token ends in the text, in bytes; a stop token counts as one byte behind it."""
    pieces = tokenizer.token_bytes(completion.prompt.sampling.skip_special_tokens)
    lengths = [len(pieces[token]) if token < len(pieces) else 0 for token in completion.token_ids]
    spaces = sum(lengths) - len(strip_start(join(completion.token_ids, pieces), tokenizer.drops_leading_space))
    ends = [end - spaces for end in accumulate(lengths)]
    return ends + [(ends[-1] if ends else 0) + 1] * (completion.num_tokens - len(ends))


def _cut(completion: Completion, tokenizer: Tokenizer) -> None:
    sampling = completion.prompt.sampling
    if isinstance(completion.stop_reason, int) or not sampling.stop:
        return
    pieces = tokenizer.token_bytes(sampling.skip_special_tokens)
    drops = tokenizer.drops_leading_space
    head = join(completion.token_ids[: sampling.min_tokens], pieces)
    tail = join(completion.token_ids[sampling.min_tokens :], pieces)
    if not sampling.min_tokens:
        tail, drops = strip_start(tail, drops), False
    found = find_stop(tail, [text.encode() for text in sampling.stop])
    if found is None:
        return
    start, end, index = found
    kept = head + tail[: end if sampling.include_stop_str_in_output else start]
    completion.text = strip_start(kept, drops).decode(errors="replace")
    completion.stop_reason = sampling.stop[index]
