"""Rows to prompts: messages, a plain text, a template over the columns, or token ids as they are."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

from batchmix.errors import BatchmixError
from batchmix.input.config import DataConfig
from batchmix.input.prompt_columns import PromptColumns, value_of_column
from batchmix.observability.clock import StageClock
from batchmix.observability.first_rows import warn_of_failed
from batchmix.prompts.aside import Aside
from batchmix.prompts.buffers import Buffers, buffered_bytes, num_bytes
from batchmix.prompts.read_ahead import read_ahead
from batchmix.prompts.row_sampling import Grammars, RowSamplings
from batchmix.prompts.row_text import NoChatFormat, RowTexts
from batchmix.prompts.swap_columns import check_swap, pair_up, swapped
from batchmix.prompts.tokenizer import Tokenizer
from batchmix.prompts.vocabulary import TokenIds
from batchmix.records import InputRow, Prompt
from batchmix.sampling import SamplingConfig
from batchmix.templates.messages import Message, PromptError, check_text

_BATCH_ROWS = 512  # encoded in one call
_BATCHES_AHEAD = 4
_MOST_ASIDE = 64  # rows that wait for grammars of their own; as many are kept compiled
_PATIENCE = 0.5  # seconds between two looks at whether to stop
_MOST_CHARS = 128  # of a token: the longest of vocabularies are runs of spaces of about that length
_PROMPT_BYTES = 500  # of a prompt without columns and token ids
_REASON_CHARS = 300
_SHOWN_CHARS = 240  # of the first prompt, in the log

_log = logging.getLogger(__name__)


def without_pauses(prompts: Generator[Prompt | None, None, None]) -> Generator[Prompt, None, None]:
    """What `PromptBuilder.build` gives, without the pauses."""
    with closing(prompts):
        for prompt in prompts:
            if prompt is not None:
                yield prompt


class PromptBuilder:
    """Makes one prompt of each row of a run; a row that cannot be run has `error` set and no token ids.

    A row's prompt is, of what it has, the first of: its `data.token_ids_column`, `data.template` over its columns,
    its `data.messages_column`, its `data.prompt_column` (of those three, the ones that `PromptColumns` names). Texts of
    the template and the prompt column are sent as one user message through the chat template; without one (a base model, a
    request to /v1/completions) the text itself is sent after the beginning-of-sequence token. With `data.swap_columns` a row
    has two prompts: one for its even samples, one with the columns swapped for the odd ones.

    `vocab_size`, `max_model_len`, `grammars` and `eos_token_ids` are the model's. BatchmixError where data.template,
    data.system_prompt or sampling cannot work.
    """

    def __init__(
        self,
        data: DataConfig,
        sampling: SamplingConfig,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int,
        vocab_size: int,
        grammars: Grammars | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._columns = PromptColumns.of(data)
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_chars = max_model_len * _MOST_CHARS
        self._vocab_size = vocab_size
        self._more_tokens_than_model = tokenizer is not None and tokenizer.vocab_size > vocab_size
        self._buffers = Buffers.of(buffered_bytes(data.max_buffered_bytes))
        try:
            self._samplings = RowSamplings(sampling, tokenizer is not None, vocab_size, grammars, eos_token_ids)
            for key in ("template", "system_prompt"):
                check_text(getattr(data, key) or "", f"data.{key}")
        except PromptError as error:
            raise BatchmixError(str(error)) from None
        self._texts = None if tokenizer is None else RowTexts(data, tokenizer)
        self._swap = None if data.swap_columns is None else check_swap(data, sampling)

    def build(
        self,
        rows: Iterable[InputRow],
        *,
        keep: Sequence[str],
        clock: StageClock,
        stopping: Callable[[], bool] = lambda: False,
        buffers: Buffers | None = None,
    ) -> Generator[Prompt | None, None, None]:
        """The rows' prompts, in order but for rows whose grammar has to be compiled first, and None where nothing but
        those is left for now.

        `keep` names the columns that the output keeps. Rows are read and encoded by a thread, ahead of the consumer and
        within `buffers` (None: as the configuration has it); closing the iterator ends it, and once `stopping()` it ends by
        itself. `clock` counts its stages read and tokenise.
        """
        buffers = buffers or self._buffers
        made = self._batches(rows, tuple(keep), clock, buffers.raw, stopping)
        batches = read_ahead(made, _BATCHES_AHEAD, buffers.read_ahead, _size, stopping)
        try:
            for batch in batches:
                if not batch:
                    yield None
                while batch:  # what the consumer has is not held here
                    yield batch.popleft()
        finally:
            batches.close()

    def check_sampling(self, overrides: Mapping[str, Any]) -> None:
        """PromptError or RecursionError where no row can run with these overrides of `sampling`. Compiles its grammar."""
        self._samplings.merged(overrides)

    def show_first(self, rows: Iterable[InputRow]) -> Iterator[InputRow]:
        """The same rows, after two lines in the log: which chat template runs, and the first prompt as the model gets it.
        A warning where none of the first rows can be run.

        BatchmixError, before a model is loaded, where the first rows need a chat template and there is none.
        """
        rows = iter(rows)
        read: list[InputRow] = []
        most_bytes = self._buffers.raw
        first: tuple[int, str] | None = None  # that cannot be run, and why
        for row in islice(rows, _BATCH_ROWS):
            read.append(row)
            most_bytes -= num_bytes(row.columns)  # rows that cannot be run are held too, until one is found that can
            shown, error = self._show(row)
            if error is None:
                name = "none, there is no tokenizer" if self._tokenizer is None else self._tokenizer.chat_format.name
                _log.info("chat template: %s", name)
                _log.info("first prompt, %s", shown)
                return chain(read, rows)
            first = first or (row.row, error)
            if most_bytes <= 0:
                break
        if first is not None:
            warn_of_failed(len(read), *first)
        return chain(read, rows)

    def _show(self, row: InputRow) -> tuple[str, str | None]:
        """The prompt of a row for people, shortened, on one line; and why the row cannot be run, where it cannot."""
        warns = self._texts is not None and self._texts.warns
        if self._texts is not None:
            self._texts.warns = False  # when it is built it will
        try:
            if row.error is None:
                self._content(row)
            [prompt] = self._build([row], ())
        except NoChatFormat as error:
            raise BatchmixError(str(error)) from None
        except (PromptError, RecursionError) as error:
            return "", _reason(error)
        finally:
            if self._texts is not None:
                self._texts.warns = warns
        if prompt.error is not None:
            return "", prompt.error
        ids = list(prompt.token_ids)
        text = repr(ids) if self._tokenizer is None else self._tokenizer.decode([ids], False)[0]
        if len(text) > _SHOWN_CHARS:
            text = f"{text[: _SHOWN_CHARS // 2]} ... {text[-_SHOWN_CHARS // 2 :]}"
        return f"row {row.row}, {len(ids)} tokens: {text!r}", None

    def _batches(
        self,
        rows: Iterable[InputRow],
        keep: tuple[str, ...],
        clock: StageClock,
        max_bytes: int,
        stopping: Callable[[], bool],
    ) -> Generator[deque[Prompt], None, None]:
        """The prompts of so many rows together as have about `max_bytes` or are _BATCH_ROWS."""
        rows = iter(rows)
        with closing(Aside(self._samplings.prepare, _MOST_ASIDE)) as aside:
            more = True
            while not stopping() and (more or aside):
                with clock.stage("read"):
                    batch, more = self._take(rows, aside, max_bytes, stopping)
                batch += aside.take(_PATIENCE if not batch else 0.0)
                with clock.stage("tokenise"):
                    prompts = self._build(batch, keep)
                    if self._swap:
                        prompts = pair_up(prompts, self._build([swapped(row, *self._swap) for row in batch], keep))
                del batch
                for prompt in prompts:
                    prompt.num_bytes = _PROMPT_BYTES + num_bytes(prompt.columns) + num_bytes(prompt.token_ids)
                ready = deque(prompts)
                del prompts
                yield ready

    def _take(
        self, rows: Iterator[InputRow], aside: Aside[InputRow], max_bytes: int, stopping: Callable[[], bool]
    ) -> tuple[list[InputRow], bool]:
        """The next rows that are encoded together, and whether there are more. Those whose grammar has to be compiled first
        are put aside, and hold up no others unless there are very many of them.
        """
        batch: list[InputRow] = []
        size = 0
        while not (len(batch) == _BATCH_ROWS or size >= max_bytes or aside.full or stopping()):
            row = next(rows, None)
            if row is None:
                return batch, False
            if self._samplings.needs_grammar(row):
                aside.put(row)
                continue
            batch.append(row)
            size += num_bytes(row.columns)
        return batch, True

    def _build(self, rows: list[InputRow], keep: tuple[str, ...]) -> list[Prompt]:
        prompts: list[Prompt] = []
        chats: list[tuple[Prompt, list[Message]]] = []
        texts: list[tuple[Prompt, str]] = []
        for row in rows:
            columns = {name: row.columns[name] for name in keep if name in row.columns}
            prompt = Prompt(row.row, row.id, columns, array("i"), self._sampling, row.error, key=row.key)
            prompts.append(prompt)
            if row.error is not None:
                continue
            try:
                prompt.sampling = self._samplings.of(row)
                content = self._content(row)
                if isinstance(content, array):
                    self._set_ids(prompt, content)
                    continue
                self._check_length(content)
            except (PromptError, RecursionError) as error:
                prompt.error = _reason(error)
                continue
            if isinstance(content, str):
                texts.append((prompt, content))
            else:
                chats.append((prompt, content))
        for prompt, ids in self._encode(chats, texts):
            try:
                self._set_ids(prompt, ids)
            except PromptError as error:
                prompt.error = _reason(error)
        return prompts

    def _check_length(self, content: list[Message] | str) -> None:
        """PromptError for a text that is far too long, before it is encoded: that takes seconds for a megabyte."""
        chars = len(content) if isinstance(content, str) else sum(len(message.text) for message in content)
        if chars > self._max_chars:
            raise PromptError(
                f"prompt has {chars} characters; more than {self._max_chars} are not encoded, as they would hardly be the"
                f" {self._max_model_len} tokens of model.max_model_len"
            )

    def _encode(
        self, chats: list[tuple[Prompt, list[Message]]], texts: list[tuple[Prompt, str]]
    ) -> Iterator[tuple[Prompt, TokenIds | PromptError]]:
        tokenizer = self._tokenizer
        if tokenizer is not None and chats:
            yield from zip(
                (prompt for prompt, _ in chats), tokenizer.encode_chats([chat for _, chat in chats]), strict=True
            )
        if tokenizer is not None and texts:
            yield from zip(
                (prompt for prompt, _ in texts), tokenizer.encode_texts([text for _, text in texts]), strict=True
            )

    def _set_ids(self, prompt: Prompt, ids: TokenIds | PromptError) -> None:
        if isinstance(ids, PromptError):
            raise ids
        longest, size = self._max_model_len - 1, self._vocab_size
        if not ids:
            raise PromptError("the chat template gives no tokens for this row")
        if len(ids) > longest:
            raise PromptError(
                f"prompt has {len(ids)} tokens; at most {longest} fit model.max_model_len={self._max_model_len}"
            )
        if self._more_tokens_than_model and max(ids) >= size:
            raise PromptError(f"prompt has token {max(ids)}, which the model's vocabulary of {size} does not have")
        room = self._max_model_len - len(ids)
        needed = self._samplings.tokens_needed(prompt.sampling)
        if room < min(needed, prompt.sampling.max_tokens):
            raise PromptError(
                f"prompt has {len(ids)} tokens, and the shortest text that sampling.structured_outputs allows {needed};"
                f" together they do not fit model.max_model_len={self._max_model_len}"
            )
        prompt.token_ids = ids

    def _content(self, row: InputRow) -> TokenIds | list[Message] | str:
        named = self._columns
        by_template = self._texts is not None and self._texts.template is not None and not named.named
        if named.token_ids is not None and not by_template:
            ids = value_of_column(row.columns, named.token_ids)
            if ids is not None:
                return self._check_ids(ids, named.token_ids)
        if self._texts is None:
            raise PromptError(
                f"the model folder has no tokenizer, so a row needs token ids in its column {named.token_ids!r}"
            )
        return self._texts.of(row)

    def _check_ids(self, ids: object, name: str) -> TokenIds:
        if not isinstance(ids, list | tuple):
            raise PromptError(f"{name} must be a list of token ids, not {type(ids).__name__}")
        if not ids:
            raise PromptError(f"{name} is empty")
        if set(map(type, ids)) != {int}:
            index = next(index for index, token in enumerate(ids) if type(token) is not int)
            raise PromptError(f"{name}[{index}]={ids[index]!r} is not an integer")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            index = next(index for index, token in enumerate(ids) if not 0 <= token < self._vocab_size)
            raise PromptError(f"{name}[{index}]={ids[index]} is outside the model's vocabulary of {self._vocab_size}")
        return array("i", ids)


def _size(prompts: Iterable[Prompt]) -> int:
    return sum(prompt.num_bytes for prompt in prompts)


def _reason(error: Exception) -> str:
    """What is wrong with a row, in one line of Unicode that is not as long as the value it may quote."""
    if isinstance(error, RecursionError):
        return "the row is nested too deeply"
    text = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
    return text if len(text) <= _REASON_CHARS else text[: _REASON_CHARS - 3] + "..."
