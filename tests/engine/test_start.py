"""From a checkpoint to an engine."""

from __future__ import annotations

import logging

from batchmix.config import EngineConfig, ModelConfig
from batchmix.engine.start import start_engine
from batchmix.model import torch_ops
from batchmix.model.checkpoint import open_checkpoint


def start(caplog):
    with caplog.at_level(logging.INFO):
        start_engine(open_checkpoint(ModelConfig()), None, EngineConfig(max_num_seqs=4), lambda: False)
    return caplog.records


def test_one_line_says_what_was_started(caplog):
    (record,) = start(caplog)
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith("tiny in ")
    assert record.getMessage().endswith("4 rows at once")


def test_a_matrix_library_that_breaks_exactness_is_told(caplog, monkeypatch):
    monkeypatch.setattr(torch_ops, "products_keep_their_bits", lambda weight, max_rows: weight.shape[0] != 8)
    message = start(caplog)[0].getMessage()
    assert message.startswith("this machine's matrix products with router round a row differently in other company")
