"""The progress bar of a call, as vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from batchmix.api.outputs import RequestOutput

UseTqdm = bool | Callable[..., Any]


@contextmanager
def progress_bar(use_tqdm: UseTqdm, total: int | None) -> Iterator[Callable[[RequestOutput], None]]:
    """Gives a function to be told of each output. `use_tqdm`: True for tqdm's own (a widget in notebooks), False for none, or
    what makes one. `total`: outputs, where they are known."""
    if use_tqdm is False:
        yield lambda output: None
        return
    make: Callable[..., Any] = tqdm if use_tqdm is True else use_tqdm
    bar = make(total=total, desc="Processed prompts", dynamic_ncols=True)
    tokens = {"input": 0, "output": 0}

    def count(output: RequestOutput) -> None:
        tokens["input"] += len(output.prompt_token_ids or ())
        tokens["output"] += sum(len(sample.token_ids) for sample in output.outputs)
        seconds = max(getattr(bar, "format_dict", {}).get("elapsed", 0.0), 1e-3)
        if hasattr(bar, "set_postfix_str"):
            speeds = ", ".join(f"{name}: {number / seconds:.2f} toks/s" for name, number in tokens.items())
            bar.set_postfix_str(f"est. speed {speeds}", refresh=False)
        bar.update(1)

    try:
        yield count
    finally:
        bar.close()
