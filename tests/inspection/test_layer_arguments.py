"""Families that an entry alone would admit wrongly are refused by a gate. None of them is refused by its name here."""

import copy
import functools

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import SIZES, WINDOW, make_tokenizer, randomize_
from pipeline.importing import rewriting
from pipeline.importing.import_model import import_model
from pipeline.inspection import layer_arguments
from pipeline.inspection.import_gate import check_import
from pipeline.inspection.layer_arguments import cut_windows, record_model_calls
from pipeline.models.architectures import ARCHITECTURES, IMPORTED_AS, Architecture, UnsupportedModelError
from tests.conftest import FAMILIES, NEAR_FAMILIES

LLAMA, OLMO2 = Architecture(), ARCHITECTURES["olmo2"]
HEADS = SIZES | {"head_dim": 12}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
EXAONE4 = {"sliding_window": WINDOW, "sliding_window_pattern": 2, "layer_types": KINDS}
CASES = {
    "ernie4_5": (LLAMA, transformers.Ernie4_5Config(**HEADS), r"RoPE turns channels \[0, 1\] of a head together"),
    "ernie4_5_moe": (
        Architecture(shared_expert="mlp.shared_experts", experts="mlp.experts", routers=("mlp.gate",)),
        NEAR_FAMILIES["ernie4_5_moe"],
        r"RoPE turns channels \[0, 1\] of a head together",
    ),
    "helium": (LLAMA, transformers.HeliumConfig(**HEADS), r"RoPE turns channels \[0, 1\] of a head together"),
    "hunyuan_v1_dense": (LLAMA, transformers.HunYuanDenseV1Config(**HEADS), "acts on the keys after RoPE"),
    "exaone4": (OLMO2, transformers.Exaone4Config(**SIZES, **EXAONE4), "block 0: .*heads_first=False"),
    "exaone4 without NoPE": (
        Architecture(attention_norm=None, mlp_norm=None, post_norms=OLMO2.post_norms, heads_first=True),
        transformers.Exaone4Config(**SIZES, **EXAONE4),
        "block 1: .* 12 of 12 channels not at all",
    ),
    "arcee": (LLAMA, transformers.ArceeConfig(**HEADS), "layer 0 has no mlp.gate_proj, which its entry"),
    "jais2": (
        Architecture(mlp_readers=("mlp.up_proj",)),
        transformers.Jais2Config(**SIZES),
        r"the final norm \(LayerNorm\) has the tensors \['bias', 'weight'\]",
    ),
    "beam": (LLAMA, transformers.BeamConfig(**SIZES), "its layers cannot be called as Llama's are .*layer_type"),
    "granite": (LLAMA, transformers.GraniteConfig(**SIZES, embedding_multiplier=2.0), "gets other hidden states"),
}


@pytest.mark.parametrize("limit", [1e15, 0])
@pytest.mark.parametrize("case", CASES)
def test_an_entry_without_support_is_refused_by_a_gate(case, limit, tmp_path, monkeypatch):
    architecture, config, message = CASES[case]
    monkeypatch.setitem(ARCHITECTURES, config.model_type, architecture)
    monkeypatch.delitem(IMPORTED_AS, config.model_type, raising=False)
    monkeypatch.delitem(rewriting._PLANNERS, config.model_type, raising=False)
    torch.manual_seed(0)
    randomize_(AutoModelForCausalLM.from_config(copy.deepcopy(config))).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    gate = functools.partial(check_import, limit=limit)
    with pytest.raises(UnsupportedModelError, match=message):
        import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out", check_result=gate)
    assert not (tmp_path / "out").exists()


def test_a_wrong_window_is_refused_whatever_its_length(model_folders, tmp_path, monkeypatch):
    """64 tokens do not reach this window; the masks are compared past it all the same."""
    config = copy.deepcopy(FAMILIES["qwen2"])
    config.sliding_window, config.max_position_embeddings = 4096, 8192
    torch.manual_seed(0)
    randomize_(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    gate = functools.partial(check_import, limit=1e15)
    import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "out", check_result=gate)
    monkeypatch.setattr("pipeline.blocks.walk.find_sliding_window", lambda config, block: None)
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has another attention mask: .* reads 40 positions in"):
        import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "other", check_result=gate)


def test_windows_are_cut_and_calls_recorded_for_each_layer():
    config = copy.deepcopy(FAMILIES["gemma3_text"])
    config.sliding_window = 512
    cut = cut_windows(config)
    assert (cut.sliding_window, config.sliding_window) == (40, 512)
    calls = record_model_calls(cut, 72)
    read = [int(layer_arguments._visible(call.get("attention_mask"), 72)[-1].sum()) for call in calls]
    assert read == [40 if kind == "sliding_attention" else 72 for kind in cut.layer_types]
    assert all(call["position_ids"].tolist() == [list(range(72))] for call in calls)
