"""The small model that the tests of guided rows share. Files with another one have fixtures of these names of their own."""

from __future__ import annotations

import pytest
from checkpoints import random_mixtral, save_hub
from engines import load
from guided_vocabulary import PIECES, SHAPE, encode

from batchmix.structured_output.compile import GrammarCompiler


@pytest.fixture(scope="module")
def reference():
    return random_mixtral(**SHAPE)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    return save_hub(reference, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def grammars():
    return GrammarCompiler(PIECES, drops_leading_space=True, eos_token_ids=[2], encode=encode)
