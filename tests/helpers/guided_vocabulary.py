"""A small vocabulary with pieces that overlap, and the shape of a model for it."""

from __future__ import annotations

from typing import Any

from batchmix.prompts.vocabulary import Vocabulary

WORDS = ["ab", "aa", " a", "  ", "é", "日本", "true", '{"', '": ', '", ', '"}', " 1", "neg", "ative", "12", '"a']
V = 288
# Control tokens, single bytes as SentencePiece has them, words, and tokens without a text.
PIECES = [b"", b"", b"", *(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
PIECES += [b""] * (V - len(PIECES))
VOCABULARY = Vocabulary(PIECES, {}, drops_leading_space=True)
# Small, because the interpreter takes about a millisecond for each program of a kernel.
SHAPE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "head_dim": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


def encode(texts: Any) -> list[list[int]]:
    """As SentencePiece would: a space before the text, single characters."""
    return [[PIECES.index(bytes([byte])) for byte in f" {text}".encode()] for text in texts]
