"""Files that are not as they should be: one line that names the file, and where it can be known the tensor."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import random_mixtral, save_fused, save_hub, save_mistral, save_stacked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import batchmix.checkpoints.loading
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.checkpoints.loading import load_weights
from batchmix.checkpoints.sources import TensorFiles, release_pages
from batchmix.errors import BatchmixError
from batchmix.models.weights import Weights

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2.weight"


def load(folder: Path, form: ModelFormat = ModelFormat.auto) -> Weights:
    return load_weights(open_checkpoint(ModelConfig(path=str(folder), format=form)), torch.float32, torch.device("cpu"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch):
    """Loading ends with one line that has all these texts, before any weight is allocated."""

    def allocated(*arguments: object) -> None:
        raise AssertionError("weights were allocated")

    def check(folder: Path, *texts: str, form: ModelFormat = ModelFormat.auto) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(batchmix.checkpoints.loading, "empty_weights", allocated)
            with pytest.raises(BatchmixError) as caught:
                load(folder, form)
        message = str(caught.value)
        assert "\n" not in message
        assert all(text in message for text in texts), message

    return check


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    random_mixtral(**SMALL).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "copy")


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(path)
    for name, tensor in tensors.items():
        del state[name]
        if tensor is not None:
            state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})


def test_a_file_that_is_cut_off_names_the_tensor(copy: Path, refused) -> None:
    path = file_of(copy, EXPERT)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    refused(copy, f"{path}: is cut off: tensor ", f"ends at byte {len(content):,}, the file at {len(content) - 5:,}")
    path.write_bytes(content[:100])
    refused(copy, f"{path}: ")
    path.write_bytes(b"")
    refused(copy, f"{path}: ")


def test_a_file_that_is_missing_is_named_with_a_tensor_of_it(copy: Path, refused) -> None:
    path = file_of(copy, EXPERT)
    path.unlink()
    refused(copy, f"{path.name} is missing (tensor ")


def test_a_tensor_that_is_not_where_the_index_says(copy: Path, refused) -> None:
    path = file_of(copy, EXPERT)
    change(path, **{EXPERT: None})
    refused(copy, f"{path}: has no tensor {EXPERT}", "model.safetensors.index.json")


def test_wrong_shapes_and_types(copy: Path, refused) -> None:
    path = file_of(copy, EXPERT)
    change(path, **{EXPERT: torch.zeros(3, 4)})
    refused(copy, f"{path}: tensor {EXPERT} is [3, 4], not [32, 16]")
    change(path, **{EXPERT: torch.zeros(32, 16, dtype=torch.int8)})
    refused(copy, f"{path}: tensor {EXPERT} is of type I8")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 5}}', "tensor a is in 5, which is no file name"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is no file name"),
    ],
)
def test_a_damaged_index(copy: Path, refused, content: str, text: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    refused(copy, "model.safetensors.index.json: ", text)


def test_fused_and_mistral_files_are_named_by_their_own_tensors(tmp_path: Path, refused) -> None:
    model = random_mixtral(**SMALL)
    path = save_fused(model, tmp_path / "fused") / "model.safetensors"
    change(path, **{"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 16, 32)})
    refused(path.parent, f"{path}: tensor model.layers.0.mlp.experts.gate_up_proj is [2, 16, 32], not [2, 32, 32]")
    path = save_mistral(model, tmp_path / "mistral") / "consolidated.safetensors"
    change(path, **{"layers.0.attention.wk.weight": torch.zeros(16, 32)})
    refused(path.parent, f"{path}: tensor layers.0.attention.wk.weight is [16, 32], not [32, 32]")


def test_pth_files(tmp_path: Path, refused) -> None:
    model = random_mixtral(**SMALL)
    path = save_mistral(model, tmp_path, pth=True) / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "norm.weight": torch.ones(3)}, path)
    refused(tmp_path, f"{path}: tensor norm.weight is [3], not [32]")
    torch.save([1, 2], path)
    refused(tmp_path, f"{path}: holds a list")
    torch.save({**state, "run": shutil.rmtree}, path)
    refused(tmp_path, f"{path}: ")  # weights_only: a function is no tensor
    torch.save(state, path, _use_new_zipfile_serialization=False)
    refused(tmp_path, f"{path}: ")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tmp_path, f"{path}: ")


def test_pth_files_with_parameters_and_odd_strides(tmp_path: Path) -> None:
    folder = save_mistral(random_mixtral(**SMALL), tmp_path, pth=True)
    expected = load(folder)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    odd = {name: t.T.contiguous().T if t.ndim == 2 else torch.nn.Parameter(t) for name, t in state.items()}
    torch.save(odd, folder / "consolidated.00.pth")
    found = load(folder)
    assert not found.norm.requires_grad
    for theirs, ours in zip(expected.layers, found.layers, strict=True):
        for name, weight in vars(theirs).items():
            assert torch.equal(weight, getattr(ours, name)), name


def test_slices_of_a_tensor_parallel_run_are_refused(tmp_path: Path, refused) -> None:
    path = save_mistral(random_mixtral(**SMALL), tmp_path, pth=True) / "consolidated.00.pth"
    shutil.copyfile(path, tmp_path / "consolidated.01.pth")
    refused(tmp_path, "consolidated.01.pth: tensor ", "is in consolidated.00.pth too")


def test_the_release_of_8x7b_in_eight_files(tmp_path: Path, refused) -> None:
    model = random_mixtral(num_local_experts=4)
    expected = load(save_hub(model, tmp_path / "hub"))
    folder = save_stacked(model, tmp_path / "stacked")
    refused(folder, "model.safetensors is missing; model.format=mistral reads the consolidated files")
    found = load(folder, ModelFormat.mistral)
    for theirs, ours in zip(expected.layers, found.layers, strict=True):
        for name, weight in vars(theirs).items():
            assert torch.equal(weight, getattr(ours, name)), name
    (folder / "consolidated.05.pt").unlink()
    refused(folder, "tensor ", "is missing", form=ModelFormat.mistral)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_local_experts", "intermediate_size"])
@pytest.mark.parametrize("value", [None, "many", -1, 2.5, True])
def test_a_config_without_a_size_is_one_line(copy: Path, refused, key: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    refused(copy, "config.json: ", key)


DAMAGE = st.tuples(
    st.sampled_from(["safetensors", "pth", "index", "config"]),
    st.sampled_from(["cut", "flip", "flips", "zeros", "longer"]),
    st.integers(0, 2**32),
)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> dict[str, tuple[Path, Path]]:
    """What -> its folder, the file to damage."""
    pth = save_mistral(random_mixtral(**SMALL), tmp_path_factory.mktemp("pth"), pth=True)
    hub = shutil.copytree(sharded, tmp_path_factory.mktemp("victim") / "hub")
    return {
        "safetensors": (hub, file_of(hub, EXPERT)),
        "index": (hub, hub / "model.safetensors.index.json"),
        "config": (hub, hub / "config.json"),
        "pth": (pth, pth / "consolidated.00.pth"),
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(DAMAGE)
def test_damage_is_one_line_or_none(victims: dict[str, tuple[Path, Path]], damage: tuple[str, str, int]) -> None:
    what, how, seed = damage
    folder, path = victims[what]
    whole = path.read_bytes()
    source = random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little") if what == "safetensors" else len(whole)
    content = bytearray(whole)
    if how == "cut":
        del content[source.randrange(len(content)) :]
    elif how == "longer":
        content += bytes(source.randrange(1, 100))
    elif how == "zeros":
        start = source.randrange(header)
        content[start : start + 50] = bytes(len(content[start : start + 50]))
    else:
        for _ in range(1 if how == "flip" else 20):
            content[source.randrange(header)] ^= 1 << source.randrange(8)
    path.write_bytes(content)
    message = None
    try:
        load(folder)
    except BatchmixError as error:
        message = str(error)
    finally:
        path.write_bytes(whole)
    if message is not None:
        assert "\n" not in message
        assert len(message) < 1000
    else:  # what no header shows: other values in tensors or configuration
        assert how in ("flip", "flips", "zeros") or (what, how) != ("safetensors", "longer")
        assert how != "cut" or what == "config"


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    tensors = {name: torch.randn(300, 1000) for name in "abc"}
    save_file(tensors, tmp_path / "x.safetensors")
    files = TensorFiles([tmp_path / "x.safetensors"])
    for _ in range(2):
        for name, tensor in tensors.items():
            assert torch.equal(files.read(name), tensor)
            files.release(name)
            release_pages(files.read(name)[5:5])
            release_pages(files.read(name).T)
