"""Random texts of a JSON Schema's automaton."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from batchmix.sampling import SamplingConfig, StructuredOutputs
from batchmix.structured_output.automata import ByteAutomaton
from batchmix.structured_output.compile import GrammarCompiler
from batchmix.structured_output.dfa import build_automaton
from batchmix.structured_output.host_grammar import HostGrammar
from batchmix.structured_output.json_schema import json_schema_grammar


def automaton_of(schema: Any) -> ByteAutomaton:
    grammar = json_schema_grammar(schema)
    assert not grammar.rules
    return build_automaton(grammar.pattern)


def texts(automaton: ByteAutomaton, source: random.Random, count: int) -> list[str]:
    """Random walks that turn to the nearest end after a while."""
    distance = np.where(automaton.accepts, 0, 10**6)
    while True:
        nearer = np.minimum(distance, 1 + np.where(automaton.goto >= 0, distance[automaton.goto], 10**6).min(1))
        if (nearer == distance).all():
            break
        distance = nearer
    found = []
    for _ in range(count):
        data, state, most = bytearray(), 0, source.choice([0, 5, 20, 80])
        while True:
            options = [byte for byte in range(256) if automaton.goto[state, byte] >= 0]
            if automaton.accepts[state] and (not options or len(data) >= most or source.random() < 0.2):
                break
            if len(data) >= most:
                options = [byte for byte in options if distance[automaton.goto[state, byte]] < distance[state]]
            data.append(source.choice(options))
            state = int(automaton.goto[state, data[-1]])
        found.append(data.decode())
    return found


GRAMMARS = GrammarCompiler([b"", *(bytes([byte]) for byte in range(256))], drops_leading_space=False, eos_token_ids=[0])


def accepts_on_host(schema: Any, text: str) -> bool:
    grammar = GRAMMARS.get(SamplingConfig(structured_outputs=StructuredOutputs(json=schema)))
    assert isinstance(grammar, HostGrammar)
    matcher = grammar.matcher.deep_copy()
    return all(matcher.consume_token(1 + byte) for byte in text.encode()) and matcher.is_accepting()
