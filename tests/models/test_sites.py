"""The table of sites agrees with the model, with params.yaml and with the plots of dvc.yaml."""

import json
import subprocess
import sys
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.checkpoint import Checkpoint
from pipeline.models.sites import CACHE_SITES, INPUT_SITES, REPRESENTATIVES, QuantizerGroup, Site, site_group
from pipeline.quantization.equalization import EQUALIZED_SITES
from pipeline.quantization.params import EqualizedSite
from tests.conftest import ROOT


def test_site_names_are_written_to_artifacts_as_plain_strings(tmp_path):
    assert json.dumps({Site.KEY: Site.VALUE}) == '{"key": "value"}'
    assert f"{Site.MLP_INPUT}_share, {Site.MLP_INPUT!r}" == "mlp_input_share, 'mlp_input'"
    assert {Site.MLP_HIDDEN: 1}["mlp_hidden"] == 1
    save_file({Site.KEY: torch.ones(1)}, tmp_path / "sites.safetensors")
    assert load_file(tmp_path / "sites.safetensors").keys() == {"key"}


def test_sites_are_ordered_as_data_flows():
    assert list(Site) == ["attention_input", "key", "value", "attention_output", "mlp_input", "mlp_hidden"]
    assert INPUT_SITES == ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
    assert set(CACHE_SITES) | set(INPUT_SITES) == set(Site)


def test_every_site_of_a_block_has_a_width(imported):
    checkpoint = Checkpoint(imported["qwen3"], "model")
    architecture, config = checkpoint.architecture, checkpoint.config
    widths = architecture.site_widths(checkpoint.build_block(0))
    assert widths.keys() == {*Site, *architecture.linear_names}
    assert tuple(architecture.site_readers) == INPUT_SITES
    hidden, head = config.hidden_size, config.head_dim
    expected = {
        Site.ATTENTION_INPUT: hidden,
        Site.KEY: head,
        Site.VALUE: head,
        Site.ATTENTION_OUTPUT: config.num_attention_heads * head,
        Site.MLP_INPUT: hidden,
        Site.MLP_HIDDEN: config.intermediate_size,
    }
    assert {site: widths[site] for site in Site} == expected


@pytest.mark.parametrize(("site", "group"), [("down_proj", "weights"), *((site, None) for site in Site)])
def test_each_site_belongs_to_one_group_of_params(site, group):
    cached = {Site.KEY: "keys", Site.VALUE: "values"}
    assert site_group(site) == (group or cached.get(site, "activations"))


def test_each_group_has_a_representative():
    assert tuple(REPRESENTATIVES) == get_args(QuantizerGroup)
    assert [site_group(site) for site in REPRESENTATIVES.values()] == list(REPRESENTATIVES)


def test_params_name_every_site_that_can_be_equalized():
    assert get_args(EqualizedSite) == EQUALIZED_SITES
    comments = (ROOT / "params.yaml").read_text()
    assert all(site in comments for site in Site)


def test_names_of_sites_need_no_torch():
    code = "import sys, pipeline.models.sites, pipeline.quantization.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
