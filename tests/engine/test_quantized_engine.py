"""Quantised experts and a cache in fp8: both backends give the same, and rows do not depend on their company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral
from engines import answers, load, make_engine, packed_logits, prompts, run
from slow_cases import slow_after

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.checkpoints.loading import load_weights
from batchmix.dtypes import Dtype, Quantization
from batchmix.errors import BatchmixError
from batchmix.models import torch_backend, torch_ops
from batchmix.models.expert_load import ExpertLoad
from batchmix.models.kv_cache import KVCache
from batchmix.models.mixtral import Mixtral
from batchmix.models.quantized import FP8, Quantized, dense, quantize, through_fp8
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.models.triton_ops import TritonOperators

V = 128
# Whole groups of int4; the rest small, because the interpreter takes about a millisecond for each program of a kernel.
SHAPE = {"vocab_size": V, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip
FORMATS = list(Quantization)
SOME = [Quantization.int4, *(pytest.param(format, marks=pytest.mark.slow) for format in (None, *FORMATS[:2]))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(format: Quantization, seed: int = 0) -> tuple[torch.Tensor, Quantized, Quantized]:
    """Router, w13, w2."""
    w13, w2 = random(4, 256, 128, seed=seed) * 0.1, random(4, 128, 128, seed=seed + 1) * 0.1
    return random(4, 128, seed=seed + 2), quantize(w13, format), quantize(w2, format)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_are_their_values(format):
    router, w13, w2 = experts(format)
    x = random(64, 128, seed=5)
    found = torch_ops.moe(x, router, w13, w2, 2)
    expected = torch.zeros_like(x)
    rounded = through_fp8 if format is Quantization.fp8 else lambda x: x
    for t, token in enumerate(x):
        weights, chosen = (router @ token).softmax(-1).topk(2)
        for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            gate, up = (w13[expert].dequantize(x.dtype) @ rounded(token)).chunk(2)
            h = rounded(torch.nn.functional.silu(gate) * up)
            expected[t] += weight * (w2[expert].dequantize(x.dtype) @ h)
    # A value of fp8 on the border between two codes may be rounded to either.
    assert (found - expected).abs().max() <= (1e-2 if format is Quantization.fp8 else 1e-5) * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_a_token_has_the_same_bits_in_any_company(format):
    router, w13, w2 = experts(format)
    x = random(128, 128, seed=6)
    together = torch_ops.moe(x, router, w13, w2, 2)
    for first in (0, 48):
        assert torch.equal(torch_ops.moe(x[first : first + 16], router, w13, w2, 2), together[first : first + 16])


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors on the CPU, for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", slow_after(2, FORMATS))
def test_both_backends_multiply_alike(format, dtype):
    router, w13, w2 = experts(format)
    x, residual = random(16, 128, seed=7).to(dtype), random(16, 128, seed=8).to(dtype)
    found = TritonOperators().moe(x, router, w13, w2, 2, residual, ExpertLoad(1, 4, x.device)[0])
    expected = torch_ops.moe(x, router, w13, w2, 2, residual)
    tolerance = 2e-2 if format is Quantization.fp8 else 2e-5 if dtype is torch.float32 else 5e-3
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.slow  # 6 s under the interpreter
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_both_backends_give_the_same_logits_with_a_cache_in_fp8(folder, format):
    rows = [list(row.token_ids) for row in prompts(3, V, seed=6, longest=12)]
    ours = packed_logits(load(folder, operators=TritonOperators(), quantization=format), rows, kv_dtype=FP8)
    theirs = packed_logits(load(folder, quantization=format), rows, kv_dtype=FP8)
    plain = packed_logits(load(folder), rows)
    for one, other, exact in zip(ours, theirs, plain, strict=True):
        assert (one - other).norm() <= (3e-2 if format is Quantization.fp8 else 1e-2) * other.norm()
        assert 1e-3 * exact.norm() < (other - exact).norm() < 0.5 * exact.norm(), (
            "quantised, but not into another model"
        )


@pytest.mark.slow  # 20 s under the interpreter
@pytest.mark.parametrize("format", [None, *FORMATS])
def test_both_backends_give_the_same_tokens(folder, format):
    rows = prompts(3, V, seed=1, longest=12, max_tokens=5)
    size = {"block_size": 4, "kv_blocks": 100, "max_model_len": 32, "prefill_chunk": 8, "kv_dtype": FP8}
    expected = run(make_engine(load(folder, quantization=format), **size), rows)
    found = run(make_engine(load(folder, operators=TritonOperators(), quantization=format), **size), rows)
    assert {key: list(c.token_ids) for key, c in found.items()} == {
        key: list(c.token_ids) for key, c in expected.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", SOME)
def test_answers_do_not_depend_on_company_or_chunks(folder, format, dtype):
    model = load(folder, dtype, quantization=format)
    rows = prompts(12, V, seed=2, longest=90, temperature=1.0, max_tokens=10, logprobs=1, n=2)
    together = answers(run(make_engine(model, kv_dtype=FP8), rows))
    few = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "kv_blocks": 40, "max_model_len": 128}
    assert answers(run(make_engine(model, kv_dtype=FP8, **few), rows, sort_window=4)) == together
    alone = answers(run(make_engine(model, kv_dtype=FP8), rows[3:4]))
    assert alone == {key: answer for key, answer in together.items() if key in alone}


def test_what_the_cache_cuts_off():
    config = open_checkpoint(ModelConfig()).config
    cache = KVCache(config, 3, 16, FP8, torch.device("cpu"))
    shape = (2, config.num_key_value_heads, config.head_dim)
    values = torch.linspace(-1000, 1000, 2 * shape[1] * shape[2]).view(shape)
    blocks, offsets = torch.tensor([1, 2]), torch.tensor([0, 5])
    cache.write(0, blocks, offsets, values, -values)
    for token in range(2):
        block = cache.read(cache.keys[0], blocks[token : token + 1], torch.float32)[0, :, offsets[token]]
        assert torch.equal(block, values[token].clamp(-448, 448).to(FP8).float())
        assert torch.equal(block, cache.as_stored(values)[token])
    layers = config.num_hidden_layers
    assert cache.keys.nbytes == 3 * layers * shape[1] * shape[2] * 16, "one byte each"
    assert KVCache.block_bytes(config, 16, FP8) * 2 == KVCache.block_bytes(config, 16, torch.bfloat16)


def load_random(quantization: Quantization | None = None, dtype: torch.dtype = torch.float32):
    name = Dtype[str(dtype).removeprefix("torch.")]
    checkpoint = open_checkpoint(ModelConfig(format=ModelFormat.random, dtype=name, quantization=quantization))
    return Mixtral(checkpoint.config, load_weights(checkpoint, dtype, torch.device("cpu")), torch_backend, 512)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("save", [save_hub, save_fused, save_mistral])
def test_experts_are_quantised_as_they_load(tmp_path, save, format):
    """Rounded to the run dtype first, whatever dtype they are kept in; all else stays as it is."""
    saved = save(random_mixtral(seed=3, **SHAPE), tmp_path / "model")
    whole = load(saved, torch.bfloat16).weights
    checkpoint = open_checkpoint(ModelConfig(path=str(saved), dtype=Dtype.bfloat16, quantization=format))
    found = load_weights(checkpoint, torch.float32, torch.device("cpu"))
    for theirs, ours in zip(whole.layers, found.layers, strict=True):
        for name in ("w13", "w2"):
            codes, expected = getattr(ours, name), quantize(getattr(theirs, name), format)
            assert torch.equal(codes.codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(codes.scales, expected.scales)
        assert torch.equal(ours.wqkv, theirs.wqkv.float())
        assert torch.equal(ours.router, theirs.router)
    ratio = found.layers[0].w13.nbytes / whole.layers[0].w13.nbytes
    assert ratio == {"fp8": 132 / 256, "int8": 132 / 256, "int4": 68 / 256}[format.value]
    assert found.num_bytes() < load(saved).weights.num_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_slices_have_the_codes_of_the_whole(tmp_path, format):
    model = save_hub(random_mixtral(**{**SHAPE, "num_key_value_heads": 2, "intermediate_size": 256}), tmp_path)
    checkpoint = open_checkpoint(ModelConfig(path=str(model), quantization=format))
    whole, *slices = (
        load_weights(checkpoint, torch.float32, torch.device("cpu"), TensorParallel(rank, size))
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    for i, layer in enumerate(whole.layers):
        halves = [shard.layers[i] for shard in slices]
        w13 = [dense(half.w13, torch.float32).chunk(2, 1) for half in halves]
        gate, up = (torch.cat([part[k] for part in w13], 1) for k in range(2))
        assert torch.equal(torch.cat((gate, up), 1), dense(layer.w13, torch.float32))
        assert torch.equal(torch.cat([dense(h.w2, torch.float32) for h in halves], 2), dense(layer.w2, torch.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_random_weights_are_quantised_too(format):
    weights = load_random(format).weights
    assert all(layer.w13.format is layer.w2.format is format for layer in weights.layers)
    assert dense(weights.layers[1].w2, torch.float32).std() == pytest.approx(0.02, rel=0.1)


def test_shapes_that_int4_cannot_take_are_refused(tmp_path):
    odd = save_hub(random_mixtral(), tmp_path / "odd")
    with pytest.raises(BatchmixError, match=r"groups of 128, and the experts' hidden_size of 64 .*int8 or fp8"):
        open_checkpoint(ModelConfig(path=str(odd), quantization=Quantization.int4))
    tiny = open_checkpoint(ModelConfig(quantization=Quantization.int4))
    with pytest.raises(BatchmixError, match=r"tensor_parallel_size=2: int4 .* intermediate_size of 64"):
        TensorParallel(size=2).check(tiny.config, tiny.quantization)
    TensorParallel(size=2).check(tiny.config, Quantization.int8)
