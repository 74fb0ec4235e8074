"""docs/python.md and docs/coming-from-vllm.md: every argument is in a table, and the tables are those of the code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from batchmix import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from batchmix.api import arguments, names, sampling_params
from batchmix.api.outputs import CompletionOutput

ROOT = Path(__file__).parents[2]
SAME, OTHER, NO_EFFECT, NOT_THERE = "same", "other name", "no effect", "not there"


def tables() -> list[dict[str, tuple[str, str]]]:
    """Of each table of names: what stands beside a name."""
    text = (ROOT / "docs/coming-from-vllm.md").read_text(encoding="utf-8")
    found = []
    for table in text.split("| vLLM | here | |\n|---|---|---|\n")[1:]:
        rows = re.findall(r"^\| `(.+?)`.* \| ([a-z ]+) \| (.*?) ?\|$", table.partition("\n\n")[0], re.MULTILINE)
        assert len(rows) == len(table.partition("\n\n")[0].strip().splitlines())
        found.append({name: (here, why) for name, here, why in rows})
    return found


def check(table: dict[str, tuple[str, str]], here: str, wanted: dict[str, str]) -> None:
    assert {name: why for name, (kind, why) in table.items() if kind == here} == wanted


def test_the_tables_are_those_of_the_code() -> None:
    llm, methods, calls, sampling, structured, _ = tables()
    check(llm, NOT_THERE, names.NOT_THERE | {"tokenizer": "the tokenizer is the model folder's"})
    check(llm, NO_EFFECT, names.NO_EFFECT)
    explicit = {name for name in inspect.signature(LLM).parameters if name != "others"}
    assert explicit | arguments.SAME.keys() == {name for name, (here, _) in llm.items() if here in (SAME, OTHER)} | {
        "tokenizer"
    }
    check(methods, NOT_THERE, names.METHODS)
    assert all(hasattr(LLM, name) for name, (here, _) in methods.items() if here == SAME)
    check(calls, NOT_THERE, names.CALL)
    taken = {*inspect.signature(LLM.generate).parameters, *inspect.signature(LLM.chat).parameters} - {"self", "others"}
    assert taken == {name for name, (here, _) in calls.items() if here == SAME}
    check(sampling, NOT_THERE, sampling_params.NOT_THERE)
    assert {name for name, (here, _) in sampling.items() if here == SAME} == {
        field.name for field in dataclasses.fields(SamplingParams)
    }
    check(structured, NOT_THERE, sampling_params.STRUCTURED_NOT_THERE)
    own = {"score_choices", "token_probabilities"}
    assert {name for name, (here, _) in structured.items() if here == SAME} | own == {
        field.name for field in dataclasses.fields(StructuredOutputsParams)
    }


def test_the_defaults_that_differ_are_in_a_table() -> None:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert "| `max_tokens` | 16; `None` for the rest of the context | 1024 |" in text
    assert re.search(r"^\| `seed` \| `None`: .* \| 0 \|$", text, re.MULTILINE)


def test_the_fields_of_outputs_are_those_of_the_code() -> None:
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for cls in (RequestOutput, CompletionOutput):
        table, _, after = text.partition(f"| `{cls.__name__}` | |\n|---|---|\n")[2].partition("\n\n")
        fields = [field.name for field in dataclasses.fields(cls)]
        assert re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE) == fields
        missing = re.findall(r"`(\w+)`", after.partition("\n\n")[0])
        assert missing
        assert not {name for name in missing if hasattr(cls, name)} | {*missing} & {*fields}
