import copy
import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.tiny_models import MOE_FAMILIES, NEAR_FAMILIES, make_tokenizer, randomize_
from pipeline.importing.expert_tensors import turn_experts
from pipeline.importing.import_model import import_model
from pipeline.importing.source import ModelImportError
from pipeline.inspection.import_gate import _compare_blocks, check_import
from pipeline.models.architectures import UnsupportedModelError
from pipeline.models.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"


def copy_model(folder, target, change):
    """Copy a model folder with changed tensors."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, target / WEIGHTS, {"format": "pt"})
    return target


@pytest.mark.parametrize("family", [*MOE_FAMILIES, "ernie4_5_moe", "hunyuan_v1_moe"])
def test_import_equals_transformers_reading_of_one_tensor_per_expert(family, model_folders, tmp_path):
    names = load_file(model_folders[family] / WEIGHTS)
    assert any(".experts.3." in name for name in names)
    by_block = []

    def check(source, folder):
        ids = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
        by_block.append(_compare_blocks(source, Checkpoint(folder, "model"), ids, torch.float32))
        return check_import(source, folder, 1e12)

    metrics = import_model(str(model_folders[family]), None, torch.float32, tmp_path / "model", check_result=check)
    assert metrics["max_logit_deviation"] == 0  # the same operations on the same numbers
    assert by_block == [0]
    tied = metrics["tied_embeddings"]
    assert metrics["parameters"] == sum(
        t.numel() for name, t in names.items() if not (tied and name == "lm_head.weight")
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe", "hunyuan_v1_moe"])
def test_three_dimensional_tensors_give_the_same_checkpoint(family, model_folders, imported, tmp_path):
    def fuse(tensors):
        own = {".mlp.moe_statics.": ".mlp.gate.moe_statics."}  # a name in checkpoints -> in transformers' class
        joined = {name: t for name, t in tensors.items() if ".experts." not in name}
        for stored, renamed in own.items():
            joined = {name.replace(stored, renamed): t for name, t in joined.items()}
        for block in range(3):
            prefix = f"model.layers.{block}.mlp.experts"
            if f"{prefix}.0.up_proj.weight" not in tensors:
                continue
            gate, up, down = (
                torch.stack([tensors[f"{prefix}.{e}.{part}_proj.weight"] for e in range(4)])
                for part in ("gate", "up", "down")
            )
            joined |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), 1), f"{prefix}.down_proj": down}
        return joined

    source = copy_model(model_folders[family], tmp_path / "fused", fuse)
    import_model(str(source), None, torch.float32, tmp_path / "model")
    for path in imported[family].glob("*.safetensors"):
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("limit", [1e12, 0], ids=["whole", "by block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ernie_is_imported_as_transformers_reads_it(tied, dtype, limit, tmp_path):
    """transformers keeps the router in float32 in a bfloat16 model; a rounded one would choose other experts."""
    config = copy.deepcopy(NEAR_FAMILIES["ernie4_5_moe"])
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = randomize_(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    gate = functools.partial(check_import, limit=limit)
    metrics = import_model(str(tmp_path / "source"), None, dtype, tmp_path / "model", check_result=gate)
    assert (metrics["max_logit_deviation"], metrics["tied_embeddings"]) == (0, tied)
    tensors = Checkpoint(tmp_path / "model", "model").load_block_tensors(1)
    router = model.model.layers[1].mlp.gate.state_dict()
    assert set(router) == {"weight", "moe_statics.e_score_correction_bias"}
    for name, tensor in router.items():
        assert tensors[f"mlp.gate.{name}"].dtype == torch.float32
        assert torch.equal(tensors[f"mlp.gate.{name}"], tensor)
    assert tensors["self_attn.q_proj.weight"].dtype == dtype


def test_a_bias_of_lm_head_is_refused_by_name(tmp_path):
    config = copy.deepcopy(NEAR_FAMILIES["ernie4_5_moe"])
    config.use_bias = True
    randomize_(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match="model_type='ernie4_5_moe': its config asks for a bias of lm_head"):
        import_model(str(tmp_path / "source"), None, torch.float32, tmp_path / "model")


@pytest.mark.parametrize("limit", [1e12, 0], ids=["whole", "by block"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hunyuan_in_bfloat16_is_imported_as_transformers_reads_it(tied, limit, tmp_path):
    config = copy.deepcopy(NEAR_FAMILIES["hunyuan_v1_moe"])
    config.tie_word_embeddings = tied
    randomize_(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    gate = functools.partial(check_import, limit=limit)
    metrics = import_model(str(tmp_path / "source"), None, torch.bfloat16, tmp_path / "model", check_result=gate)
    assert (metrics["max_logit_deviation"], metrics["tied_embeddings"]) == (0, tied)
    tensors = Checkpoint(tmp_path / "model", "model").load_block_tensors(1)
    assert (tensors["mlp.gate.wg.weight"].dtype, tensors["self_attn.q_proj.weight"].dtype) == (
        torch.float32,
        torch.bfloat16,
    )


def test_one_number_of_chosen_experts_is_kept_and_several_are_refused(model_folders, imported, tmp_path):
    """Hunyuan-A13B states the same number for each layer."""
    assert NEAR_FAMILIES["hunyuan_v1_moe"].moe_topk == [2, 2]
    assert Checkpoint(imported["hunyuan_v1_moe"], "model").config.num_experts_per_tok == 2
    shutil.copytree(model_folders["hunyuan_v1_moe"], tmp_path / "mixed")
    path = tmp_path / "mixed" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_topk": [2, 1]}))
    with pytest.raises(UnsupportedModelError, match=r"moe_topk=\[2, 1\] is not supported"):
        import_model(str(tmp_path / "mixed"), None, torch.float32, tmp_path / "model")


def test_a_missing_expert_is_refused_by_name(model_folders, tmp_path):
    def drop(tensors):
        return {name: t for name, t in tensors.items() if ".experts.2.w1." not in name}

    source = copy_model(model_folders["mixtral"], tmp_path / "partial", drop)
    with pytest.raises(ModelImportError, match=r"experts: gate_proj: 1 missing \(experts \[2\]\); the config has 4"):
        import_model(str(source), None, torch.float32, tmp_path / "model")


def test_clipped_keys_are_refused_by_name(model_folders, tmp_path):
    shutil.copytree(model_folders["olmoe"], tmp_path / "clipped")
    path = tmp_path / "clipped" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_qkv": 8.0}))
    with pytest.raises(UnsupportedModelError, match=r"clip_qkv=8\.0 in its config"):
        import_model(str(tmp_path / "clipped"), None, torch.float32, tmp_path / "model")


def test_transposed_experts_of_multimodal_checkpoints_are_turned():
    gate_up, down = torch.arange(2 * 6 * 4.0).view(2, 4, 6), torch.arange(2 * 3 * 4.0).view(2, 3, 4)  # D = 4, I = 3
    name = "model.layers.0.mlp.experts"
    assert torch.equal(turn_experts(f"{name}.gate_up_proj", gate_up, 4), gate_up.mT)
    assert torch.equal(turn_experts(f"{name}.down_proj", down, 4), down.mT)
    assert turn_experts(f"{name}.gate_up_proj", gate_up.mT, 4).shape == (2, 6, 4)
    assert torch.equal(turn_experts("model.layers.0.mlp.gate.weight", down[0], 5), down[0])
