"""docs/flags.md names keys that exist with values they accept, and every quantizer flag of the official commands."""

import re

import pytest
import yaml
from conftest import ROOT

from pipeline.params import parse_params

TEXT = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
KEYS = re.findall(r"^\|[^|]*\| `([a-z0-9_.]+): ([^`]*)` \|", TEXT, re.MULTILINE)
FLAGS = set(re.findall(r"^\| `(--\w+)", TEXT, re.MULTILINE))
QUANTIZER_FLAGS = {
    *("--wbits", "--w_group_size", "--w_asym"),
    *("--input_bits", "--input_group_size", "--input_mode", "--input_asym", "--activation_clipping"),
    *("--k_bits", "--v_bits", "--kv_group_size", "--kv_mode", "--kv_asym"),
    *("--mse_init", "--mse_init_size"),
}


def test_every_quantizer_flag_is_listed():
    assert QUANTIZER_FLAGS <= FLAGS
    assert len(KEYS) > 30


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
