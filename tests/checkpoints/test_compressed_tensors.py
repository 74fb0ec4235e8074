"""compressed-tensors' layouts, both ways, against the library: what it compresses, and what it makes of what we save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import random_mixtral, save_hub
from engines import load, packed_logits
from safetensors.torch import load_file, save_file

from batchmix.checkpoints.checkpoint import open_checkpoint
from batchmix.checkpoints.config import ConvertConfig, ConvertFormat, ModelConfig
from batchmix.checkpoints.convert import convert
from batchmix.config import Config
from batchmix.dtypes import Dtype, Quantization
from batchmix.errors import BatchmixError
from batchmix.models.quantized import Quantized, dense, format_of
from batchmix.models.tensor_parallel import TensorParallel
from batchmix.output.config import OutputConfig

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

pytestmark = pytest.mark.slow  # the library takes seconds to import

SCHEMES: dict[str, tuple[str, dict[str, Any], Quantization | None]] = {
    "fp8 by tensor": ("float-quantized", {"type": "float", "strategy": "tensor"}, Quantization.fp8),
    "fp8 by channel": ("float-quantized", {"type": "float", "strategy": "channel"}, Quantization.fp8),
    "fp8 by block": ("float-quantized", {"type": "float", "strategy": "block", "block_structure": [64, 64]}, None),
    "int8 by channel": ("int-quantized", {"type": "int", "strategy": "channel"}, Quantization.int8),
    "packed int8": ("pack-quantized", {"type": "int", "strategy": "channel"}, Quantization.int8),
    "packed int8 by group": ("pack-quantized", {"type": "int", "strategy": "group", "group_size": 64}, None),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, Quantization.int4),
    "int4 by channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, Quantization.int4),
    "int4 by small groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, None),
    "asymmetric int4": (
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False}, None
    ),
    "asymmetric int8": ("int-quantized", {"type": "int", "strategy": "channel", "symmetric": False}, None),
}  # fmt: skip
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_local_experts": 4, "vocab_size": 64}
STATIC = {"type": "float", "strategy": "tensor", "dynamic": False}
DYNAMIC = {"type": "float", "strategy": "token", "dynamic": True}


def save_compressed(
    folder: Path, form: str, weights: dict[str, Any], activations: dict[str, Any] | None, **shape: int
) -> Path:
    """A random Mixtral whose linear layers the library compresses, beside it `plain`: as the library decompresses it."""
    # Not at the top: the library takes four seconds to import, and these tests are slow ones.
    pytest.importorskip("compressed_tensors")  # of the `dev` extra
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    plain = save_hub(random_mixtral(seed=4, **{**SHAPE, **shape}), folder / "plain")
    state, packed, widened = load_file(plain / "model.safetensors"), {}, {}
    for name, weight in state.items():
        if "_proj" not in name and ".experts." not in name:
            packed[name] = widened[name] = weight
            continue
        parts = compressor.compress({"weight": weight, **qparams(weight, args)}, scheme)
        widened[name] = compressor.decompress(parts, scheme)["weight"].float()
        if activations == STATIC:
            parts["input_scale"] = torch.tensor([0.1])
        packed |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
    config = json.loads((plain / "config.json").read_text())
    save_file(widened, plain / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": form, "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json"),
                                      "input_activations": activations}},
    }  # fmt: skip
    target = folder / "compressed"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def qparams(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """Scales, and zeros where they are not 0, as their observers would find them."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, width = weight.shape
    strategy = str(args.strategy)
    if strategy == "block":
        assert args.block_structure is not None
        high, wide = args.block_structure
        parts = weight.view(rows // high, high, width // wide, wide).transpose(1, 2).flatten(2)
    else:
        parts = {"tensor": weight.reshape(1, 1, -1), "channel": weight[:, None]}.get(strategy)
        parts = weight.unflatten(1, (-1, args.group_size)) if parts is None else parts
    scales, zeros = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    scales = scales.reshape(-1) if strategy == "tensor" else scales
    return {"weight_scale": scales} | ({} if args.symmetric else {"weight_zero_point": zeros})


def test_int4_attention_of_an_odd_width(tmp_path):
    """wo has 4 x 24 columns: no whole group, so its values are taken though experts keep their codes."""
    form, weights, _ = SCHEMES["int4 by channel"]
    folder = save_compressed(tmp_path, form, weights, None, head_dim=24)
    for ours, theirs in zip(load(folder).weights.layers, load(tmp_path / "plain").weights.layers, strict=True):
        assert ours.w13.format is Quantization.int4
        assert torch.allclose(ours.wo, theirs.wo, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_own_weights(tmp_path, name):
    form, weights, kept = SCHEMES[name]
    folder = save_compressed(tmp_path, form, weights, None)
    found, expected = load(folder).weights, load(tmp_path / "plain").weights
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for matrix in ("wqkv", "wo", "w13", "w2"):
            weight = getattr(ours, matrix)
            if matrix in ("w13", "w2"):
                assert (weight.format if isinstance(weight, Quantized) else None) is kept
            values = weight.dequantize(torch.float32) if isinstance(weight, Quantized) else weight
            assert torch.allclose(values, getattr(theirs, matrix), rtol=1e-6, atol=0), matrix
    if kept is not Quantization.fp8:  # which rounds activations too
        row = list(range(3, 40))
        (ours,), (theirs,) = packed_logits(load(folder), [row]), packed_logits(load(tmp_path / "plain"), [row])
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("activations", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_fp8_activations_are_rounded_by_row_whatever_scale_the_checkpoint_has(tmp_path, activations):
    folder = save_compressed(tmp_path, *SCHEMES["fp8 by tensor"][:2], activations)
    model = load(folder)
    row = list(range(3, 40))
    (ours,), (theirs,) = packed_logits(model, [row]), packed_logits(load(tmp_path / "plain"), [row])
    assert 0 < (ours - theirs).norm() <= 0.1 * theirs.norm()
    assert all(layer.w2.format is Quantization.fp8 for layer in model.weights.layers)


def test_slices_of_what_is_quantised(tmp_path):
    form, weights, _ = SCHEMES["int4"]
    folder = save_compressed(tmp_path, form, weights, None)
    checkpoint = open_checkpoint(ModelConfig(path=str(folder), dtype=Dtype.float32))
    with pytest.raises(BatchmixError, match="intermediate_size of 64"):
        TensorParallel(size=2).check(checkpoint.config, checkpoint.quantization)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BatchmixError, match=match):
        open_checkpoint(ModelConfig(path=str(folder)))


def test_what_cannot_be_read_is_named(tmp_path):
    form, weights, _ = SCHEMES["int4"]
    folder = save_compressed(tmp_path, form, weights, None)
    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is not supported"),
    ):  # fmt: skip
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (folder / "config.json").write_text(json.dumps(changed))
        refused(folder, match)
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    for change, match in (({"actorder": "group"}, "actorder 'group'"), ({"num_bits": 3}, "3 bits")):
        weights |= {"num_bits": 4, "actorder": None, **change}
        (folder / "config.json").write_text(json.dumps(config))
        refused(folder, match)


def test_quant_method_fp8(tmp_path):
    """AutoFP8's names are those of compressed-tensors; in DeepSeek-V3's a block's scale is called weight_scale_inv."""
    for name, kept, changes in (
        ("fp8 by tensor", Quantization.fp8, {"activation_scheme": "static"}),
        ("fp8 by block", None, {"weight_block_size": [64, 64]}),
    ):
        here = tmp_path / name
        here.mkdir()
        form, weights, _ = SCHEMES[name]
        folder = save_compressed(here, form, weights, STATIC)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", **changes}
        (folder / "config.json").write_text(json.dumps(config))
        state = load_file(folder / "model.safetensors")
        if kept is None:
            state = {name.replace(".weight_scale", ".weight_scale_inv"): tensor for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for ours, theirs in zip(load(folder).weights.layers, load(here / "plain").weights.layers, strict=True):
            assert format_of(ours.w13) is kept
            assert torch.allclose(dense(ours.w13, torch.float32), theirs.w13, rtol=1e-6, atol=0)
            assert torch.allclose(ours.wqkv, theirs.wqkv, rtol=1e-6, atol=0)


def converted(folder: Path, quantization: Quantization | None = None, name: str = "saved", **options: Any) -> Path:
    target = folder.parent / name
    convert(
        Config(
            model=ModelConfig(path=str(folder), quantization=quantization),
            convert=ConvertConfig(**options),
            output=OutputConfig(dir=str(target)),
        )
    )
    return target


@pytest.mark.parametrize("format", list(Quantization))
def test_what_we_save_the_library_and_transformers_read(tmp_path, format, capsys):
    pytest.importorskip("compressed_tensors")  # of the `dev` extra
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import MixtralForCausalLM

    plain = save_hub(random_mixtral(seed=4, **SHAPE), tmp_path / "plain")
    saved = converted(plain, format)
    table = capsys.readouterr().out
    report = json.loads((saved / "quantization_report.json").read_text())
    assert [row["layer"] for row in report["relative_error"]] == [0, 1]
    at_load, kept = load(plain, quantization=format).weights, load(saved).weights
    for i, (ours, theirs) in enumerate(zip(kept.layers, at_load.layers, strict=True)):
        for matrix in ("w13", "w2"):
            found, expected = getattr(ours, matrix), getattr(theirs, matrix)
            assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
            assert torch.equal(found.scales, expected.scales)
        whole = load(plain).weights.layers[i].w2
        error = float((dense(ours.w2, torch.float32) - whole).norm() / whole.norm())
        assert report["relative_error"][i]["w2"] == pytest.approx(error, rel=1e-5)
        assert f"{error:.5f}" in table

    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    compressor, state = BaseCompressor.get_value_from_registry(parsed.format), load_file(saved / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts.3.w2."
    parts = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    values = compressor.decompress(parts, parsed.config_groups["group_0"])["weight"]
    assert torch.equal(values, kept.layers[1].w2[3].dequantize(torch.float32))

    row = list(range(3, 40))
    with torch.inference_mode():
        theirs = MixtralForCausalLM.from_pretrained(saved, dtype=torch.float32)(torch.tensor([row])).logits[0]
    (ours,) = packed_logits(load(saved), [row])
    # transformers widens the experts and rounds no activations, which fp8 here does.
    assert (ours - theirs).norm() <= (0.1 if format is Quantization.fp8 else 1e-4) * theirs.norm()


def test_quantised_experts_are_written_as_they_are_or_widened(tmp_path):
    form, weights, _ = SCHEMES["int4 by channel"]
    folder = save_compressed(tmp_path, form, weights, None)
    same, wide = converted(folder), converted(folder, name="wide", dtype=Dtype.float32, format=ConvertFormat.mistral)
    assert not (same / "quantization_report.json").exists()
    for ours, theirs in zip(load(same).weights.layers, load(folder).weights.layers, strict=True):
        assert torch.equal(ours.w13.codes, theirs.w13.codes)
        assert torch.equal(ours.w13.scales, theirs.w13.scales)
        assert torch.equal(ours.wqkv, theirs.wqkv)
    for ours, theirs in zip(load(wide).weights.layers, load(folder).weights.layers, strict=True):
        assert torch.equal(ours.w13, dense(theirs.w13, torch.float32))
    with pytest.raises(BatchmixError, match=r"convert\.format=mistral: experts in int4 are written as hf only"):
        converted(folder, name="none", format=ConvertFormat.mistral)
