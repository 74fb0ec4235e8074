"""The output's columns: their schema, and completions as a table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import pyarrow as pa

from batchmix.errors import BatchmixError
from batchmix.input.schema import LOOSE, as_json_text
from batchmix.output.logprobs import LOGPROBS, LOGPROBS_OF_IDS, TokenTexts, records_of_ids
from batchmix.output.messages import MESSAGES, is_list_of_structs, message_records
from batchmix.records import Completion

ID = "id"
FIRST = pa.schema([("row", pa.int64()), (ID, pa.string()), ("sample_index", pa.int32())])
LAST = pa.schema(
    [
        ("generated_text", pa.string()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cumulative_logprob", pa.float64()),
        ("error", pa.string()),
    ]
)
TOKEN_IDS = pa.field("generated_token_ids", pa.list_(pa.int32()))
GUIDED_LOGPROBS = pa.field("guided_logprobs", pa.list_(pa.float32()))  # of each token, one that ends the text included
CHOICE_PROBABILITIES = pa.field("choice_probabilities", pa.list_(pa.float64()))  # in the order of the choices


class TypedColumns(Protocol):
    """Columns that are made of the completions, such as an annotation task's."""

    @property
    def schema(self) -> pa.Schema: ...

    def arrays(self, completions: Sequence[Completion]) -> list[pa.Array]:
        """One of each field of `schema`, [N]."""


class OutputColumns:
    """`row`, `id`, `sample_index`, the kept input columns, an annotation task's, and what was generated.

    `schema` has them all, in order. An input column that is called as one of ours becomes `input_<name>`; `id` is not among
    the kept ones where it fills ours.
    """

    def __init__(
        self,
        kept: pa.Schema,
        *,
        token_ids: bool,
        logprobs: bool,
        choice_probabilities: bool = False,
        guided_logprobs: bool = False,
        provenance: Mapping[str, str] | None = None,
        annotations: TypedColumns | None = None,
        tokens: TokenTexts | None = None,
        messages: str | None = None,
    ) -> None:
        """`tokens`: what the tokens of logprobs are as text; None: they have ids alone, as in earlier releases. `messages`: the
        input column with conversations, which becomes MESSAGES where it is no list of structs."""
        of_logprobs = LOGPROBS_OF_IDS if tokens is None else LOGPROBS
        asked = {TOKEN_IDS: token_ids, of_logprobs: logprobs, CHOICE_PROBABILITIES: choice_probabilities,
                 GUIDED_LOGPROBS: guided_logprobs}  # fmt: skip
        extra = [field for field, wanted in asked.items() if wanted]
        own = {*FIRST.names, *LAST.names, *(field.name for field in extra)}
        typed = list(annotations.schema) if annotations is not None else []
        names = [field.name for field in typed]
        for name in names:
            if name in own or names.count(name) > 1:
                raise BatchmixError(f"annotate: a field of the answers is called {name!r}, as a column that the output has"
                                    " anyway; give it another name")  # fmt: skip
        own |= set(names)
        self.tokens = tokens
        self._annotations = annotations
        self._kept = kept
        self._conversations = {
            field.name for field in kept if field.name == messages and not is_list_of_structs(field.type)
        }
        taken = own | set(kept.names)
        fields = []
        for field in kept:
            name = field.name
            while name in own or (name != field.name and name in taken):
                name = f"input_{name}"
            taken.add(name)
            kind = MESSAGES if field.name in self._conversations else field.type
            fields.append(field.with_name(name).with_type(kind).remove_metadata())
        metadata = {
            f"batchmix.{key}": value.encode(errors="backslashreplace") for key, value in (provenance or {}).items()
        }
        self.schema = pa.schema([*FIRST, *fields, *typed, *LAST, *extra], metadata=metadata)
        self._token_ids = token_ids
        self._logprobs = logprobs
        self._choice_probabilities = choice_probabilities
        self._guided_logprobs = guided_logprobs

    def table(self, completions: Sequence[Completion]) -> pa.Table:
        """One row for each completion, in the order given."""
        columns: list[list[object] | pa.Array] = [
            [completion.prompt.row for completion in completions],
            [completion.prompt.id for completion in completions],
            [completion.sample_index for completion in completions],
        ]
        for field in self._kept:
            values = [completion.prompt.columns.get(field.name) for completion in completions]
            if field.name in self._conversations:
                values = [message_records(value) for value in values]
            elif field.metadata == LOOSE:
                values = [as_json_text(value) for value in values]
            columns.append(values)
        if self._annotations is not None:
            columns += self._annotations.arrays(completions)
        columns += [
            [completion.text for completion in completions],
            [completion.finish_reason for completion in completions],
            [None if c.stop_reason is None else str(c.stop_reason) for c in completions],
            [len(completion.prompt.token_ids) for completion in completions],
            [completion.num_tokens for completion in completions],
            [completion.cumulative_logprob for completion in completions],
            [completion.error for completion in completions],
        ]
        if self._token_ids:
            columns.append([None if c.error is not None else list(c.token_ids) for c in completions])
        if self._logprobs:
            records = records_of_ids if self.tokens is None else self.tokens.records
            columns.append([records(completion.logprobs) for completion in completions])
        if self._choice_probabilities:
            columns.append([completion.choice_probabilities for completion in completions])
        if self._guided_logprobs:
            columns.append([completion.guided_logprobs for completion in completions])
        arrays = [
            values if isinstance(values, pa.Array) else pa.array(values, field.type)
            for values, field in zip(columns, self.schema, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)
