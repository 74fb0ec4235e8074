"""From a checkpoint to an engine."""

from __future__ import annotations

import logging

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import answers, prompts, run
from slow_cases import slow_after

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights
from batchmix.dtypes import Quantization
from batchmix.engine import build
from batchmix.engine.config import Backend, EngineConfig
from batchmix.errors import BatchmixError
from batchmix.models import numba_cache, torch_products
from batchmix.models.quantized import Quantized


def engine_of(folder, **config):
    model = ModelConfig() if folder is None else ModelConfig(path=str(folder))
    return build.start_engine(open_checkpoint(model), None, EngineConfig(device="cpu", **config), lambda: False)


def lines(caplog):
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_one_line_says_what_was_started(caplog):
    with caplog.at_level(logging.INFO):
        engine_of(None, max_num_seqs=4)
    ((level, line),) = [found for found in lines(caplog) if "matrix products" not in found[1]]
    assert level == logging.INFO
    assert line.startswith("tiny in ")
    assert line.endswith("4 rows at once")


def test_the_line_says_which_operators_run(caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        engine_of(None, max_num_seqs=4)
        engine_of(None, max_num_seqs=4, backend=Backend.torch)
        monkeypatch.setattr(build, "compute_dtype", lambda *_: torch.float16)
        engine_of(None, max_num_seqs=4)  # for which there are no kernels
    told = [line for _, line in lines(caplog) if line.startswith("tiny in ")]
    assert ["numba kernels" in line for line in told] == [True, False, False]
    assert ["torch operators" in line for line in told] == [False, True, True]


def test_a_start_without_numba_names_what_is_missing(caplog, monkeypatch):
    monkeypatch.setattr(numba_cache, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        engine_of(None, max_num_seqs=4)
    found = [line for _, line in lines(caplog)]
    assert any(line.startswith("torch's operators run, slower than the CPU kernels: numba and llvm") for line in found)
    assert any("torch operators" in line for line in found)


def test_numba_asked_for_is_refused_where_it_has_no_kernels(monkeypatch):
    monkeypatch.setattr(build, "compute_dtype", lambda *_: torch.float16)
    with pytest.raises(
        BatchmixError, match=r"^engine\.backend=numba: has no kernels for float16; use engine\.backend=torch"
    ):
        build.check_engine(open_checkpoint(ModelConfig()), EngineConfig(device="cpu", backend=Backend.numba))


def test_weights_are_prepacked_but_for_quantised_experts_and_a_tied_head():
    engine = engine_of(None, max_num_seqs=4)
    weights = engine.model.weights
    packs = torch_products._packs(weights.embedding.dtype)
    layer = weights.layers[0]
    assert [part.is_mkldnn for part in (layer.wqkv, layer.wo, layer.w13[0], layer.w2[7])] == [packs] * 4
    assert weights.lm_head is weights.embedding or weights.lm_head.is_mkldnn == packs
    assert not weights.embedding.is_mkldnn
    bytes_before = load_weights(
        open_checkpoint(ModelConfig()), weights.embedding.dtype, torch.device("cpu")
    ).num_bytes()
    assert weights.num_bytes() == bytes_before
    model = open_checkpoint(ModelConfig(quantization=Quantization.int8))
    int8 = build.start_engine(model, None, EngineConfig(device="cpu", max_num_seqs=4), lambda: False)
    assert isinstance(int8.model.weights.layers[0].w13, Quantized)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(), tmp_path_factory.mktemp("model"))


one_call = torch_products.one_call


def in_halves_for_some(x, weight):
    """Sums are cut in two for numbers of rows that are no multiple of 48, as AMX has them in another order for some."""
    if len(x) % 48 == 0:
        return one_call(x, weight)
    first, second = (part.contiguous() for part in x.chunk(2, 1))
    left, right = (part.contiguous() for part in weight.to_dense().chunk(2, 1))
    return one_call(first, left) + one_call(second, right)


@pytest.mark.parametrize("dtype", slow_after(1, [torch.bfloat16, torch.float32]))
def test_answers_are_exact_where_the_matrix_library_is_not(caplog, monkeypatch, folder, dtype):
    monkeypatch.setattr(build, "compute_dtype", lambda *_: dtype)
    monkeypatch.setattr(torch_products, "_fixed", set())
    rows = prompts(8, 512, seed=2, longest=40, logprobs=1, max_tokens=6)

    def found(size):
        return answers(run(engine_of(folder, max_num_seqs=size, max_num_batched_tokens=40 * size), rows))

    monkeypatch.setattr(torch_products, "one_call", in_halves_for_some)
    with monkeypatch.context() as unchecked:
        unchecked.setattr(torch_products, "hold_bits", lambda shapes, unpacked: ([], []))
        assert found(8) != found(1), "the fault must show for this to say anything"
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert found(8) == found(3)
    said = "this machine's matrix products with wqkv, wo, router, w13, w2 round a row differently among more rows: they run"
    assert len([line for _, line in lines(caplog) if line.startswith(said)]) == 2
    assert not [line for level, line in lines(caplog) if level >= logging.WARNING]


def test_what_cannot_be_held_is_told_and_refused_where_exactness_is_asked_for(caplog, monkeypatch, folder):
    def by_place(x, weight):
        if len(weight) != 8:  # but the router's
            return one_call(x, weight)
        return torch.cat((one_call(x[:16], weight), one_call(x[16:].flip(1), weight.to_dense().flip(1))))

    monkeypatch.setattr(torch_products, "one_call", by_place)
    monkeypatch.setattr(torch_products, "_fixed", set())
    engine_of(None, max_num_seqs=4)
    (line,) = [line for level, line in lines(caplog) if level == logging.WARNING]
    assert line == (
        "this machine's matrix products with router round a row differently among other rows, also in calls of 64 rows:"
        " answers may depend on the batch size; with model.dtype=float32 or fewer threads (OMP_NUM_THREADS) they may not"
    )
    with pytest.raises(
        BatchmixError, match=r"^engine\.batch_invariant=true: this machine's matrix products with router"
    ):
        engine_of(None, max_num_seqs=4, batch_invariant=True)
