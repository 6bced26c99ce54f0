"""Presets are complete params files that say what their names say."""

import re

import pytest
import yaml
from conftest import ROOT

from pipeline.params import load_params

PRESETS = {path.stem: path for path in sorted((ROOT / "presets").glob("*.yaml"))}


def keys_of(values, path=()):
    """Every key, but those of corpora and tasks, which have names of their own."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict) and key not in ("corpora", "tasks"):
            yield from keys_of(value, (*path, key))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_have_exactly_the_keys_there_are(name):
    params = load_params(PRESETS[name])
    ours = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert set(keys_of(yaml.safe_load(PRESETS[name].read_text()))) == set(keys_of(ours))
    assert f"make preset NAME={name}" in PRESETS[name].read_text()
    bits = re.search(r"w(\d+)a(\d+)kv(\d+)", name)
    init = params.quantizer_init
    found = (init.weights.bits, init.activations.bits, init.keys.bits)
    assert found == tuple(map(int, bits.groups()))
    assert init.values.bits == init.keys.bits
    if length := re.search(r"trained-prefix-(\d+)", name):
        assert params.prefix_training.length == int(length[1])
        assert params.prefix.use == "trained"
        assert params.prefix_training.enabled


def test_the_documents_prefix_lengths_are_there():
    assert {"3", "8", "10"} <= {name.rpartition("-")[2] for name in PRESETS if "w4a4kv4-trained-prefix" in name}
