"""Floats of 8 and 4 bits give the same values when they are chosen, trained, exported and written for others."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pipeline.hf  # noqa: F401
from pipeline.blocks.quantized import block_settings, find_site_quantizers, load_block
from pipeline.export.folder import export_model
from pipeline.importing.import_model import import_model
from pipeline.inference.loading import load, use_integers_
from pipeline.inference.packed_block import PackedLinear
from pipeline.inference.prefixed_model import assemble_model
from pipeline.inspection.saturation import SaturationProbe
from pipeline.interop.other_formats import FormatError, compare_formats, write_formats
from pipeline.numerics.grids import as_grid
from pipeline.runtime.artifacts import load_tensors, make_header
from pipeline.training.trainables import freeze_, unfreeze_
from tests.conftest import SIZES, make_tokenizer, randomize_, read_json
from tests.inference.test_prefixed_model import make_quantized
from tests.interop.test_other_formats import PLAIN, TEXT

WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}  # blocks of 32 divide


def both(name, bits, **activations):
    changes = {
        f"{group}.{key}": value
        for group in ("weights", "activations")
        for key, value in (("format", name), ("bits", bits))
    }
    return changes | {f"activations.{key}": value for key, value in activations.items()}


KINDS = {
    "float-quantized": both("fp8_e4m3", 8),
    "float-quantized dynamic": both("fp8_e4m3", 8, mode="dynamic", clipping=False),
    "mxfp4-pack-quantized": both("mxfp4", 4, mode="dynamic", clipping=False),
    "nvfp4-pack-quantized": both("nvfp4", 4) | {"weights.rounding": "gptq"},
    "nvfp4-pack-quantized weights": {"weights.format": "nvfp4"},
    "int-quantized": {"weights.bits": 8, "activations.bits": 8, "activations.symmetric": False},
}
CACHE = {"keys.format": "nvfp4", "values.format": "mxfp4", "values.mode": "dynamic"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a model whose widths are multiples of 32."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    randomize_(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | WIDTHS))).save_pretrained(root / "source")
    make_tokenizer().save_pretrained(root / "source")
    import_model(str(root / "source"), None, torch.float32, root / "wide")
    return {"wide": root / "wide"}


def read_back(folder):
    """Load a folder by transformers and compressed-tensors, in float32. FP4 is decompressed to bfloat16 first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with contextlib.suppress(RuntimeError):  # float32 times bfloat16, after the weights are decompressed
        model(TEXT)
    return torch.nn.Module.float(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_compressed_tensors_computes_the_same_logits(wide, tmp_path, kind):
    checkpoint, _ = make_quantized(wide, tmp_path, "wide", PLAIN | KINDS[kind], (), r4="identity")
    contents = write_formats(
        checkpoint,
        None,
        tmp_path / "formats",
        formats=["compressed-tensors"],
        drop=[],
        max_shard_size="5GB",
        header=make_header("export", {}),
    )
    folder = tmp_path / "formats" / "compressed-tensors"
    config = read_json(folder / "config.json")
    described = config["quantization_config"]
    assert described["format"] == described["config_groups"]["group_0"]["format"] == kind.split()[0]
    assert described["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert ("bfloat16" in contents["compressed-tensors"].load) == ("fp4" in kind) == (config["dtype"] == "bfloat16")
    expected = assemble_model(checkpoint, None)(TEXT).logits
    assert (read_back(folder)(TEXT).logits - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 0
    if "fp4" in kind:  # its config asks for bfloat16
        assert AutoModelForCausalLM.from_pretrained(folder)(TEXT).logits.dtype == torch.bfloat16
    if kind == "nvfp4-pack-quantized":  # kernels that fuse q, k and v have one scale
        tensors = read_tensors(folder)
        scales = [tensors[f"model.layers.0.self_attn.{name}_proj.weight_global_scale"] for name in "qkv"]
        assert scales[0] == scales[1] == scales[2]


def read_tensors(folder):
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_tensors(path, "export")[0].items()
    }


@pytest.mark.parametrize("kind", ["float-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"])
def test_loaded_and_trained_blocks_equal_the_evaluated_ones(wide, tmp_path, kind):
    checkpoint, runner = make_quantized(wide, tmp_path, "wide", KINDS[kind] | CACHE)
    prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
    metrics = export_model(
        checkpoint,
        prefix,
        tmp_path / "export",
        original=wide["wide"],
        max_shard_size="5GB",
        header=make_header("export", {}),
        results={},
    )
    model, _ = load(tmp_path / "export")
    use_integers_(model)  # has no effect: the weights are floats
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 14
    assert all(linear.product is None for linear in linears)
    with torch.no_grad():
        expected = assemble_model(checkpoint, prefix["kv"])(TEXT).logits
        assert torch.equal(model(TEXT).logits, expected)
    spec = block_settings(checkpoint, 0).spec("q_proj")
    if "fp4" in kind:  # scales take a byte for each block
        packed = linears[0]
        assert packed.weight_scale.dtype == torch.uint8
        assert packed.weight_scale.shape == (128, 64 // spec.group_size)
    assert metrics["size_mib"] > 0

    block = load_block(checkpoint, 0)
    hidden = checkpoint.embed(TEXT)
    with torch.no_grad(), SaturationProbe(block, checkpoint.architecture) as probe:
        before = runner.run(block, hidden, prefix["kv"][0])
    assert all(0 <= site["share"] < 0.05 and site["sqnr"] > 10 for site in probe.report().values())
    weights = {name: block.get_submodule(name).dense_weight(torch.float32) for name in checkpoint.architecture.linears}
    # Off the grid, so that scales have a gradient, but near enough to round to the same values.
    weights = {name: weight * (1 + 0.01 * torch.rand_like(weight)) for name, weight in weights.items()}
    for start in (None, weights):
        block = load_block(checkpoint, 0)
        trainables = unfreeze_(block, checkpoint.architecture, start)
        trained = runner.run(block, hidden, prefix["kv"][0])
        assert torch.allclose(trained, before, atol=1e-6)
        trained.square().sum().backward()
        parameters = [*trainables.quantizers, *trainables.weights]
        assert [parameter.shape for parameter in parameters if not parameter.grad.any()] == []
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.05 * parameter.grad.sign() * (parameter.abs().mean() if parameter.dim() and start else 1)
            moved = runner.run(block, hidden, prefix["kv"][0])
            freeze_(block)
            assert not torch.equal(moved, before)
            assert torch.allclose(runner.run(block, hidden, prefix["kv"][0]), moved, atol=1e-5)
    quantizers = find_site_quantizers(block, checkpoint.architecture)
    for scale, grid in [
        (block.self_attn.q_proj.weight_scale, block.self_attn.q_proj.spec.grid),
        (quantizers["key"].scale, quantizers["key"].spec.grid),
    ]:
        assert torch.equal(grid.round_scale(scale), scale)  # still a scale the format has
    assert as_grid(spec.grid) is spec.grid


def test_compressed_tensors_refuses_activations_it_cannot_hold(wide, tmp_path):
    for number, (changes, reason) in enumerate(
        [
            (
                both("fp8_e4m3", 8) | {"weights.format": "int"},
                "no layout for fp8_e4m3 with weights in another format",
            ),
            (both("nvfp4", 4, mode="dynamic"), "scale of nvfp4 is static"),
            (both("mxfp4", 4, mode="dynamic"), "ranges of mxfp4 are never clipped"),
            (both("nvfp4", 4, centered=True), "no centered activations"),
        ]
    ):
        checkpoint, _ = make_quantized(wide, tmp_path / str(number), "wide", PLAIN | changes, (), r4="identity")
        with pytest.raises(FormatError, match=reason):
            compare_formats(checkpoint, False, ["compressed-tensors"], [])


def test_manifest_names_a_dropped_prefix(wide, tmp_path):
    checkpoint, _ = make_quantized(
        wide, tmp_path, "wide", PLAIN | {"weights.format": "nvfp4"}, (5, 9, 0), r4="identity"
    )
    prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
    write_formats(
        checkpoint,
        prefix["kv"],
        tmp_path / "formats",
        formats=["compressed-tensors"],
        drop=["prefix"],
        max_shard_size="5GB",
        header=make_header("export", {}),
        prefix_token_ids=prefix["token_ids"].tolist(),
    )
    named = read_json(tmp_path / "formats" / "manifest.json")["compressed-tensors"]["prefix"]
    assert named == {"token_ids": [5, 9, 0], "text": checkpoint.tokenizer.decode([5, 9, 0])}
