import math
import shutil
from contextlib import ExitStack

import numpy
import pytest
import torch
import transformers
from gguf import GGUFValueType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.gguf import gguf_tokenizer_mapping

from benchmarks.tiny_gguf import write_gguf
from pipeline.importing import gguf_file, gguf_source
from pipeline.importing.gguf_file import GgufFile
from pipeline.importing.gguf_source import open_gguf
from pipeline.importing.import_model import ModelImportError, import_model
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from tests.conftest import SIZES, make_tokenizer, randomize_

WHOLE, REAL, TEXT, LIST = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.ARRAY
WIDE = SIZES | {"hidden_size": 64}  # whole blocks of 32, as quantized storage wants them
GEMMA = WIDE | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
CONFIGS = {
    "llama_tied": LlamaConfig(**WIDE, tie_word_embeddings=True),
    "llama_biases": LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "llama_wide_heads": LlamaConfig(**WIDE, head_dim=32),
    "mistral": MistralConfig(**WIDE, head_dim=32, sliding_window=None),
    "qwen2": Qwen2Config(**WIDE),
    "qwen3": Qwen3Config(**WIDE, head_dim=32, tie_word_embeddings=True),
    "phi3": Phi3Config(**WIDE, sliding_window=20),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
    "gemma3_text": Gemma3TextConfig(**GEMMA),
}


def make(config, seed=0):
    torch.manual_seed(seed)
    return randomize_(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def import_logits(path, folder, token_ids):
    import_model(str(path), None, torch.float32, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return loaded(token_ids).logits


@pytest.mark.parametrize("family", CONFIGS)
def test_tensors_equal_transformers_bit_for_bit(family, tmp_path):
    model = make(CONFIGS[family])
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), quantized=True)
    with ExitStack() as stack:
        source = open_gguf(str(path), path, stack)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=source.config)
        expected = whole.state_dict()
        assert {source.read(name).dtype for name in source.names} == {torch.float32}
        assert source.names == expected.keys() - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        assert [name for name in source.names if not torch.equal(source.read(name), expected[name])] == []


@pytest.mark.parametrize("family", CONFIGS)
def test_import_reads_the_model_that_was_written(family, tmp_path, token_ids):
    """Sizes of heads, biases, soft caps, windows: transformers drops some of them."""
    model = make(CONFIGS[family])
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer())
    with torch.no_grad():
        expected = model(token_ids).logits
    logits = import_logits(path, tmp_path / "out", token_ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()  # measured: 0, and 3e-7 with norms plus one


@pytest.mark.parametrize("family", CONFIGS)
def test_tokenizer_comes_from_the_file_and_not_from_its_folder(family, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS[family]), make_tokenizer())
    AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name).save_pretrained(tmp_path / "expected")
    (tmp_path / "tokenizer_config.json").write_text("something else")
    import_model(str(path), None, torch.float32, tmp_path / "out")
    for file in (tmp_path / "expected").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_transformers_versions_that_misread_tokenizers_are_refused(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer())
    for version in ("5.17.0", "5.18.0.dev0"):
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.raises(
            ModelImportError, match=rf"transformers {version} reads GGUF tokenizers wrong .* 5\.18 or newer"
        ):
            import_model(str(path), None, torch.float32, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(transformers, "__version__", "5.18.0")
    import_model(str(path), None, torch.float32, tmp_path / "out")


def test_unknown_ways_of_splitting_text_are_refused(tmp_path, caplog):
    model = make(CONFIGS["llama_tied"])
    settings = {"tokenizer.ggml.pre": ("deepseek-coder", TEXT)}
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), settings=settings)
    with pytest.raises(ModelImportError, match=r"tokenizer\.ggml\.pre='deepseek-coder' is not known to transformers"):
        import_model(str(path), None, torch.float32, tmp_path / "out")
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), settings={"tokenizer.ggml.pre": None})
    assert import_model(str(path), None, torch.float32, tmp_path / "out")["blocks"] == 3
    assert "tokenizer.ggml.pre=None does not say how text is split" in caplog.text


def test_named_chat_templates_are_kept(tmp_path):
    settings = {
        "tokenizer.chat_template": ("{{ messages }}", TEXT),
        "tokenizer.chat_template.tool_use": ("{{ tools }}", TEXT),
        "tokenizer.chat_templates": (["tool_use"], LIST, TEXT),
    }
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer(), settings=settings)
    import_model(str(path), None, torch.float32, tmp_path / "out")
    templates = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert templates == {"default": "{{ messages }}", "tool_use": "{{ tools }}"}


@pytest.mark.parametrize("name", ["bos", "eos", "padding", "unknown"])
def test_special_ids_beyond_the_vocabulary_are_refused(name, tmp_path):
    settings = {f"tokenizer.ggml.{name}_token_id": (400, WHOLE)}
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer(), settings=settings)
    with pytest.raises(ModelImportError, match=rf"{name}_token_id=400 is beyond the vocabulary of 320 tokens"):
        import_model(str(path), None, torch.float32, tmp_path / "out")


def test_listed_ways_of_splitting_text_agree_with_transformers():
    transformers_splits = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    assert gguf_source._SPLITS - {"gpt2", "gpt-2", "mpt", "olmo", "jais", "trillion", "smollm"} == set(
        transformers_splits
    )


def llama3_divisors(theta, size, factor, original):
    """Compute rope_freqs.weight as llama.cpp's converter does."""
    divisors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return numpy.array(divisors, dtype=numpy.float32)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"rope.scaling.type": ("yarn", TEXT), "rope.scaling.original_context_length": (32, WHOLE)}
SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}


@pytest.mark.parametrize(
    ("family", "rope", "settings", "tensors"),
    [
        ("llama", LLAMA3 | ORIGINAL, {}, {"rope_freqs.weight": llama3_divisors(1e4, 16, 8.0, 32)}),
        ("llama", {"rope_type": "default"}, {}, {"rope_freqs.weight": numpy.ones(8, dtype=numpy.float32)}),
        (
            "llama",
            {"rope_type": "linear", "factor": 4.0},
            {"rope.scaling.type": ("linear", TEXT), "rope.scaling.factor": (4.0, REAL)},
            {},
        ),
        ("qwen2", {"rope_type": "yarn", "factor": 8.0} | ORIGINAL, YARN | {"rope.scaling.factor": (8.0, REAL)}, {}),
        (
            "phi3",
            LONGROPE | ORIGINAL,
            {
                "rope.scaling.original_context_length": (32, WHOLE),
                "rope.scaling.attn_factor": (math.sqrt(1 + math.log(8) / math.log(32)), REAL),
            },
            {"rope_factors_short.weight": numpy.float32(SHORT), "rope_factors_long.weight": numpy.float32(LONG)},
        ),
    ],
)
def test_rope_scaling_is_kept(family, rope, settings, tensors, tmp_path):
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config}[family]
    more = ORIGINAL if family == "phi3" else {}
    model = make(kind(**WIDE | more, rope_parameters={"rope_theta": 10000.0} | rope))
    settings = {f"{family}.{name}": value for name, value in settings.items()}
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), settings=settings, tensors=tensors)
    token_ids = torch.randint(0, 320, (1, 200), generator=torch.Generator().manual_seed(3))
    for ids in (token_ids, token_ids[:, :24]):
        with torch.no_grad():
            expected = model(ids).logits
        logits = import_logits(path, tmp_path / "out", ids)
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()  # measured: 4e-6; without: 0.3 and more


@pytest.mark.parametrize("original", [8192, 131072])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_of_real_llamas_is_recognised(original, factor, tmp_path):
    model = make(LlamaConfig(**WIDE | {"max_position_embeddings": 131072}, rope_parameters={"rope_theta": 5e5}))
    tensors = {"rope_freqs.weight": llama3_divisors(5e5, 16, factor, original)}
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), tensors=tensors)
    import_model(str(path), None, torch.float32, tmp_path / "out")
    rope = Checkpoint(tmp_path / "out", "model").config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("llama3", factor)


@pytest.mark.parametrize("pattern", [(2, WHOLE), ([True, False, True], LIST, GGUFValueType.BOOL)])
def test_pattern_of_sliding_layers_is_kept(pattern, tmp_path):
    model = make(Gemma3TextConfig(**GEMMA, sliding_window_pattern=2))
    settings = {"gemma3.attention.sliding_window_pattern": pattern}
    path = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), settings=settings)
    import_model(str(path), None, torch.float32, tmp_path / "out")
    config = Checkpoint(tmp_path / "out", "model").config
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.sliding_window == 16


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("logit_scale", (0.5, REAL), r"not known to this project: llama\.logit_scale=0\.5\. Take the original"),
        ("embedding_scale", (12.0, REAL), r"llama\.embedding_scale=12\.0"),
        ("attention.scale", (0.5, REAL), r"attention\.scale=0\.5 is not one over the root of the head's size 16"),
        ("final_logit_softcapping", (30.0, REAL), r"llama\.final_logit_softcapping=30\.0"),
        ("expert_count", (8, WHOLE), r"llama\.expert_count=8"),
        (
            "attention.causal",
            (False, GGUFValueType.BOOL),
            r"llama\.attention\.causal=False: attention reads later",
        ),
        ("attention.sliding_window", (64, WHOLE), r"attention\.sliding_window=64 in a llama model is not supported"),
        ("rope.scaling.type", ("yarn", TEXT), r"rope\.scaling\.type='yarn' with factor=None is not supported"),
        ("rope.scaling.attn_factor", (1.2, REAL), r"llama\.rope\.scaling\.attn_factor=1\.2"),
        ("rope.dimension_count", (8, WHOLE), r"rope\.dimension_count=8: RoPE turns only a part of each head \(16\)"),
        ("attention.value_length", (8, WHOLE), r"key_length=16 and attention\.value_length=8 differ"),
        ("feed_forward_length", ([96, 96, 64], LIST, WHOLE), r"feed_forward_length differs from block to block"),
        ("attention.head_count", None, r"the file lacks the settings attention\.head_count"),
        ("something.new", (1, WHOLE), r"llama\.something\.new=1"),
    ],
)
def test_settings_that_nothing_reads_are_refused_by_name(name, value, message, tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer(), settings={f"llama.{name}": value}
    )
    with pytest.raises(ModelImportError, match=message) as error:
        import_model(str(path), None, torch.float32, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_settings_that_change_nothing_are_accepted(tmp_path):
    settings = {
        "llama.logit_scale": (1.0, REAL),
        "llama.attention.scale": (0.25, REAL),
        "llama.expert_count": (0, WHOLE),
        "llama.attention.sliding_window": (4096, WHOLE),
        "llama.rope.scaling.type": ("none", TEXT),
        "llama.rope.scaling.finetuned": (False, GGUFValueType.BOOL),
        "general.name": ("mistral", TEXT),
        "quantize.imatrix.file": ("imatrix.dat", TEXT),
        "someone.version": (3, WHOLE),
    }
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer(), settings=settings)
    assert import_model(str(path), None, torch.float32, tmp_path / "out")["blocks"] == 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        ({"output_norm.weight": None}, r"1 missing \(model\.norm\.weight\)"),
        ({"blk.0.ffn_gate_exps.weight": numpy.zeros((2, 2), numpy.float32)}, r"do not belong to a llama model: blk\.0"),
        ({"blk.0.attn_q.bias": numpy.zeros(64, numpy.float32)}, r"missing \(model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"blk.3.ffn_up.weight": numpy.zeros((96, 64), numpy.float32)}, r"1 unexpected \(model\.layers\.3\.mlp"),
        ({"rope_freqs.weight": numpy.linspace(1, 9, 8, dtype=numpy.float32)}, r"rope_freqs\.weight does not scale"),
        ({"rope_factors_long.weight": numpy.ones(8, numpy.float32)}, r"rope_factors_long\.weight with rope\.scaling"),
        ({"token_embd.weight": numpy.zeros((300, 64), numpy.float32)}, r"has shape \[300, 64\], its config asks"),
        ({"blk.0.ffn_up.weight": numpy.zeros((96, 64), numpy.int32)}, r"blk\.0\.ffn_up\.weight is stored as I32"),
    ],
)  # fmt: skip
def test_tensors_that_lack_or_have_no_place_are_refused_by_name(tensors, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer(), tensors=tensors)
    with pytest.raises(ModelImportError, match=message) as error:
        import_model(str(path), None, torch.float32, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_split_files_are_read_whole_or_refused(tmp_path, token_ids):
    model = make(CONFIGS["llama_tied"])
    first = write_gguf(tmp_path / "model.gguf", model, make_tokenizer(), parts=3)
    assert first.name == "model-00001-of-00003.gguf"
    with torch.no_grad():
        expected = model(token_ids).logits
    second = first.with_name("model-00002-of-00003.gguf")
    for source in (first, second, tmp_path):
        assert torch.equal(import_logits(source, tmp_path / "out", token_ids), expected)
        shutil.rmtree(tmp_path / "out")
    alone = shutil.copyfile(first, tmp_path / "alone.gguf")
    with pytest.raises(ModelImportError, match=r"alone\.gguf is one of 3 parts \(split\.count\)\. Get all of them"):
        import_model(str(alone), None, torch.float32, tmp_path / "out")
    alone.unlink()
    shutil.copyfile(first, second)
    with pytest.raises(ModelImportError, match=r"00002-of-00003\.gguf says that it is part 1\. Get the set again"):
        import_model(str(first), None, torch.float32, tmp_path / "out")
    second.unlink()
    with pytest.raises(
        ModelImportError, match=r"model-00002-of-00003\.gguf of the 3 parts is missing next to model-00001"
    ):
        import_model(str(first), None, torch.float32, tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 0.999])
def test_files_that_are_cut_off_are_refused_in_one_line(share, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer())
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelImportError, match=r"is cut off|does not begin as a GGUF file does") as error:
        import_model(str(path), None, torch.float32, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_unsupported_architectures_are_refused_with_a_list(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["llama_tied"]), make_tokenizer())
    path.write_bytes(path.read_bytes().replace(b"llama", b"gpt2x"))
    with pytest.raises(
        UnsupportedModelError, match=r"architecture 'gpt2x' is not supported\. Supported are: gemma2, gemma3,"
    ):
        import_model(str(path), None, torch.float32, tmp_path / "out")
    assert Olmo2Config.model_type not in ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3")


def test_paths_may_begin_at_home_and_name_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "models"
    folder.mkdir()
    path = write_gguf(folder / "Model.GGUF", make(CONFIGS["llama_tied"]), make_tokenizer())
    for source in ("~/models/Model.GGUF", "~/models", str(folder)):
        assert import_model(source, None, torch.float32, tmp_path / "out")["blocks"] == 3
    with pytest.raises(ModelImportError, match="'~/other': there is no such folder"):
        import_model("~/other", None, torch.float32, tmp_path / "out")
    shutil.copyfile(path, folder / "another.gguf")
    with pytest.raises(ModelImportError, match=r"several GGUF files \(Model\.GGUF, another\.gguf\)\. Name one"):
        import_model(str(folder), None, torch.float32, tmp_path / "out")


def test_dequantizing_in_chunks_gives_the_same_numbers(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", make(CONFIGS["qwen2"]), make_tokenizer(), quantized=True)
    file = GgufFile(path)
    whole = {name: file.read(name) for name in file.tensors}
    monkeypatch.setattr(gguf_file, "_CHUNK", 7 * 64)
    assert all(torch.equal(file.read(name), tensor) for name, tensor in whole.items())
