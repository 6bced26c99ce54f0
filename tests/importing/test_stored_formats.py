import functools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from benchmarks.tiny_models import randomize_
from pipeline.importing.import_model import ModelImportError, import_model
from pipeline.importing.stored_formats import (
    dequantize_fp8,
    dequantize_mxfp4,
    find_quantization,
    open_stored,
    read_stored_format,
)
from pipeline.inspection.import_gate import check_import
from pipeline.models.checkpoint import Checkpoint
from tests.conftest import read_json
from tests.importing.test_wrappers import make_wrapper, save_wrapper

FP8 = torch.float8_e4m3fn
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [20, 32]}


def compress(strategy, **scheme):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy} | scheme
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


# Settings, suffix of the scales, and block (-1: all). 48 and 96 are not multiples of 20, nor 48 of 32.
FORMATS = {
    "per tensor": (PER_TENSOR, "weight_scale_inv", (-1, -1)),
    "blocks": (BLOCKS, "weight_scale_inv", (20, 32)),
    "auto fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", (-1, -1)),
    "ct tensor": (compress("tensor"), "weight_scale", (-1, -1)),
    "ct channel": (compress("channel"), "weight_scale", (1, -1)),
    "ct group": (compress("group", group_size=16), "weight_scale", (1, 16)),
    "ct block": (compress("block", block_structure=[20, 32]), "weight_scale", (20, 32)),
    "ct old block": (compress("block", block_structure="20x32"), "weight_scale", (20, 32)),
}


def multiply_slowly(codes, scales, block):
    """Compute the reference: one product per value, in Python."""
    rows, columns = (length if size == -1 else size for size, length in zip(block, codes.shape, strict=True))
    table = scales.reshape(math.ceil(codes.shape[0] / rows), math.ceil(codes.shape[1] / columns)).double().tolist()
    values = codes.double().tolist()
    exact = [[x * table[i // rows][j // columns] for j, x in enumerate(row)] for i, row in enumerate(values)]
    return torch.tensor(exact, dtype=torch.float64).float()


def quantize(weight, block, dtype=torch.float32):
    """Return fp8 codes and a scale for each block, the last ones short."""
    rows, columns = (length if size == -1 else size for size, length in zip(block, weight.shape, strict=True))
    scales = torch.stack(
        [
            torch.stack([part.abs().max() / 448 for part in strip.split(columns, dim=1)])
            for strip in weight.split(rows, dim=0)
        ]
    ).to(dtype)
    spread = scales.float().repeat_interleave(rows, 0)[: len(weight)].repeat_interleave(columns, 1)
    return (weight / spread[:, : weight.shape[1]]).to(FP8), scales


def store(folder, name):
    """Store the linears of a checkpoint in a format, and return the values that they represent."""
    settings, suffix, block = FORMATS[name]
    tensors = load_file(folder / "model.safetensors")
    exact = {}
    for key in [key for key in tensors if "_proj.weight" in key]:
        codes, scales = quantize(tensors[key], block)
        exact[key] = multiply_slowly(codes, scales, block)
        if name == "per tensor":
            scales = scales.reshape(())
            tensors[key.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
        if name in ("ct tensor", "auto fp8"):
            scales = scales.reshape(1)
            tensors[key.removesuffix("weight") + "input_scale"] = torch.tensor([0.5])
        tensors[key] = codes
        tensors[key.removesuffix("weight") + suffix] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json") | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return exact


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_imported_as_its_exact_values(name, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_odd_sizes"], tmp_path / "source")
    if name == "ct group":  # 52 and 78 are not multiples of 16
        shutil.rmtree(folder)
        shutil.copytree(model_folders["qwen3"], folder)
    exact = store(folder, name)
    gate = functools.partial(check_import, limit=1e15)
    metrics = import_model(str(folder), None, torch.float32, tmp_path / "out", check_result=gate)
    checkpoint = Checkpoint(tmp_path / "out", "model")
    for index in range(3):
        for key, tensor in checkpoint.load_block_tensors(index).items():
            if "_proj.weight" in key:
                assert torch.equal(tensor, exact[f"model.layers.{index}.{key}"])
    assert metrics["import_gate"] == "by block"
    assert metrics["max_logit_deviation"] < 1e-5  # measured: 0
    assert metrics["dequantized_tensors"] == len(exact) == 21
    assert metrics["source_quantization"].startswith(
        "fp8" if "ct" not in name else "compressed-tensors float-quantized"
    )
    report = read_json(tmp_path / "out/report.json")
    assert report["quantization"] == {"format": metrics["source_quantization"], "tensors": 21}
    assert ("dropped" in report) == (name in ("per tensor", "auto fp8", "ct tensor"))
    assert "quantization_config" not in read_json(tmp_path / "out/config.json")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_the_import_casts_once(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    exact = store(folder, "blocks")
    import_model(str(folder), None, torch.bfloat16, tmp_path / "out")
    tensors = Checkpoint(tmp_path / "out", "model").load_block_tensors(0)
    assert torch.equal(tensors["mlp.up_proj.weight"], exact["model.layers.0.mlp.up_proj.weight"].bfloat16())


@pytest.mark.parametrize("name", ["mistral3", "mistral3 ministral3"])
def test_a_wrapper_with_weights_in_fp8_is_imported(name, tmp_path, token_ids):
    """Import a model like Devstral: the vision tower in bfloat16, the text model in fp8 with scalar scales."""
    model = make_wrapper(name)
    tensors = save_wrapper(model, tmp_path / "source")
    exact = {}
    for key in [key for key in tensors if "language_model" in key and "_proj.weight" in key]:
        codes, scales = quantize(tensors[key], (-1, -1))
        exact[key] = multiply_slowly(codes, scales, (-1, -1))
        tensors |= {key: codes, f"{key}_scale_inv": scales.reshape(())}
        tensors[key.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    config = read_json(tmp_path / "source/config.json") | {"quantization_config": PER_TENSOR}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    metrics = import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out")
    model.load_state_dict(exact, strict=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids).logits, model(input_ids=token_ids).logits)
    assert metrics["dequantized_tensors"] == len(exact)
    assert read_json(tmp_path / "out/report.json")["dropped"]["scales of activations"] == {"tensors": 21, "bytes": 84}


@pytest.mark.parametrize("shape", [(288, 128), (128, 288), (7, 5), (260, 130), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_do_not_divide_the_shape_equal_the_slow_reference(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    codes, scales = quantize(torch.randn(shape, generator=generator), (128, 128), dtype)
    values = dequantize_fp8("x", "w", codes, scales, (128, 128))
    assert values.dtype == torch.float32
    assert torch.equal(values, multiply_slowly(codes, scales, (128, 128)))


@pytest.mark.parametrize(
    ("shape", "scales", "block", "message"),
    [
        ((6, 4), (2, 2), (4, 4), r"w \[6, 4\] has scales of shape \[2, 2\], its config asks for \[2, 1\]"),
        ((6, 4), (3, 1), (4, 4), r"asks for \[2, 1\] \(blocks of 4 x 4\)"),  # never guessed from the shape
        ((6, 4), (6, 1), (-1, -1), r"asks for \[1, 1\]"),
        ((2, 6, 4), (2, 2), (4, 4), r"shape \[2, 6, 4\]. Only the weights of linears"),
    ],
)
def test_scales_of_another_shape_are_refused(shape, scales, block, message):
    with pytest.raises(ModelImportError, match=message):
        dequantize_fp8("x", "w", torch.ones(shape).to(FP8), torch.ones(scales), block)


def test_scales_that_are_not_numbers_are_refused():
    with pytest.raises(ModelImportError, match="scales of w are NaN or infinite"):
        dequantize_fp8("x", "w", torch.ones(2, 2).to(FP8), torch.tensor([float("nan")]), (-1, -1))


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def unpack_slowly(blocks, scales):
    experts, rows, groups, _ = blocks.shape
    values = torch.zeros(experts, groups * 32, rows, dtype=torch.float64)
    for expert in range(experts):
        for row in range(rows):
            for column in range(groups * 32):
                group, place = divmod(column, 32)
                byte = int(blocks[expert, row, group, place // 2])
                code = byte >> 4 if place % 2 else byte & 15
                value = -E2M1[code - 8] if code >= 8 else E2M1[code]
                values[expert, column, row] = value * 2.0 ** (int(scales[expert, row, group]) - 127)
    return values


def make_mxfp4(seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 5, 2, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(0, 255, (3, 5, 2), dtype=torch.uint8, generator=generator).clamp_max(250)


def test_mxfp4_equals_the_slow_reference_for_all_scales_and_transformers_where_bfloat16_holds_them():
    blocks, scales = make_mxfp4()
    values = dequantize_mxfp4("x", "w", blocks, scales)
    assert torch.equal(values.double(), unpack_slowly(blocks, scales))
    moderate = scales.clamp(100, 150)
    expected = convert_moe_packed_tensors(blocks, moderate, dtype=torch.float32)
    assert torch.equal(dequantize_mxfp4("x", "w", blocks, moderate), expected)


def test_mxfp4_pairs_get_the_name_of_the_weight():
    blocks, scales = make_mxfp4()
    tensors = {
        "a.gate_up_proj_blocks": blocks,
        "a.gate_up_proj_scales": scales,
        "a.gate_up_proj_bias": torch.ones(3, 5),
    }
    stored = read_stored_format("x", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    opened = open_stored("x", stored, set(tensors), tensors.__getitem__, lambda name: "U8")
    assert opened.names == {"a.gate_up_proj", "a.gate_up_proj_bias"}
    assert opened.quantized == {"a.gate_up_proj"}
    assert opened.read("a.gate_up_proj").shape == (3, 64, 5)
    assert opened.read("a.gate_up_proj_bias").shape == (3, 5)
    with pytest.raises(ModelImportError, match=r"a\.gate_up_proj_blocks is stored as mxfp4, but its scales"):
        open_stored("x", stored, {"a.gate_up_proj_blocks"}, tensors.__getitem__, lambda name: "U8")
    with pytest.raises(ModelImportError, match=r"a\.gate_up_proj_scales belongs to no quantized weight"):
        open_stored("x", stored, {"a.gate_up_proj_scales"}, tensors.__getitem__, lambda name: "U8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_experts_in_mxfp4_is_imported_as_its_exact_values(dtype, model_folders, tmp_path):
    """gpt-oss stores its experts like this, and all else in bfloat16. The widths are multiples of 32."""
    sizes = {"hidden_size": 64, "num_experts_per_tok": 2, "num_local_experts": 3}
    folder = shutil.copytree(model_folders["gpt_oss"], tmp_path / "source")
    config = AutoConfig.from_pretrained(folder, **sizes)
    model = randomize_(AutoModelForCausalLM.from_config(config))
    generator, exact = torch.Generator().manual_seed(1), {}
    tensors = dict(model.state_dict())
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, inner, rows = tensors.pop(name).shape
        shape = (experts, rows, inner // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 126, shape, dtype=torch.uint8, generator=generator)
        exact[name] = unpack_slowly(blocks, scales).float()
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    assert len(exact) == 4
    model.load_state_dict(exact, strict=False)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    gate = functools.partial(check_import, limit=1e15)
    metrics = import_model(str(folder), None, dtype, tmp_path / "out", check_result=gate)
    assert metrics["import_gate"] == "by block"
    assert metrics["max_logit_deviation"] < 1e-5  # measured: 0
    assert (metrics["source_quantization"], metrics["dequantized_tensors"]) == ("mxfp4, groups of 32", 4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 320, (2, 40), generator=generator)
    expected = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # its table of RoPE stays float32
    expected.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_damaged_mxfp4_is_refused():
    blocks, scales = make_mxfp4()
    with pytest.raises(ModelImportError, match="not mxfp4: expected uint8, 16 bytes"):
        dequantize_mxfp4("x", "w", blocks[..., :8], scales)
    scales[1, 1, 1] = 255
    with pytest.raises(ModelImportError, match="scales of w are NaN"):
        dequantize_mxfp4("x", "w", blocks, scales)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (
            "mlp.up_proj.weight_scale_inv",
            r"up_proj\.weight is stored as fp8, blocks of 20 x 32, but its scales .*missing",
        ),
        ("mlp.up_proj.weight", r"up_proj\.weight_scale_inv belongs to no quantized weight"),
    ],
)
def test_half_a_pair_is_refused(gone, message, model_folders, tmp_path):
    folder = shutil.copytree(model_folders["llama_tied"], tmp_path / "source")
    store(folder, "blocks")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.{gone}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelImportError, match=message):
        import_model(str(folder), None, torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"already quantized \(quant_method='gptq'\).*Start from the original"),
        ("awq", r"already quantized \(quant_method='awq'\)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"format=\['pack-quantized'\]"),
        (compress("channel") | {"format": "int-quantized"}, r"format=\['int-quantized'\]"),
        (compress("channel", num_bits=4), r"'num_bits': 4"),
        (compress("channel", symmetric=False), r"'symmetric': False"),
        (compress("attn_head"), r"strategy='attn_head'"),
        (compress("block", block_structure="128"), r"block_structure=\[128\] .* is not a block"),
        (BLOCKS | {"weight_block_size": [128]}, r"weight_block_size=\[128\] .* is not a block"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_method='modelopt'"),
        (compress("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compress("channel") | {"transform_config": {"config_groups": {"R1": {}}}}, "its weights are rotated"),
    ],
)
def test_other_formats_are_refused_by_name_with_the_remedy(settings, message):
    with pytest.raises(ModelImportError, match=message):
        read_stored_format("x", settings)


def test_several_schemes_are_refused():
    settings = compress("channel")
    settings["config_groups"]["group_1"] = compress("tensor")["config_groups"]["group_0"]
    with pytest.raises(ModelImportError, match="several schemes"):
        read_stored_format("x", settings)


def test_the_settings_are_found_on_either_level_and_under_the_old_name():
    assert find_quantization({}) is None
    assert find_quantization({"text_config": {"quantization_config": PER_TENSOR}}) == PER_TENSOR
    assert find_quantization({"compression_config": BLOCKS}) == BLOCKS
    assert read_stored_format("x", {"quant_method": "fp8"}).block == (128, 128)  # transformers' default
