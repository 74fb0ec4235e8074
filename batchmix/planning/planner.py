"""The plan stage: which prompts run together.

A window of prompts is sorted by (shared prefix, length) and cut into batches that fit the engine's slots and KV cache.
Sorting puts prompts of like length side by side, so a prefill step packs them without waste and their decode steps read
contexts of like length; longest first, so that the last and least full steps of a window are its cheapest. Prompts that
begin alike run together where the engine shares their KV blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from batchmix.planning.prefixes import find_prefixes
from batchmix.records import Batch, Prompt

_FIRST_WINDOW = 256  # prompts before the first batch runs; each window is 4 times the last, up to sort_window


@dataclass(frozen=True)
class Limits:
    """What the engine can hold."""

    max_num_seqs: int  # rows that decode together
    kv_blocks: int
    block_size: int  # tokens of a KV block
    sort_window: int  # prompts held and sorted at once
    window_bytes: int = sys.maxsize  # of the prompts of a window
    batch_bytes: int = sys.maxsize  # of the prompts of a batch
    share_prefix: bool = False  # whether the engine computes what prompts have in common once


def plan(prompts: Iterable[Prompt | None], limits: Limits) -> Iterator[Batch]:
    """Cut prompts into batches, window by window. Prompts that carry an error come first in theirs and take no room.

    None among the prompts says that those behind it are not ready yet: a window ends there, and an empty batch says that
    there is none now.
    """
    prompts, more = iter(prompts), True
    size = min(_FIRST_WINDOW, limits.sort_window)
    while more:
        window, more = _window(prompts, size, limits.window_bytes)
        if window:
            yield from _cut(window, limits)
            size = min(4 * size, limits.sort_window)
        elif more:
            yield Batch([])
        del window  # before the next is read


def _window(prompts: Iterator[Prompt | None], size: int, max_bytes: int) -> tuple[list[Prompt], bool]:
    """The next `size` prompts, or fewer where these have `max_bytes` or others are not ready; whether there may be more."""
    window: list[Prompt] = []
    held = 0
    for prompt in prompts:
        if prompt is None:
            return window, True
        window.append(prompt)
        held += prompt.num_bytes
        if len(window) == size or held >= max_bytes:
            return window, True
    return window, False


def _cut(window: list[Prompt], limits: Limits) -> Iterator[Batch]:
    for failed in _by_bytes([prompt for prompt in window if prompt.error is not None], limits.batch_bytes):
        yield Batch(failed)
    runnable = [prompt for prompt in window if prompt.error is None]
    runnable.sort(key=lambda prompt: (-len(prompt.token_ids), prompt.row))
    if limits.share_prefix:
        groups = find_prefixes(runnable, limits.block_size)
        order = sorted(range(len(runnable)), key=groups.__getitem__)  # stable: by length within a group
        runnable = [runnable[place] for place in order]
    batch: list[Prompt] = []
    seqs = blocks = held = 0
    for prompt in runnable:
        needed = prompt_blocks(prompt, limits.block_size)
        if batch and (
            seqs + prompt.num_samples > limits.max_num_seqs
            or blocks + needed > limits.kv_blocks
            or held + prompt.num_bytes > limits.batch_bytes
        ):
            yield Batch(batch)
            batch, seqs, blocks, held = [], 0, 0, 0
        batch.append(prompt)
        held += prompt.num_bytes
        seqs += prompt.num_samples
        blocks += needed
    if batch:
        yield Batch(batch)


def _by_bytes(prompts: list[Prompt], max_bytes: int) -> Iterator[list[Prompt]]:
    """Cut into lists of at most `max_bytes`, or of one prompt."""
    start = held = 0
    for place, prompt in enumerate(prompts):
        if place > start and held + prompt.num_bytes > max_bytes:
            yield prompts[start:place]
            start, held = place, 0
        held += prompt.num_bytes
    if start < len(prompts):
        yield prompts[start:]


def prompt_blocks(prompt: Prompt, block_size: int) -> int:
    """KV blocks that a prompt takes at its start: its samples share all but the last, which each of them fills."""
    return len(prompt.token_ids) // block_size + prompt.num_samples
