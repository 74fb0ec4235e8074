"""Hub ids: a cache as huggingface_hub leaves it, and no network."""

from __future__ import annotations

import functools
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
from checkpoints import random_mixtral, save_hub, save_mistral
from huggingface_hub import HfApi

from batchmix.checkpoints import checkpoint
from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ModelConfig, ModelFormat
from batchmix.errors import BatchmixError

ID = "someone/Mixtral-mini"
ask = HfApi.model_info
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`main` is at NEW, which has transformers' and Mistral's files; the tag `v0` at OLD, which has other layers."""
    repository = tmp_path / "hub" / "models--someone--Mixtral-mini"
    new = repository / "snapshots" / NEW
    save_hub(random_mixtral(), new)
    save_mistral(random_mixtral(), new)
    save_hub(random_mixtral(num_hidden_layers=1), repository / "snapshots" / OLD)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    (repository / "refs" / "v0").write_text(OLD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    return repository


def test_a_hub_id_is_read_from_the_cache(cache: Path) -> None:
    found = open_checkpoint(ModelConfig(path=ID))
    assert found.folder == cache / "snapshots" / NEW
    assert (found.format, found.config.num_hidden_layers) == (ModelFormat.hf, 2)
    assert [path.name for path in found.files] == ["model.safetensors"]
    found = open_checkpoint(ModelConfig(path=ID, format=ModelFormat.mistral))
    assert [path.name for path in found.files] == ["consolidated.safetensors"]


@pytest.mark.parametrize("revision", ["v0", OLD])
def test_a_revision_is_a_branch_a_tag_or_a_commit(cache: Path, revision: str) -> None:
    found = open_checkpoint(ModelConfig(path=ID, revision=revision))
    assert (found.folder, found.config.num_hidden_layers) == (cache / "snapshots" / OLD, 1)


def test_what_the_cache_lacks_is_one_line(cache: Path) -> None:
    def refused(match: str, **model: object) -> None:
        with pytest.raises(BatchmixError, match=match) as caught:
            open_checkpoint(ModelConfig(**{"path": ID, **model}))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused(r"model\.path=someone/Other: neither a folder here nor to be had from the hub", path="someone/Other")
    refused(r"nor to be had from the hub at model\.revision=v9", revision="v9")
    refused(r"model\.path=a b/c: neither a folder here nor", path="a b/c")
    (cache / "snapshots" / NEW / "model.safetensors").unlink()
    refused(r"model\.safetensors is missing; model\.format=mistral reads")
    shutil.rmtree(cache / "snapshots" / NEW)
    refused("neither a folder here nor")
    assert open_checkpoint(ModelConfig(path=ID, revision="v0"), weights=False).files == ()


@pytest.mark.parametrize("cached", [True, False])
def test_a_hub_that_does_not_answer_is_not_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cached: bool
) -> None:
    """As behind a firewall that drops packets: connections open, and no answer comes."""
    monkeypatch.setattr(checkpoint, "_HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            HfApi, "model_info", functools.partial(asked_at, f"http://127.0.0.1:{silent.getsockname()[1]}")
        )
        if cached:
            assert open_checkpoint(ModelConfig(path=ID)).folder == cache / "snapshots" / NEW
            assert "the hub was not asked (timed out); the copy in the local cache is used" in caplog.text
        else:
            with pytest.raises(
                BatchmixError, match=r"nor to be had from the hub \(timed out\); where there is no network"
            ):
                open_checkpoint(ModelConfig(path="someone/Other"))


def asked_at(endpoint: str, path: str, *, revision: str | None, timeout: float) -> object:
    return ask(HfApi(endpoint), path, revision=revision, timeout=timeout)


@pytest.mark.parametrize(
    ("form", "weights", "expected"),
    [
        ("auto", True, ["model-00001.safetensors", "model-00002.safetensors", "model.safetensors"]),
        ("mistral", True, ["consolidated*"]),
        ("auto", False, None),
    ],
)
def test_only_the_files_of_one_layout_are_downloaded(tmp_path, monkeypatch, form, weights, expected) -> None:
    """transformers' and Mistral's files lie side by side on the hub, 93 GB each."""
    folder = save_mistral(save_hub_in_two(tmp_path), tmp_path)
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str], **options: bool) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_checkpoint(ModelConfig(path=ID, format=ModelFormat[form]), weights=weights)
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert asked[1:] == ([sorted(expected)] if expected else [])


def save_hub_in_two(folder: Path):
    model = random_mixtral()
    save_hub(model, folder)
    for number in (1, 2):
        shutil.copyfile(folder / "model.safetensors", folder / f"model-0000{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00002.safetensors", "b": "model-00001.safetensors", "c": "model-00001.safetensors"}}'
    )
    return model
