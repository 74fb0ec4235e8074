"""Device tables that many slots use at once: logit biases, stop-string automata."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor

from batchmix.models.async_copy import async_copy_to_gpu
from batchmix.prompts.stop_strings import StopTable
from batchmix.sampling import SamplingConfig

_KEEP_UNUSED = 16  # tables that nobody uses just now are kept, because the next row often wants the same one


class DeviceTableCache:
    """Tables of some rows by `width` columns each, stacked in one tensor so that a step gathers from it by row number.
    A table is built once per key and counted by its users; its first row's number stays valid while it is in use."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(0, width, dtype=dtype, device=device)
        self._spans: dict[Hashable, tuple[int, int]] = {}  # key -> first row, number of rows; oldest use first
        self._users: dict[Hashable, int] = {}

    def acquire(self, key: Hashable, build: Callable[[], Tensor]) -> int:
        """The first row of the key's table, built on first use; call `release` when the user is done."""
        if key not in self._spans:
            table = async_copy_to_gpu(build().to(self.data.dtype), self.data.device)
            self._spans[key] = self._place(len(table)), len(table)
            first = self._spans[key][0]
            self.data[first : first + len(table)] = table
        self._users[key] = self._users.get(key, 0) + 1
        return self._spans[key][0]

    def release(self, key: Hashable) -> None:
        """One user less. Tables without users are dropped, oldest first, once there are more than a few."""
        self._users[key] -= 1
        self._spans[key] = self._spans.pop(key)
        unused = [key for key in self._spans if self._users[key] == 0]
        for old in unused[: max(0, len(unused) - _KEEP_UNUSED)]:
            del self._spans[old], self._users[old]

    def _place(self, rows: int) -> int:
        """First fit between the spans in use; the tensor grows by doubling where none fits."""
        first = 0
        for start, length in sorted(self._spans.values()):
            if start - first >= rows:
                return first
            first = start + length
        if first + rows > len(self.data):
            grown = self.data.new_zeros(max(2 * len(self.data), first + rows), self.data.shape[1])
            grown[: len(self.data)] = self.data
            self.data = grown
        return first


def bias_key(sampling: SamplingConfig) -> tuple[object, ...]:
    """What makes two rows share a bias table; empty where there is none."""
    if sampling.logit_bias is None and sampling.allowed_token_ids is None:
        return ()
    allowed = None if sampling.allowed_token_ids is None else tuple(sampling.allowed_token_ids)
    return tuple(sorted((sampling.logit_bias or {}).items())), allowed


def bias_table(sampling: SamplingConfig, vocab_size: int) -> Tensor:
    """What is added to the logits, float32 [1, V]."""
    bias = torch.zeros(1, vocab_size)
    if sampling.allowed_token_ids is not None:
        bias.fill_(float("-inf"))
        bias[0, sampling.allowed_token_ids] = 0.0
    for token, value in (sampling.logit_bias or {}).items():
        bias[0, token] += value
    return bias


def stop_key(sampling: SamplingConfig) -> tuple[object, ...]:
    """What makes two rows share an automaton; empty where there is none."""
    return (tuple(sampling.stop), sampling.skip_special_tokens) if sampling.stop else ()


def automaton(table: StopTable) -> Tensor:
    """int64 [states, V + 1]: the next state by token, then the string that is complete in a state or -1."""
    return torch.from_numpy(np.concatenate((table.next_state, table.matched[:, None]), 1).astype(np.int64))
