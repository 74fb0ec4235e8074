"""Where tokens end in their text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.output.detokenize import detokenize
from batchmix.prompts.tokenizer import Tokenizer, load_tokenizer
from batchmix.records import Completion, Prompt
from batchmix.sampling import SamplingConfig


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(open_checkpoint(ModelConfig()).folder)
    assert found is not None
    return found


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from('ab {}":é日\n1'), max_size=20), st.booleans())
def test_token_ends(tokenizer, text, stopped):
    """A token's bytes lie between the end of the token before it and its own, but for the space that marks a text's start."""
    prompt = Prompt(0, "0", {}, [1], SamplingConfig())
    (ids,) = tokenizer.encode_texts([text])
    tokens = [token for token in ids if token != tokenizer.bos_id]
    asked = [0.0] * (len(tokens) + stopped)
    one = Completion(prompt, 0, tokens, "stop", num_tokens=len(asked), guided_logprobs=asked)
    other = Completion(prompt, 1, tokens, "stop", num_tokens=len(asked))
    detokenize([one, other], tokenizer)
    assert one.text == text
    assert other.token_ends is None
    ends, data, pieces = list(one.token_ends or ()), text.encode(), tokenizer.token_bytes()
    assert len(ends) == len(asked)
    if stopped:
        assert ends.pop() == len(data) + 1 or not tokens
    for place, (token, end) in enumerate(zip(tokens, ends, strict=True)):
        piece = pieces[token] if place else pieces[token].removeprefix(b" ")
        assert data[ends[place - 1] if place else 0 : end] == piece
