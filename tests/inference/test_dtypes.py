"""Tensors of quantizers keep their dtype: a loaded or cast export equals its checkpoint exactly."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import pipeline.hf  # noqa: F401
from pipeline.blocks.prefix_kv import load_prefix_kv
from pipeline.blocks.walk import walk
from pipeline.export.folder import export_model
from pipeline.importing.import_model import import_model
from pipeline.inference.loading import load
from pipeline.inference.prefixed_model import assemble_model
from pipeline.runtime.artifacts import load_tensors, make_header
from tests.conftest import make_model
from tests.export.test_folder import RESULTS, TEXT
from tests.inference.test_prefixed_model import QUANTIZERS, make_quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CENTERED = {f"{group}.centered": True for group in ("activations", "keys", "values")}
KINDS = {
    "centered": CENTERED,
    "centered, asymmetric groups": CENTERED | QUANTIZERS["asymmetric groups"],
    "dynamic": QUANTIZERS["dynamic"] | {"activations.centered": True},
}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def exported(request, model_folders, tmp_path_factory):
    """Return family, kind -> the exported folder of a model imported in one dtype, and its checkpoint."""
    root, made = tmp_path_factory.mktemp("dtypes"), {}

    def make(family, kind):
        if (family, kind) not in made:
            folder = root / f"{family} {kind}"
            imported = {family: folder / "model"}
            import_model(str(model_folders[family]), None, request.param, imported[family])
            changes = KINDS[kind]
            checkpoint, runner = make_quantized(imported, folder, family, changes, dtype=request.param)
            assert checkpoint.dtype == request.param
            prefix, _ = load_tensors(checkpoint.folder / "prefix.safetensors", checkpoint.stage)
            export_model(
                checkpoint,
                prefix,
                folder / "export",
                original=imported[family],
                max_shard_size="5GB",
                header=make_header("export", {}),
                results=RESULTS,
            )
            made[family, kind] = folder / "export", checkpoint, runner
        return made[family, kind]

    make.dtype = request.param
    return make


def find_quantizer_tensors(model):
    """Name -> tensor, of everything that was chosen in calibration."""
    endings = ("scale", "zero_point", "clip_factor", "shift", "mean", "weight_common")
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(endings)}


def assemble(checkpoint):
    return assemble_model(checkpoint, load_prefix_kv(checkpoint.folder, checkpoint.stage))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama_untied_biases", "qwen2", "gemma3_text"])
@torch.no_grad()
def test_a_loaded_export_is_the_assembled_checkpoint(exported, family, kind):
    folder, checkpoint, runner = exported(family, kind)
    evaluated = assemble(checkpoint)
    expected = evaluated(TEXT).logits
    assert expected.dtype == exported.dtype
    loaders = [
        lambda: load(folder)[0],
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=exported.dtype),
        lambda: AutoModelForCausalLM.from_pretrained(folder, device_map="cpu"),
        lambda: AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=exported.dtype),
    ]
    for loader in loaders:
        model = loader()
        assert torch.equal(model(TEXT).logits, expected)
        tensors = find_quantizer_tensors(model)
        assert any(name.endswith("key_quantizer.mean") for name in tensors)
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float32, torch.uint8}
        for name, tensor in find_quantizer_tensors(evaluated).items():
            assert torch.equal(tensors[name], tensor), name
    hidden = walk(checkpoint, checkpoint.embed(TEXT), runner, "", load_prefix_kv(checkpoint.folder, checkpoint.stage))
    walked = checkpoint.load_lm_head().logits(checkpoint.load_final_norm()(hidden))
    assert torch.equal(walked, expected)


@pytest.mark.parametrize("cast_to", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_a_cast_export_is_the_cast_checkpoint(exported, cast_to):
    folder, checkpoint, _ = exported("qwen2", "centered")
    model, evaluated = load(folder)[0], assemble(checkpoint)
    before = {name: tensor.clone() for name, tensor in find_quantizer_tensors(model).items()}
    expected = evaluated.to(cast_to)(TEXT).logits
    assert expected.dtype == cast_to
    cast = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "half", torch.float64: "double"}
    for change in (lambda one: one.to(cast_to), lambda one: getattr(one, cast[cast_to])()):
        other = change(copy.deepcopy(model))
        assert torch.equal(other(TEXT).logits, expected)
        for name, tensor in find_quantizer_tensors(other).items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name
    if cast_to != torch.float64:  # loading in a dtype and casting to it are one thing
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, dtype=cast_to)(TEXT).logits, expected)


@torch.no_grad()
def test_a_cast_there_and_back_changes_weights_alone(exported):
    folder, _, _ = exported("llama_untied_biases", "centered")
    model = load(folder)[0]
    expected = model(TEXT).logits
    before = {name: tensor.clone() for name, tensor in find_quantizer_tensors(model).items()}
    model.to(torch.float64).to(exported.dtype)
    assert torch.equal(model(TEXT).logits, expected)
    model.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in find_quantizer_tensors(model).items())


@pytest.mark.parametrize("family", ["llama_tied", "gemma3_text"])
@torch.no_grad()
def test_float16_is_nearer_to_float32_than_bfloat16_until_activations_are_rounded(imported, tmp_path, family):
    """Casting overflows nothing. With 4-bit activations, a tiny random model turns any rounding into other integers."""
    exact = {f"{group}.bits": 16 for group in ("activations", "keys", "values")}
    checkpoint, _ = make_quantized(imported, tmp_path, family, exact)
    expected = assemble(checkpoint)(TEXT).logits
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        logits = assemble(checkpoint).to(dtype)(TEXT).logits.float()
        errors[dtype] = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert errors[torch.float16] < 0.01  # measured: 0.002 to 0.005
    assert errors[torch.float16] < errors[torch.bfloat16] < 0.06  # measured: 0.016 to 0.041


def find_biases(model):
    return [tensor for name, tensor in model.state_dict().items() if name.endswith("e_score_correction_bias")]


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "ernie4_5_moe"])
@torch.no_grad()
def test_correction_biases_of_routers_stay_float32(exported, family):
    folder, checkpoint, _ = exported(family, "dynamic")
    expected = assemble(checkpoint)(TEXT).logits
    model = load(folder)[0]
    source = find_biases(make_model(family))
    assert source
    assert torch.equal(model(TEXT).logits, expected)
    for cast in (lambda: None, model.half, model.float):
        cast()
        biases = find_biases(model)
        assert {bias.dtype for bias in biases} == {torch.float32}
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(biases, source, strict=True))


@pytest.mark.parametrize(("family", "router"), [("ernie4_5_moe", "mlp.gate"), ("hunyuan_v1_moe", "mlp.gate.wg")])
@torch.no_grad()
def test_weights_of_a_float32_router_stay_float32(exported, family, router):
    """transformers keeps them in float32 in these families, whatever the model's dtype."""
    folder, checkpoint, _ = exported(family, "dynamic")
    stored = checkpoint.load_block_tensors(1)[f"{router}.weight"]
    assert (stored.dtype, stored.to(torch.bfloat16).float().equal(stored)) == (torch.float32, False)
    model = load(folder)[0]
    assert torch.equal(model(TEXT).logits, assemble(checkpoint)(TEXT).logits)
    for cast in (lambda: None, model.half, model.float):
        cast()
        weight = model.model.layers[1].get_submodule(router).weight
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored)
