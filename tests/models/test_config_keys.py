"""Every key of a checkpoint's configuration files: used, checked or without effect, as docs/checkpoints.md has it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_mixtral, save_hub, save_mistral
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers import MixtralConfig as Theirs

from batchmix.checkpoints.checkpoint import Checkpoint, open_checkpoint
from batchmix.checkpoints.config import ModelConfig
from batchmix.checkpoints.loading import load_weights, open_tensors
from batchmix.checkpoints.sources import TensorFiles
from batchmix.errors import BatchmixError
from batchmix.models.config_keys import CONFIG, GENERATION_CONFIG, MOE, PARAMS, ROPE, Keys
from batchmix.models.mixtral_config import MixtralConfig

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
HUGE = 10**9


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    model = random_mixtral(**SMALL)
    root = tmp_path_factory.mktemp("models")
    return {"config.json": save_hub(model, root / "hub"), "params.json": save_mistral(model, root / "mistral")}


@pytest.fixture
def hub(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["config.json"], tmp_path / "hub")


@pytest.fixture
def mistral(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["params.json"], tmp_path / "mistral")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


def find(folder: Path, **model: Any) -> Checkpoint:
    return open_checkpoint(ModelConfig(path=str(folder), **model))


def refusal(folder: Path, **model: Any) -> str:
    with pytest.raises(BatchmixError) as caught:
        find(folder, **model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def known(keys: Keys) -> set[str]:
    return {*keys.used, *keys.only, *keys.without_effect, *keys.settings}


# ---- No key is missing


def test_no_key_of_transformers_is_missing() -> None:
    theirs = {field.name for field in dataclasses.fields(Theirs)} | set(Theirs().to_dict()) | set(Theirs.attribute_map)
    assert theirs - known(CONFIG) == set()
    assert set(vars(GenerationConfig())) - known(GENERATION_CONFIG) == set()


def test_defaults_are_those_of_transformers() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    settings = GENERATION_CONFIG.settings
    assert {key: settings[key] for key in settings if key in defaults} == {
        k: defaults[k] for k in settings if k in defaults
    }
    theirs = Theirs()
    needed = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 8, "num_local_experts": 4, "model_type": "mixtral"}  # fmt: skip
    ours = MixtralConfig.from_hf(needed)
    for key in (
        "num_key_value_heads",
        "num_experts_per_tok",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]  # type: ignore[index]
    assert MixtralConfig.from_hf({**needed, "num_key_value_heads": None}).num_key_value_heads == 8  # as many as heads


@pytest.mark.parametrize("keys", [CONFIG, ROPE, GENERATION_CONFIG, PARAMS, MOE], ids=lambda keys: keys.file)
def test_the_table_in_the_docs_has_every_key(keys: Keys) -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{keys.file.split(': ')[-1]}`")]
    documented: dict[str, set[str]] = {}
    for row in rows:
        _, _, use, names, _ = (cell.strip() for cell in row.split("|"))
        documented[use] = set(re.findall(r"`([A-Za-z0-9_]+)`", names))
    shared = (
        GENERATION_CONFIG if keys is CONFIG else Keys("", frozenset(), {}, frozenset())
    )  # config.json's are said once
    expected = {
        "used": keys.used,
        "checked": set(keys.only),
        "not used, named in the log": set(keys.settings) - set(shared.settings),
        "no effect": keys.without_effect - shared.without_effect,
    }
    assert documented == {use: names for use, names in expected.items() if names}


# ---- Checked keys


@pytest.mark.parametrize("key", sorted(CONFIG.only))
def test_a_value_of_config_json_that_we_do_not_run_is_refused(hub: Path, key: str) -> None:
    change(hub / "config.json", **{key: ["other"] if key in ("architectures", "layer_types") else {"0": {}}})
    assert f"config.json: {key}=" in refusal(hub)
    for value in (None, *CONFIG.only[key]):
        change(hub / "config.json", **{key: value})
        find(hub)


@pytest.mark.parametrize("key", sorted(PARAMS.only))
def test_a_value_of_params_json_that_we_do_not_run_is_refused(mistral: Path, key: str) -> None:
    change(mistral / "params.json", **{key: {"rank": 8}})
    assert f"params.json: {key}=" in refusal(mistral)
    for value in (None, *PARAMS.only[key]):
        change(mistral / "params.json", **{key: value})
        find(mistral)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "default", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": ["default", "yarn"]},
        "linear",
        5,
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_rotary_embeddings_are_refused(hub: Path, key: str, rope: object) -> None:
    change(hub / "config.json", **{key: rope})
    assert "config.json: rope_" in refusal(hub)


def test_rope_theta_is_taken_from_where_transformers_takes_it(hub: Path) -> None:
    for values in (
        {"rope_theta": 5.0},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "rope_theta": 5.0},
        {
            "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"},
            "rope_scaling": {"rope_theta": 9.0, "type": "default"},
        },
        {},
    ):
        config = json.loads((hub / "config.json").read_text())
        config = {key: value for key, value in config.items() if not key.startswith("rope")} | values
        expected = Theirs(**json.loads(json.dumps(config))).rope_parameters["rope_theta"]  # type: ignore[index]
        assert MixtralConfig.from_hf(config).rope_theta == expected, values


def test_sizes_that_do_not_fit_together(hub: Path, mistral: Path) -> None:
    for values, text in (
        ({"head_dim": 15}, "must be even"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"num_experts_per_tok": 3}, "more than the 2 experts"),
        ({"num_experts": 4}, "num_experts=4, but num_local_experts=2"),
    ):
        path = shutil.copytree(hub, hub.parent / str(len(text)))
        change(path / "config.json", **values)
        assert text in refusal(path)
    change(mistral / "params.json", moe={"num_experts": 2, "num_experts_per_tok": 2, "num_shared_experts": 1})
    assert "params.json: moe: num_shared_experts=1 is not supported" in refusal(mistral)


def test_the_other_name_of_the_number_of_experts(hub: Path) -> None:
    config = json.loads((hub / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (hub / "config.json").write_text(json.dumps(config))
    assert find(hub).config.num_local_experts == 2


@pytest.mark.parametrize("file", ["config.json", "params.json"])
def test_a_sliding_window_is_full_attention_for_rows_that_fit_in_it(folders, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(folders[file], tmp_path / "model")
    change(folder / file, sliding_window=128)
    assert f"{file}: sliding_window=128 is not supported for rows that are longer; model.max_model_len=128" in refusal(
        folder
    )
    assert "sliding_window=128" in refusal(folder, max_model_len=129)
    assert find(folder, max_model_len=128).max_model_len == 128
    change(folder / file, sliding_window=4096)
    assert find(folder).max_model_len == 1024
    for value in (0, -1, 1.5, "128", True):
        change(folder / file, sliding_window=value)
        assert f"{file}: sliding_window is" in refusal(folder)


# ---- Where answers end


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (7, None, 2, (7, 2)),
        (7, {}, 9, (7, 9)),
        (7, {"eos_token_id": 3}, 9, (3, 9)),
        (7, {"eos_token_id": [3, 4, 3]}, 4, (3, 4)),
        (7, {"eos_token_id": None}, 9, (9,)),
        ([7, 8], None, None, (7, 8)),
        (7, None, 64, (7,)),
        ([7, 900], None, 7, (7,)),
    ],
)
def test_answers_end_where_they_do_in_vllm(hub: Path, config, generation, tokenizer, expected) -> None:
    change(hub / "config.json", eos_token_id=config)
    (hub / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        change(hub / "generation_config.json", **generation)
    found = find(hub)
    assert found.end_tokens(tokenizer) == expected
    assert any("eos_token_id [900]" in note for note in found.notes) == (config == [7, 900])


@pytest.mark.parametrize("value", ["</s>", 2.0, True, -1, [2, "x"], {"a": 1}, [[2]]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_id_is_refused(hub: Path, file: str, value: object) -> None:
    (hub / "generation_config.json").unlink(missing_ok=True)
    change(hub / file, eos_token_id=value)
    assert f"{file}: eos_token_id is" in refusal(hub)


# ---- Keys without effect


@pytest.mark.parametrize("key", sorted(GENERATION_CONFIG.settings))
def test_a_generation_setting_is_named_and_not_used(hub: Path, key: str) -> None:
    before = find(hub)
    change(hub / "generation_config.json", **{key: GENERATION_CONFIG.settings[key]})
    assert find(hub) == before
    change(hub / "generation_config.json", **{key: 0.37})
    after = find(hub)
    assert dataclasses.replace(after, notes=()) == dataclasses.replace(before, notes=())
    [note] = after.notes
    assert note.startswith(f"generation_config.json: {key}=0.37: not used; only sampling.*")


@pytest.mark.parametrize("key", sorted(CONFIG.without_effect))
def test_a_key_without_effect_changes_nothing(hub: Path, key: str) -> None:
    before = find(hub)
    change(hub / "config.json", **{key: 0.37})
    assert find(hub) == before


def test_keys_that_nobody_reads_are_named(hub: Path, mistral: Path) -> None:
    change(hub / "config.json", attn_logit_softcapping=30.0, temperature=0.7, nothing=None, **{"a\nb": 1})
    assert find(hub).notes == (
        "config.json: temperature=0.7: not used; only sampling.* says how answers are drawn",
        r"config.json: nothing reads attn_logit_softcapping, a\nb; transformers' Mixtral does not either",
    )
    change(mistral / "params.json", softcap=30.0)
    assert "softcap" in find(mistral).notes[0]


# ---- Folders that are no plain checkpoint


def test_an_adapter_is_refused_with_what_it_is(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for folder in (tmp_path / "adapter", hub):  # alone, or in the folder of a model, where transformers applies it
        change(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="some/base")
        message = refusal(folder)
        assert "LoRA adapter of 'some/base'" in message
        assert "merge" in message


def test_an_index_beside_a_whole_file_is_not_read(hub: Path) -> None:
    for index in ({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}, {}):
        (hub / "model.safetensors.index.json").write_text(json.dumps(index))
        found = find(hub)
        assert [path.name for path in found.files] == ["model.safetensors"]
        assert (
            "model.safetensors is read, as in transformers; model.safetensors.index.json beside it is not"
            in found.notes[0]
        )
        load_weights(found, torch.float32, torch.device("cpu"))


def test_tensors_that_are_not_used_are_named(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = hub / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    save_file(load_file(path) | extra, path)
    with caplog.at_level(logging.WARNING):
        load_weights(find(hub), torch.float32, torch.device("cpu"))
    [line] = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert "tensor model.layers.0.self_attn.q_proj.bias is not used" in line


def test_tied_embeddings_with_another_output_layer_are_refused(hub: Path) -> None:
    change(hub / "config.json", tie_word_embeddings=True)
    with pytest.raises(BatchmixError, match=r"lm_head\.weight differs .* tie_word_embeddings=true; set it to false"):
        load_weights(find(hub), torch.float32, torch.device("cpu"))
    state = load_file(hub / "model.safetensors")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, hub / "model.safetensors")
    load_weights(find(hub), torch.float32, torch.device("cpu"))


# ---- Absurd files


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"]  # fmt: skip
ABSURD = [HUGE, 2**63, 10**300, -1, 0, 1.5, "32", True, [], [32], {"a": 1}]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: str(value)[:10])
@pytest.mark.parametrize("key", SIZES)
def test_an_absurd_size_is_one_line(hub: Path, key: str, value: object) -> None:
    change(hub / "config.json", **{key: value})
    tracemalloc.start()
    assert f"config.json: {key} is " in refusal(hub)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: str(value)[:10])
@pytest.mark.parametrize("key", ["dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size"])
def test_an_absurd_size_of_params_json_is_one_line(mistral: Path, key: str, value: object) -> None:
    change(mistral / "params.json", **{key: value})
    assert f"params.json: {key} is " in refusal(mistral)


@pytest.mark.parametrize("value", [0, -1.0, "1e-5", True, [1e-5], 10**400])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_an_absurd_number_is_one_line(hub: Path, key: str, value: object) -> None:
    config = json.loads((hub / "config.json").read_text())
    config.pop("rope_parameters", None)
    (hub / "config.json").write_text(json.dumps(config | {key: value}))
    assert f"config.json: {key} is " in refusal(hub)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", "false"), ("dtype", {"a": 1}), ("dtype", ["float32"]), ("model_type", {"mixtral": 1}),
     ("quantization_config", [1]), ("quantization_config", {"quant_method": ["awq"]}), ("quantization_config", "awq")],
)  # fmt: skip
def test_a_value_of_another_type_is_one_line(hub: Path, key: str, value: object) -> None:
    change(hub / "config.json", **{key: value})
    assert key.removesuffix("_method") in refusal(hub)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "must hold a JSON object, not list"),
        ("null", "must hold a JSON object"),
        ("", "cannot be read as JSON"),
        ('{"vocab_size": NaN}', "NaN is no JSON value"),
        ('{"vocab_size": -Infinity}', "Infinity is no JSON value"),
        ('{"vocab_size": 64, "vocab_size": 128}', "key 'vocab_size' is there twice"),
        ('{"a": {"\\n": 1, "\\n": 2}}', r"key '\n' is there twice"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "params.json", "adapter_config.json"])
def test_a_file_that_is_no_json_object_is_one_line(folders, tmp_path: Path, file: str, content, text: str) -> None:
    folder = shutil.copytree(folders["params.json" if file == "params.json" else "config.json"], tmp_path / "model")
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(folder)
    assert file in message
    assert text in message


def test_a_file_that_is_too_large_is_not_read(hub: Path) -> None:
    with (hub / "config.json").open("r+b") as file:
        file.truncate(10 * 2**30)  # a hole: no disk is used
    assert "config.json: has more than 256 MiB" in refusal(hub)


@pytest.mark.parametrize(
    "file",
    ["model.bin", "..", "a" * 300 + ".safetensors", "a\0.safetensors", "x/y.safetensors", "\ud800.safetensors", ["m"]],
)
def test_an_index_that_names_no_safetensors_file(hub: Path, file: object) -> None:
    (hub / "model.safetensors").unlink()
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a\nb": file}}))
    assert "which is no file name" in refusal(hub)


def write_header(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def entry(shape: object, offsets: object, dtype: object = "F32") -> bytes:
    return json.dumps({"a\nb": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b'{"a":' * 100_000, None),
        (b'{"__metadata__":' + b"[" * 100_000, None),
        (b"{}", 2**62),
        (b"{}", 2**64 - 1),
        (b"[]", None),
        (entry([HUGE, HUGE], [0, 4 * HUGE * HUGE]), None),
        (entry([2**40, 2**40], [0, 8]), None),
        (entry([HUGE], [0, 4 * HUGE]), None),
        (entry([2], [8, 0]), None),
        (entry([-1], [0, 8]), None),
        (entry([2], [0, 10**30]), None),
        (entry([1.5], [0, 8]), None),
        (entry([2], [0]), None),
        (entry([2], None), None),
        (entry([2], [0, 8], "F33"), None),
        (entry([2], [0, 8], 5), None),
        (entry([1] * 10_000, [0, 4]), None),
        (b"\xff" * 100, None),
    ],
    ids=range(18),
)
def test_a_header_that_lies_is_one_line(hub: Path, header: bytes, length: int | None) -> None:
    write_header(hub / "model.safetensors", header, length, bytes(8))
    with pytest.raises(BatchmixError) as caught:
        load_weights(find(hub), torch.float32, torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from([HUGE, 0, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def check_message(folder: Path) -> None:
    """A checkpoint is opened, or refused in one line of no great length."""
    message = ""
    try:
        found = find(folder)
        open_tensors(found, TensorFiles(found.files))
    except BatchmixError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["config.json", "params.json"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), JSON), min_size=1, max_size=3),
)
def test_any_value_of_any_key_is_run_or_refused_in_one_line(folders: dict[str, Path], file: str, changes) -> None:
    keys = sorted(known(CONFIG if file == "config.json" else PARAMS))
    path = folders[file] / file
    whole = path.read_text()
    values = json.loads(whole) | {keys[k % len(keys)]: value for k, value in changes}
    path.write_text(json.dumps(values))
    try:
        check_message(folders[file])
    finally:
        path.write_text(whole)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, 1000),
    key=st.sampled_from(["dtype", "shape", "data_offsets", "other"]),
    value=JSON | st.sampled_from(["F64", "I8", "F8_E4M3"]) | st.lists(st.integers(-1, 2**64), min_size=1, max_size=2),
)
def test_any_value_of_a_header_is_read_or_refused_in_one_line(folders, which: int, key: str, value: object) -> None:
    path = folders["config.json"] / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    header[names[which % len(names)]][key] = value
    write_header(path, json.dumps(header).encode(), data=whole[8 + length :])
    try:
        check_message(folders["config.json"])
    finally:
        path.write_bytes(whole)
