"""Streamed experts on a device whose copies come as late as they may: the same bits as with all experts at hand."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import ShortOfMemory, answers, load, make_engine, packed_logits, prompts, run
from hypothesis import given, settings
from hypothesis import strategies as st
from links import FakeLink
from slow_cases import slow_after

from batchmix.errors import BatchmixError
from batchmix.models.triton_ops import TritonOperators
from batchmix.offload import transfer_stream as link_module
from batchmix.offload.expert_stream import ExpertStream, Offload, spread
from batchmix.offload.transfer_stream import CudaTransferStream, mapped

LAYERS = 4
SHAPE = {"num_hidden_layers": LAYERS, "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "head_dim": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hub(random_mixtral(**SHAPE), tmp_path_factory.mktemp("model"))


@given(st.integers(1, 100), st.data())
def test_streamed_layers_stand_evenly(layers, data):
    streamed = data.draw(st.integers(1, layers))
    places = spread(streamed, layers)
    assert len(set(places)) == streamed
    assert places[-1] == layers - 1
    gaps = [after - before for before, after in zip((-1, *places), places, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert min(gaps) >= 1


def layers_of(count, link, streamed, buffers):
    """Layers whose experts say whose they are."""
    offload = Offload(link, streamed, buffers)
    layers = []
    for layer in range(count):
        w13, w2 = (offload.experts(layer)(shape, torch.float32).fill_(layer) for shape in ((2, 4, 3), (2, 3, 2)))
        layers.append(SimpleNamespace(w13=w13, w2=w2))
    return layers, ExpertStream(layers, offload)


@settings(deadline=None)
@given(st.integers(1, 9), st.data())
def test_every_layer_gets_its_own_experts(count, data):
    """Whatever the ring's size, and where a step ends early, as it does when memory runs out."""
    streamed = data.draw(st.sets(st.integers(0, count - 1), min_size=1)) if data.draw(st.booleans()) else set(
        spread(data.draw(st.integers(1, count)), count)
    )  # fmt: skip
    link = FakeLink()
    _, stream = layers_of(count, link, tuple(sorted(streamed)), data.draw(st.integers(1, count + 2)))
    for ends_at in data.draw(st.lists(st.integers(0, count), max_size=6)):
        with suppress(torch.OutOfMemoryError):
            for layer in range(count):
                with stream(layer) as (w13, w2):
                    assert torch.equal(w13, torch.full_like(w13, layer))
                    assert torch.equal(w2, torch.full_like(w2, layer))
                    if layer == ends_at:
                        raise torch.OutOfMemoryError
    assert stream.bytes == link.copied


def test_a_copy_that_is_not_waited_for_shows(monkeypatch):
    link = FakeLink()
    _, stream = layers_of(3, link, (0, 1, 2), 2)
    monkeypatch.setattr(link, "wait", lambda handle: None)
    with stream(0) as (w13, _):
        assert w13.isnan().all()


def test_a_buffer_that_is_overwritten_in_use_shows():
    link = FakeLink()
    _, stream = layers_of(3, link, (0, 1, 2), 2)
    with stream(0) as (w13, _):
        stream._fetch(2)
        assert w13.isnan().all()


@settings(max_examples=10, deadline=None)
@given(streamed=st.integers(1, LAYERS), buffers=st.integers(1, LAYERS + 1), seed=st.integers(0, 3))
def test_logits_are_those_of_experts_at_hand(folder, streamed, buffers, seed):
    rows = [list(row.token_ids) for row in prompts(3, 128, seed=seed, longest=20)]
    offload = Offload(FakeLink(), spread(streamed, LAYERS), buffers)
    expected, found = packed_logits(load(folder), rows), packed_logits(load(folder, offload=offload), rows)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("streamed", "buffers", "on_disk"),
    slow_after(1, [(3, 2, True), (4, 2, False), (1, 1, False), (2, 3, False)], unpack=True),
)
def test_answers_are_those_of_experts_at_hand(folder, tmp_path, streamed, buffers, on_disk):
    rows = prompts(9, 128, longest=30, temperature=1.0, max_tokens=6, logprobs=1)
    link = FakeLink(folder=tmp_path, host_room=0 if on_disk else 1 << 40)
    model = load(folder, offload=Offload(link, spread(streamed, LAYERS), buffers))
    experts = sum(layer.w13.nbytes + layer.w2.nbytes for layer in model.weights.layers)
    engine = make_engine(model, max_num_seqs=4)
    assert answers(run(engine, rows)) == answers(run(make_engine(load(folder), max_num_seqs=4), rows))
    assert link.host_bytes == experts * streamed // LAYERS
    assert link.peak == model.weights.num_bytes() - link.host_bytes + experts * min(buffers, streamed) // LAYERS
    assert engine.model.stream.bytes == link.copied
    assert link.copied % link.host_bytes == experts * min(buffers, streamed) // LAYERS % link.host_bytes, "whole passes"
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_out_of_memory_in_the_middle_of_a_step(folder):
    rows = prompts(9, 128, longest=20, temperature=1.0, max_tokens=6)
    model = load(folder, offload=Offload(FakeLink(), spread(3, LAYERS)))
    expected = answers(run(make_engine(load(folder), max_num_seqs=4), rows))
    model.ops = ShortOfMemory("moe", {6, 21})
    engine = make_engine(model, max_num_seqs=4)
    assert answers(run(engine, rows)) == expected
    assert engine.stats.out_of_memory == 2


def test_a_card_that_is_too_small_says_so(folder):
    with pytest.raises(torch.OutOfMemoryError):
        load(folder, offload=Offload(FakeLink(capacity=100_000), spread(1, LAYERS)))


def test_page_locked_memory_is_exactly_as_large_and_given_back(monkeypatch):
    calls = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *arguments: calls.append(("lock", *arguments)) or 0,
        cudaHostUnregister=lambda address: calls.append(("unlock", address)),
    )
    monkeypatch.setattr(link_module, "_cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    tensor = torch.frombuffer(link_module._Locked(12_000), dtype=torch.float32).view(3, 1000)
    tensor[1] = 7.0
    assert tensor.sum() == 7000
    assert calls == [("lock", tensor.data_ptr(), 12_000, 0)]
    address = tensor.data_ptr()
    del tensor
    assert calls[1:] == ["synchronize", ("unlock", address)]
    cudart.cudaHostRegister = lambda *_: 2
    with pytest.raises(BatchmixError, match=r"cannot be page-locked \(CUDA error 2\)"):
        link_module._Locked(12_000)
    assert len(calls) == 3


def test_a_folder_for_weights_that_is_not_there_or_not_named(tmp_path):
    with pytest.raises(BatchmixError, match=r"model\.offload_dir=.*nowhere.*No such file"):
        mapped((2, 3), torch.float32, str(tmp_path / "nowhere"))
    with pytest.raises(BatchmixError, match=r"name a folder on a fast disk in model\.offload_dir"):
        mapped((2, 3), torch.float32, None)


@pytest.mark.gpu
@pytest.mark.parametrize("on_disk", [False, True])
def test_on_a_card(folder, tmp_path, on_disk):
    """The copies of a real link: page-locked memory, a mapped file, and a cache on the host."""
    rows = prompts(30, 128, longest=100, temperature=1.0, max_tokens=16, logprobs=1)
    expected = answers(run(make_engine(load(folder, operators=TritonOperators())), rows))
    link = CudaTransferStream(
        torch.device("cuda", torch.cuda.current_device()), 0 if on_disk else 1 << 30, str(tmp_path)
    )
    model = load(folder, operators=TritonOperators(), offload=Offload(link, spread(3, LAYERS)))
    assert model.weights.layers[-1].w13.is_pinned() != on_disk
    assert answers(run(make_engine(model), rows)) == expected
    assert answers(run(make_engine(model, link), rows)) == expected
