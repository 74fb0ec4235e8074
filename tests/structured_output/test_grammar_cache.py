"""Tables of grammars on disk."""

from __future__ import annotations

import numpy as np
import pytest

from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output import compile as compiling
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.grammar import CompiledGrammar
from batchmix.structured_output.grammar_cache import GrammarCache

PIECES = [b"", *(bytes([byte]) for byte in range(256))]
ASKED = SamplingConfig(structured_outputs=StructuredOutputs(json={"type": "string", "maxLength": 20, "minLenght": 1}))


def compiler(cache: GrammarCache) -> GrammarCompiler:
    return GrammarCompiler(PIECES, drops_leading_space=False, eos_token_ids=[0], cache=cache)


def test_a_later_run_reads_what_an_earlier_one_compiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_WORTH_KEEPING", 0)
    first = compiler(GrammarCache.of(PIECES)).get(ASKED)
    monkeypatch.setattr(compiling, "build_automaton", None)
    caplog.clear()
    second = compiler(GrammarCache.of(PIECES)).get(ASKED)
    assert isinstance(first, CompiledGrammar)
    assert isinstance(second, CompiledGrammar)
    assert "did you mean 'minLength'" in caplog.text
    assert np.array_equal(first.table, second.table)
    assert np.array_equal(first.token_class, second.token_class)
    assert (first.start, first.shortest, first.shortest_longer, first.has_end, first.forced) == (
        second.start, second.shortest, second.shortest_longer, second.has_end, second.forced,
    )  # fmt: skip


@pytest.mark.parametrize("change", [b"x", b"y"])
def test_another_vocabulary_has_tables_of_its_own(tmp_path, monkeypatch, change):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_WORTH_KEEPING", 0)
    compiler(GrammarCache.of(PIECES)).get(ASKED)
    assert GrammarCache.of([*PIECES, change]).get(compiling.grammar_key(ASKED)) is None


@pytest.mark.parametrize("damage", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_file_is_as_none(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "_WORTH_KEEPING", 0)
    compiler(GrammarCache.of(PIECES)).get(ASKED)
    (path,) = tmp_path.rglob("*.npz")
    path.write_bytes(damage)
    assert isinstance(compiler(GrammarCache.of(PIECES)).get(ASKED), CompiledGrammar)
