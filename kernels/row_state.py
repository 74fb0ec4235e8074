"""A batch's rows as tensors: which field lies where, and why a row ended.

Kernels, their oracles and whoever fills the tensors share this index of fields; it needs no Triton.

Legend: R rows, V vocabulary, N end-of-sequence tokens, W stop tokens of the row that has most, L steps of a history.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Finish(IntEnum):
    """Why a row ended. Where several hold, EOS goes before STOP_TOKEN, its grammar's end, STOP_STRING and LENGTH."""

    RUNNING = 0  # it has not
    EOS = 1  # an end-of-sequence token
    STOP_TOKEN = 2  # one of its own stop tokens
    STOP_STRING = 3  # its text contains one of its stop strings
    LENGTH = 4  # max_tokens: reached, or too few for a longer text of its grammar
    FREE = 5  # no row: steps leave the slot alone, as they do rows that have ended
    WHOLE = 6  # its grammar allows no longer text
    FAILED = 7  # its grammar allows neither the text nor one that begins with it; set by the host alone


class State(IntEnum):
    """Of `RowTensors.state`: what a step changes."""

    TOKEN = 0  # the last one; its keys and values are not in the cache yet
    CONTEXT = 1  # tokens before it; one below the prompt's until the first token is chosen
    GENERATED = 2  # tokens chosen so far: the position that keys the next one's random number
    FINISH = 3  # a Finish
    STOP_REASON = 4  # the stop token, or the ordinal of the stop string
    STOP_STATE = 5  # row of `automata`, counted from STOP_BASE
    GRAMMAR_STATE = 6  # row of `grammar_states`, counted from GRAMMAR_BASE


class Number(IntEnum):
    """Of `RowTensors.numbers`: what a row asked for in whole numbers."""

    MAX_TOKENS = 0
    MIN_TOKENS = 1  # below them no end-of-sequence and no stop token is chosen, and no stop string is looked for
    TOP_K = 2  # 0 or less, or V or more: all
    SEED = 3  # with ROW_KEY, SAMPLE and GENERATED the key of the random number
    ROW_KEY = 4
    SAMPLE = 5
    BIAS_ROW = 6  # row of `biases`, -1: none
    STOP_BASE = 7  # first row of its automaton in `automata`, -1: none
    GRAMMAR_BASE = 8  # first row of its grammar in `grammar_states`, -1: none
    GRAMMAR_CLASS = 9  # row of `grammar_classes`, -1: none


class Real(IntEnum):
    """Of `RowTensors.reals`: what a row asked for in real numbers."""

    TEMPERATURE = 0  # 0: the most likely token, the first of those that tie
    TOP_P = 1  # 1: all
    MIN_P = 2  # 0: all
    REPETITION_PENALTY = 3
    PRESENCE_PENALTY = 4
    FREQUENCY_PENALTY = 5


class Flag(IntEnum):
    """Of `RowTensors.flags`."""

    PENALISED = 0  # one of the penalties changes something: output_counts are kept, in_prompt is read
    IGNORE_EOS = 1
    WANTS_LOGPROB = 2  # the log-probability that the model gives the token
    PROCESSED_LOGPROBS = 3  # the one among the tokens that are not at -inf in the end, for logprob_history


def check_block(block: Tensor, fields: type[IntEnum], rows: int) -> None:
    """Assert that a block has these fields of so many rows, each field contiguous."""
    assert block.shape == (len(fields), rows), (fields.__name__, block.shape, rows)
    assert block.stride(1) == 1, (fields.__name__, block.stride())


@dataclass(frozen=True)
class RowTensors:
    """What operators read and change of R rows. Row r is column r of the blocks, which are contiguous along it.

    A grammar's part of `grammar_states` is a row for each state, followed by one for each class of tokens in that state.
    A class's row: the next state, counted from the grammar's first row; how many tokens must follow a token of the class.
    Tokens for which max_tokens leaves too few are not allowed. A state's own row: whether its text is over; how many
    tokens a longer text takes, 0 where the text may not end.
    """

    state: Tensor  # int64 [7, R]
    numbers: Tensor  # int64 [10, R]
    reals: Tensor  # float32 [6, R]
    flags: Tensor  # bool [4, R]
    stop_token_ids: Tensor  # int64 [R, W], -1 where there are fewer
    eos_token_ids: Tensor  # int64 [N], of all rows
    biases: Tensor  # float32 [tables, V], added to the logits; -inf: not allowed
    automata: Tensor  # integers [states, V + 1]: the next state by token; last the string complete in a state, -1: none
    output_counts: Tensor | None  # int32 [R, V], of rows with penalties; None: there are no such rows
    in_prompt: Tensor | None  # bool [R, V], likewise
    grammar_states: Tensor | None  # int32 [rows, 2]; None: no row has a grammar
    grammar_classes: Tensor | None  # int32 [grammars, V], the class of each token, 1 or more; likewise
    history: Tensor  # int32 [R, L]: the n-th token in column n % L, a ring for whoever reads it in time
    logprob_history: Tensor | None  # float32 [R, L], likewise, of PROCESSED_LOGPROBS; None: no row wants them

    def narrow(self, end: int, first: int = 0) -> RowTensors:
        """Rows first..end-1, in the same memory."""

        def rows_of(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[first:end]

        return RowTensors(
            self.state[:, first:end], self.numbers[:, first:end], self.reals[:, first:end], self.flags[:, first:end],
            self.stop_token_ids[first:end], self.eos_token_ids, self.biases, self.automata,
            rows_of(self.output_counts), rows_of(self.in_prompt), self.grammar_states, self.grammar_classes,
            self.history[first:end], rows_of(self.logprob_history),
        )  # fmt: skip
