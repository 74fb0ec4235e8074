import dataclasses
from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.planning.planner import Limits, plan, prompt_blocks
from batchmix.records import Prompt
from batchmix.sampling import SamplingConfig

LIMITS = Limits(max_num_seqs=8, kv_blocks=40, block_size=16, sort_window=64)


def make_prompt(row: int, length: int, samples: int, failed: bool) -> Prompt:
    ids = () if failed else range(length)
    return Prompt(row, str(row), {}, ids, SamplingConfig(n=samples), "too long" if failed else None)


specs = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 10), st.booleans()), max_size=400)


@settings(deadline=None, max_examples=100)
@given(specs)
def test_every_prompt_once_and_within_the_limits(spec: list[tuple[int, int, bool]]) -> None:
    prompts = [make_prompt(row, *fields) for row, fields in enumerate(spec)]
    batches = list(plan(prompts, LIMITS))
    assert sorted(prompt.row for batch in batches for prompt in batch.prompts) == list(range(len(prompts)))
    for batch in batches:
        runnable = [prompt for prompt in batch.prompts if prompt.error is None]
        lengths = [len(prompt.token_ids) for prompt in runnable]
        assert lengths == sorted(lengths, reverse=True)
        if len(runnable) > 1:
            assert sum(prompt.sampling.n for prompt in runnable) <= LIMITS.max_num_seqs
            assert sum(prompt_blocks(prompt, LIMITS.block_size) for prompt in runnable) <= LIMITS.kv_blocks


@settings(deadline=None, max_examples=30)
@given(specs)
def test_the_same_prompts_give_the_same_batches(spec: list[tuple[int, int, bool]]) -> None:
    prompts = [make_prompt(row, *fields) for row, fields in enumerate(spec)]
    rows = [[prompt.row for prompt in batch.prompts] for batch in plan(prompts, LIMITS)]
    assert rows == [[prompt.row for prompt in batch.prompts] for batch in plan(iter(prompts), LIMITS)]


def test_starts_small_and_never_reads_more_than_a_window_ahead() -> None:
    pulled = 0

    def prompts() -> Iterator[Prompt]:
        nonlocal pulled
        for row in range(20_000):
            pulled += 1
            yield make_prompt(row, 20, 1, False)

    limits = dataclasses.replace(LIMITS, sort_window=2048)
    given_out = 0
    for batch in plan(prompts(), limits):
        if given_out == 0:
            assert pulled == 256
        assert pulled - given_out <= 2048
        given_out += len(batch.prompts)
    assert given_out == 20_000
