"""Checkpoints of families that are rewritten at import compute the same as transformers' class of the source."""

import functools
import json
import shutil

import pytest
import torch
import transformers
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny_models import SIZES, make_model, make_tokenizer, randomize_
from pipeline.export.model_card import describe_source
from pipeline.importing import rewriting
from pipeline.importing.import_model import import_model
from pipeline.importing.rewriting import rewrite_checkpoint
from pipeline.inspection.import_gate import ImportGateError, check_import
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint
from pipeline.rotation.gate import compute_exactly_, find_eps, normalise
from tests.conftest import read_json

REWRITTEN = {
    "granite": "llama",
    "granitemoehybrid": "llama",
    "granitemoe": "mixtral",
    "hyperclovax": "hyperclovax",
    "helium": "llama",
    "ernie4_5": "llama",
    "glm": "llama",
    "glm4": "hyperclovax",
    "phi3_partial": "mistral",
}
VARIANTS = {
    "granite_untied": transformers.GraniteConfig(
        **SIZES, attention_bias=True, embedding_multiplier=3.0, attention_multiplier=0.7, logits_scaling=5.0
    ),
    "hyperclovax_without_post_norms": transformers.HyperCLOVAXConfig(
        **SIZES, use_post_norm=False, residual_multiplier=0.5, logits_scaling=0.3
    ),
    "helium_biases": transformers.HeliumConfig(**SIZES, head_dim=12, attention_bias=True, mlp_bias=True),
    "phi3_default_partial": transformers.Phi3Config(
        **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
}
# transformers computes the RoPE of ernie4_5, and tables of RoPE, in float32; LongRoPE's are made anew.
# The router of granitemoe computes logits in float32.
IN_FLOAT32 = {"ernie4_5": 2e-6, "phi3_partial": 5e-6, "granitemoe": 2e-7}  # measured: 3e-7, 2e-6, 2.4e-8
GATE = functools.partial(check_import, limit=1e15)


def save(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_variant(name):
    torch.manual_seed(0)
    return randomize_(AutoModelForCausalLM.from_config(VARIANTS[name]))


def load_exactly(folder):
    """Load a model that computes in float64, including its norms; tables of RoPE stay in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    for layer in model.model.layers:
        compute_exactly_(layer)
    norm = model.model.norm
    norm.forward = functools.partial(normalise, gain=norm.weight, eps=find_eps(norm))
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", [*REWRITTEN, *VARIANTS])
def test_the_rewritten_model_has_the_logits_of_the_source_in_float64(name, tmp_path, token_ids):
    model = make_model(name) if name in REWRITTEN else make_variant(name)
    source = save(model, tmp_path / "source")
    import_model(str(source), None, torch.float64, tmp_path / "out")
    loaded, original = load_exactly(tmp_path / "out"), load_exactly(source)
    assert loaded.config.model_type == REWRITTEN.get(name, loaded.config.model_type) != original.config.model_type or (
        name == "hyperclovax"
    )
    ids = torch.cat((token_ids,) * 4, dim=1)
    expected = original(ids).logits
    deviation = (loaded(ids).logits - expected).abs().max() / expected.abs().max()
    assert deviation < IN_FLOAT32.get(name, 1e-13)  # measured: at most 8e-15


def test_channels_are_permuted_as_worked_out():
    """RoPE turns (0, 1) and (2, 3) of 6 channels. Llama turns (0, 3), (1, 4) and (2, 5), the last at frequency 0."""
    config = transformers.GlmConfig(**SIZES, head_dim=6, attention_bias=False)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 4 / 6}
    stored = torch.arange(24.0)[:, None].expand(24, 48)
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = rewrite_checkpoint(config, {name}, lambda _: stored)
    assert plain.read(name)[:12, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert plain.config.rope_parameters["rope_type"] == "proportional"
    assert plain.config.rope_parameters["rope_theta"] == pytest.approx(100**1.5)
    tables = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(plain.config)
    assert tables.inv_freq.tolist() == pytest.approx([1.0, 100**-0.5, 0.0])


@pytest.mark.parametrize("width", [12, 20, 22, 46, 96, 98, 100, 128])
def test_as_many_channels_are_turned_as_in_the_source(width):
    config = transformers.GlmConfig(**SIZES, head_dim=width)
    for turned in range(width // 4 * 2, width, 2):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": turned / width}
        if int(width * (turned / width)) != turned:  # the source would turn fewer as well
            continue
        plain = rewrite_checkpoint(config, set(), lambda name: torch.zeros(0)).config
        share = plain.rope_parameters["partial_rotary_factor"]
        assert int(share * width // 2) == turned // 2


def test_multipliers_keep_embedding_and_lm_head_as_stored():
    config = transformers.GraniteConfig(
        **SIZES, embedding_multiplier=12.0, residual_multiplier=0.25, attention_multiplier=1 / 16, logits_scaling=8.0
    )
    names = {
        "model.embed_tokens.weight": torch.ones(4, 48),
        "model.norm.weight": torch.ones(48),
        "model.layers.1.mlp.down_proj.weight": torch.ones(48, 96),
        "model.layers.1.mlp.up_proj.weight": torch.ones(96, 48),
    }
    plain = rewrite_checkpoint(config, set(names), names.__getitem__)
    values = {name.split(".")[-2]: plain.read(name).unique().item() for name in names}
    assert values == {"embed_tokens": 1, "norm": 1 / 8, "down_proj": 0.25 / 12, "up_proj": 1}
    assert plain.config.rms_norm_eps == config.rms_norm_eps / 144
    assert plain.rounds
    assert not rewrite_checkpoint(transformers.HeliumConfig(**SIZES), set(names), names.__getitem__).rounds


def test_the_report_and_the_model_card_name_the_changes(tmp_path):
    import_model(str(save(make_model("granite"), tmp_path / "source")), None, torch.float32, tmp_path / "out")
    report = read_json(tmp_path / "out/report.json")["rewritten"]
    assert report["from"] == "granite"
    assert "embedding_multiplier=12.0, residual_multiplier=0.22" in report["changes"][0]
    card = describe_source(Checkpoint(tmp_path / "out", "model"))
    assert "The source is of the family `granite`, rewritten without change of output: multipliers are folded" in card


def test_a_wrong_factor_is_refused_in_sixteen_bits_although_weights_are_rounded(tmp_path, monkeypatch):
    source = save(make_model("granite"), tmp_path / "source")
    assert import_model(str(source), None, torch.bfloat16, tmp_path / "out", check_result=GATE)
    right = rewriting._fold_multipliers_

    def fold_wrongly_(plan, *args, **options):
        right(plan, *args, **options)
        plan.factors["self_attn.o_proj"] *= 1.003  # bfloat16 rounds by as much

    monkeypatch.setattr(rewriting, "_fold_multipliers_", fold_wrongly_)
    with pytest.raises(ImportGateError, match="not what transformers reads from the source"):
        import_model(str(source), None, torch.bfloat16, tmp_path / "other", check_result=GATE)


def test_the_tokenizer_keeps_its_own_splitting(tmp_path):
    """Granite 4 names GPT2Tokenizer. By its family transformers takes tokenizer.json; by Llama, GPT-2's splitting."""
    source = save(make_model("granite"), tmp_path / "source")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}|\p{L}{1,2}|[^\p{N}\p{L}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save_pretrained(source)
    declared = read_json(source / "tokenizer_config.json") | {"tokenizer_class": "GPT2Tokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(declared))
    import_model(str(source), None, torch.float32, tmp_path / "out")
    text = "the stone bridge of 1234 years"
    expected = AutoTokenizer.from_pretrained(source)(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == expected
    shutil.copyfile(source / "tokenizer_config.json", tmp_path / "out/tokenizer_config.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids != expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            transformers.GraniteMoeHybridConfig(
                **SIZES, layer_types=["linear_attention", *["full_attention"] * 2], mamba_n_heads=2
            ),
            r"state \('linear_attention', 1 of 3 layers, first layer 0\).*; experts \(num_local_experts=8\)",
        ),
        (
            transformers.GraniteMoeHybridConfig(
                **SIZES, layer_types=["full_attention"] * 3, mamba_n_heads=2, num_local_experts=0
            ),
            "position_embedding_type=None is not supported: it has no RoPE",
        ),
        (
            transformers.GlmConfig(
                **SIZES, head_dim=48, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 2 / 24}
            ),
            r"RoPE turns only 4 of 48 channels, and rope_theta\^12 would exceed float32",
        ),
        (transformers.GraniteConfig(**SIZES, logits_scaling=0.0), "with logits_scaling=0.0 is not supported"),
        (
            transformers.GlmConfig(
                **SIZES,
                head_dim=12,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
            ),
            "with rope_type='linear' and partial_rotary_factor=0.5 is not supported",
        ),
    ],
)
def test_settings_that_the_plain_family_lacks_are_refused_by_name(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        rewrite_checkpoint(config, set(), lambda name: torch.zeros(0))
