"""Weights as GGUF: gguf, transformers and the importer read back the written model, up to the rounding of scales."""

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from pipeline.importing.import_model import import_model
from pipeline.inference.prefixed_model import assemble_model
from pipeline.interop.gguf_writer import pack_blocks
from pipeline.interop.other_formats import FormatError, compare_formats, write_formats
from pipeline.models.checkpoint import Checkpoint
from pipeline.numerics.quantizer import dequantize_weight
from pipeline.runtime.artifacts import make_header
from tests.conftest import SIZES, make_tokenizer, randomize_, read_json
from tests.inference.test_prefixed_model import make_quantized
from tests.interop.test_number_formats import WIDTHS
from tests.interop.test_other_formats import PLAIN, TEXT

FAMILIES = {"llama": LlamaConfig(**SIZES | WIDTHS), "qwen2": Qwen2Config(**SIZES | WIDTHS | {"head_dim": 16})}
KINDS = {
    "Q4_0": {"weights.group_size": 32},
    "Q8_0 whole rows": {"weights.bits": 8},
    "mixed": {"overrides": [{"sites": ["down_proj"], "bits": 6}, {"sites": ["k_proj"], "bits": 16}]},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        randomize_(AutoModelForCausalLM.from_config(config)).save_pretrained(root / "source" / family)
        make_tokenizer().save_pretrained(root / "source" / family)
        import_model(str(root / "source" / family), None, torch.float32, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_packed_blocks_dequantize_to_the_weights(bits, groups):
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 96), generator=generator, dtype=torch.int8)
    scale = torch.rand(5, groups, generator=generator) + 0.01
    kind = gguf.GGMLQuantizationType.Q4_0 if bits <= 4 else gguf.GGMLQuantizationType.Q8_0
    weights = torch.from_numpy(gguf.quants.dequantize(pack_blocks(integers, scale, bits).numpy(), kind))
    assert torch.equal(weights, dequantize_weight(integers, scale.half().float()))
    with pytest.raises(ValueError, match="beyond float16"):
        pack_blocks(integers, scale * 1e-9, bits)


def write_model(checkpoint, folder):
    """Write formats/gguf/model.gguf below `folder`."""
    write_formats(
        checkpoint,
        None,
        folder / "formats",
        formats=["gguf"],
        drop=[],
        max_shard_size="5GB",
        header=make_header("export", {}),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gguf_reads_back_as_the_quantized_model(wide, tmp_path, family, kind):
    checkpoint, _ = make_quantized(wide, tmp_path, family, PLAIN | KINDS[kind], (), r4="identity")
    write_model(checkpoint, tmp_path)
    assert read_json(tmp_path / "formats" / "manifest.json")["gguf"]["keeps"] == ["weights"]
    path = tmp_path / "formats" / "gguf" / "model.gguf"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_up.weight"] == ("Q8_0" if kind == "Q8_0 whole rows" else "Q4_0")
    if kind == "mixed":
        assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_k.weight"]) == ("Q8_0", "F32")
    import_model(str(path), None, torch.float32, tmp_path / "again")
    again = Checkpoint(tmp_path / "again", "model")
    expected = assemble_model(checkpoint, None)(TEXT).logits
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    for model in (assemble_model(again, None), loaded):
        assert (model(TEXT).logits - expected).abs().max() <= 5e-3 * expected.abs().max()
    assert again.tokenizer("The house")["input_ids"] == checkpoint.tokenizer("The house")["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_llama_cpp_computes_the_quantized_model(wide, tmp_path, family, kind):
    """llama.cpp's products round their input to 8 bits in blocks of 32. Its tokenizer gives the same tokens."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    checkpoint, _ = make_quantized(wide, tmp_path, family, PLAIN | KINDS[kind], (), r4="identity")
    write_model(checkpoint, tmp_path)
    path = tmp_path / "formats" / "gguf" / "model.gguf"
    llama = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, n_threads=1, verbose=False)
    model = assemble_model(checkpoint, None)
    for tokens in TEXT.tolist():
        llama.reset()
        llama.eval(tokens)
        logits = torch.from_numpy(llama.scores[: len(tokens)]).clone()
        expected = model(torch.tensor([tokens])).logits[0]
        assert (logits - expected).abs().max() <= 0.1 * expected.abs().max()  # measured: 0.044
        assert torch.corrcoef(torch.stack((logits.flatten(), expected.flatten())))[0, 1] > 0.999
    token_ids = checkpoint.tokenizer("The house", add_special_tokens=False)["input_ids"]
    assert llama.tokenize(b"The house", add_bos=False) == token_ids


@pytest.mark.parametrize("names", [["default"], ["default", "rag", "tool_use"], ["tool_use"]])
def test_chat_templates_are_read_back_by_name(wide, tmp_path, names):
    checkpoint, _ = make_quantized(wide, tmp_path, "llama", PLAIN | KINDS["Q4_0"], (), r4="identity")
    templates = {name: f"{{{{ messages[0].content }}}} {name}" for name in names}
    checkpoint.tokenizer.chat_template = templates["default"] if names == ["default"] else templates
    write_model(checkpoint, tmp_path)
    import_model(str(tmp_path / "formats/gguf/model.gguf"), None, torch.float32, tmp_path / "again")
    assert Checkpoint(tmp_path / "again", "model").tokenizer.chat_template == checkpoint.tokenizer.chat_template


def test_gguf_refuses_settings_that_it_cannot_hold(wide, tmp_path):
    changes = {"weights.symmetric": False, "activations.bits": 8}
    checkpoint, _ = make_quantized(wide, tmp_path, "llama", PLAIN | changes, (5, 0), r4="hadamard")
    with pytest.raises(FormatError) as error:
        compare_formats(checkpoint, True, ["gguf"], [])
    for reason in (
        "rotation.r4: down_proj expects a rotated input",
        "gguf cannot hold q_proj: Q4_0 and Q8_0 have no zero points. Use symmetric: true.",
        "activations: gguf holds weights only",
        "prefix: gguf has no place for it",
    ):
        assert reason in str(error.value)
    checkpoint, _ = make_quantized(
        wide, tmp_path / "nv", "llama", PLAIN | {"weights.format": "nvfp4"}, (), r4="identity"
    )
    with pytest.raises(FormatError, match="Q4_0 and Q8_0 hold integers, not nvfp4"):
        compare_formats(checkpoint, False, ["gguf"], [])
