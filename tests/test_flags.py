"""docs/flags.md names keys that exist with values they accept, and every flag of the official programs."""

import re

import pytest
import yaml

from pipeline.params import parse_params
from tests.conftest import ROOT

TEXT = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
KEYS = re.findall(r"^\|[^|]*\| `([a-z0-9_.]+): ([^`]*)` \|", TEXT, re.MULTILINE)
FLAGS = set(re.findall(r"--(\w+)", "\n".join(line for line in TEXT.splitlines() if line.startswith("|"))))
MAIN = """
    model_path model_name cache_dir output_dir save_quant_dir real_quant resume_quant
    wbits w_group_size w_asym w_sym input_bits input_group_size input_mode input_asym input_sym
    k_bits v_bits kv_group_size k_pre_rope kv_mode kv_asym kv_sym
    mse_init asym_mse_init skip_qk_weight_init block_qk_weight_init mse_init_size fp_mse_init
    pre_rotate rotate_mode down_online_had qk_online_had set_prefixed_tokens outlier_threshold lac
    quant_lr weight_lr min_lr_factor clip_grad wd off_load_to_disk use_fp32 debug early_stop constant_wlr
    train_size val_size training_seqlen epochs calib_dataset batch_size loss_type training_target
    ppl_seqlen seed eval_ppl eval_tasks eval_batch_size max_memory
    max_outlier max_item_index set_outlier_zero modified_index ablate_prefix_number
"""
EVAL = "quant_model_path output_dir real_quant ppl_seqlen seed eval_ppl eval_tasks eval_batch_size max_memory"
PLOTS = """
    model_path model_name save_dir dataset num_samples seq_len seed max_memory
    pre_rotate down_online_had qk_online_had outlier_threshold outlier_object set_prefixed_tokens
    plot_linear_input plot_linear_output plot_layer_wise_outlier_token_number plot_outlier_token_position
    plot_outlier_token plot_layer_input_3d plot_block_output_3d disable_legend keep_prefixed_token only_down_proj
"""
TRAINABLE_PREFIX = """
    trainable_prefix prefix_len prefix_lr prefix_epochs prefix_loss_type batch_size outlier_threshold
    activation_clipping quant_model
"""


@pytest.mark.parametrize("flags", [MAIN, EVAL, PLOTS, TRAINABLE_PREFIX], ids=["main", "eval", "plots", "prefix"])
def test_every_flag_is_listed(flags):
    assert not set(flags.split()) - FLAGS
    assert len(KEYS) > 60


@pytest.mark.parametrize(("key", "value"), KEYS)
def test_listed_keys_exist_and_take_the_listed_value(key, value):
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["corpora"] |= {"c4": {"source": "c4", "max_documents": 100}, "wikitext2": {"source": "wikitext2"}}
    if value == "trained":
        params["prefix_training"]["enabled"] = True
    if key.endswith("before_rope"):
        params["rotation"]["r3"] = "identity"
    *path, last = key.split(".")
    group = params
    for part in path:
        group = group[part]
    assert last in group
    group[last] = yaml.safe_load(value)
    parse_params(params)
