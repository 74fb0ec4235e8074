"""What each token contributes to the generated text, in bytes. The text of a row is these bytes joined."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

TokenIds: TypeAlias = "array[int]"  # typecode "i": 4 bytes a token where a list takes 36

MAX_VOCABULARY = 2**21  # ids; the largest vocabularies have a quarter million tokens


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token: `text` without control tokens (b"" for them), `control` their own strings.

    `drops_leading_space`: the tokenizer marks the start of a text with a space that is not part of it (SentencePiece).
    """

    text: list[bytes]
    control: Mapping[int, bytes]
    drops_leading_space: bool
    everything: list[bytes] = field(init=False)  # `text` with control tokens as their strings

    def __post_init__(self) -> None:
        everything = [self.control.get(token, piece) for token, piece in enumerate(self.text)]
        object.__setattr__(self, "everything", everything)

    def pieces(self, skip_special_tokens: bool) -> list[bytes]:
        """The bytes of each token, [vocab_size]."""
        return self.text if skip_special_tokens else self.everything

    def decode(self, batch: Iterable[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        """The text of each list of token ids; bytes that are not UTF-8 become U+FFFD."""
        pieces = self.pieces(skip_special_tokens)
        drop = self.drops_leading_space
        return [strip_start(join(ids, pieces), drop).decode(errors="replace") for ids in batch]


def join(ids: Sequence[int], pieces: Sequence[bytes]) -> bytes:
    """The bytes of `ids`. Ids above the tokenizer's (models pad their vocabulary) contribute nothing."""
    try:
        return b"".join(map(pieces.__getitem__, ids))
    except IndexError:
        return b"".join(pieces[token] for token in ids if token < len(pieces))


def strip_start(data: bytes, drops_leading_space: bool) -> bytes:
    """The bytes of a text's tokens as the bytes of the text itself."""
    return data[1:] if drops_leading_space and data.startswith(b" ") else data
