"""Offline batch generation for Mixtral: prompts in, Arrow files out.

From Python: `LLM`, `SamplingParams` and what they return, with vLLM's names, and `run` for a whole job (docs/python.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when they are first used: torch takes seconds
    from batchmix.api.job import Run, run
    from batchmix.api.llm import LLM
    from batchmix.api.outputs import CompletionOutput, Logprob, RequestOutput
    from batchmix.api.sampling_params import SamplingParams, StructuredOutputsParams
    from batchmix.errors import BatchmixError

__version__ = "0.1.0"
__all__ = ["LLM", "BatchmixError", "CompletionOutput", "Logprob", "RequestOutput", "Run", "SamplingParams",
           "StructuredOutputsParams", "run"]  # fmt: skip
_MODULES = {
    "LLM": "api.llm", "BatchmixError": "errors", "CompletionOutput": "api.outputs", "Logprob": "api.outputs",
    "RequestOutput": "api.outputs", "Run": "api.job", "SamplingParams": "api.sampling_params",
    "StructuredOutputsParams": "api.sampling_params", "run": "api.job",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'batchmix' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"batchmix.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
