"""Which prompts begin alike: the instruction that every row of a job repeats, few-shot headers, questions about one text.

What is shared is counted in whole KV blocks, which is what the engine can share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from batchmix.records import Prompt

_GROUP_ROWS = 16  # prompts from which a prefix decides where they are sorted; fewer lose more by their lengths


def find_prefixes(prompts: Sequence[Prompt], block_size: int) -> list[int]:
    """For each prompt the group that it is sorted into: the longest prefix that it shares with many others.

    Sets `shared_tokens` of each prompt: how many of its leading tokens, in whole blocks and never all of them, at
    least one other prompt begins with too. Groups are numbered; 0 is that of prompts which share with few or none.
    """
    groups = [0] * len(prompts)
    num_groups, level = 0, 0
    alike = [list(range(len(prompts)))]
    while alike:
        start, stop = level * block_size, (level + 1) * block_size
        level += 1
        longer = []
        for members in alike:
            by_block: dict[bytes, list[int]] = defaultdict(list)
            for place in members:
                ids = prompts[place].token_ids
                if stop < len(ids):
                    by_block[_bytes(ids[start:stop])].append(place)
            for same in by_block.values():
                if len(same) < 2:
                    continue
                longer.append(same)
                for place in same:
                    prompts[place].shared_tokens = stop
                if len(same) >= _GROUP_ROWS and len(same) < len(members):
                    num_groups += 1
                    for place in same:
                        groups[place] = num_groups
        alike = longer
    return groups


def _bytes(ids: Sequence[int]) -> bytes:
    return ids.tobytes() if hasattr(ids, "tobytes") else repr(list(ids)).encode()
