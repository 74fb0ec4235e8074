"""Shared prefixes against a comparison of every pair, and the order that they give."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.planning.planner import Limits, plan
from batchmix.planning.prefixes import find_prefixes
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

SIZE = 4


def make(rows: list[list[int]]) -> list[Prompt]:
    return [Prompt(row, str(row), {}, array("i", ids), SamplingConfig()) for row, ids in enumerate(rows)]


def common_blocks(a: list[int], b: list[int]) -> int:
    """Tokens of the leading whole blocks that are equal, leaving each at least one token of its own."""
    most = (min(len(a), len(b)) - 1) // SIZE * SIZE
    return max(stop for stop in range(0, most + 1, SIZE) if a[:stop] == b[:stop])


headers = st.sampled_from([[], [1] * 4, [1] * 8, [1] * 4 + [2] * 5, [3] * 13])
rows = st.lists(st.tuples(headers, st.lists(st.integers(0, 1), min_size=1, max_size=9)), max_size=40)


@settings(deadline=None, max_examples=200)
@given(rows)
def test_what_is_shared_is_what_some_other_prompt_begins_with(parts: list[tuple[list[int], list[int]]]) -> None:
    texts = [header + own for header, own in parts]
    prompts = make(texts)
    find_prefixes(prompts, SIZE)
    for place, text in enumerate(texts):
        others = [common_blocks(text, other) for i, other in enumerate(texts) if i != place]
        assert prompts[place].shared_tokens == max(others, default=0)


def test_prompts_with_one_header_run_together_and_by_length() -> None:
    texts = [[header] * 8 + [5 + row] * (1 + row % 7) for row in range(120) for header in [row % 3]]
    texts += [[9 + row] * (3 + row) for row in range(20)]  # nothing in common
    limits = Limits(max_num_seqs=1000, kv_blocks=10_000, block_size=SIZE, sort_window=1000, share_prefix=True)
    [batch] = plan(make(texts), limits)
    order = [
        (tuple(prompt.token_ids[:1]) if prompt.row < 120 else (), len(prompt.token_ids)) for prompt in batch.prompts
    ]
    headers = [header for header, _ in order]
    runs = [header for place, header in enumerate(headers) if place == 0 or headers[place - 1] != header]
    assert len(runs) == 4, "each header once, and what has none"
    for header in set(headers):
        lengths = [length for found, length in order if found == header]
        assert lengths == sorted(lengths, reverse=True)


def test_a_prefix_of_all_leaves_the_order_to_the_lengths() -> None:
    texts = [[7] * 8 + [row] * (1 + row % 5) for row in range(64)]
    base = {"max_num_seqs": 1000, "kv_blocks": 10_000, "block_size": SIZE, "sort_window": 1000}
    [shared], [plain] = (list(plan(make(texts), Limits(**base, share_prefix=share))) for share in (True, False))
    assert [prompt.row for prompt in shared.prompts] == [prompt.row for prompt in plain.prompts]
    assert {prompt.shared_tokens for prompt in shared.prompts} == {8}
    assert {prompt.shared_tokens for prompt in plain.prompts} == {0}
